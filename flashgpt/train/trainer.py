"""Trains a model on prepared tokens: from a config to a run's folder, to its end or to a signal.

A resumed run repeats the run that was not interrupted, bit for bit on the CPU. What a step does is
in step.py, what happens around the steps in loop.py, where a run starts in resume.py.
"""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path

from flashgpt.attention import kernels
from flashgpt.data.batches import Batches, eval_windows
from flashgpt.data.shards import TokenData
from flashgpt.launch import Launch
from flashgpt.locks import BusyError, alone
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import RunConfig, TrainConfig
from flashgpt.tokenizer import Tokenizer
from flashgpt.train import checkpoint, runtime
from flashgpt.train.feed import Feed
from flashgpt.train.loop import COPIES, Listener, Result, Run
from flashgpt.train.parallel import ALONE, Parallel
from flashgpt.train.parts import build
from flashgpt.train.record import Record
from flashgpt.train.resume import check_start, go_on, mark
from flashgpt.train.saver import HostCopies, Saver
from flashgpt.train.step import Forward, Stepper, pays_as_graph


class Trainer:
    """Trains a model on prepared tokens.

    Args:
        model: is trained in place; moved to the device that `config` names.
        tokenizer: goes into every checkpoint.
        config: the `[train]` section.
        parallel: the processes that train together, each with a trainer of its own.

    Raises:
        ValueError: as `parts.build`.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: Tokenizer,
        config: TrainConfig,
        parallel: Parallel = ALONE,
    ) -> None:
        self.parts = build(model, tokenizer, config, parallel)

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
        lead = self.parts.parallel.lead
        lead(lambda: check_start(self.parts.config, out, resume))
        batches = self._batches(data)
        with contextlib.ExitStack() as held:
            held.callback(self.parts.model.set_dropout, None)
            lead(lambda: self._take(out, resume, held))
            return self._fit(data, batches, out, run, resume, listener)

    def _take(self, out: Path, resume: bool, held: contextlib.ExitStack) -> None:
        """Makes the run's folder this run's own while `held` lasts."""
        out.mkdir(parents=True, exist_ok=True)
        try:
            held.enter_context(alone(out))
        except BusyError as error:
            raise ValueError(
                f"{out} is being trained by another process; wait for it, or choose another --out"
            ) from error
        check_start(self.parts.config, out, resume)  # another process may just have ended
        # Now, not at the first checkpoint.
        n_bytes = sum(parameter.nbytes for parameter in self.parts.model.parameters())
        checkpoint.check_space(out, COPIES * n_bytes)
        checkpoint.remove_temporaries(out)
        mark(out, Launch.here().name)

    def _fit(
        self,
        data: TokenData,
        batches: Batches,
        out: Path,
        run: RunConfig,
        again: bool,
        listener: Listener,
    ) -> Result:
        model, config, parallel = self.parts.model, self.parts.config, self.parts.parallel
        self.parts.guard.reset()  # a second run of the same trainer starts anew
        found = go_on(out, data, self.parts, listener.note) if again else None
        record = Record(out, writes=parallel.is_first)
        record.start(run, found.step if found else 0)
        record.state["skipped"] = found.state.get("skipped", []) if found else []
        kernels.clear_receipt()  # the run's record is of this run
        with (
            runtime.repeating(runtime.must_repeat(model, config)),
            runtime.StopSignals() as signals,
            self._feed(batches) as feed,
            Saver() as saver,
        ):
            if parallel.is_first:
                saver.submit(lambda: HostCopies.reserve(model.parameters(), COPIES))
            forward = self._forward(found, listener)
            stepper = Stepper(self.parts, forward, pays_as_graph(self.parts), listener.note)
            stepper.next = found.step if found else 0
            compiled = forward is not self.parts.module
            this = Run(
                *(self.parts, data, batches, run, record, feed, stepper),
                *(compiled, saver, signals, listener),
            )
            return this.go(found)

    def _forward(self, found: checkpoint.Checkpoint | None, listener: Listener) -> Forward:
        """The forward pass of the steps; notes if that of the steps before was another."""
        parts, config = self.parts, self.parts.config
        if found and found.step >= (config.stop_at or config.steps):
            return parts.module  # no step is left to do
        forward = runtime.compiled(parts.model, config, listener.note, parts.module, parts.parallel)
        now = forward is not parts.module
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
        stepper = Stepper(parts, parts.module)
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
        parts = self.parts
        return Feed(batches, parts.rows, parts.rows_at_once, parts.device, parts.own_rows)
