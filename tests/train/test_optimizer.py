"""The optimizer: roles, decay, clipping, refusals, state by name.

pytest tests/train/test_optimizer.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.train import optimizer
from flashgpt.train.muon import Muon

CFG = dict(vocab_size=11, context_length=4, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0)
OPTIMIZERS: list[Literal["adamw", "muon"]] = ["adamw", "muon"]
MATRICES = {"c_attn.weight", "c_proj.weight", "c_fc.weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_role(tied: bool) -> None:
    model = GPTModel({**CFG, "qkv_bias": True, "tie_weights": tied})
    found = {name: role for name, _, role in optimizer.roles(model)}
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, role in found.items():
        if name in ("wte.weight", "wpe.weight", "lm_head.weight"):
            assert role == "embedding"
        else:
            is_matrix = ".".join(name.split(".")[-2:]) in MATRICES
            assert role == ("matrix" if is_matrix else "vector"), name
    assert ("lm_head.weight" in found) == (not tied)


def test_a_module_of_unknown_kind_has_no_role() -> None:
    with pytest.raises(KeyError, match="Conv1d"):
        list(optimizer.roles(torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1))))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_and_embeddings_decay_and_vectors_do_not(
    tied: bool, kind: Literal["adamw", "muon"]
) -> None:
    model = GPTModel({**CFG, "qkv_bias": True, "tie_weights": tied})
    config = TrainConfig(optimizer=kind, lr=0.9, weight_decay=0.2, beta1=0.8, beta2=0.9)
    made = optimizer.build(model, config)
    groups = [group for part in made.parts for group in part.param_groups]
    grouped = [p for group in groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len(list(model.parameters()))
    assert all(group.get("betas", (0.8, 0.9)) == (0.8, 0.9) for group in groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    made.set_rate(0.5)
    made.step()
    for name, p in model.named_parameters():
        decays = not name.endswith("bias") and "ln_" not in name
        assert torch.equal(p, before[name] * (1 - 0.5 * 0.2) if decays else before[name]), name
    made.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_muon_updates_the_matrices_and_sees_query_key_and_value_apart() -> None:
    model = GPTModel({**CFG, "qkv_bias": True})
    made = optimizer.build(model, TrainConfig(optimizer="muon"))
    give_gradients(model, 0)
    made.step()
    by_muon = {n for n, p in model.named_parameters() if "momentum_buffer" in state_of(made, p)}
    by_adamw = {n for n, p in model.named_parameters() if "exp_avg" in state_of(made, p)}
    assert by_muon == {name for name, _, role in optimizer.roles(model) if role == "matrix"}
    assert by_adamw == {name for name, _ in model.named_parameters()} - by_muon
    parts = [part for part in made.parts if isinstance(part, Muon)]
    split = {
        made.names[p]: g["split"] for part in parts for g in part.param_groups for p in g["params"]
    }
    assert {name for name, count in split.items() if count == 3} == {"h.0.attn.c_attn.weight"}
    assert set(split.values()) == {1, 3}


def state_of(made: optimizer.Optimizer, parameter: torch.nn.Parameter) -> dict[str, Any]:
    """The moments of a parameter, whichever rule it has."""
    found: dict[str, Any] = {}
    for part in made.parts:
        found |= part.state.get(parameter, {})
    return found


def give_gradients(model: GPTModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_refused_step_changes_no_bit_and_the_next_is_as_if_it_had_not_been(
    kind: Literal["adamw", "muon"],
) -> None:
    def run(refusals: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = GPTModel(CFG)
        made = optimizer.build(model, TrainConfig(optimizer=kind, lr=0.01))

        def bits() -> dict[str, Tensor]:
            weights = {name: p.detach() for name, p in model.named_parameters()}
            tensors = weights | made.state_tensors()
            return {name: t.clone().view(torch.int32) for name, t in tensors.items()}

        for number in range(3):
            if refusals:
                before = bits()
                for p in model.parameters():
                    p.grad = torch.full_like(p, torch.nan)
                made.step(torch.tensor(1.0))
                after = bits()
                if number == 0:  # the state is there from now on, and is zero
                    assert not any(after.pop(name).any() for name in after.keys() - before)
                assert after.keys() == before.keys()
                assert all(torch.equal(after[name], before[name]) for name in before)
            give_gradients(model, number)
            made.step(torch.tensor(0.0) if refusals else None)
        return bits()

    one, other = run(refusals=True), run(refusals=False)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_gradient_is_clipped_to_its_norm(tmp_path: Path, train: Callable[..., Any]) -> None:
    """After one step exp_avg is (1 - beta1) times the gradient that AdamW was given."""
    norms = {}
    for limit in (0, 0.25, 100):
        run = train(tmp_path / str(limit), "--train.stop-at", 1, "--train.grad-clip", limit)
        moments = [t for name, t in run.tensors().items() if name.endswith("exp_avg")]
        given = math.sqrt(sum(float(t.double().square().sum()) for t in moments)) / 0.1
        norms[limit] = run.metrics[0]["grad_norm"]
        assert norms[limit] > 1
        expected = 0.25 if limit == 0.25 else norms[limit]
        assert given == pytest.approx(expected, rel=1e-5)
    assert len(set(norms.values())) == 1  # what is logged is the norm before clipping


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_goes_by_the_names_of_the_parameters(kind: Literal["adamw", "muon"]) -> None:
    model, twin = GPTModel(CFG), GPTModel(CFG)
    first, second = (optimizer.build(m, TrainConfig(optimizer=kind)) for m in (model, twin))
    give_gradients(model, 0)
    first.step()
    tensors = first.state_tensors()
    expected = set()
    for name, _, role in optimizer.roles(model):
        muon = kind == "muon" and role == "matrix"
        moments = ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq", "step")
        expected |= {f"{name}.{moment}" for moment in moments}
    assert set(tensors) == expected
    second.load_state_tensors(tensors)
    again = second.state_tensors()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert all(tensors[name].data_ptr() != again[name].data_ptr() for name in tensors)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_is_loaded_into_the_memory_that_is_there(kind: Literal["adamw", "muon"]) -> None:
    """A captured step goes on from it; nothing to load is the state of step 0."""
    model, twin = GPTModel(CFG), GPTModel(CFG)
    first, second = (optimizer.build(m, TrainConfig(optimizer=kind)) for m in (model, twin))
    for made, its_model, steps in ((first, model, 2), (second, twin, 1)):
        for number in range(steps):
            give_gradients(its_model, number)
            made.step()
    addresses = {name: t.data_ptr() for name, t in second.state_tensors().items()}
    second.load_state_tensors(first.state_tensors())
    mine, others = second.state_tensors(), first.state_tensors()
    assert all(torch.equal(mine[name], others[name]) for name in mine | others)
    second.load_state_tensors({})
    zeros = second.state_tensors()
    assert {name: t.data_ptr() for name, t in zeros.items()} == addresses
    assert not any(t.any() for t in zeros.values())

    new = GPTModel(CFG)
    new.load_state_dict(twin.state_dict())
    third = optimizer.build(new, TrainConfig(optimizer=kind))
    for made, its_model in ((second, twin), (third, new)):
        give_gradients(its_model, 5)
        made.step()
    assert all(map(torch.equal, twin.parameters(), new.parameters()))


def test_a_rate_has_the_bits_of_pythons_number() -> None:
    """On the CPU; PyTorch's own AdamW gets it as a number here."""
    model, twin = GPTModel(CFG), GPTModel(CFG)
    twin.load_state_dict(model.state_dict())
    made = optimizer.build(model, TrainConfig(weight_decay=0.0))
    (ours,) = made.parts
    betas = ours.defaults["betas"]
    theirs = torch.optim.AdamW(twin.parameters(), betas=betas, weight_decay=0.0, fused=True)
    for number in range(5):
        rate = 1e-3 / (number + 0.7)
        made.set_rate(rate)
        theirs.param_groups[0]["lr"] = rate
        for its_model in (model, twin):
            give_gradients(its_model, number)
        made.step()
        theirs.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    made.set_rate(rate * (1 + 1e-4))
    made.step()
    theirs.step()
    assert not all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_of_another_model_or_optimizer_is_refused(kind: Literal["adamw", "muon"]) -> None:
    model = GPTModel(CFG)
    made = optimizer.build(model, TrainConfig(optimizer=kind))
    with pytest.raises(ValueError, match=r"does not fit the model: 'h\.0"):
        made.load_state_tensors({"wte.weight.exp_avg": torch.zeros(1)})
    other = optimizer.build(model, TrainConfig(optimizer="adamw" if kind == "muon" else "muon"))
    give_gradients(model, 0)
    other.step()
    with pytest.raises(ValueError, match=r"'h\.0\.attn\.c_attn\.weight\.\w+' is on one side only"):
        made.load_state_tensors(other.state_tensors())
    made.load_state_tensors({})  # a checkpoint of step 0
    assert made.state_tensors() == {}
