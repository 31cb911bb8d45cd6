"""Decoding: the same tokens with and without the cache, alone and side by side.

pytest tests/generation/test_decode.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashgpt.generation import rows as arranging
from flashgpt.generation.cache import KVCache, LayerKV
from flashgpt.generation.decode import decode, decode_rows
from flashgpt.generation.forward import Forward
from flashgpt.generation.rows import Logits, Row
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import SampleConfig

CONTEXT = 8
Make = Callable[..., GPTModel]
GREEDY = SampleConfig(temperature=0, max_new_tokens=30)


def _by_definition(model: GPTModel, prompt: list[int], config: SampleConfig) -> list[int]:
    """Greedy, one whole forward pass a token."""
    window, found = list(prompt), []
    while len(found) < config.max_new_tokens:
        token = int(model(torch.tensor([window]))[0, -1].argmax())
        found.append(token)
        if len(window) == CONTEXT and config.past_context == "stop":
            break
        if len(window) == CONTEXT:
            window = window[-(CONTEXT // 2) :]
        window.append(token)
    return found


@pytest.mark.parametrize("past_context", ["stop", "slide"])
@pytest.mark.parametrize("length", range(1, CONTEXT + 1))
def test_greedy_tokens_are_the_same_with_and_without_the_cache(
    model: GPTModel, length: int, past_context: Any
) -> None:
    prompt = [(37 * i + length) % 256 for i in range(length)]
    config = SampleConfig(temperature=0, max_new_tokens=30, past_context=past_context)
    expected = _by_definition(model, prompt, config)
    assert len(expected) == (30 if past_context == "slide" else CONTEXT - length + 1)
    for use_cache in (True, False):
        found = decode(model, prompt, config, vocab_size=257, use_cache=use_cache)
        assert list(found) == expected
    if past_context == "slide":
        assert len(set(expected)) > 5  # no fixed point that any rule would reach


@pytest.mark.parametrize("fault", ["stale row", "no positions", "not cleared"])
def test_that_comparison_sees_a_wrong_cache(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    good = list(decode(model, [1, 2, 3], GREEDY, vocab_size=257))
    if fault == "stale row":
        extend = LayerKV.extend

        def stale(self: LayerKV, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return extend(self, k if self.length % 2 else torch.zeros_like(k), v)

        monkeypatch.setattr(LayerKV, "extend", stale)
    elif fault == "no positions":
        call = Forward.__call__

        def at_the_beginning(self: Forward, ids: Tensor, *rest: Any) -> Tensor:
            return call(self, ids, *rest[:2], torch.zeros_like(ids))

        monkeypatch.setattr(Forward, "__call__", at_the_beginning)
    else:
        monkeypatch.setattr(Logits, "_forward", _without_clearing(Logits._forward))
    assert list(decode(model, [1, 2, 3], GREEDY, vocab_size=257)) != good


def _without_clearing(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """After a slide, only the last half of the new window is computed anew."""

    def logits(self: Logits, ids: list[list[int]], pads: Any, cache: Any, fast: Any) -> Tensor:
        if cache.length == 0 and len(ids[0]) == CONTEXT // 2 + 1:
            cache.k_LBNSH.zero_(), cache.v_LBNSH.zero_()
            cache.advance(2)
            return inner(self, [row[2:] for row in ids], pads, cache, fast)
        return inner(self, ids, pads, cache, fast)

    return logits


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_seeds_draw_equal_text_with_and_without_the_cache(model: GPTModel, seed: int) -> None:
    config = SampleConfig(seed=seed, max_new_tokens=40, temperature=1.0, top_k=20)
    streams = [
        list(decode(model, [5], config, vocab_size=257, use_cache=use_cache))
        for use_cache in (True, False, True)
    ]
    assert streams[0] == streams[1] == streams[2] and len(streams[0]) == 40
    other = SampleConfig(**{**vars(config), "seed": 2})
    assert list(decode(model, [5], other, vocab_size=257)) != streams[0]


def test_the_default_generator_is_left_alone(model: GPTModel) -> None:
    before = torch.get_rng_state()
    list(decode(model, [5], SampleConfig(max_new_tokens=5), vocab_size=257))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_between_tokens_the_model_is_as_it_was(make_model: Make, training: bool) -> None:
    model = make_model(drop_rate=0.5).train(training)
    ids = torch.tensor([[1, 2, 3]])
    expected = list(decode(make_model(drop_rate=0.5), [5], GREEDY, vocab_size=257))
    found = []
    for token in decode(model, [5], GREEDY, vocab_size=257):
        found.append(token)
        assert model.training is training
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        model.zero_grad()
        model(ids, ids).backward()  # weights and graph are usable
        assert all(p.grad is not None and not p.is_inference() for p in model.parameters())
    assert found == expected  # dropout was off for the tokens


def test_a_stream_that_is_left_midway_leaves_the_mode(make_model: Make) -> None:
    model = make_model().train()
    next(decode(model, [5], GREEDY, vocab_size=257))
    assert model.training
    with torch.no_grad():
        next(decode(model, [5], GREEDY, vocab_size=257))
        assert not torch.is_grad_enabled()


def test_ids_past_the_tokenizers_are_never_drawn(make_model: Make) -> None:
    model = make_model(vocab_size=320)
    with torch.no_grad():
        model.lm_head.weight[257:] *= 100
    for config in (GREEDY, SampleConfig(temperature=5.0, top_k=0, max_new_tokens=200)):
        assert max(decode(model, [5], config, vocab_size=257)) < 257
    assert max(decode(model, [5], GREEDY, vocab_size=320)) >= 257  # the mask is what held them


def test_end_of_text_ends_and_is_not_given(model: GPTModel) -> None:
    tokens = list(decode(model, [5], GREEDY, vocab_size=257))
    eos = tokens[4]
    first = tokens.index(eos)
    assert list(decode(model, [5], GREEDY, vocab_size=257, eos_id=eos)) == tokens[:first]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt must hold at least one token"),
        ([1] * (CONTEXT + 1), "prompt must be at most context_length 8 tokens, got 9"),
        ([1, 257], r"prompt ids must be in 0 \.\. 256 \(vocab_size 257\), got 257"),
        ([-1], r"prompt ids must be in 0 \.\. 256 .*, got -1"),
    ],
)
def test_bad_prompts_are_refused(model: GPTModel, prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(decode(model, prompt, GREEDY, vocab_size=257))


PROMPTS = [[5], [1, 2, 3], [7] * CONTEXT, [9, 8, 7, 6, 5, 4, 3], [1, 2, 3], [200, 100], [31] * 5]


def _alone(model: GPTModel, config: SampleConfig, **options: Any) -> list[tuple[list[int], Any]]:
    """Ids and reason of each prompt, decoded by itself."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        row = Row(list(prompt), config.max_new_tokens, sample=number % 3)
        for _ in decode_rows(model, [row], config, vocab_size=257, **options):
            pass
        found.append((row.ids, row.reason))
    return found


def _together(model: GPTModel, config: SampleConfig, **options: Any) -> list[tuple[list[int], Any]]:
    """The same, all of them side by side."""
    rows = [
        Row(list(prompt), config.max_new_tokens, sample=number % 3)
        for number, prompt in enumerate(PROMPTS)
    ]
    for _ in decode_rows(model, rows, config, vocab_size=257, **options):
        pass
    return [(row.ids, row.reason) for row in rows]


DRAWN = SampleConfig(temperature=1.0, top_k=20, max_new_tokens=30, seed=4)


@pytest.mark.parametrize("past_context", ["stop", "slide"])
@pytest.mark.parametrize("config", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("use_flash", [True, False])
def test_a_row_is_the_same_alone_and_beside_others(
    make_model: Make, config: SampleConfig, past_context: Any, use_flash: bool
) -> None:
    """Lengths 1 to the whole context; rows slide and end at different steps."""
    model = make_model(use_flash=use_flash)
    config = dataclasses.replace(config, past_context=past_context)
    alone = _alone(model, config)
    ends = {"eos_id": alone[1][0][3], "use_cache": True}
    for options in ({}, ends, {"use_cache": False}):
        expected = _alone(model, config, **options)
        assert _together(model, config, **options) == expected
    reasons = {reason for _, reason in _alone(model, config, **ends)}
    assert "eos" in reasons and len(reasons) > 1
    assert len({len(ids) for ids, _ in alone}) > 1 or past_context == "slide"
    assert [ids for ids, _ in alone][1] != [ids for ids, _ in alone][5]


@pytest.mark.parametrize("fault", ["position", "mask", "no mask", "order", "copy"])
def test_that_comparison_sees_a_row_that_is_off_by_one(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    expected = _alone(model, GREEDY)
    assert _together(model, GREEDY) == expected
    call = Forward.__call__

    def wrong(
        self: Forward, ids: Tensor, cache: KVCache, documents: Any = None, positions: Any = None
    ) -> Tensor:
        if documents is not None:
            if fault == "position":
                positions = (positions - 1).clamp(min=0)
            elif fault == "mask":  # the last padding is seen
                documents = torch.cat([documents[:, 1:], documents[:, -1:]], 1)
            elif fault == "no mask":
                documents = None
        return call(self, ids, cache, documents, positions)

    if fault == "order":
        after = Logits.after
        monkeypatch.setattr(Logits, "after", lambda *a: after(*a).roll(1, 0))
    elif fault == "copy":
        gather = arranging.gather

        def shifted(sources: Any, capacity: int) -> KVCache:
            made = gather(sources, capacity)
            for row, pad in enumerate(made.pads):
                if pad:  # the first position of the text is not copied
                    made.k_LBNSH[:, row, :, pad] = made.v_LBNSH[:, row, :, pad] = 0
            return made

        monkeypatch.setattr(arranging, "gather", shifted)
    else:
        monkeypatch.setattr(Forward, "__call__", wrong)
    assert _together(model, GREEDY) != expected


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_prompts_and_samples_are_as_they_are_alone(
    model: GPTModel, data: st.DataObject
) -> None:
    ids = st.lists(st.integers(0, 256), min_size=1, max_size=CONTEXT)
    prompts = data.draw(st.lists(ids, min_size=1, max_size=4))
    config = data.draw(
        st.builds(
            SampleConfig,
            temperature=st.sampled_from([0.0, 0.7, 1.3]),
            top_k=st.sampled_from([0, 10]),
            top_p=st.sampled_from([None, 0.8]),
            past_context=st.sampled_from(["stop", "slide"]),
            max_new_tokens=st.integers(1, 20),
            seed=st.integers(0, 2**63 - 1),
        )
    )
    rows = [Row(list(p), config.max_new_tokens, sample) for p in prompts for sample in range(2)]
    for _ in decode_rows(model, rows, config, vocab_size=257, eos_id=3):
        pass
    for number, row in enumerate(rows):
        prompt, use_cache = prompts[number // 2], bool(number % 2)
        alone = Row(list(prompt), config.max_new_tokens, row.sample)
        options = {"vocab_size": 257, "eos_id": 3, "use_cache": use_cache}
        assert [x.id for _, x in decode_rows(model, [alone], config, **options)] == row.ids
        assert alone.reason == row.reason and row.reason is not None


def test_logits_of_a_padded_row_are_those_of_the_row_alone(make_model: Make) -> None:
    """In float64 to 1e-12, over steps, a slide and a row that ends; unit-scale logits."""
    model = make_model().double()
    for use_cache in (True, False):
        rows = [Row(list(prompt), 30) for prompt in PROMPTS]
        together = Logits(model, use_cache=use_cache)
        for step in range(12):
            alive = rows if step < 4 else rows[::2]
            found = together.after(alive)
            for row, logits_V in zip(alive, found, strict=True):
                with torch.no_grad():
                    exact = model(torch.tensor([row.window]))[0, -1]
                torch.testing.assert_close(logits_V, exact, atol=1e-12, rtol=1e-12)
                row.push(int(exact.argmax()), CONTEXT, "slide")
        assert float(found.std()) > 0.5


def test_samples_of_a_prompt_share_its_prefill(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = Logits._forward

    def counted(self: Logits, ids: Any, *more: Any) -> Tensor:
        seen.append((len(ids), len(ids[0])))
        return forward(self, ids, *more)

    monkeypatch.setattr(Logits, "_forward", counted)
    rows = [Row([1, 2, 3], 3, sample) for sample in range(4)]
    config = SampleConfig(temperature=9.0, top_k=0, max_new_tokens=3)
    list(decode_rows(model, rows, config, vocab_size=257))
    assert seen == [(1, 3), (4, 1), (4, 1)]
    assert len({tuple(row.ids) for row in rows}) == 4


def test_the_reason_is_why_it_ended(model: GPTModel) -> None:
    def run(config: SampleConfig, eos_id: int | None = None) -> tuple[list[int], Any]:
        row = Row([5], config.max_new_tokens)
        for _ in decode_rows(model, [row], config, vocab_size=257, eos_id=eos_id):
            pass
        return row.ids, row.reason

    ids, reason = run(GREEDY)
    assert reason == "length" and len(ids) == 30
    first = ids.index(ids[4])
    assert run(GREEDY, ids[4]) == (ids[:first], "eos")
    by_id = dataclasses.replace(GREEDY, stop_ids=(ids[4], 256))
    assert run(by_id) == (ids[:first], "stop")
    assert run(by_id, ids[4]) == (ids[:first], "eos")
    stop = dataclasses.replace(GREEDY, past_context="stop")
    assert run(stop) == (ids[:CONTEXT], "context")
    assert run(dataclasses.replace(stop, max_new_tokens=CONTEXT)) == (ids[:CONTEXT], "length")


def test_log_probabilities_are_the_models_own(make_model: Make) -> None:
    """Whatever the temperature and the restriction; a padded vocabulary is left out."""
    model = make_model(vocab_size=300)
    config = SampleConfig(temperature=0.5, top_k=3, max_new_tokens=12, seed=2)
    rows = [Row([5], 12), Row([1, 2, 3], 12)]
    windows = {row: list(row.window) for row in rows}
    for row, drawn in decode_rows(model, rows, config, vocab_size=257, top=4):
        with torch.no_grad():
            logits = model(torch.tensor([windows[row]]))[0, -1, :257].double()
        expected = logits.log_softmax(-1)
        assert drawn.logprob == pytest.approx(float(expected[drawn.id]), abs=2e-4)
        best = expected.topk(4)
        assert [token for token, _ in drawn.top] == best.indices.tolist()
        assert [x for _, x in drawn.top] == pytest.approx(best.values.tolist(), abs=2e-4)
        windows[row] = list(row.window)
    for top in (-1, 258):
        with pytest.raises(ValueError, match=rf"logprobs must be in 0 \.\. .*257, got {top}"):
            next(decode_rows(model, [Row([1], 1)], config, vocab_size=257, top=top))


def test_stop_ids_past_the_vocabulary_are_refused(model: GPTModel) -> None:
    config = SampleConfig(stop_ids=(3, 257))
    with pytest.raises(ValueError, match=r"stop_ids must be below .* 257, got 257"):
        next(decode(model, [1], config, vocab_size=257))
