"""Checkpoints: a complete Hugging Face GPT-2 folder each, plus `trainer/` to go on from.

    checkpoints/step_00000100/
      config.json  model.safetensors  tokenizer.json ...   what `transformers` loads as it is
      trainer/optimizer.safetensors                         moments, by parameter name
      trainer/guard.safetensors                             what the guard remembers (format 2)
      trainer/state.json                                    format, step, seed, receipt, settings
      trainer/digests.json                                  BLAKE2b of every other file

Written to a folder whose name starts with a dot, flushed to disk, then renamed: a folder without a
dot is complete. Digests are checked on load. There is no pickle.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashgpt.config import GPTConfig
from flashgpt.data.shards import file_digest
from flashgpt.interop import hub, huggingface
from flashgpt.model.gpt2 import GPTModel
from flashgpt.tokenizer import Tokenizer
from flashgpt.train.parts import Parts

FORMAT = 2
FOLDER = "checkpoints"
TEMPORARY = ".saving-"
REPLACED, DOOMED = TEMPORARY + "old-", TEMPORARY + "doomed-"  # by a rename, before the removal
DAMAGED = ".damaged-"
READ_AGAIN = 5  # times a reader chooses anew when training has removed what it was reading
SMALL_FILES = 16 * 2**20  # bytes: tokenizer, config, digests, and some air
MAY_DIFFER = ("use_flash", "drop_rate")  # config keys that a resumed run may change


class DamagedError(ValueError):
    """A checkpoint that is incomplete or changed."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, digests checked."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])


def name_of(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of, apart from the objects that train.

    Attributes:
        weights: parameters by our names, on the host; shared ones once.
        optimizer, guard: what these gave as `state_tensors`, on the host.
        state: goes into state.json; has `step`.
    """

    cfg: GPTConfig
    tokenizer: Tokenizer
    state: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    guard: dict[str, Tensor]


def save(run: Path, contents: Contents) -> Path:
    """Writes the checkpoint of `state["step"]` and returns its folder.

    Raises:
        OSError: it cannot be written, with a message that says what to do; earlier checkpoints stay
            as they are.
    """
    tensors = [*contents.weights.values(), *contents.optimizer.values()]
    check_space(run, sum(tensor.nbytes for tensor in tensors))
    parent = run / FOLDER
    final = parent / name_of(contents.state["step"])
    temporary = parent / (TEMPORARY + final.name)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        trainer = temporary / "trainer"
        trainer.mkdir(parents=True)
        eos_id = contents.tokenizer.eos_id
        huggingface.save_tensors(contents.cfg, contents.weights, temporary, eos_id=eos_id)
        contents.tokenizer.save(temporary)
        save_file(contents.optimizer, trainer / "optimizer.safetensors")
        save_file(contents.guard, trainer / "guard.safetensors")
        write_json(trainer / "state.json", {"format": FORMAT, **contents.state})
        write_json(trainer / "digests.json", _digests(temporary))
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        _publish(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _explained(error, final) from error
    return final


def check_space(run: Path, n_bytes: int) -> None:
    """Refuses to begin what would not end.

    Raises:
        OSError: the disk of the run's folder is gone, or has no room for `n_bytes` of tensors.
    """
    try:
        free = shutil.disk_usage(run).free
    except OSError as error:
        raise _explained(error, run) from error
    needed = n_bytes + SMALL_FILES
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"no space left on the disk for {run}: a checkpoint takes {needed / 1e6:,.1f} MB, "
            f"{free / 1e6:,.1f} are free; free some, then go on with --resume",
        )


def _publish(temporary: Path, final: Path) -> None:
    """Renames into place; a damaged checkpoint of the same step makes room."""
    if final.exists():
        old = final.with_name(REPLACED + final.name)
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(final)
    _flush(final.parent)


def _explained(error: Exception, path: Path) -> OSError:
    number = getattr(error, "errno", None)
    if number == errno.ENOSPC or "No space left" in str(error):
        text = f"no space left on the disk for {path}; free some, then go on with --resume"
        return OSError(errno.ENOSPC, text)
    return OSError(number or errno.EIO, f"cannot write {path}: {error}")


def steps(run: Path) -> list[Path]:
    """Complete checkpoint folders, newest first."""
    return sorted((run / FOLDER).glob("step_*"), reverse=True)


def remove_temporaries(run: Path) -> None:
    """Removes what a killed save left behind; what it was about to replace comes back."""
    for path in (run / FOLDER).glob(TEMPORARY + "*"):
        before = path.with_name(path.name.removeprefix(REPLACED))
        if path.name.startswith(REPLACED) and not before.exists():
            path.rename(before)
        else:
            shutil.rmtree(path, ignore_errors=True)


def set_aside(run: Path, step: int) -> None:
    """Takes the checkpoints past `step` out of the row, for a run that goes on from there.

    They are damaged, else it would go on from them. They stay, under a name with a dot.
    """
    for path in steps(run):
        if path.name > name_of(step):
            aside = path.with_name(DAMAGED + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def remove_old(run: Path, keep: int, named: set[str | None]) -> None:
    """Removes all but the `keep` newest checkpoints and those that are `named`; 0 keeps all.

    Each is renamed first: what a kill leaves half removed has a temporary's name.
    """
    for path in steps(run)[keep:] if keep else []:
        if path.name not in named:
            doomed = path.with_name(DOOMED + path.name)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def check(path: Path) -> Checkpoint:
    """Reads the state of a checkpoint after checking every digest.

    Raises:
        DamagedError: names the file that is missing or changed.
        ValueError: written by a newer version.
    """
    state = _read_json(path / "trainer" / "state.json")
    listed = path / "trainer" / "digests.json"
    expected = _read_json(listed)
    if listed.read_text(encoding="utf-8") != _as_json(expected):  # not even in its white space
        raise DamagedError(f"{listed} is damaged: it is not as it was written")
    for name, digest in expected.items():
        try:
            found = file_digest(path / name)
        except OSError as error:
            raise DamagedError(f"{path / name} cannot be read: {error.strerror}") from error
        if found != digest:
            raise DamagedError(f"{path / name} is damaged: its digest does not match")
    if state.get("format", 0) > FORMAT:  # after the digests: a flipped bit is no newer version
        raise ValueError(
            f"{path} has format {state['format']}, this version reads up to {FORMAT}; "
            f"update flashgpt"
        )
    return Checkpoint(path, state)


def good(run: Path) -> Iterator[Checkpoint | DamagedError]:
    """Checkpoints from the newest on, damaged ones as the error that names them."""
    for path in steps(run):
        try:
            yield check(path)
        except DamagedError as error:
            yield error


def load(path: str | Path, *, best: bool = False) -> tuple[GPTModel, Tokenizer | None]:
    """Model (on the CPU, in eval mode) and tokenizer of a run, a checkpoint or a GPT-2 folder.

    Args:
        path: a run's folder (its newest good checkpoint), a checkpoint, any folder of a Hugging
            Face GPT-2, or the name of one in the hub's cache; gpt2 to gpt2-xl are downloaded.
        best: of a run, the checkpoint with the lowest validation loss.

    Raises:
        ValueError: nothing that can be loaded, it is damaged, or the tokenizer is another model's;
            the message names it.
    """
    for _ in range(READ_AGAIN):
        folder = model_folder(Path(path), best)
        try:
            if (folder / "trainer").exists():
                check(folder)
            model = huggingface.load(folder).eval()
            tokenizer = Tokenizer.load(folder) if has_tokenizer(folder) else None
            if tokenizer is not None:
                _check_fit(folder, tokenizer, model.cfg.vocab_size)
            if folder.exists():
                return model, tokenizer
        except (ValueError, OSError):
            if folder.exists():
                raise
    raise ValueError(f"{path} is changing too fast to be read; wait until its training has ended")


def _check_fit(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer whose texts the model cannot read; special tokens may be of no use."""
    largest = max(tokenizer.eos_id, int(tokenizer.byte_lengths.nonzero()[0][-1]))
    if largest >= vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer must have ids below the model's vocab_size {vocab_size}, got "
            f"{largest}; it is another model's: put the right one beside the weights"
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies beside a model's weights."""
    return any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))


def model_folder(path: Path, best: bool = False) -> Path:
    """Where `load` finds model and tokenizer; raises what it raises."""
    if (path / "config.json").exists():
        if best:
            raise ValueError(f"{path} is one model, not a run with a best one; leave --best out")
        return path
    if not path.is_dir():
        if not (path.exists() or best) and (cached := hub.find(path.as_posix())):
            return cached
        raise ValueError(f"{path} is no folder; name a run or a GPT-2 folder")
    if best:
        name = read_state(path).get("best")
        if not name:
            raise ValueError(f"{path} has no best checkpoint yet; leave --best out")
        return path / FOLDER / str(name)
    damaged: list[str] = []
    for found in good(path):
        if isinstance(found, Checkpoint):
            for text in damaged:
                logging.getLogger(__name__).warning("passed over: %s", text)
            return found.path
        damaged.append(str(found))
    if damaged:
        raise ValueError(f"{path} has no good checkpoint: {'; '.join(damaged)}")
    raise ValueError(f"{path} holds neither checkpoints nor config.json; name a run's folder")


def read_state(run: Path) -> dict[str, Any]:
    """The state.json of a run: last and best checkpoint, versions, receipt.

    Raises:
        ValueError: no run's folder, or a damaged file.
    """
    if not (run / "state.json").exists():
        raise ValueError(f"{run} is no run with a checkpoint: it has no state.json")
    state = _read_json(run / "state.json")
    for name in ("last", "best", "best_val_loss", "receipt", "versions"):
        if name not in state:
            raise DamagedError(f"{run / 'state.json'} is damaged: it lacks {name}")
    return state


def load_into(checkpoint: Checkpoint, parts: Parts) -> None:
    """Copies weights and the state of optimizer and guard.

    Raises:
        ValueError: another model's checkpoint; the key that differs is named. The switch and the
            dropout rate may differ.
    """
    parallel, trainer = parts.parallel, checkpoint.path / "trainer"
    weights = parallel.read(lambda: _weights(checkpoint.path, parts.model.cfg))
    for name, parameter in parts.model.named_parameters():
        parallel.copy_(parameter.detach(), weights[name])
    moments = parallel.read(lambda: load_file(trainer / "optimizer.safetensors"))
    parts.optimizer.load_state_tensors(moments, parallel.copy_)
    guard = trainer / "guard.safetensors"  # not in format 1
    parts.guard.load_state_tensors(
        parallel.lead(lambda: load_file(guard) if guard.exists() else {})
    )


def _weights(folder: Path, cfg: GPTConfig) -> dict[str, Tensor]:
    """The weights of a checkpoint of the model `cfg`, by our names; raises as `load_into`."""
    there = huggingface.read_config(folder).to_dict()
    for key, value in cfg.to_dict().items():
        if key not in MAY_DIFFER and there[key] != value:
            raise ValueError(f"model.{key} must be {there[key]} as in {folder}, got {value}")
    path = folder / "model.safetensors"
    return huggingface.own_tensors(cfg, load_file(path), str(path))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as `write_text` does."""
    write_text(path, _as_json(value))


def write_text(path: Path, text: str) -> None:
    """Writes through a temporary file, so that a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path} is damaged: it holds no object")
    return value


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def _flush(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
