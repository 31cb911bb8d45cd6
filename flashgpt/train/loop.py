"""What happens around the steps of a run: evaluations, log, checkpoints, incidents, the end."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from flashgpt.attention import kernels
from flashgpt.data.batches import Batches
from flashgpt.data.shards import TokenData
from flashgpt.measure.flops import flop_per_token, peak_flop_per_second
from flashgpt.runconfig import RunConfig
from flashgpt.train import checkpoint, incident, runtime
from flashgpt.train.diagnose import diagnose
from flashgpt.train.evaluate import Evaluation, evaluate
from flashgpt.train.feed import Feed
from flashgpt.train.guard import LIMIT_IN_A_ROW, Verdict
from flashgpt.train.parts import Parts, in_one_process
from flashgpt.train.record import Record
from flashgpt.train.saver import HostCopies, Saver
from flashgpt.train.step import Done, Stepper, dropout_seed

MOST_ROLLBACKS = 3
COPIES = 3  # of each parameter's size in a checkpoint: the weights and AdamW's two moments


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what happened and what is saved."""


@dataclasses.dataclass(frozen=True)
class Listener:
    """Who hears about progress. Every call is optional."""

    step: Callable[[dict[str, Any]], None] = lambda _: None
    evaluation: Callable[[int, Evaluation], None] = lambda *_: None
    note: Callable[[str], None] = lambda _: None
    sample: Callable[[str], None] = lambda _: None


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: optimizer steps done in all.
        evaluation: of the validation split at the end; None when the run was interrupted, or
            when no step was left to do.
        checkpoint: the last checkpoint.
        interrupted: the signal that ended the run, or None.
    """

    step: int
    evaluation: Evaluation | None
    checkpoint: Path
    interrupted: int | None


@dataclasses.dataclass
class Run:
    """One call of `Trainer.fit`.

    Attributes:
        batches: where the tokens of a step stand; `feed` brings them.
        config: the whole config, as it goes into the folder.
        stepper: stands at the first step to do.
        compiled: whether its steps are.
    """

    parts: Parts
    data: TokenData
    batches: Batches
    config: RunConfig
    record: Record
    feed: Feed
    stepper: Stepper
    compiled: bool
    saver: Saver
    signals: runtime.StopSignals
    listener: Listener

    def __post_init__(self) -> None:
        self.train = self.parts.config
        self.last = self.train.stop_at or self.train.steps
        self.copies = HostCopies(self.parts.parallel.whole)
        self.saved: Path | None = None
        self.interrupted: int | None = None
        model, device = self.parts.model, self.parts.device
        self.flop = flop_per_token(model)
        peak = peak_flop_per_second(device, self.parts.autocast)
        self.peak = None if peak is None else peak * self.parts.parallel.size

    def go(self, start: checkpoint.Checkpoint | None) -> Result:
        """Trains to the last step; `start` is the checkpoint that the run goes on from."""
        first = step = self.stepper.next
        entry = evaluation = None
        if start is not None:
            self.saved = start.path
            evaluation = self._catch_up(start)
        if first >= self.last:
            key = "steps" if self.train.stop_at is None else "stop_at"
            self.listener.note(f"step {first} of {self.last} is done; a larger train.{key} goes on")
        for done in self.stepper.completed(self.feed, self.last, self._pause, self._stop):
            self.saver.check()
            if step == first:
                for line in kernels.receipt():
                    self.listener.note(f"attention: {line}")
            step = done.step + 1
            entry = self._entry(done)
            if done.verdict == Verdict.BAD:
                self._refused(done, entry)
            elif done.verdict == Verdict.ACCEPTED:
                self.parts.guard.in_a_row = 0
            evaluation = self._look(step, entry)
        self._save(step, entry)
        self._wait()
        self.record.plot()
        assert self.saved is not None
        if step >= self.last:  # a signal during the last step interrupted nothing
            return Result(step, evaluation, self.saved, None)
        return Result(step, None, self.saved, self.interrupted)

    def _catch_up(self, start: checkpoint.Checkpoint) -> Evaluation | None:
        """Does what a kill between the saving of a step and its log line left undone."""
        entry, logged = start.state.get("entry"), self.record.metrics

        def is_done() -> bool:
            return entry is None or bool(logged and logged[-1]["step"] == start.step)

        if self.parts.parallel.lead(is_done):
            return None
        assert entry is not None, "the first process has its log line"
        return self._look(start.step, dict(entry))

    def _pause(self, step: int) -> bool:
        """Whether the state after so many steps is evaluated or saved."""
        train = self.train
        return any(_due(step, n) for n in (train.eval_every, train.checkpoint_every)) or (
            step >= self.last
        )

    def _stop(self) -> bool:
        # A signal to one process ends all of them after the same step.
        self.interrupted = self.parts.parallel.largest(self.signals.received or 0) or None
        return self.interrupted is not None

    def _look(self, step: int, entry: dict[str, Any]) -> Evaluation | None:
        """Saves, evaluates and logs after so many steps, each where it is due."""
        train, evaluation, comparable = self.train, None, None
        # First, so that nothing is lost however long the evaluation takes. Not in a row of bad
        # steps: the weights are those before it, and a rollback wants older ones.
        bad_row = self.parts.guard.in_a_row > 0
        if (_due(step, train.checkpoint_every) and not bad_row) or step >= self.last:
            self._save(step, entry)
        if _due(step, train.eval_every) or step >= self.last:
            evaluation = comparable = self._evaluate(train.eval_tokens)
        if step >= self.last:
            evaluation = self._evaluate(train.final_eval_tokens)
        if evaluation is not None:
            entry |= {
                "val_loss": evaluation.loss,
                "perplexity": evaluation.perplexity,
                "bits_per_byte": evaluation.bits_per_byte,
            }
            self.listener.evaluation(step, evaluation)
        if _due(step, train.log_every) or evaluation is not None or "skipped" in entry:
            self.record.log(entry)
            self.listener.step(entry)
        if comparable is not None and self.saved is not None:
            self._judge(self.saved, step, comparable.loss)
        return evaluation

    def _judge(self, saved: Path, step: int, loss: float) -> None:
        """Tells the record how good the checkpoint of this step is, if there is one."""
        if saved.name != checkpoint.name_of(step) or not self.parts.parallel.is_first:
            return

        def judge() -> None:
            self.record.judged(saved.name, loss)
            self._remove_old()

        self.saver.submit(judge)

    def _remove_old(self) -> None:
        record = self.record
        keep = {record.state["best"], record.state["last"]}
        checkpoint.remove_old(record.folder, self.train.keep_checkpoints, keep)

    def _entry(self, done: Done) -> dict[str, Any]:
        """What metrics.jsonl says of a step."""
        parts = self.parts
        per_second = parts.rows * parts.model.cfg.context_length / done.seconds
        entry: dict[str, Any] = {
            "step": done.step + 1,
            "loss": done.loss,
            "lr": done.rate,
            "grad_norm": done.norm,
            "tokens_per_second": round(per_second, 1),
            "data_seconds": round(done.data_seconds, 6),
            "peak_memory_bytes": runtime.peak_memory_bytes(parts.device),
            "epoch": self.batches.epochs(done.step + 1),
        }
        if self.peak is not None:
            entry["mfu"] = round(per_second * self.flop / self.peak, 4)
        if done.verdict == Verdict.BAD:
            entry["skipped"] = incident.reason(done)
        elif done.verdict == Verdict.OVERFLOW:
            entry["skipped"] = "fp16 overflow: the loss scale falls"
        return entry

    def _refused(self, done: Done, entry: dict[str, Any]) -> None:
        """Keeps what is known of a bad step; after too many in a row, goes back or ends."""
        guard = self.parts.guard
        guard.in_a_row += 1
        where = self._keep(done)
        self.listener.note(f"step {done.step + 1} is left out: {entry['skipped']}{where}")
        if guard.in_a_row < LIMIT_IN_A_ROW:
            return
        if self.train.guard == "rollback" and self._roll_back(done.step + 1, entry):
            return
        guard.release()
        self.record.log(entry)
        self._save(done.step + 1, entry)
        self._wait()
        self.record.plot()
        self.parts.parallel.lead(lambda: self._give_up(done, entry))

    def _give_up(self, done: Done, entry: dict[str, Any]) -> NoReturn:
        left_out = self.record.folder / incident.FOLDER / incident.name_of(done.step)
        raise TrainingError(
            f"step {done.step + 1}: {entry['skipped']}, the {self.parts.guard.in_a_row}rd bad step "
            f"in a row; the weights are those before them, in {self.saved}. Look: flashgpt train "
            f"--replay {shlex.quote(str(left_out))} "
            "--model.use-flash False; go on with --resume and a lower --train.lr, with "
            "--train.guard rollback, or, if this is no fault, with --train.guard-zscore 0"
        )

    def _keep(self, done: Done) -> str:
        """Writes the incident's folder, in the first process; returns what to say of it."""
        parts = in_one_process(self.parts)
        return self.parts.parallel.lead(lambda: self._examine(parts, done))

    def _examine(self, parts: Parts | None, done: Done) -> str:
        assert parts is not None, "the first process has them"
        micros = self.feed.whole(done.step)
        seed = dropout_seed(self.train.seed, done.step)
        scale = parts.guard.loss_scale
        findings = diagnose(parts, micros, seed)
        found = incident.Incident(
            step=done.step,
            reason=incident.reason(done),
            loss=done.loss,
            norm=done.norm,
            z_loss=done.z_loss,
            z_norm=done.z_norm,
            dropout_seed=seed,
            loss_scale=1.0 if scale is None else float(scale),
            windows=self.batches.windows(done.step),
            findings=findings,
            receipt=kernels.receipt(),
            config=self.config,
            micros=micros,
        )
        first = findings.first_non_finite
        text = f"; the first number that is not finite is in {first}" if first else ""
        try:
            return f"{text}; {found.save(self.record.folder, parts.model)}"
        except OSError as error:  # the run is worth more than its incident
            return f"{text}; no incident was written ({error.strerror or error})"

    def _roll_back(self, step: int, entry: dict[str, Any]) -> bool:
        """Puts the weights of an earlier checkpoint in place; the batches up to `step` are passed.

        False if there is none, or after MOST_ROLLBACKS.
        """
        self._wait()
        before = step - LIMIT_IN_A_ROW
        ranges = self.record.state["skipped"]
        found = self.parts.parallel.lead(lambda: self._newest(before))
        if found is None or len(ranges) >= MOST_ROLLBACKS:
            return False
        parts = self.parts
        checkpoint.load_into(found, parts)
        parts.guard.in_a_row = 0
        ranges.append([found.step, step])
        self.listener.note(
            f"rolled back to the weights of {found.path}; the batches of steps {found.step + 1} to "
            f"{step} are passed over"
        )
        self._save(step, entry)
        return True

    def _newest(self, most: int) -> checkpoint.Checkpoint | None:
        """The newest good checkpoint of `most` steps."""
        for found in checkpoint.good(self.record.folder):
            if isinstance(found, checkpoint.Checkpoint) and found.step <= most:
                return found
        return None

    def _evaluate(self, max_tokens: int | None) -> Evaluation:
        return evaluate(
            self.parts.model,
            self.data.val,
            self.parts.tokenizer.byte_lengths,
            max_tokens=max_tokens,
            autocast=self.parts.autocast,
            parallel=self.parts.parallel,
        )

    def _wait(self) -> None:
        """Waits until checkpoints are written; all do, where no timeout of NCCL runs."""
        self.parts.parallel.lead(self.saver.wait)

    def _save(self, step: int, entry: dict[str, Any] | None) -> None:
        """Copies the state, and writes it as the checkpoint of `step` while training goes on.

        All processes bring what is sharded; the first one writes. The step's log line, which
        follows when it has been evaluated, goes with it.
        """
        path = self.record.folder / checkpoint.FOLDER / checkpoint.name_of(step)
        if path == self.saved:
            return
        self._wait()
        self.saved = path
        parts, record = self.parts, self.record
        tensors: dict[str, dict[str, Tensor]] = {
            "weights": dict(parts.model.named_parameters()),
            "optimizer": parts.optimizer.state_tensors(),
            "guard": parts.guard.state_tensors(),
        }
        if not parts.parallel.is_first:
            for tensor in (t for group in tensors.values() for t in group.values()):
                parts.parallel.whole(tensor)
            return
        copies, wait = self.copies.take(tensors)
        receipt = kernels.receipt()
        state = {
            "step": step,
            "seed": self.train.seed,
            "data": self.data.fingerprint,
            "receipt": receipt,
            "train": dataclasses.asdict(self.train),
            "compiled": self.compiled,
            "parallel": str(parts.parallel),
            "skipped": list(record.state["skipped"]),
            "entry": None if entry is None else dict(entry),
        }
        contents = checkpoint.Contents(parts.model.cfg, parts.tokenizer, state, **copies)

        def write() -> None:
            wait()
            checkpoint.save(record.folder, contents)
            record.saved(path.name, receipt)
            self._remove_old()

        self.saver.submit(write)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
