"""Drawing ahead of the host: the same texts as one step after the other, whoever ends when.

Without a GPU the graph is a plain call, of the model itself where `on_device` is not asked for:
Triton's interpreter is slow.
pytest tests/generation/test_ahead.py
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.generation.cache import KVCache
from flashgpt.generation.decode import decode, decode_rows
from flashgpt.generation.rows import Row
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import SampleConfig

pytest.importorskip("triton")

from flashgpt.generation import ahead, device_step, triton_step

CUDA = torch.cuda.is_available()
VOCAB = 257
Make = Callable[..., GPTModel]


class PlainEvent:
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


def plain_step(
    model: GPTModel, cache: KVCache, state: triton_step.State, vocab_size: int
) -> tuple[Tensor, None]:
    """device_step.step by the model's own forward."""
    length, cache.length = cache.length, int(state.place_B[0])
    place_S = torch.arange(cache.length + 1)
    pad_B1 = state.pad_B[:, None]
    logits_B1V = model(
        state.id_B[:, None],
        documents_BT=(place_S >= pad_B1).int(),
        positions_BT=(place_S[-1:] - pad_B1).clamp(min=0),
        cache=cache,
    )
    cache.length = length
    return logits_B1V[:, 0, :vocab_size], None


def plain_advance(state: triton_step.State, best: None, last_place: int) -> None:
    """triton_step.advance."""
    state.tokens_LB[state.drawn_B[0]] = state.id_B
    state.drawn_B.add_(1)
    state.place_B.add_(1).clamp_(max=last_place)


@pytest.fixture(autouse=True)
def graphs(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, graphs_without_gpu: None
) -> Callable[[], int]:
    """Lets every run be drawn ahead; how often a graph was made."""
    monkeypatch.setattr(ahead, "LEAST_TOKENS", 1)
    made: list[ahead.Graph] = []
    start = ahead.Graph.__init__

    def count(self: ahead.Graph, *rest: Any) -> None:
        made.append(self)
        start(self, *rest)

    monkeypatch.setattr(ahead.Graph, "__init__", count)
    if not CUDA:
        monkeypatch.setattr(torch.cuda, "Event", PlainEvent)
        if "on_device" not in request.fixturenames:
            monkeypatch.setattr(device_step, "step", plain_step)
            monkeypatch.setattr(triton_step, "advance", plain_advance)
    return lambda: len(made)


@pytest.fixture
def on_device() -> None:
    """The kernels themselves."""


@pytest.fixture
def model(make_model: Make) -> GPTModel:
    """One that lives as long as its test."""
    return make_model(context_length=12).to("cuda" if CUDA else "cpu")


def texts(
    model: GPTModel, prompts: list[list[int]], config: SampleConfig, eos: int | None = None
) -> list[tuple[list[int], str | None]]:
    rows = [Row(list(prompt), config.max_new_tokens, at) for at, prompt in enumerate(prompts)]
    for _ in decode_rows(model, rows, config, vocab_size=VOCAB, eos_id=eos):
        pass
    return [(row.ids, row.reason) for row in rows]


def one_by_one(*arguments: Any, **more: Any) -> list[tuple[list[int], str | None]]:
    """`texts`, nothing drawn ahead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "LEAST_TOKENS", 10**9)
        return texts(*arguments, **more)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0, "past_context": "slide"},
        {"temperature": 0, "past_context": "stop"},
        {"temperature": 1.0, "top_k": 20, "seed": 1},
        {"temperature": 2.0, "top_k": 0, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
def test_texts_are_those_drawn_one_by_one(
    model: GPTModel, changes: dict[str, Any], graphs: Callable[[], int]
) -> None:
    config = SampleConfig(max_new_tokens=18, **changes)
    prompts = [[5], [7, 8, 9], [1, 2]]
    found = texts(model, prompts, config)
    assert found == one_by_one(model, prompts, config)
    assert graphs() >= 1 and len({tuple(ids) for ids, _ in found}) == 3
    assert texts(model, prompts[:1], config) == found[:1]


def test_kernels_draw_them_too(model: GPTModel, on_device: None) -> None:
    config = SampleConfig(temperature=0, max_new_tokens=5)
    prompts = [[5], [7, 8, 9]]
    found = texts(model, prompts, config)
    assert found == one_by_one(model, prompts, config)


def test_texts_end_one_after_the_other(model: GPTModel, graphs: Callable[[], int]) -> None:
    config = SampleConfig(max_new_tokens=11, temperature=1.0, top_k=0, seed=4)
    prompts = [[token] for token in (3, 5, 8, 13)]
    whole = [ids for ids, _ in texts(model, prompts, config)]
    made = graphs()
    eos, stop = whole[1][2], whole[2][4]
    config = SampleConfig(**{**vars(config), "stop_ids": (stop,)})
    found = texts(model, prompts, config, eos)
    assert found == one_by_one(model, prompts, config, eos)
    assert [reason for _, reason in found] == ["length", "eos", "stop", "length"]
    assert [ids for ids, _ in found] == [whole[0], whole[1][:2], whole[2][:4], whole[3]]
    # With two of four ended the others go on in a graph of their own.
    assert graphs() == made + 1


def test_a_graph_is_made_once_and_serves_one_stream_at_a_time(
    model: GPTModel, graphs: Callable[[], int]
) -> None:
    config = SampleConfig(temperature=0, max_new_tokens=8)
    alone = [list(decode(model, [token], config, vocab_size=VOCAB)) for token in (3, 5)]
    assert graphs() == 1
    streams = [decode(model, [token], config, vocab_size=VOCAB) for token in (3, 5)]
    together = []
    for pair in zip(*streams, strict=True):
        together.append(pair)
        assert len(together) == 1 or not ahead._kept  # none for others while it is in use
    assert [list(ids) for ids in zip(*together, strict=True)] == alone
    assert graphs() == 2


def test_what_a_stream_left_midway_leaves_is_taken_up(
    model: GPTModel, graphs: Callable[[], int]
) -> None:
    config = SampleConfig(temperature=0, max_new_tokens=8)
    expected = list(decode(model, [3], config, vocab_size=VOCAB))
    stream = decode(model, [5], config, vocab_size=VOCAB)
    next(stream), next(stream), stream.close()
    assert list(decode(model, [3], config, vocab_size=VOCAB)) == expected
    assert graphs() == 1


def test_new_weights_are_used(model: GPTModel, graphs: Callable[[], int]) -> None:
    config = SampleConfig(temperature=0, max_new_tokens=6)
    before = texts(model, [[3]], config)
    with torch.no_grad():
        model.wte.weight.neg_()  # in place: the graph reads them where they are
    after = texts(model, [[3]], config)
    assert after == one_by_one(model, [[3]], config) != before and graphs() == 1
    for parameter in model.parameters():
        parameter.data = parameter.data.neg()  # elsewhere
    assert texts(model, [[3]], config) == one_by_one(model, [[3]], config)
    assert graphs() == 2


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU: a plain call needs its model")
def test_a_graph_does_not_keep_its_model(make_model: Make) -> None:
    model = make_model().cuda()
    texts(model, [[3]], SampleConfig(temperature=0, max_new_tokens=4))
    kept = weakref.ref(model)
    assert len(ahead._kept) == 1
    del model
    gc.collect()
    assert kept() is None and not ahead._kept


def test_at_most_so_many_steps_are_under_way(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = 0
    launch = ahead.Ahead._launch

    def count(self: ahead.Ahead, graph: ahead.Graph) -> None:
        nonlocal launched
        launched += 1
        launch(self, graph)

    monkeypatch.setattr(ahead.Ahead, "_launch", count)
    config = SampleConfig(temperature=0, max_new_tokens=8)
    for drawn, _ in enumerate(decode(model, [3], config, vocab_size=VOCAB), 1):
        assert launched == (0 if drawn == 1 else min(drawn - 1 + ahead.STEPS, 7))
    assert drawn == 8


def test_other_models_are_drawn_from_one_by_one(
    make_model: Make, graphs: Callable[[], int]
) -> None:
    model = make_model(use_flash=False).to("cuda" if CUDA else "cpu")
    texts(model, [[3]], SampleConfig(temperature=0, max_new_tokens=4))
    assert graphs() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_weights_on_a_gpu_are_served() -> None:
    weight = torch.ones(2, 2, device="cuda")
    assert device_step.serves(weight) and device_step.serves(weight.bfloat16())
    assert not device_step.serves(weight.double()) and not device_step.serves(weight.cpu())
