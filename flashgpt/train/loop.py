"""The training loop: batch, forward, backward, clip, step; evaluate, log, save; stop safely.

Owns the order of things in a step. What step t does is a function of the config, the seed and t
alone - its batch, its dropout masks, its learning rate - so a resumed run repeats the run that was
not interrupted, bit for bit on the CPU.

Legend: B batch, T positions.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashgpt.attention import kernels
from flashgpt.attention.dropout import philox
from flashgpt.config import RunConfig, TrainConfig
from flashgpt.data.batches import Batches
from flashgpt.data.shards import TokenData
from flashgpt.model.gpt2 import GPTModel
from flashgpt.tokenizer import Tokenizer
from flashgpt.train import checkpoint, optimizer, runtime
from flashgpt.train.evaluate import Evaluation, evaluate
from flashgpt.train.record import Record
from flashgpt.train.schedule import learning_rate

DROPOUT_STREAM = 0xD0
# What a resumed run may not change: these make the batches, the masks and the optimizer's state.
FIXED = ("seed", "tokens_per_step", "optimizer")
# What it may change without a word: it takes part in no step.
FREE = (
    *("stop_at", "log_every", "eval_every", "eval_tokens", "final_eval_tokens"),
    *("checkpoint_every", "keep_checkpoints"),
)


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
        self.device = runtime.device(config.device)
        self.autocast = runtime.autocast_dtype(config.precision, self.device)
        self.model = model.to(self.device)
        self.model.set_attention(
            own_masks=config.dropout_masks == "kernel", deterministic=config.deterministic
        )
        self.model.set_checkpointing(config.activation_checkpointing)
        self.tokenizer = tokenizer
        self.config = config
        self.rows = config.rows(model.cfg.context_length)  # sequences in one optimizer step
        self.optimizer = optimizer.build(self.model, config)

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

        SIGINT and SIGTERM end it after the step in hand, with a checkpoint.

        Args:
            data: the prepared tokens.
            out: the run's folder.
            run: the whole config, as it goes into the folder.
            resume: go on from the newest good checkpoint in `out`.
            listener: hears about steps, evaluations and events.

        Raises:
            ValueError: `out` holds checkpoints and `resume` is off, or a config that does not fit.
            TrainingError: loss or gradient is no longer finite.
            OSError: a checkpoint cannot be written.
        """
        listener = listener or Listener()
        context = self.model.cfg.context_length
        batches = Batches(data.train, context, self.rows, self.config.seed)
        first = self._starting_step(out, data, resume, listener)
        record = Record(out)
        record.start(run, first)
        kernels.clear_receipt()  # the run's record is of this run
        forward = runtime.compiled(self.model, self.config, listener.note)
        try:
            with runtime.repeating(self.config.deterministic), runtime.StopSignals() as signals:
                return self._steps(first, batches, data, record, forward, signals, listener)
        finally:
            self.model.set_dropout(None)

    def time_step(self, data: TokenData, seconds: float) -> float:
        """Median seconds per optimizer step, from about `seconds` of training.

        Changes the weights: use a trainer that is thrown away.
        """
        batches = Batches(data.train, self.model.cfg.context_length, self.rows, self.config.seed)
        times: list[float] = []
        while not times or sum(times) < seconds:
            started = time.perf_counter()
            self._step(len(times), batches, self.model)
            times.append(time.perf_counter() - started)
        self.model.set_dropout(None)
        return statistics.median(times)

    def _starting_step(self, out: Path, data: TokenData, resume: bool, listener: Listener) -> int:
        check_start(self.config, out, resume)
        checkpoint.remove_temporaries(out)
        if not resume:
            return 0
        for found in checkpoint.good(out):
            if isinstance(found, checkpoint.DamagedError):
                listener.note(f"passed over: {found}")
                continue
            if found.state["data"] != data.fingerprint:
                raise ValueError(
                    f"{found.path} was trained on other text or with another tokenizer than "
                    f"{data.folder}; restore the text, or start anew with another --out"
                )
            changes = _changes(found, self.config)
            checkpoint.load_into(found, self.model, self.optimizer)
            listener.note(f"goes on from {found.path}")
            for change in changes:
                listener.note(change)
            return found.step
        listener.note(f"no good checkpoint in {out}: starts at step 0")
        return 0

    def _steps(
        self,
        first: int,
        batches: Batches,
        data: TokenData,
        record: Record,
        forward: Callable[[Tensor, Tensor], Tensor],
        signals: runtime.StopSignals,
        listener: Listener,
    ) -> Result:
        config, last = self.config, min(self.config.stop_at or math.inf, self.config.steps)
        step, evaluation = first, None
        here = record.folder / checkpoint.FOLDER / checkpoint.name_of(first)
        saved = here if here.exists() else None  # the one that a resumed run started from
        if first >= last:
            listener.note(f"step {first} of {last} is done; a larger train.steps goes on")
        while step < last and signals.received is None:
            entry = self._step(step, batches, forward)
            if step == first:
                for line in kernels.receipt():
                    listener.note(f"attention: {line}")
            step += 1
            entry = {"step": step, **entry, "epoch": batches.epochs(step)}
            evaluation = comparable = None
            if _due(step, config.eval_every) and step < last:
                evaluation = comparable = self._evaluate(data, config.eval_tokens)
                entry |= _evaluation_entry(evaluation)
                listener.evaluation(step, evaluation)
            if step >= last:
                comparable = self._evaluate(data, config.eval_tokens)  # with those on the way
                evaluation = self._evaluate(data, config.final_eval_tokens)
                entry |= _evaluation_entry(evaluation)
                listener.evaluation(step, evaluation)
            if _due(step, config.log_every) or evaluation is not None:
                record.log(entry)
                listener.step(entry)
            if _due(step, config.checkpoint_every) or step >= last:
                saved = self._save(step, record, data, comparable)
        if saved is None or saved.name != checkpoint.name_of(step):
            saved = self._save(step, record, data, None)
        record.plot()
        if step >= last:  # a signal during the last step interrupted nothing
            return Result(step, evaluation, saved, None)
        return Result(step, None, saved, signals.received)

    def _step(
        self, step: int, batches: Batches, forward: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Any]:
        """One optimizer step; refuses to apply a gradient that is not finite."""
        started = time.perf_counter()
        micro = self.config.micro_batch or self.rows
        self.model.train()
        total = torch.zeros((), device=self.device)
        for row in range(0, self.rows, micro):
            ids, targets = batches.batch(step, first=row, count=micro)
            seed = dropout_seed(self.config.seed, step)
            self.model.set_dropout(seed, row)
            if self.config.dropout_masks == "kernel":
                torch.manual_seed(seed + row)  # a step's masks depend on nothing before it
            with runtime.casting(self.device, self.autocast):
                loss = forward(
                    torch.from_numpy(ids).to(self.device), torch.from_numpy(targets).to(self.device)
                )
            loss = loss * (micro / self.rows)
            loss.backward()
            total += loss.detach()
        limit = self.config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        if not (math.isfinite(norm) and math.isfinite(total.item())):
            raise TrainingError(
                f"step {step}: loss {total.item()} and gradient norm {norm} must be finite; the "
                "weights were left as they were. Lower train.lr, or go on from the last checkpoint "
                "with --resume and --model.use-flash False to see whether attention is to blame"
            )
        rate = learning_rate(step, self.config)
        self.optimizer.set_rate(rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        return {
            "loss": total.item(),
            "lr": rate,
            "grad_norm": norm,
            "tokens_per_second": round(self.rows * self.model.cfg.context_length / seconds, 1),
        }

    def _evaluate(self, data: TokenData, max_tokens: int | None) -> Evaluation:
        return evaluate(
            self.model,
            data.val,
            self.tokenizer.byte_lengths,
            max_tokens=max_tokens,
            autocast=self.autocast,
        )

    def _save(
        self, step: int, record: Record, data: TokenData, evaluation: Evaluation | None
    ) -> Path:
        receipt = kernels.receipt()
        state = {
            "step": step,
            "seed": self.config.seed,
            "data": data.fingerprint,
            "receipt": receipt,
            "train": dataclasses.asdict(self.config),
        }
        path = checkpoint.save(record.folder, self.model, self.optimizer, self.tokenizer, state)
        record.saved(path, None if evaluation is None else evaluation.loss, receipt)
        checkpoint.remove_old(record.folder, self.config.keep_checkpoints, record.state["best"])
        return path


def check_start(config: TrainConfig, out: Path, resume: bool) -> None:
    """Refuses early what would fail after the data has been prepared.

    Raises:
        ValueError: `out` holds checkpoints and `resume` is off, or a device or precision that this
            machine does not have.
    """
    runtime.autocast_dtype(config.precision, runtime.device(config.device))
    if not resume and checkpoint.steps(out):
        raise ValueError(f"{out} holds checkpoints; go on with --resume, or choose another --out")


def _changes(found: checkpoint.Checkpoint, config: TrainConfig) -> list[str]:
    """One line per setting that a resumed run changes for its steps to come.

    Raises:
        ValueError: a setting of FIXED differs; it is named.
    """
    changes = []
    now = dataclasses.asdict(config)
    for name, before in found.state.get("train", {}).items():  # older checkpoints hold none
        if name in FREE or name not in now or now[name] == before:
            continue
        if name in FIXED:
            raise ValueError(
                f"train.{name} must be {before} as in {found.path}, got {now[name]}; "
                "choose another --out to start anew"
            )
        changes.append(f"train.{name} is {now[name]} from here on, was {before}")
    return changes


def dropout_seed(seed: int, step: int) -> int:
    """The 64-bit dropout seed of an optimizer step, signed: Philox of the run's seed."""
    low, high, _, _ = philox(step, step >> 32, 0, DROPOUT_STREAM, torch.tensor(seed))
    word = int(high) << 32 | int(low)
    return word - 2**64 if word >= 2**63 else word


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluation_entry(evaluation: Evaluation) -> dict[str, float]:
    return {
        "val_loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
    }
