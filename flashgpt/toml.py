"""A run's config as TOML: read with errors that name the key, written with a comment per key."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashgpt.fields import check_keys, documented_fields
from flashgpt.runconfig import RunConfig


def load_toml(path: str | Path) -> RunConfig:
    """Reads a run's config.

    Raises:
        ValueError: no TOML, an unknown section or key (the nearest one is suggested), a wrong type.
        OSError: the file cannot be read.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML file: {error}") from error
    return from_tree(tree, str(path))


def from_tree(tree: Mapping[str, Any], origin: str) -> RunConfig:
    """A RunConfig from nested dicts, as TOML gives them; `origin` names them in errors."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(RunConfig)}
    check_keys(tree, sections, origin)
    made: dict[str, Any] = {}
    for name, factory in sections.items():
        table = tree.get(name, {})
        if not isinstance(table, Mapping):
            raise ValueError(f"{origin}: [{name}] must be a section, got {table!r}")
        known = documented_fields(typing.cast(Any, factory))
        check_keys(table, known, f"{origin}: [{name}]")
        values = {key: _held(value, known[key][0]) for key, value in table.items()}
        try:
            made[name] = typing.cast(Any, factory)(**values)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
    return RunConfig(**made)


def _held(value: Any, kind: Any) -> Any:
    """A value as a field holds it: lists as tuples, and one text for a list that has no other."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and typing.get_origin(kind) is tuple:
        return (value,)
    return value


def to_toml(config: RunConfig) -> str:
    """The commented TOML of a run; a key without a value is written as a comment."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        part = getattr(config, section.name)
        for name, (_, doc) in documented_fields(type(part)).items():
            value = getattr(part, name)
            entry = f"# {name} =" if value is None else f"{name} = {_toml_value(value)}"
            lines.append(f"{entry}  # {doc}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + "".join(map(_toml_character, value)) + '"'
    return repr(value)


def _toml_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if " " <= character <= "~":
        return character
    return f"\\U{ord(character):08x}"
