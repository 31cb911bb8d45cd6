"""TOML in and out, and what overrides what. pytest tests/test_toml.py"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgpt import config
from flashgpt.fields import documented_fields
from flashgpt.runconfig import DataConfig, ModelConfig, RunConfig, SampleConfig, TrainConfig
from flashgpt.toml import from_tree, load_toml, to_toml

SECTIONS = (ModelConfig, DataConfig, TrainConfig, SampleConfig)


def _optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


FLOATS = st.floats(0, 0.999, allow_subnormal=True)
COUNTS = st.integers(1, 2**62)
RUNS = st.builds(
    RunConfig,
    st.builds(
        ModelConfig,
        preset=st.sampled_from(sorted(config.PRESETS)),
        vocab_size=_optional(COUNTS),
        emb_dim=_optional(COUNTS),
        drop_rate=_optional(FLOATS),
        use_flash=_optional(st.booleans()),
        activation=_optional(st.sampled_from(["gelu", "gelu_new"])),
    ),
    st.builds(
        DataConfig,
        source=st.lists(st.text(), min_size=1).map(tuple),
        tokenizer=st.text(),
        vocab_size=st.integers(257, 2**62),
        cache=st.text(),
    ),
    st.builds(
        TrainConfig,
        steps=st.integers(9, 2**62),
        stop_at=_optional(st.integers(1, 9)),
        lr=st.floats(1e-300, 1e300),
        beta1=FLOATS,
        weight_decay=st.floats(0, 1e300),
        warmup_steps=_optional(st.integers(0, 9)),
        schedule=st.sampled_from(["cosine", "wsd", "constant"]),
        precision=st.sampled_from(["auto", "fp32", "bf16"]),
    ),
    st.builds(
        SampleConfig,
        prompt=st.text(),
        temperature=FLOATS,
        top_k=st.integers(0, 99),
        stop=st.lists(st.text(min_size=1)).map(tuple),
        stop_ids=st.lists(st.integers(0, 99)).map(tuple),
    ),
)


@settings(max_examples=100, deadline=None)
@given(run=RUNS)
def test_toml_gives_back_what_was_written(run: RunConfig) -> None:
    written = to_toml(run)
    assert written.isascii()
    assert from_tree(tomllib.loads(written), "written") == run


def test_none_means_the_default_wherever_toml_cannot_say_it() -> None:
    for cls in SECTIONS:
        for field in dataclasses.fields(cls):
            if "None" in str(field.type):
                assert field.default is None, field.name


def test_toml_explains_every_key() -> None:
    written = to_toml(RunConfig())
    for cls in SECTIONS:
        for name, (_, doc) in documented_fields(cls).items():
            assert any(name in line and doc in line for line in written.splitlines()), name


def test_one_text_stands_for_a_list_of_it() -> None:
    tree = {"data": {"source": "a.txt"}, "sample": {"stop": "end", "prompt": "a"}}
    made = from_tree(tree, "here")
    assert made.data.source == ("a.txt",) and made.sample.stop == ("end",)
    assert made.sample.prompt == "a"
    with pytest.raises(ValueError, match=r"stop_ids must be a list of integers, got \('7',\)"):
        from_tree({"sample": {"stop_ids": "7"}}, "here")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[train]\nstep = 3", r"\[train\] has an unknown key 'step'; did you mean 'steps'"),
        ("[trian]\nsteps = 3", r"has an unknown key 'trian'; did you mean 'train'"),
        ("train = 3", r"\[train\] must be a section, got 3"),
        ("[train]\nsteps = '3'", "train.steps must be an integer, got '3'"),
        ("[data]\nsource = [1]", "data.source must be a list of texts"),
        ("[train]\nsteps = ", "is no TOML file"),
        ("[train]\nsteps = 1\nsteps = 2", "is no TOML file"),
    ],
)
def test_a_wrong_toml_is_explained(tmp_path: Path, written: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(written)
    with pytest.raises(ValueError, match=message) as caught:
        load_toml(path)
    assert str(caught.value).startswith(str(path))


def test_bytes_that_are_no_text_are_no_toml(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"run\.toml is no TOML file"):
        load_toml(tmp_path / "run.toml")


def _printed(cli: Callable[..., Any], *arguments: object) -> RunConfig:
    printed = cli("train", *arguments, "--print-config").done()
    return from_tree(tomllib.loads(printed), "printed")


def test_preset_then_toml_then_command_line(tmp_path: Path, cli: Callable[..., Any]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\npreset = "gpt2"\nn_layers = 3\nn_heads = 6\nuse_flash = true\n'
        "[train]\nsteps = 7\n"
    )
    run = _printed(cli, path, "--model.n-heads", 4, "--model.use-flash", False, "--train.lr", 0.5)
    cfg = run.model.resolve(300)
    assert cfg.emb_dim == 768  # the preset
    assert (cfg.n_layers, run.train.steps) == (3, 7)  # the file
    assert (cfg.n_heads, cfg.use_flash, run.train.lr) == (4, False, 0.5)  # the command line
    assert run.sample == SampleConfig()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--sample.prompt", 'quote " back \\ tab \t \u00e9\U0001f642\x7f', "--train.stop-at", 3),
        ("--data.source", "a.txt", "b [1].txt", "--data.tokenizer", "bytes"),
        ("--model.preset", "gpt2", "--model.qkv-bias", "False", "--model.activation", "gelu"),
        ("--model.use_flash", "False", "--train.tokens_per_step=512", "--sample.top-k", 0),
    ],
)
def test_print_config_reloads_equal(
    tmp_path: Path, cli: Callable[..., Any], arguments: tuple[object, ...]
) -> None:
    printed = cli("train", *arguments, "--print-config").done()
    (tmp_path / "again.toml").write_text(printed)
    assert cli("train", tmp_path / "again.toml", "--print-config").done() == printed
    if arguments:
        assert load_toml(tmp_path / "again.toml") != RunConfig()


def test_every_field_is_an_option(cli: Callable[..., Any]) -> None:
    shown = cli("train", "--help").done()
    for section in dataclasses.fields(RunConfig):
        for name in documented_fields(type(getattr(RunConfig(), section.name))):
            assert f"--{section.name}.{name.replace('_', '-')} " in shown, name
