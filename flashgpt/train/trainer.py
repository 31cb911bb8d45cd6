"""Trains a model on prepared tokens: from a config to a run's folder, to its end or to a signal.

A resumed run repeats the run that was not interrupted, bit for bit on the CPU. What a step does is
in step.py, what happens around the steps in loop.py, where a run starts in resume.py.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from flashgpt.attention import kernels
from flashgpt.data.batches import Batches, eval_windows
from flashgpt.data.shards import TokenData
from flashgpt.locks import BusyError, alone
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import RunConfig, TrainConfig
from flashgpt.tokenizer import Tokenizer
from flashgpt.train import checkpoint, runtime
from flashgpt.train.feed import Feed
from flashgpt.train.loop import COPIES, Listener, Result, Run
from flashgpt.train.parts import build
from flashgpt.train.record import Record
from flashgpt.train.resume import check_start, go_on
from flashgpt.train.saver import HostCopies, Saver
from flashgpt.train.step import Forward, Stepper, pays_as_graph


class Trainer:
    """Trains a model on prepared tokens.

    Args:
        model: is trained in place; moved to the device that `config` names.
        tokenizer: goes into every checkpoint.
        config: the `[train]` section.

    Raises:
        ValueError: a device or precision that this machine does not have, or a step that is no
            whole number of sequences.
    """

    def __init__(self, model: GPTModel, tokenizer: Tokenizer, config: TrainConfig) -> None:
        self.parts = build(model, tokenizer, config)

    def fit(
        self,
        data: TokenData,
        out: Path,
        run: RunConfig,
        *,
        resume: bool = False,
        listener: Listener | None = None,
    ) -> Result:
        """Trains from step 0, or from the newest good checkpoint, to the end of the schedule.

        SIGINT, SIGTERM and SIGHUP end it after the step in hand, with a checkpoint.

        Args:
            data: the prepared tokens.
            out: the run's folder.
            run: the whole config, as it goes into the folder.
            resume: go on from the newest good checkpoint in `out`.
            listener: hears about steps, evaluations and events.

        Raises:
            ValueError: `out` holds checkpoints and `resume` is off, another process trains there,
                or a config that does not fit.
            TrainingError: the guard refused too many steps in a row.
            OSError: a checkpoint cannot be written.
        """
        listener = listener or Listener()
        check_start(self.parts.config, out, resume)
        batches = self._batches(data)
        out.mkdir(parents=True, exist_ok=True)
        try:
            with alone(out):
                check_start(self.parts.config, out, resume)  # another process may just have ended
                return self._fit(data, batches, out, run, resume, listener)
        except BusyError as error:
            raise ValueError(
                f"{out} is being trained by another process; wait for it, or choose another --out"
            ) from error
        finally:
            self.parts.model.set_dropout(None)

    def _fit(
        self,
        data: TokenData,
        batches: Batches,
        out: Path,
        run: RunConfig,
        again: bool,
        listener: Listener,
    ) -> Result:
        model, config = self.parts.model, self.parts.config
        # Now, not at the first checkpoint.
        checkpoint.check_space(out, COPIES * sum(p.nbytes for p in model.parameters()))
        checkpoint.remove_temporaries(out)
        self.parts.guard.reset()  # a second run of the same trainer starts anew
        found = go_on(out, data, self.parts, listener.note) if again else None
        record = Record(out)
        record.start(run, found.step if found else 0)
        record.state["skipped"] = found.state.get("skipped", []) if found else []
        kernels.clear_receipt()  # the run's record is of this run
        with (
            runtime.repeating(runtime.must_repeat(model, config)),
            runtime.StopSignals() as signals,
            self._feed(batches) as feed,
            Saver() as saver,
        ):
            saver.submit(lambda: HostCopies.reserve(model.parameters(), COPIES))
            forward = self._forward(found, listener)
            stepper = Stepper(self.parts, forward, pays_as_graph(self.parts), listener.note)
            stepper.next = found.step if found else 0
            compiled = forward is not model
            this = Run(
                *(self.parts, data, batches, run, record, feed, stepper),
                *(compiled, saver, signals, listener),
            )
            return this.go(found)

    def _forward(self, found: checkpoint.Checkpoint | None, listener: Listener) -> Forward:
        """The forward pass of the steps; notes if that of the steps before was another."""
        model, config = self.parts.model, self.parts.config
        if found and found.step >= (config.stop_at or config.steps):
            return model  # no step is left to do
        forward = runtime.compiled(model, config, listener.note)
        now = forward is not model
        if found and found.state.get("compiled", now) != now:  # older checkpoints do not say
            ways = ("eager", "compiled")
            listener.note(
                f"steps are {ways[now]} from here on, were {ways[not now]}: they round otherwise"
            )
        return forward

    def time_step(self, data: TokenData, seconds: float) -> float:
        """Median seconds per optimizer step, from about `seconds` of training.

        Changes the weights: use a trainer that is thrown away.
        """
        times: list[float] = []

        def enough() -> bool:
            return bool(times) and sum(times) >= seconds

        parts = self.parts
        stepper = Stepper(parts, parts.model)
        with self._feed(self._batches(data)) as feed:
            for done in stepper.completed(feed, parts.config.steps, lambda _: True, enough):
                times.append(done.seconds)
        parts.model.set_dropout(None)
        return statistics.median(times)

    def _batches(self, data: TokenData) -> Batches:
        config, context = self.parts.config, self.parts.model.cfg.context_length
        eval_windows(data.val, context, 1)  # refuses now what could not be evaluated at the end
        return Batches(data.train, context, self.parts.rows, config.seed)

    def _feed(self, batches: Batches) -> Feed:
        micro = self.parts.config.micro_batch or self.parts.rows
        return Feed(batches, self.parts.rows, micro, self.parts.device)
