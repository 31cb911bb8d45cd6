"""From one format to another: what is there, what is written, and the proof of both.

Written to a hidden folder beside the one that is asked for, proven there, flushed, renamed: the
folder that was asked for is complete and proven, or not there.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from flashgpt.interop import from_scratch, huggingface, llmc, nanogpt
from flashgpt.interop.files import only_tensors, read_pickle, read_safetensors
from flashgpt.interop.foreign import Foreign
from flashgpt.interop.proof import Proof, prove
from flashgpt.tokenizer import Tokenizer

To = Literal["ours", "huggingface", "nanogpt"]
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
PADDING = 512  # vocabularies are padded to a multiple of 64 or 128, of this at most
NAMES = {
    "huggingface": "Hugging Face GPT-2",
    "nanogpt": "nanoGPT checkpoint",
    "from-scratch": "state dict of the from-scratch lineage",
    "llm.c": "llm.c model",
}
KNOWN = (
    "a folder with config.json or ckpt.pt, nanoGPT's ckpt.pt, a state dict of the from-scratch "
    "lineage, or llm.c's .bin"
)


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was done: `notes` for people, and the proof."""

    proof: Proof
    notes: tuple[str, ...]


def read(path: Path, n_heads: int | None = None) -> Foreign:
    """The model that lies at a path, whatever format it has.

    Args:
        n_heads: of a state dict, which does not say it; refused elsewhere.

    Raises:
        ValueError: nothing there that is a model, or a damaged one; says what was found.
    """
    found = _read(path, n_heads)
    if n_heads is not None and found.format != "from-scratch":
        raise ValueError(
            f"--n-heads is for state dicts alone; {path} is a {NAMES[found.format]} and says it"
        )
    return found


def _read(path: Path, n_heads: int | None) -> Foreign:
    if path.is_dir():
        if (path / "config.json").exists():
            return huggingface.read(path)
        if (path / nanogpt.FILE).exists():
            return _read(path / nanogpt.FILE, n_heads)
        names = sorted(entry.name for entry in path.iterdir())
        what = f"it holds {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        raise ValueError(f"{path} is no model: {what if names else 'it is empty'}; name {KNOWN}")
    if not path.exists():
        raise ValueError(f"{path} does not exist; name {KNOWN}")
    with path.open("rb") as file:
        start = file.read(16)
    if llmc.is_one(path):
        return llmc.read(path)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        tensors = read_safetensors(path)
        if from_scratch.is_one(tensors):
            return from_scratch.read(path, tensors, n_heads)
        raise ValueError(
            f"{path} is a file of tensors without a config; {_named(tensors)}; name the folder "
            "with its config.json"
        )
    if start[:2] in (b"PK", b"\x80\x02"):  # torch.save's zip file, and its old form
        return _read_pickle(path, n_heads)
    raise ValueError(f"{path} is no model: it begins with {start[:8]!r}; name {KNOWN}")


def _read_pickle(path: Path, n_heads: int | None) -> Foreign:
    found = read_pickle(path)
    if nanogpt.is_one(found):
        return nanogpt.read(path, found)
    state = found.get("model_state_dict", found)  # beside which an optimizer may stand
    if isinstance(state, dict) and from_scratch.is_one(state):
        return from_scratch.read(path, only_tensors(state, str(path)), n_heads)
    raise ValueError(
        f"{path} is neither a nanoGPT checkpoint (model, model_args) nor a state dict of the "
        f"from-scratch lineage (tok_emb.weight ...); {_named(found)}"
    )


def _named(found: Mapping[str, object]) -> str:
    names = [str(name) for name in found][:3]
    return f"it holds {', '.join(names)} ..." if names else "it is empty"


def check_free(folder: Path) -> None:
    """Refuses to write where something is.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists; name another folder, or remove it")


def convert(source: Foreign, out: Path, to: To, tokenizer: str | None = None) -> Converted:
    """Writes a model and its tokenizer in a format and proves it; no folder is left on failure.

    Args:
        out: the folder to make.
        tokenizer: what `Tokenizer.load` reads; left out, that beside the source, if any.

    Raises:
        ValueError: `out` is not free, the format has no form for this model, the tokenizer does
            not fit, or the proof failed.
        OSError: the folder cannot be written.
    """
    out = out.absolute()
    check_free(out)
    here = source.path.parent
    found = _tokenizer(here, tokenizer)
    notes = [*source.notes, _about_tokenizer(source, found)]
    eos_id = source.eos_id if found is None else found.eos_id
    temporary = out.parent / f".{out.name}.converting"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed conversion left
        temporary.mkdir()
        if to == "nanogpt":
            notes += nanogpt.write(source, temporary)
        else:
            notes += _write_huggingface(source, temporary, to, eos_id)
        if found is not None and tokenizer is None:
            for name in TOKENIZER_FILES:
                if (here / name).exists():
                    shutil.copyfile(here / name, temporary / name)
        elif found is not None:
            found.save(temporary)
        proof = prove(source, read(temporary))
        _publish(temporary, out)
    except SafetensorError as error:
        raise OSError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Converted(proof, tuple(notes))


def _write_huggingface(
    source: Foreign, folder: Path, to: To, eos_id: int | None
) -> tuple[str, ...]:
    cfg, notes, note = source.cfg, [], {}
    if to == "ours":
        note = huggingface.own_note(cfg)
        if not source.biases:
            note["biases"] = False
    elif not source.biases:
        notes.append("biases: zeros, without a note that the source has none")
    elif not cfg.qkv_bias:
        notes.append("query-key-value bias: zeros, without a note that the source has none")
    huggingface.save_tensors(cfg, source.own, folder, eos_id=eos_id, note=note)
    return tuple(notes)


def _tokenizer(here: Path, named: str | None) -> Tokenizer | None:
    if named is not None:
        return Tokenizer.load(named)
    if any((here / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return Tokenizer.load(here)
    return None


def _about_tokenizer(source: Foreign, tokenizer: Tokenizer | None) -> str:
    """What to say about it.

    Raises:
        ValueError: it is another model's.
    """
    if tokenizer is None:
        return "no tokenizer beside it: the model has none; --tokenizer adds one"
    theirs, ours = tokenizer.vocab_size, source.cfg.vocab_size
    if theirs > ours or ours - theirs >= PADDING:
        raise ValueError(
            f"the tokenizer must have the model's vocabulary of {ours:,} ids, got {theirs:,}; it "
            "is another model's: name the right one with --tokenizer"
        )
    if theirs < ours:
        return (
            f"tokenizer of {theirs:,} ids; the model's other {ours - theirs} ids are padding, "
            "kept, and never sampled"
        )
    return f"tokenizer of {theirs:,} ids"


def _publish(temporary: Path, out: Path) -> None:
    for path in [*temporary.rglob("*"), temporary]:
        _flush(path)
    if out.exists():
        out.rmdir()  # it is empty; a rename replaces an empty folder on POSIX only
    temporary.rename(out)
    _flush(out.parent)


def _flush(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk; Windows has no way for folders."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
