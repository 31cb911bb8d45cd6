"""`flashgpt convert`. pytest tests/verbs/test_convert.py"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flashgpt.interop import convert as interop
from flashgpt.tokenizer import Tokenizer
from flashgpt.train.checkpoint import load
from tests.interop import stand_ins
from tests.interop.stand_ins import D, N, T, V

Cli = Callable[..., Any]
PROOF = re.compile(r"^  logits of 4 prompts of 16 tokens differ by at most \S+ \(rule: \S+,", re.M)


def test_a_nanogpt_folder_becomes_a_model_that_generates(tmp_path: Path, cli: Cli) -> None:
    stand_ins.nanogpt_file(tmp_path / "out" / "ckpt.pt", vocab=300)
    ran = cli("convert", tmp_path / "out", tmp_path / "mine", "--tokenizer", "bytes").done()
    assert "nanoGPT checkpoint, 2 layers, 3 heads, width 24, context 16, vocabulary 300" in ran
    assert "GELU is the exact one (erf)" in ran
    assert "tokenizer of 257 ids; the model's other 43 ids are padding" in ran
    assert PROOF.search(ran) and ran.endswith(f"ready: {tmp_path / 'mine'} (ours)\n")
    written = cli("generate", tmp_path / "mine", "--prompt", "ab", "--max-new-tokens", 5).done()
    assert written.startswith("ab")
    assert cli("convert", tmp_path / "mine", tmp_path / "back", "--to", "nanogpt").done()
    assert (tmp_path / "back" / "tokenizer.json").exists()
    again = torch.load(tmp_path / "back" / "ckpt.pt", weights_only=True)["model"]
    first = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["model"]
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_a_run_goes_out_and_its_tokenizer_with_it(tmp_path: Path, trained: Any, cli: Cli) -> None:
    ran = cli("convert", trained.folder, tmp_path / "hf", "--to", "huggingface").done()
    assert "no query-key-value bias, as its note says" in ran
    assert "query-key-value bias: zeros, without a note" in ran
    assert "tokenizer of 257 ids\n" in ran
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    best = cli("convert", trained.folder, tmp_path / "best", "--best").done()
    name = json.loads((trained.folder / "state.json").read_text())["best"]
    assert str(trained.folder / "checkpoints" / name) in best
    ours, _ = load(trained.folder / "checkpoints" / name)
    found, tokenizer = load(tmp_path / "best")
    assert tokenizer is not None and found.cfg == ours.cfg
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[key])
    greedy = ("--prompt", "the", "--temperature", 0)
    expected = cli("generate", trained.folder, *greedy).done()
    assert cli("generate", tmp_path / "hf", *greedy).done() == expected


def test_vocab_and_merges_are_a_tokenizer(tmp_path: Path, trained: Any, cli: Cli) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained.checkpoints[-1], source)
    shutil.rmtree(source / "trainer")
    inner = json.loads((source / "tokenizer.json").read_text())["model"]
    vocab = inner["vocab"] | {"<|endoftext|>": 256}
    (source / "vocab.json").write_text(json.dumps(vocab))
    (source / "merges.txt").write_text("#version: 0.2\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    assert "tokenizer of 257 ids" in cli("convert", source, tmp_path / "out").done()
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.encode("caf\u00e9") == list("caf\u00e9".encode())
    assert (tmp_path / "out" / "merges.txt").exists()


def test_a_state_dict_needs_its_heads_to_be_told(tmp_path: Path, cli: Cli) -> None:
    path, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_file(stand_ins.from_scratch_state(True), path)
    refused = cli("convert", path, out).error(1)
    assert "does not say how many heads the model has; add --n-heads" in refused
    assert "3 heads, as told" in cli("convert", path, out, "--n-heads", 3).done()
    assert load(out)[0].cfg.n_heads == 3
    wrong = cli("convert", path, tmp_path / "no", "--n-heads", 5).error(1)
    assert "emb_dim 24 and n_heads 5" in wrong
    none = cli("convert", path, tmp_path / "no", "--n-heads", 0).error(1)
    assert "n_heads must be at least 1, got 0" in none
    told = cli("convert", out, tmp_path / "no", "--n-heads", 3).error(1)
    assert "--n-heads is for state dicts alone" in told
    nested = {"model_state_dict": stand_ins.from_scratch_state(), "optimizer_state_dict": {}}
    torch.save(nested, tmp_path / "both.pth")
    assert cli("convert", tmp_path / "both.pth", tmp_path / "two", "--n-heads", 3).done()


def test_llm_c(tmp_path: Path, cli: Cli) -> None:
    stand_ins.llmc_file(tmp_path / "m.bin", version=5)
    ran = cli("convert", tmp_path / "m.bin", tmp_path / "out").done()
    assert "llm.c model" in ran and "bfloat16" in ran
    assert "rows 61 to 63 of the token embedding are padding and left out" in ran
    assert "the model has none; --tokenizer adds one" in ran
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def _nanogpt(folder: Path, **options: Any) -> Path:
    stand_ins.nanogpt_file(folder / "ckpt.pt", **options)
    return folder / "ckpt.pt"


def _llmc(folder: Path, cut: int | None = None, **header: int) -> Path:
    path = folder / "m.bin"
    stand_ins.llmc_file(path)
    content = np.fromfile(path, np.uint8)
    places = {"magic": 0, "version": 1, "V": 3, "NH": 5, "L": 4, "Vp": 7}
    for name, value in header.items():
        content[:1024].view("<i4")[places[name]] = value
    content[:cut].tofile(path)
    return path


def _text(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _pickled(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def _scratch(folder: Path, **changes: Any) -> Path:
    state = {**stand_ins.from_scratch_state(), **changes}
    return _pickled(folder / "m.pth", {k: v for k, v in state.items() if v is not None})


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def _beside_bytes(path: Path) -> Path:
    Tokenizer.bytes().save(path.parent)
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda p: p / "none", "none does not exist; name a folder with config.json"),
    "empty folder": (lambda p: p, "is no model: it is empty"),
    "folder of other things": (
        lambda p: _text(p / "d" / "a.txt", "hello").parent,
        "d is no model: it holds a.txt; name a folder with config.json or ckpt.pt",
    ),
    "text file": (lambda p: _text(p / "a.bin", "hello"), "is no model: it begins with b'hello'"),
    "another architecture": (
        lambda p: _text(p / "d" / "config.json", '{"model_type": "llama"}').parent,
        "model_type must be 'gpt2', got 'llama'",
    ),
    "config without weights": (
        lambda p: (
            _text(
                p / "d" / "config.json",
                '{"vocab_size": 9, "n_positions": 4, "n_embd": 4, "n_head": 1, "n_layer": 1}',
            ).parent
        ),
        "model.safetensors cannot be read",
    ),
    "safetensors alone": (
        lambda p: (
            save_file({"wte.weight": torch.ones(2)}, p / "a.safetensors") or p / "a.safetensors"
        ),
        "a file of tensors without a config; it holds wte.weight ...",
    ),
    "pickle cut short": (lambda p: _cut(_nanogpt(p)), "ckpt.pt is damaged or cut short"),
    "pickle of something else": (
        lambda p: _pickled(p / "a.pt", {"weights": torch.ones(1)}),
        "neither a nanoGPT checkpoint (model, model_args) nor a state dict of the from-scratch "
        "lineage (tok_emb.weight ...); it holds weights ...",
    ),
    "pickle with code": (
        lambda p: _pickled(p / "a.pt", {"model": print, "model_args": {}}),
        "may hold code that runs when it is read, so it is refused: it asks for",
    ),
    "nanogpt missing tensor": (
        lambda p: _nanogpt(p, changes={"transformer.h.1.ln_2.weight": None}),
        "lacks the tensor 'transformer.h.1.ln_2.weight'",
    ),
    "nanogpt unexpected tensor": (
        lambda p: _nanogpt(p, changes={"transformer.h.2.ln_1.weight": torch.ones(D)}),
        "a tensor that GPT-2 does not know: 'transformer.h.2.ln_1.weight'",
    ),
    "nanogpt bias where it says none": (
        lambda p: _nanogpt(p, bias=False, changes={"transformer.ln_f.bias": torch.ones(D)}),
        "a tensor that GPT-2 does not know: 'transformer.ln_f.bias'",
    ),
    "nanogpt vocabulary": (
        lambda p: _nanogpt(p, changes={"transformer.wte.weight": torch.ones(7, D)}),
        "'transformer.wte.weight' must have the shape [61, 24], got [7, 24]",
    ),
    "nanogpt no tensor": (
        lambda p: _nanogpt(p, changes={"transformer.wte.weight": 3}),
        "'transformer.wte.weight' must be a tensor, got int",
    ),
    "nanogpt setting": (
        lambda p: _pickled(p / "a.pt", {"model": {}, "model_args": {"n_layer": 2}}),
        "lacks n_head in model_args",
    ),
    "nanogpt float64": (
        lambda p: _nanogpt(p, changes={"transformer.wpe.weight": torch.ones(T, D).double()}),
        "'wpe.weight' (our name) must be float32, bfloat16 or float16, got float64",
    ),
    "from-scratch missing": (
        lambda p: _scratch(p, **{"trf_blocks.1.att.W_key.weight": None}),
        "lacks the tensor 'trf_blocks.1.att.W_key.weight'",
    ),
    "from-scratch missing head": (
        lambda p: _scratch(p, **{"out_head.weight": None}),
        "lacks the tensor 'out_head.weight'",
    ),
    "from-scratch shape": (
        lambda p: _scratch(p, **{"trf_blocks.1.att.W_key.weight": torch.ones(8, D)}),
        "'trf_blocks.1.att.W_key.weight' must have the shape [24, 24], got [8, 24]",
    ),
    "from-scratch vocabulary": (
        lambda p: _scratch(p, **{"out_head.weight": torch.ones(60, D)}),
        "'out_head.weight' must have the shape [61, 24], got [60, 24]",
    ),
    "llm.c cut short": (lambda p: _llmc(p, -100), "m.bin is cut short: it has"),
    "llm.c cut in the header": (lambda p: _llmc(p, 500), "cut short: it has 500 bytes"),
    "llm.c version": (lambda p: _llmc(p, version=1), "version 3 (float32) or 5 (bfloat16)"),
    "llm.c too long": (lambda p: _llmc(p, L=1), "does not fit its header: it has"),
    "llm.c header": (lambda p: _llmc(p, L=-1), "L in its header must be at least 1, got -1"),
    "llm.c heads": (lambda p: _llmc(p, NH=5), "emb_dim 24 and n_heads 5"),
    "llm.c padding": (lambda p: _llmc(p, Vp=60), "Vp must be at least V = 61, got 60"),
    "tokenizer too large": (
        lambda p: _beside_bytes(_nanogpt(p)),
        "the tokenizer must have the model's vocabulary of 61 ids, got 257",
    ),
    "tokenizer too small": (
        lambda p: _beside_bytes(_nanogpt(p, vocab=900)),
        "the tokenizer must have the model's vocabulary of 900 ids, got 257",
    ),
    "tokenizer of which half is missing": (
        lambda p: _text(_nanogpt(p).with_name("vocab.json"), "{}").with_name("ckpt.pt"),
        "must have tokenizer.json, or vocab.json and merges.txt; it lacks merges.txt",
    ),
    "tokenizer damaged": (
        lambda p: _text(_nanogpt(p).with_name("tokenizer.json"), "{").with_name("ckpt.pt"),
        "tokenizer files must be readable",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path: Path, cli: Cli, case: str) -> None:
    make, message = BAD[case]
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    heads = ("--n-heads", N) if case.startswith("from-scratch") else ()
    assert message in cli("convert", source, tmp_path / "out", *heads).error(1)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_named_tokenizer_that_is_none_leaves_nothing(tmp_path: Path, cli: Cli) -> None:
    source, out = _nanogpt(tmp_path), tmp_path / "out"
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0}, "itos": {0: "a"}}))
    for named, message in (
        (tmp_path / "meta.pkl", "meta.pkl: it is a pickle, which may hold code, and is not read"),
        ("nowhere", "must be bytes, gpt2, or a folder or tokenizer.json that exists"),
        ("bytes", "the tokenizer must have the model's vocabulary of 61 ids, got 257"),
    ):
        assert message in cli("convert", source, out, "--tokenizer", named).error(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "meta.pkl"]


def test_nothing_is_overwritten(tmp_path: Path, cli: Cli) -> None:
    source, out = _nanogpt(tmp_path), tmp_path / "out"
    out.mkdir()
    cli("convert", source, out).done()  # an empty folder is free
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert f"{out} exists; name another folder" in cli("convert", source, out).error(1)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert "exists" in cli("convert", source, source).error(1)
    assert "--to" in cli("convert", source, tmp_path / "no", "--to", "gguf").error(2)


def test_a_failed_proof_leaves_nothing(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _nanogpt(tmp_path)
    monkeypatch.setattr("flashgpt.interop.proof.FACTOR", 0.0)
    refused = cli("convert", source, tmp_path / "out").error(1)
    assert "is wrong, nothing was written: logits of 4 prompts of 16 tokens differ" in refused
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_full_disk_is_one_line(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise interop.SafetensorError("I/O error: No space left on device (os error 28)")

    source = _nanogpt(tmp_path)
    monkeypatch.setattr(interop.huggingface, "save_file", full)
    assert "No space left" in cli("convert", source, tmp_path / "out").error(1)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


KILLED = """
import sys, time
from flashgpt.interop import convert
def wait(*_):
    print("written", flush=True)
    time.sleep(60)
convert.prove = wait
from flashgpt.cli import main
main(["convert", *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_kill_leaves_no_folder_and_the_next_conversion_cleans_up(
    tmp_path: Path, cli: Cli
) -> None:
    source, out = _nanogpt(tmp_path), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        while process.stdout.readline() not in ("written\n", ""):
            pass
        process.send_signal(signal.SIGKILL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.converting", "ckpt.pt"]
    cli("convert", source, out).done()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "out"]
    assert load(out)[0].cfg.vocab_size == V
