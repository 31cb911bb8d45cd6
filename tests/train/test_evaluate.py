"""Loss and bits per byte against sums by hand. pytest tests/train/test_evaluate.py"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flashgpt.data.shards import TokenSplit
from flashgpt.model.gpt2 import GPTModel
from flashgpt.train.evaluate import Evaluation, evaluate
from flashgpt.train.loop import Listener

CFG = dict(vocab_size=7, context_length=5, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.5)
LENGTHS = np.array([1, 2, 3, 1, 4, 2, 0], dtype=np.int32)  # the last one stands for no byte


def _split() -> TokenSplit:
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, 7, size).astype(np.uint16) for size in (23, 1, 11)]
    return TokenSplit(shards, [np.zeros(1, np.int64)] * 3, 0)


def _by_hand(model: GPTModel, split: TokenSplit) -> tuple[float, int, int]:
    """Nats, tokens and bytes: each token from those before it in its window, one at a time."""
    nats, tokens, n_bytes = 0.0, 0, 0
    for number, shard in enumerate(split.tokens):
        ids = shard.astype(np.int64).tolist()
        for at in range(1, len(ids)):
            if number in split.ignored and split.ignored[number][at]:
                continue
            start = (at - 1) // 5 * 5
            logits = model(torch.tensor([ids[start:at]]))[0, -1].double().detach()
            nats += float(logits.exp().sum().log() - logits[ids[at]])
            tokens += 1
            n_bytes += int(LENGTHS[ids[at]])
    return nats, tokens, n_bytes


def test_sums_are_those_by_hand() -> None:
    torch.manual_seed(0)
    model, split = GPTModel(CFG).eval(), _split()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)  # so that the loss is not that of a uniform guess
    nats, tokens, n_bytes = _by_hand(model, split)
    found = evaluate(model, split, LENGTHS)
    assert (found.tokens, found.bytes) == (tokens, n_bytes) == (32, n_bytes)
    assert found.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert abs(found.loss - math.log(7)) > 0.1


def test_only_targets_that_count_are_counted() -> None:
    torch.manual_seed(0)
    model, split = GPTModel(CFG).eval(), _split()
    rng = np.random.default_rng(1)
    masks = {0: rng.random(23) < 0.5, 2: np.ones(11, np.bool_)}
    masks[0][6:16] = True  # two windows of which nothing counts, in the middle and at the end
    masks[2][3] = False
    split = dataclasses.replace(split, ignored=masks)
    nats, tokens, n_bytes = _by_hand(model, split)
    found = evaluate(model, split, LENGTHS)
    assert (found.tokens, found.bytes) == (tokens, n_bytes)
    assert 1 < tokens < 13
    assert found.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    nothing = {number: np.ones(len(ids), np.bool_) for number, ids in enumerate(split.tokens)}
    with pytest.raises(ValueError, match="must have a target that counts"):
        evaluate(model, dataclasses.replace(split, ignored=nothing), LENGTHS)


def _strided_by_hand(model: GPTModel, split: TokenSplit, stride: int) -> tuple[float, int]:
    """Nats and tokens: each token from those before it in the first window that reaches it."""
    nats, tokens = 0.0, 0
    for number, shard in enumerate(split.tokens):
        ids = shard.astype(np.int64).tolist()
        for at in range(1, len(ids)):
            if number in split.ignored and split.ignored[number][at]:
                continue
            start = next(s for s in range(0, len(ids), stride) if at <= s + 5)
            assert at - start > min(5 - stride, at - 1)
            logits = model(torch.tensor([ids[start:at]]))[0, -1].double().detach()
            nats += float(logits.exp().sum().log() - logits[ids[at]])
            tokens += 1
    return nats, tokens


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("some", [False, True])
def test_strided_sums_are_those_by_hand(stride: int, some: bool) -> None:
    torch.manual_seed(0)
    model, split = GPTModel(CFG).eval(), _split()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)
    if some:
        ignored = {0: np.random.default_rng(1).random(23) < 0.5}
        split = dataclasses.replace(split, ignored=ignored)
    nats, tokens = _strided_by_hand(model, split, stride)
    found = evaluate(model, split, LENGTHS, stride=stride)
    assert found.tokens == tokens and (some or tokens == 32)
    assert found.loss == pytest.approx(nats / tokens, rel=1e-6)
    plain = evaluate(model, split, LENGTHS)
    if stride == 5:
        assert found == plain
    else:
        assert abs(found.loss - plain.loss) > 1e-3
        other = evaluate(model, split, LENGTHS, stride=stride % 4 + 1)
        assert abs(found.loss - other.loss) > 1e-3  # an advance that is off by one is seen


def test_a_stride_outside_the_context_is_refused() -> None:
    for stride in (0, 6):
        with pytest.raises(ValueError, match=rf"stride must be in 1 \.\. .* 5, got {stride}"):
            evaluate(GPTModel(CFG), _split(), LENGTHS, stride=stride)
    with pytest.raises(ValueError, match="max_tokens must be left out with a stride, got 9"):
        evaluate(GPTModel(CFG), _split(), LENGTHS, stride=2, max_tokens=9)


def test_it_uses_eval_mode_and_gives_the_mode_back() -> None:
    torch.manual_seed(0)
    model = GPTModel(CFG)
    for training in (True, False):
        model.train(training)
        found = [evaluate(model, _split(), LENGTHS) for _ in range(2)]
        assert found[0] == found[1] and model.training is training
        assert all(p.grad is None for p in model.parameters())
    with pytest.raises(IndexError):
        evaluate(model.train(), _split(), LENGTHS[:2])
    assert model.training


def test_few_tokens_are_whole_windows_and_the_same_each_time() -> None:
    torch.manual_seed(0)
    model, heard = GPTModel(CFG), []
    found = evaluate(model, _split(), LENGTHS, max_tokens=12, progress=heard.append)
    assert found.tokens == 10 and heard == [10]
    assert found == evaluate(model, _split(), LENGTHS, max_tokens=12)


def test_text_of_no_bytes_has_no_bits_per_byte() -> None:
    split = TokenSplit([np.array([6, 6], np.uint16)], [np.zeros(1, np.int64)], 0)
    found = evaluate(GPTModel(CFG), split, LENGTHS)
    assert math.isinf(found.bits_per_byte) and found.tokens == 1


def test_perplexity_of_a_hopeless_model_is_a_number() -> None:
    assert math.isfinite(Evaluation(1e9, 1.0, 1, 1).perplexity)


def test_the_runs_last_evaluation_is_what_evaluate_finds(
    trained: Any, cli: Callable[..., Any]
) -> None:
    found = json.loads(cli("evaluate", trained.folder, "--json").done())
    last = trained.metrics[-1]
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-9)
    assert found["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-9)
    assert [e["step"] for e in trained.metrics if "val_loss" in e] == [4, 8, 12]


def test_a_listener_says_nothing_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    listener = Listener()
    listener.step({})
    listener.evaluation(1, Evaluation(1.0, 1.0, 1, 1))
    listener.note("")
    listener.sample("")
    assert capsys.readouterr() == ("", "")
