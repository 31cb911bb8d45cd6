"""A step whose state stands on the device: its logits, its cache, and what it draws.

Without a GPU in Triton's interpreter, in fp32 and fp16 (it is wrong in bf16).
pytest tests/generation/test_device_step.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from flashgpt.generation.cache import KVCache
from flashgpt.model.gpt2 import GPTModel

pytest.importorskip("triton")

from flashgpt.generation import device_step, triton_attend, triton_dot, triton_step
from flashgpt.generation.triton_step import State

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
VOCAB = 200  # of the model's 257
SEEDS = 2
Make = Callable[..., GPTModel]


def state(ids: Sequence[int], place: int, pads: Sequence[int], room: int) -> State:
    texts = len(ids)

    def ints(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    return State(
        ints(ids, torch.int64),
        ints([place] * texts),
        ints(pads),
        ints([0] * texts),
        torch.zeros(room, texts, dtype=torch.int64, device=DEVICE),
    )


def filled(model: GPTModel, prompts: Tensor, pads: Sequence[int], room: int) -> KVCache:
    """A cache of the model's dtype that holds prompts; what it does not hold is not a number."""
    weight = model.wte.weight
    cache = KVCache(model.cfg, len(prompts), weight.device, weight.dtype, pads=pads, capacity=room)
    cache.k_LBNSH.fill_(torch.nan), cache.v_LBNSH.fill_(torch.nan)
    if prompts.shape[1]:
        plain(model, prompts, cache)
    return cache


def plain(model: GPTModel, ids_BT: Tensor, cache: KVCache) -> Tensor:
    """The model's own logits after ids that join the cache."""
    end = cache.length + ids_BT.shape[1]
    place_S = torch.arange(end, device=DEVICE)
    pad_B1 = torch.tensor(cache.pads, device=DEVICE)[:, None]
    with torch.no_grad():
        logits: Tensor = model(
            ids_BT,
            documents_BT=(place_S >= pad_B1).int(),
            positions_BT=(place_S[cache.length :] - pad_B1).clamp(min=0),
            cache=cache,
            last_only=True,
        )
    return logits[:, -1, :VOCAB]


def results(logits: Tensor, cache: KVCache, held: int) -> list[Tensor]:
    """Logits, and what joined the cache."""
    return [
        x.double() for x in (logits, cache.k_LBNSH[:, :, :, held], cache.v_LBNSH[:, :, :, held])
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("pads", "held", "shape"),
    [
        ([0], 0, {}),
        ([0], 3, {}),
        ([0], 15, {"activation": "gelu", "qkv_bias": True}),  # the last of its part of the keys
        ([0], 16, {}),  # the first
        ([0], 47, {"emb_dim": 36, "n_heads": 3}),  # the last there is room for
        ([0, 5], 21, {"qkv_bias": True}),
        ([0, 17, 1], 40, {"emb_dim": 20, "n_heads": 1}),  # a part that holds no text
        ([0, 3, 0, 1, 2, 0, 9], 33, {}),  # through tensor cores
        ([0, 3, 0, 1, 2, 0], 21, {"emb_dim": 36, "n_heads": 3, "qkv_bias": True}),
        ([0, 3, 0, 1, 2], 15, {"activation": "gelu"}),  # so, with attention in parts
        ([0, 3, 0, 1, 2, 0, 0, 5, 9], 33, {}),  # by PyTorch's products
        ([0, 3, 0, 1, 2, 0, 0, 5], 33, {"n_heads": 1}),  # so, with attention in parts
    ],
)
def test_logits_and_cache_err_no_more_than_the_models_own(
    make_model: Make,
    pads: list[int],
    held: int,
    shape: dict[str, object],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if DEVICE == "cpu" and dtype == torch.float16 and held not in (15, 21):
        pytest.skip("in the interpreter fp32 will do")
    room, texts = 48, len(pads)
    monkeypatch.setattr(triton_attend, "KEYS", 16)
    monkeypatch.setattr(triton_attend, "KEYS_WHOLE", 8)
    monkeypatch.setattr(device_step, "FULL", 14)
    monkeypatch.setattr(triton_step, "TILE", 512)  # many programs
    monkeypatch.setattr(triton_dot, "MOST_TEXTS", 7)
    model = make_model(context_length=room, **shape).to(DEVICE, dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # GPT-2 begins with ones and zeros
                parameter.normal_(mean=float("ln" in name and "weight" in name), std=0.25)
    exact_model = copy.deepcopy(model).double()
    found: list[tuple[list[Tensor], ...]] = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        ids = torch.randint(VOCAB, (texts, held + 1)).to(DEVICE)
        exact_cache = filled(exact_model, ids[:, :held], pads, room)
        exact = plain(exact_model, ids[:, held:], exact_cache)
        cache = filled(model, ids[:, :held], pads, room)
        own_cache = copy.deepcopy(cache)
        own = plain(model, ids[:, held:], own_cache)
        now = state(ids[:, held].tolist(), held, pads, room)
        with torch.no_grad():
            logits, best = device_step.step(model, cache, now, VOCAB)
        assert logits.shape == (texts, VOCAB)
        pairs = ((logits, cache), (own, own_cache), (exact, exact_cache))
        found.append(tuple(results(*pair, held) for pair in pairs))
    for which in range(3):
        mine, models, right = (
            torch.stack([x[which] for x in side]) for side in zip(*found, strict=True)
        )
        error, allowed = (mine - right).abs(), (models - right).abs()
        floor = torch.finfo(dtype).eps * right.abs().max()
        assert error.max() <= 2 * allowed.max() + floor
        assert error.square().mean().sqrt() <= 1.25 * allowed.square().mean().sqrt() + floor / 4
    if best is not None:
        drawn = state([7] * texts, held, pads, room)
        triton_step.advance(drawn, best, room - 1)
        assert drawn.id_B.tolist() == logits.argmax(-1).tolist() == drawn.tokens_LB[0].tolist()


@pytest.mark.parametrize("fault", ["place", "pad", "another token", "stale values"])
def test_that_comparison_sees_a_wrong_state(make_model: Make, fault: str) -> None:
    model = make_model(context_length=48).to(DEVICE)
    ids = torch.randint(VOCAB, (2, 21), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cache = filled(model, ids[:, :20], [0, 5], 48)
    right = plain(model, ids[:, 20:], copy.deepcopy(cache))
    now = state(ids[:, 20].tolist(), 20, [0, 5], 48)
    if fault == "stale values":
        cache.v_LBNSH[:, 1, :, 5:20] = 5
    else:
        {"place": now.place_B, "pad": now.pad_B, "another token": now.id_B}[fault][1] -= 1
    with torch.no_grad():
        found, _ = device_step.step(model, cache, now, VOCAB)
    error = (found - right).abs().amax(1)
    assert error[0] < 1e-3 < 0.1 < error[1]


def test_equal_logits_draw_the_lowest_id(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "TILE", 512)
    model = make_model(context_length=48).to(DEVICE)
    with torch.no_grad():
        model.ln_f.bias.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[[71, 90, 130]] = 1
        now = state([3], 46, [46], 48)
        _, best = device_step.step(model, filled(model, torch.zeros(1, 0), [46], 48), now, VOCAB)
    assert best is not None
    triton_step.advance(now, best, 47)
    assert now.tokens_LB[0].tolist() == now.id_B.tolist() == [71]
    assert (now.place_B.tolist(), now.drawn_B.tolist()) == ([47], [1])
    triton_step.advance(now, None, 47)
    assert (now.place_B.tolist(), now.drawn_B.tolist()) == ([47], [2])
    assert now.tokens_LB[1].tolist() == [71]
