"""Folders that transformers reads and writes. pytest tests/interop/test_huggingface.py

The budget for logits is that of the other kernels: against transformers in float64, our float32
errs at most twice as much as transformers' own float32 does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashgpt.generation.decode import decode
from flashgpt.interop import huggingface
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import SampleConfig
from flashgpt.tokenizer import Tokenizer
from flashgpt.train.checkpoint import load

transformers = pytest.importorskip("transformers")

CFG = dict(vocab_size=61, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.1)
TOLERANCE = 2.0


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _theirs(folder: Path) -> Any:
    return transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


def _ids(vocab_size: int, length: int) -> Tensor:
    return torch.randint(vocab_size, (4, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _agree(ours: GPTModel, theirs: Any) -> None:
    ids = _ids(ours.cfg.vocab_size, ours.cfg.context_length)
    single, found = theirs(ids).logits, ours.eval()(ids)
    exact = theirs.double()(ids).logits
    theirs.float()
    allowed = TOLERANCE * (single - exact).abs().max()
    assert (found - exact).abs().max() <= allowed
    assert exact.std() > 0.01 and allowed < 1e-5 * exact.abs().max()


@torch.no_grad()
def _greedy(ours: GPTModel, theirs: Any, prompt: list[int], count: int) -> None:
    expected = theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=count, eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    config = SampleConfig(temperature=0, max_new_tokens=count)
    assert list(decode(ours, prompt, config, vocab_size=ours.cfg.vocab_size)) == expected


def _random(tied: bool = True, scale: float = 5.0, **changes: Any) -> Any:
    """A random model of transformers, biases and gains included."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3)
    config = transformers.GPT2Config(
        **{**sizes, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0, **changes}
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02).mul_(scale if p.dim() == 2 else 1)
    return model


def test_transformers_loads_a_checkpoint_as_it_is(trained: Any) -> None:
    folder = trained.checkpoints[-1]
    ours, tokenizer = load(folder)
    assert tokenizer is not None
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    _agree(ours, theirs.eval())
    _greedy(ours, theirs, tokenizer.encode("the cat"), 20)
    assert theirs.config.eos_token_id == tokenizer.eos_id == 256
    assert theirs.config.attn_pdrop == 0.1 and theirs.config.tie_word_embeddings
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    text = "dogs  ran\n\t\u00e9\U0001f642 x"
    assert fast(text)["input_ids"] == tokenizer.encode(text)
    assert fast.decode(tokenizer.encode(text)) == text
    assert fast.eos_token_id == tokenizer.eos_id


def test_a_trained_tokenizer_reads_the_same_in_transformers(tmp_path: Path, text: Path) -> None:
    tokenizer = Tokenizer.train([text.read_text()], 290)
    model = GPTModel({**CFG, "vocab_size": tokenizer.vocab_size})
    huggingface.save(model, tmp_path, eos_id=tokenizer.eos_id)
    tokenizer.save(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    sample = text.read_text()[:400] + " it's 12\n\n  e\u0301"
    assert fast(sample)["input_ids"] == tokenizer.encode(sample)
    assert len(fast) == tokenizer.vocab_size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_folder_of_transformers_loads(tmp_path: Path, tied: bool, prefix: bool) -> None:
    theirs = _random(tied)
    theirs.save_pretrained(tmp_path)
    if not prefix:
        path = tmp_path / "model.safetensors"
        tensors = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
        # What the original release has beside its weights.
        tensors |= {"h.0.attn.bias": torch.ones(1), "h.1.attn.masked_bias": torch.ones(())}
        save_file(tensors, path)
    ours = huggingface.load(tmp_path)
    assert ours.cfg.qkv_bias and ours.cfg.tie_weights is tied
    assert (ours.lm_head.weight is ours.wte.weight) is tied
    _agree(ours, theirs)
    _greedy(ours, theirs, [1, 2, 3], 13)


@pytest.mark.parametrize("name", ["gelu_new", "gelu", "gelu_pytorch_tanh"])
def test_activations(tmp_path: Path, name: str) -> None:
    theirs = _random(activation_function=name)
    theirs.save_pretrained(tmp_path)
    _agree(huggingface.load(tmp_path), theirs)


def test_the_comparison_sees_another_activation(tmp_path: Path) -> None:
    theirs = _random(activation_function="gelu")
    theirs.save_pretrained(tmp_path)
    _change(tmp_path, activation_function="gelu_new")
    with pytest.raises(AssertionError):
        _agree(huggingface.load(tmp_path), theirs)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_keeps_every_bit(tmp_path: Path, qkv_bias: bool, tied: bool) -> None:
    torch.manual_seed(0)
    more = dict(tie_weights=tied, activation="gelu", use_flash=False)
    model = GPTModel({**CFG, "qkv_bias": qkv_bias, **more})
    huggingface.save(model, tmp_path, eos_id=3)
    again = huggingface.load(tmp_path)
    assert again.cfg == model.cfg
    state, found = model.state_dict(), again.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(state[name], found[name]) for name in state)
    tensors = load_file(tmp_path / "model.safetensors")
    biases = [tensors[f"transformer.h.{i}.attn.c_attn.bias"] for i in range(2)]
    assert all(bias.shape == (72,) and (qkv_bias or not bias.any()) for bias in biases)
    assert ("lm_head.weight" in tensors) is not tied
    _agree(again, _theirs(tmp_path))


def test_a_bias_that_is_there_is_not_dropped(tmp_path: Path) -> None:
    huggingface.save(GPTModel(CFG), tmp_path, eos_id=None)
    _tensors(tmp_path, {"transformer.h.1.attn.c_attn.bias": torch.ones(72)})
    with pytest.raises(ValueError, match=r"h\.1\.attn\.c_attn\.bias' must be zero for qkv_bias"):
        huggingface.load(tmp_path)


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "left out"}))


def _tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors: dict[str, Any] = {**load_file(path), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "gpt_neo"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("n_inner", 95),
        ("activation_function", "relu"),
        ("attn_pdrop", 0.2),
        ("embd_pdrop", 0.2),
        ("resid_pdrop", 0.2),
        ("n_head", 5),
        ("vocab_size", "left out"),
        ("n_positions", "left out"),
        ("n_embd", "left out"),
        ("n_head", "left out"),
        ("n_layer", "left out"),
    ],
)
def test_a_setting_we_do_not_compute_is_refused_by_name(
    tmp_path: Path, cli: Callable[..., Any], name: str, value: Any
) -> None:
    huggingface.save(GPTModel(CFG), tmp_path, eos_id=None)
    _change(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=name if name != "n_head" or value != 5 else "n_heads"):
        huggingface.read_config(tmp_path)
    assert "generate" not in cli("generate", tmp_path, "--prompt", "a").error(1)


def test_every_field_of_gpt2config_is_mapped_fixed_or_without_effect() -> None:
    """A field that transformers adds must be looked at before this passes again."""
    no_effect = {
        # of a classification head; of decoding by transformers; of its memory layout
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        *("summary_first_dropout", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
        "initializer_range",
    }
    own = set(vars(transformers.GPT2Config())) - set(vars(transformers.PretrainedConfig()))
    written = {
        *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
        *("activation_function", "resid_pdrop", "embd_pdrop", "attn_pdrop", "tie_word_embeddings"),
    }
    assert own - no_effect - written - set(huggingface.FIXED) == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer.ln_f.bias": None}, "lacks the tensor 'transformer.ln_f.bias'"),
        ({"transformer.ln_f.bias": torch.ones(5)}, r"'transformer.ln_f.bias' must have .*\[24\]"),
        ({"transformer.h.2.ln_1.bias": torch.ones(24)}, "does not know: 'transformer.h.2.ln_1"),
        ({"transformer.h.0.mlp.c_fc.weight": torch.ones(96, 24)}, "transposed, got"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    huggingface.save(GPTModel(CFG), tmp_path, eos_id=None)
    _tensors(tmp_path, changes)
    with pytest.raises(ValueError, match=message) as caught:
        huggingface.load(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'"text"'])
def test_a_config_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        huggingface.read_config(tmp_path)


def test_weights_that_are_none_are_named(tmp_path: Path) -> None:
    huggingface.save(GPTModel(CFG), tmp_path, eos_id=None)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        huggingface.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        huggingface.load(tmp_path)


def _old_release(folder: Path, sharded: bool, pickled: bool, prefix: bool) -> None:
    """Rewrites the weights of a folder as older releases have them, in shards or as a pickle."""
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor] = dict(load_file(path))
    path.unlink()
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if not prefix:
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    write = torch.save if pickled else save_file
    stem, end = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    if not sharded:
        write(tensors, folder / f"{stem}.{end}")
        return
    names = sorted(tensors)
    where = {name: f"{stem}-0000{1 + (i % 2)}-of-00002.{end}" for i, name in enumerate(names)}
    for shard in set(where.values()):
        write({name: tensors[name] for name in names if where[name] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": where}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize(("sharded", "pickled"), [(True, False), (False, True), (True, True)])
def test_older_ways_to_keep_weights_load(
    tmp_path: Path, sharded: bool, pickled: bool, prefix: bool
) -> None:
    theirs = _random()
    theirs.save_pretrained(tmp_path)
    whole = huggingface.load(tmp_path).state_dict()
    _old_release(tmp_path, sharded, pickled, prefix)
    found = huggingface.load(tmp_path)
    assert all(torch.equal(whole[name], tensor) for name, tensor in found.state_dict().items())
    _agree(found, theirs)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    huggingface.save(GPTModel(CFG), tmp_path, eos_id=None)
    _old_release(tmp_path, sharded=True, pickled=False, prefix=True)
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        huggingface.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../secret"}}))
    with pytest.raises(ValueError, match=r"index\.json must name files beside it, got '\.\./secr"):
        huggingface.load(tmp_path)
    for content in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            huggingface.load(tmp_path)


def test_a_tied_head_with_weights_of_its_own_is_refused(tmp_path: Path) -> None:
    huggingface.save(GPTModel(CFG), tmp_path, eos_id=None)
    _tensors(tmp_path, {"lm_head.weight": torch.ones(61, 24)})
    with pytest.raises(ValueError, match="must be the token embedding for tie_word_embeddings"):
        huggingface.load(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    _tensors(tmp_path, {"lm_head.weight": embedding.clone()})
    assert huggingface.load(tmp_path).cfg.tie_weights


def test_another_architecture_is_named(tmp_path: Path) -> None:
    llama = {"model_type": "llama", "hidden_size": 64, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    with pytest.raises(ValueError, match="model_type must be 'gpt2', got 'llama'"):
        huggingface.load(tmp_path)
