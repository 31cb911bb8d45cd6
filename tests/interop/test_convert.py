"""Every format, there and back, against `transformers` and against faults of our own.

pytest tests/interop/test_convert.py
"""

from __future__ import annotations

import dataclasses
import json
import logging
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashgpt.interop import convert, huggingface, proof, weights
from flashgpt.interop.convert import read
from flashgpt.interop.foreign import Foreign
from flashgpt.interop.proof import prove
from flashgpt.interop.weights import FROM_SCRATCH, LLMC, NANOGPT, Row, rows, to_theirs
from flashgpt.model.gpt2 import GPTModel
from tests.interop import stand_ins
from tests.interop.stand_ins import D, L, N, T, V

KINDS = {
    "nanogpt": ("nanogpt", {}),
    "nanogpt without biases": ("nanogpt", {"bias": False}),
    "nanogpt compiled": ("nanogpt", {"prefix": "_orig_mod."}),
    "nanogpt padded": ("nanogpt", {"vocab": 128}),
    "from-scratch": ("from-scratch", {}),
    "from-scratch qkv_bias": ("from-scratch", {"qkv_bias": True}),
    "from-scratch tied": ("from-scratch", {"tied": True}),
    "llm.c fp32": ("llm.c", {"version": 3}),
    "llm.c bf16": ("llm.c", {"version": 5}),
    "llm.c not padded": ("llm.c", {"padded": V}),
}


def _make(folder: Path, kind: str) -> Foreign:
    form, options = KINDS[kind]
    if form == "nanogpt":
        stand_ins.nanogpt_file(folder / "ckpt.pt", **options)
        return read(folder)
    if form == "llm.c":
        stand_ins.llmc_file(folder / "model.bin", **options)
        return read(folder / "model.bin")
    torch.save(stand_ins.from_scratch_state(**options), folder / "model.pth")
    return read(folder / "model.pth", n_heads=N)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_through_ours_keeps_every_bit(tmp_path: Path, kind: str) -> None:
    source = _make(tmp_path, kind)
    convert.convert(source, tmp_path / "ours", "ours")
    ours = read(tmp_path / "ours")
    assert ours.cfg == source.cfg
    if source.format == "nanogpt":
        convert.convert(ours, tmp_path / "back", "nanogpt")
        before, after = (
            torch.load(path / "ckpt.pt", weights_only=True)
            for path in (tmp_path, tmp_path / "back")
        )
        _same(
            {name.removeprefix("_orig_mod."): t for name, t in before["model"].items()},
            after["model"],
        )
        assert after["model_args"] == before["model_args"]
        return
    table = {"from-scratch": FROM_SCRATCH, "llm.c": LLMC}[source.format]
    cfg = ours.cfg
    own = ours.own | ({"lm_head.weight": ours.own["wte.weight"]} if cfg.tie_weights else {})
    again = to_theirs([row for row in rows(table, cfg.n_layers) if row.ours in own], own)
    theirs = {name: t for name, t in source.theirs.items() if not name.endswith("mask")}
    _same(theirs, again)
    if source.format == "llm.c":  # the file's own bytes, from the table's order
        path, stacked = tmp_path / "model.bin", [tensor.flatten() for tensor in again.values()]
        padding = torch.zeros(struct.unpack("<8i", path.read_bytes()[:32])[7] - V, D)
        stacked.insert(1, padding.to(stacked[0].dtype).flatten())
        assert torch.cat(stacked).view(torch.uint8).numpy().tobytes() == path.read_bytes()[1024:]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_from_what_is_written(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    source = _make(tmp_path, kind)
    done = convert.convert(source, tmp_path / "out", "huggingface")
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "out",
        attn_implementation="eager",
        output_loading_info=True,
        dtype=torch.float32,
    )
    assert not any(info.values()), info
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "flashgpt" not in config
    ids = torch.randint(source.cfg.vocab_size, (4, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = proof._reference(source, torch.float64)(ids)
        assert (theirs.eval()(ids).logits - expected).abs().max() <= done.proof.rule
    assert expected.std() > 1 and done.proof.rule < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hugging_face_model_goes_round(tmp_path: Path, dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=N, activation_function="gelu",
        bos_token_id=3, eos_token_id=3,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).to(dtype).save_pretrained(tmp_path / "hf")
    before = load_file(tmp_path / "hf" / "model.safetensors")
    steps = [("hf", "ours"), ("ours", "nanogpt"), ("nanogpt", "huggingface")]
    for start, end in steps:
        done = convert.convert(read(tmp_path / start), tmp_path / end, end)  # type: ignore[arg-type]
        assert done.proof.difference <= done.proof.rule < 1e-5
    _same(before, load_file(tmp_path / "huggingface" / "model.safetensors"))
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["eos_token_id"] == 3


def test_what_nanogpt_gets_is_what_it_takes(tmp_path: Path) -> None:
    """Its training loads model and optimizer strictly, and only plain things are in the file."""
    convert.convert(_make(tmp_path, "nanogpt"), tmp_path / "out", "nanogpt")
    found = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    state = stand_ins.nanogpt_state()
    assert list(found["model"]) and found["model"].keys() == state.keys()
    embedding, head = found["model"]["transformer.wte.weight"], found["model"]["lm_head.weight"]
    assert embedding.data_ptr() == head.data_ptr()
    parameters = [t.clone().requires_grad_() for n, t in state.items() if n != "lm_head.weight"]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1.0,
    )
    optimizer.load_state_dict(found["optimizer"])
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert found["iter_num"] == 0 and found["best_val_loss"] > 1e8
    size = sum(t.nbytes for name, t in state.items() if name != "lm_head.weight")
    assert (tmp_path / "out" / "ckpt.pt").stat().st_size < size + 20_000


def test_biases_that_a_training_moved_go_along(tmp_path: Path) -> None:
    convert.convert(_make(tmp_path, "nanogpt without biases"), tmp_path / "ours", "ours")
    path = tmp_path / "ours" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.1.mlp.c_fc.bias"] = torch.ones(4 * D)
    save_file(tensors, path)
    done = convert.convert(read(tmp_path / "ours"), tmp_path / "out", "nanogpt")
    assert any("query-key-value bias: zeros" in note for note in done.notes)
    found = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert found["model_args"]["bias"] is True
    assert found["model"]["transformer.h.1.mlp.c_fc.bias"].all()
    assert not found["model"]["transformer.h.1.attn.c_attn.bias"].any()


def test_an_untied_nanogpt_comes_in_and_does_not_go_out(tmp_path: Path) -> None:
    stand_ins.nanogpt_file(tmp_path / "ckpt.pt", changes={"lm_head.weight": torch.randn(V, D)})
    source = read(tmp_path / "ckpt.pt")
    assert not source.cfg.tie_weights and any("of its own" in note for note in source.notes)
    convert.convert(source, tmp_path / "ours", "ours")
    with pytest.raises(ValueError, match="must have a tied head"):
        convert.convert(source, tmp_path / "out", "nanogpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "ours"]


def test_a_tanh_gelu_does_not_go_to_nanogpt(tmp_path: Path) -> None:
    source = _make(tmp_path, "llm.c fp32")
    with pytest.raises(ValueError, match=r"must have the exact GELU \(erf\), got gelu_new"):
        convert.convert(source, tmp_path / "out", "nanogpt")
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


# Faults that a table or a writer could have; each must be seen by the proof.
def _swapped(table: tuple[Row, ...], one: str, other: str) -> tuple[Row, ...]:
    names = {row.ours: row.theirs for row in table}
    swap = {one: names[other], other: names[one]}
    return tuple(Row(r.ours, swap.get(r.ours, r.theirs), r.transposed) for r in table)


def _turned(table: tuple[Row, ...]) -> tuple[Row, ...]:
    square = "h.{i}.attn.c_proj.weight"
    return tuple(
        Row(r.ours, r.theirs, not r.transposed if r.ours == square else r.transposed) for r in table
    )


@pytest.mark.parametrize("place", ["nanogpt", "huggingface"])
@pytest.mark.parametrize("fault", ["turned", "norms", "biases"])
def test_the_proof_sees_a_table_that_is_wrong_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, fault: str
) -> None:
    source = _make(tmp_path, "nanogpt")
    module = getattr(convert, place)
    table = NANOGPT if place == "nanogpt" else weights.HUGGINGFACE
    wrong = {
        "turned": _turned(table),
        "norms": _swapped(table, "h.{i}.ln_1.weight", "h.{i}.ln_2.weight"),
        "biases": _swapped(table, "h.{i}.attn.c_proj.bias", "h.{i}.mlp.c_proj.bias"),
    }[fault]
    monkeypatch.setattr(module, place.upper(), wrong)
    with pytest.raises(ValueError, match=r"is wrong, nothing was written: logits of 4 prompts"):
        convert.convert(source, tmp_path / "out", place)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_the_proof_sees_wrong_stacks_and_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str, fault: Any) -> tuple[Row, ...]:
        table = FROM_SCRATCH
        return tuple(fault(row) if row.ours == name else row for row in table)

    torch.save(stand_ins.from_scratch_state(), tmp_path / "model.pth")
    wrong = without(
        "h.{i}.attn.c_attn.weight", lambda row: Row(row.ours, tuple(reversed(row.theirs)))
    )
    monkeypatch.setattr(convert.from_scratch, "FROM_SCRATCH", wrong)
    with pytest.raises(ValueError, match="is wrong, nothing was written"):
        convert.convert(read(tmp_path / "model.pth", N), tmp_path / "out", "ours")


@pytest.mark.parametrize(
    "change", [{"activation": "gelu_new"}, {"n_heads": 4}, {"tie_weights": False}]
)
def test_the_proof_sees_another_model(tmp_path: Path, change: dict[str, Any]) -> None:
    source = _make(tmp_path, "nanogpt")
    cfg = dataclasses.replace(source.cfg, **change)
    own = dict(source.own)
    if "tie_weights" in change:
        own["lm_head.weight"] = own["wte.weight"].roll(1, 0)
    state = GPTModel(cfg).state_dict() | own
    huggingface.save_tensors(cfg, state, tmp_path, eos_id=None)
    with pytest.raises(ValueError, match=r"is wrong, nothing was written: logits"):
        prove(source, read(tmp_path))


def test_the_proof_sees_one_changed_bit_and_numbers_that_are_none(tmp_path: Path) -> None:
    source = _make(tmp_path, "nanogpt padded")
    own = {**source.own, "wpe.weight": source.own["wpe.weight"].clone()}
    own["wpe.weight"].view(torch.int32)[3, 3] ^= 1
    other = dataclasses.replace(source, own=own)
    with pytest.raises(ValueError, match=r"'wpe\.weight' does not read back bit for bit"):
        prove(source, other)
    own["wpe.weight"][0, 0] = torch.nan
    damaged = dataclasses.replace(
        source, theirs={**source.theirs, "transformer.wpe.weight": own["wpe.weight"]}
    )
    with pytest.raises(ValueError, match="has logits that are not finite"):
        prove(damaged, damaged)
