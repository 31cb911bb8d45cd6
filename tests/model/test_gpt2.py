"""GPTModel: shapes, names, the switch, dropout, numbers against other implementations.

pytest tests/model/test_gpt2.py
"""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashgpt.attention import kernels
from flashgpt.config import PRESETS, preset
from flashgpt.interop import huggingface
from flashgpt.measure.memory import peak_bytes
from flashgpt.model import gpt2
from flashgpt.model.gpt2 import GPTModel, check_ids
from flashgpt.orchestrator import CFG as DOCUMENTED

CFG: dict[str, Any] = {
    "vocab_size": 61,
    "context_length": 24,
    "emb_dim": 12,
    "n_heads": 3,
    "n_layers": 2,
    "drop_rate": 0.0,
}


def make(seed: int = 0, **changes: Any) -> GPTModel:
    """A small model all of whose parameters, biases and norms too, are far from their start."""
    torch.manual_seed(seed)
    model = GPTModel({**CFG, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.2))
            assert parameter.std() > 0.1, name
    return model


def ids_of(batch: int = 2, length: int = 24, seed: int = 0, vocab: int = 61) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: GPTModel, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The loss and all gradients, by name."""
    model.zero_grad()
    loss = model(ids, targets)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, got in found.items():
        torch.testing.assert_close(
            got, wanted[name], rtol=0, atol=atol, msg=lambda m, n=name: n + m
        )


# ---- shapes and names


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameter_counts_of_the_released_models(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = GPTModel(preset(name))
    assert model.n_parameters == millions


def test_the_documented_cfg_maps_two_by_256_ids_to_logits() -> None:
    cfg = {k: v for k, v in DOCUMENTED.items() if k not in ("tokenizer", "train")}
    model = GPTModel(cfg).eval()
    with torch.inference_mode():
        logits = model(torch.randint(50257, (2, 256)))
    assert list(logits.shape) == [2, 256, 50257]
    assert torch.isfinite(logits).all()


def names_of(n_layers: int, qkv_bias: bool) -> list[str]:
    """GPT-2's own names."""
    names = ["wte.weight", "wpe.weight"]
    for i in range(n_layers):
        modules = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
        for module, kind in itertools.product(modules, ("weight", "bias")):
            if qkv_bias or (module, kind) != ("attn.c_attn", "bias"):
                names.append(f"h.{i}.{module}.{kind}")
    return [*names, "ln_f.weight", "ln_f.bias", "lm_head.weight"]


@pytest.mark.parametrize("use_flash", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_state_dict_has_gpt2s_names_and_nothing_else(use_flash: bool, qkv_bias: bool) -> None:
    model = make(use_flash=use_flash, qkv_bias=qkv_bias)
    assert list(model.state_dict()) == names_of(2, qkv_bias)
    masks = [name for name, _ in model.named_buffers() if name.endswith("mask")]
    assert masks == ([] if use_flash else ["h.0.attn.mask", "h.1.attn.mask"])
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    assert shapes["wte.weight"] == shapes["lm_head.weight"] == [61, 12]  # never padded
    assert shapes["wpe.weight"] == [24, 12]
    assert shapes["h.0.attn.c_attn.weight"] == [36, 12]
    assert shapes["h.0.mlp.c_fc.weight"] == [48, 12]


def test_tied_weights_are_one_tensor_and_untied_are_two() -> None:
    tied, untied = make(), make(tie_weights=False)
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight
    assert untied.n_parameters == tied.n_parameters + 61 * 12
    ids = ids_of()
    untied.load_state_dict(tied.state_dict())
    assert torch.equal(untied(ids), tied(ids))
    found, both = gradients(untied, ids, ids), gradients(tied, ids, ids)
    together = found["wte.weight"] + found["lm_head.weight"]
    torch.testing.assert_close(both["wte.weight"], together, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("use_flash", [True, False])
def test_an_empty_model_takes_weights_and_is_like_the_first(
    use_flash: bool, tie_weights: bool
) -> None:
    model = make(use_flash=use_flash, tie_weights=tie_weights, drop_rate=0.2)
    other = GPTModel.empty(model.cfg)
    assert (other.lm_head.weight is other.wte.weight) == tie_weights
    other.load_state_dict(model.state_dict())
    assert {n: b.shape for n, b in other.named_buffers()} == {
        n: b.shape for n, b in model.named_buffers()
    }
    ids = ids_of()
    for path in (model, other):
        path.set_dropout(seed=3)
    assert torch.equal(model(ids), other(ids))


def test_initialisation_is_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPTModel({**CFG, "emb_dim": 192, "n_layers": 3, "qkv_bias": True, "vocab_size": 500})
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(
                parameter, torch.full_like(parameter, float("ln_" in name and "weight" in name))
            )
            continue
        std = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
        spread = std / math.sqrt(2 * parameter.numel())
        assert abs(parameter.std().item() - std) < 6 * spread, name
        assert abs(parameter.mean().item()) < 6 * std / math.sqrt(parameter.numel()), name


# ---- the switch


def test_weights_move_between_the_settings() -> None:
    flash, standard = make(), make(seed=1, use_flash=False)
    ids = ids_of()
    assert not torch.allclose(standard(ids), flash(ids), atol=1e-2)
    standard.load_state_dict(flash.state_dict())
    torch.testing.assert_close(standard(ids), flash(ids), rtol=0, atol=1e-5)
    make(seed=2).load_state_dict(standard.state_dict())


def test_set_attention_moves_the_switch_of_a_built_model() -> None:
    model = make().double()
    ids = ids_of()
    outputs = []
    kernels.clear_receipt()
    for setting in (
        dict(use_flash=True),
        dict(use_flash=False),
        dict(use_flash=True, kernel="blocked"),
        dict(kernel="sdpa:cpu"),
        dict(kernel=None),
    ):
        model.set_attention(**setting)
        if "use_flash" in setting:
            assert model.cfg.use_flash == setting["use_flash"]
        masks = [name for name, _ in model.named_buffers() if name.endswith("mask")]
        assert len(masks) == (0 if model.cfg.use_flash else 2)
        outputs.append(model(ids))
    served = [line.split()[0] + ("!" if "asked" in line else "") for line in kernels.receipt()]
    assert served == ["sdpa:cpu", "standard!", "blocked!", "sdpa:cpu!"]
    for found in outputs[1:]:
        torch.testing.assert_close(found, outputs[0], rtol=0, atol=1e-13)
    model.set_attention(kernel="sdpa:flash")
    with pytest.raises(ValueError, match="'sdpa:flash' cannot serve this call"):
        model(ids)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], int, int, int]:
    """(cfg, batch, length, seed) of a small model with dropout."""
    heads = draw(st.integers(1, 3))
    context = draw(st.integers(1, 20))
    cfg = dict(
        vocab_size=draw(st.integers(2, 40)),
        context_length=context,
        emb_dim=heads * draw(st.integers(1, 6)),
        n_heads=heads,
        n_layers=draw(st.integers(1, 3)),
        drop_rate=draw(st.sampled_from([0.0, 0.1, 0.5])),
        qkv_bias=draw(st.booleans()),
        tie_weights=draw(st.booleans()),
        activation=draw(st.sampled_from(["gelu_new", "gelu"])),
    )
    return cfg, draw(st.integers(1, 3)), draw(st.integers(1, context)), draw(st.integers(0, 99))


@given(case=cases())
@settings(max_examples=25, deadline=None)
def test_both_settings_give_the_same_numbers(case: tuple[dict[str, Any], int, int, int]) -> None:
    """In float64, dropout included: logits, loss, every gradient."""
    cfg, batch, length, seed = case
    torch.manual_seed(seed)
    flash = GPTModel(cfg).double()
    with torch.no_grad():
        for parameter in flash.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    standard = GPTModel({**cfg, "use_flash": False}).double()
    standard.load_state_dict(flash.state_dict())
    ids = ids_of(batch, length, seed, cfg["vocab_size"])
    targets = ids_of(batch, length, seed + 1, cfg["vocab_size"])
    for path in (flash, standard):
        path.set_dropout(seed=seed, first_row=3)
    torch.testing.assert_close(flash(ids), standard(ids), rtol=1e-10, atol=1e-10)
    found, wanted = gradients(flash, ids, targets), gradients(standard, ids, targets)
    assert_close(found, wanted, atol=1e-10)


# ---- against other implementations


@pytest.mark.parametrize(
    "changes",
    [
        dict(qkv_bias=True),
        dict(qkv_bias=False, tie_weights=False),
        dict(qkv_bias=True, activation="gelu"),
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    model = make(**changes).eval()
    huggingface.save(model, tmp_path, eos_id=None)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = ids_of()
    with torch.no_grad():
        single = theirs(ids).logits
        exact = theirs.double()(ids).logits
        wide = copy.deepcopy(model).double()
        for use_flash in (True, False):
            wide.set_attention(use_flash=use_flash)
            model.set_attention(use_flash=use_flash)
            torch.testing.assert_close(wide(ids), exact, rtol=1e-11, atol=1e-11)
            error, their_error = (model(ids) - exact).abs(), (single - exact).abs()
            floor = 2 * 0.3 * 2**-23 * exact.abs().max()
            assert error.max() <= 2 * their_error.max() + floor
            assert error.square().mean().sqrt() <= 1.25 * their_error.square().mean().sqrt() + floor


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = make().double()
    ids, targets = ids_of(), ids_of(seed=1)
    targets[0, :5] = -100
    targets[1, -1] = -100
    found = gradients(model, ids, targets)
    model.zero_grad()
    wanted = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-100)
    wanted.backward()
    exact = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close(found, {"loss": wanted.detach(), **exact}, atol=1e-13)
    assert found["loss"].dim() == 0


def test_last_only_and_documents() -> None:
    model = make().double().eval()
    ids = ids_of()
    whole = model(ids)
    torch.testing.assert_close(model(ids, last_only=True), whole[:, -1:], rtol=0, atol=1e-13)
    documents = (torch.arange(24) // 10).expand(2, -1)
    for use_flash in (True, False):
        model.set_attention(use_flash=use_flash)
        packed = model(ids, documents_BT=documents)
        torch.testing.assert_close(packed[:, :10], whole[:, :10], rtol=0, atol=1e-12)
        assert not torch.allclose(packed[:, 10:], whole[:, 10:], atol=1e-3)
        changed = ids.clone()
        changed[:, :10] = (changed[:, :10] + 1) % 61
        other = model(changed, documents_BT=documents)
        assert torch.equal(other[:, 10:], packed[:, 10:])


# ---- dropout


@pytest.mark.parametrize("use_flash", [True, False])
def test_eval_drops_nothing_and_draws_nothing(use_flash: bool) -> None:
    model = make(drop_rate=0.5, use_flash=use_flash)
    still = make(drop_rate=0.0, use_flash=use_flash)
    ids = ids_of()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    state = torch.get_rng_state()
    assert torch.equal(model(ids), model(ids))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model(ids), still(ids), rtol=0, atol=1e-5)
    model.train().set_dropout(seed=1)
    assert torch.equal(model(ids), model(ids))
    model.set_dropout(seed=None)
    assert not torch.equal(model(ids), model(ids))


def test_equal_manual_seed_gives_equal_losses_on_both_paths() -> None:
    flash = make(drop_rate=0.3).double()
    standard = make(drop_rate=0.3, use_flash=False).double()
    ids = ids_of()
    losses = []
    for model, seed in ((flash, 5), (standard, 5), (flash, 6)):
        torch.manual_seed(seed)
        losses.append(model(ids, ids).item())
    assert abs(losses[0] - losses[1]) < 1e-12
    assert abs(losses[0] - losses[2]) > 1e-4


@pytest.mark.parametrize("use_flash", [True, False])
def test_micro_batches_draw_the_masks_of_their_global_rows(use_flash: bool) -> None:
    model = make(drop_rate=0.3, use_flash=use_flash).double()
    ids, targets = ids_of(4), ids_of(4, seed=1)
    model.set_dropout(seed=-77, first_row=10)
    whole = gradients(model, ids, targets)

    def halves(second_row: int) -> dict[str, Tensor]:
        found = []
        for rows, first_row in ((slice(0, 2), 10), (slice(2, 4), second_row)):
            model.set_dropout(seed=-77, first_row=first_row)
            found.append(gradients(model, ids[rows], targets[rows]))
        return {name: (found[0][name] + found[1][name]) / 2 for name in whole}

    assert_close(halves(12), whole, atol=1e-13)
    assert not torch.allclose(halves(10)["wte.weight"], whole["wte.weight"], atol=1e-6)


def test_layers_and_sites_draw_different_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashgpt.attention import dropout as law
    from flashgpt.model import block, gpt2

    drawn: list[tuple[int, int]] = []
    original = law.drop_elements

    def noting(x: Tensor, dropout: law.Dropout | None, site: int, start: int = 0) -> Tensor:
        assert dropout is not None
        drawn.append((dropout.layer, site))
        return original(x, dropout, site, start)

    monkeypatch.setattr(gpt2, "drop_elements", noting)
    monkeypatch.setattr(block, "drop_elements", noting)
    make(drop_rate=0.1)(ids_of())
    assert drawn == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]


def test_a_compiled_model_trains_like_the_eager_one() -> None:
    """One graph; dropout on, so blocked attention, every mask and the loss are part of it.

    Traced, functionalised and partitioned; generated code is tried in tests/attention.
    """
    model = make(drop_rate=0.2)
    ids, targets = ids_of(), ids_of(seed=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):  # one graph serves every seed
        for seed, first_row in ((1, 0), (-(2**62), 4), (2**63 - 1, 2**20)):
            model.set_dropout(seed=seed, first_row=first_row)
            eager = gradients(model, ids, targets)
            model.zero_grad()
            loss = compiled(ids, targets)
            loss.backward()
            found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            assert_close({"loss": loss.detach(), **found}, eager, atol=2e-6)


# ---- activation checkpointing


def drawn_gradients(
    model: GPTModel, forward: Any = None, seeds: tuple[int | None, ...] = (5, None)
) -> list[Tensor]:
    """Loss and gradients with dropout, for masks of a seed and of torch's generator (None)."""
    found = []
    for seed in seeds:
        model.zero_grad()
        model.set_dropout(seed)
        torch.manual_seed(7)
        loss = (model if forward is None else forward)(ids_of(), ids_of(seed=1))
        loss.backward()
        found += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize("own_masks", [False, True])
@pytest.mark.parametrize("use_flash", [True, False])
def test_checkpointing_computes_the_blocks_twice_and_the_same(
    use_flash: bool, own_masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(drop_rate=0.2, use_flash=use_flash)
    model.set_attention(own_masks=own_masks)
    passes: list[int] = []
    for block in model.h:
        block.register_forward_pre_hook(lambda *_: passes.append(1))
    plain = drawn_gradients(model)
    assert len(passes) == 2 * 2
    model.set_checkpointing(True)
    again = drawn_gradients(model)
    assert len(passes) == 2 * 2 + 2 * 2 * 2
    assert len(again) == len(plain) and all(map(torch.equal, again, plain))
    model.eval()(ids_of(), ids_of()).backward()
    with torch.no_grad():
        model.train()(ids_of(), ids_of())
    assert len(passes) == 12 + 2 + 2  # neither evaluates a block twice
    model.set_checkpointing(False)
    assert all(map(torch.equal, drawn_gradients(model), plain))

    def forgetful(*arguments: Any, preserve_rng_state: bool, **options: Any) -> Any:
        assert preserve_rng_state == own_masks
        return checkpoint(*arguments, preserve_rng_state=False, **options)

    monkeypatch.setattr(gpt2, "checkpoint", forgetful)
    model.set_checkpointing(True)
    assert all(map(torch.equal, drawn_gradients(model), plain)) == (not own_masks)


@pytest.mark.parametrize("use_flash", [True, False])
def test_a_compiled_model_checkpoints_like_the_eager_one(use_flash: bool) -> None:
    model = make(drop_rate=0.2, use_flash=use_flash)
    plain = drawn_gradients(model, seeds=(5,))
    model.set_checkpointing(True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, drawn_gradients(model, compiled, seeds=(5,)), plain))


def test_checkpointing_takes_less_memory() -> None:
    """Of 16 layers, what one keeps instead of 16, and 16 inputs of D numbers per token.

    A layer keeps about 18 D numbers a token and N T more for its weights of attention; 16 of
    those over one and 16 inputs is above 8, and half of that is left to everything else.
    """
    cfg = {**CFG, "emb_dim": 32, "n_heads": 2, "n_layers": 16, "context_length": 64}
    model = GPTModel({**cfg, "use_flash": False})
    ids = ids_of(8, 64)
    model(ids, ids).backward()  # the gradients are there before and after
    peaks = {}
    for on in (False, True):
        model.set_checkpointing(on)
        peaks[on] = peak_bytes(lambda: model(ids, ids).backward(), torch.device("cpu"))
    assert 4 * peaks[True] < peaks[False], peaks


# ---- what is refused


@pytest.mark.parametrize(
    ("ids", "targets", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), None, r"ids must be \[B, T\], got \[4\]"),
        (
            torch.zeros(1, 25, dtype=torch.int64),
            None,
            r"sequence must be 1 \.\. context_length 24 tokens, got 25",
        ),
        (torch.zeros(1, 0, dtype=torch.int64), None, r"sequence must be 1 \.\..*got 0"),
        (
            torch.tensor([[3, 61]]),
            None,
            r"ids must be in 0 \.\. 60 \(vocab_size 61\), got 61",
        ),
        (torch.tensor([[-1, 3]]), None, r"ids must be in 0 \.\. 60.*got -1"),
        (
            torch.tensor([[3, 4]]),
            torch.tensor([[4, 99]]),
            r"targets must be in 0 \.\. 60.*got 99",
        ),
        (torch.tensor([[3, 4]]), torch.tensor([[4, -1]]), r"targets must be in.*got -1"),
        (
            torch.tensor([[3, 4]]),
            torch.tensor([[4]]),
            r"targets must have the shape of ids \[1, 2\], got \[1, 1\]",
        ),
    ],
)
def test_wrong_ids_are_refused(ids: Tensor, targets: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(ids, targets)


def test_ids_at_the_borders_pass() -> None:
    check_ids(torch.tensor([[0, 60]]), 61, "ids")
    make()(torch.tensor([[0, 60]]), torch.tensor([[60, -100]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 3}, r"n_head.*n_heads"),
        ({"emb_dim": 13}, r"emb_dim must be divisible by n_heads, got emb_dim 13 and n_heads 3"),
        ({"vocab_size": 0}, r"vocab_size must be at least 1, got 0"),
    ],
)
def test_wrong_cfgs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTModel({**CFG, **change})
    missing = {k: v for k, v in CFG.items() if k != "n_layers"}
    with pytest.raises(ValueError, match="cfg lacks 'n_layers'"):
        GPTModel(missing)


def test_the_presets_are_known_by_name() -> None:
    assert set(PRESETS) >= {"tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
