"""What the fields of every config class share: types, help texts, and errors that name a field."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from typing_extensions import Doc

PLURALS: dict[Any, str] = {int: "integers", str: "texts"}  # of what lists hold


def documented_fields(cls: type) -> dict[str, tuple[Any, str]]:
    """Name -> (type, help text) of every field of a config class."""
    found = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        doc = next(m for m in hint.__metadata__ if isinstance(m, Doc))
        found[name] = (hint.__origin__, doc.documentation)
    return found


def check_keys(got: Iterable[str], known: Iterable[str], origin: str) -> None:
    """Refuses a key that is not known.

    Raises:
        ValueError: names the key, where it stands, and the nearest known key.
    """
    known = list(known)
    for key in got:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{origin} has an unknown key {key!r}; {hint}")


def check_types(config: Any, origin: str) -> None:
    """Refuses a field whose value is not of its declared type (an int passes for a float).

    Raises:
        ValueError: names the field, the type it must have and the value.
    """
    for name, (kind, _) in documented_fields(type(config)).items():
        value = getattr(config, name)
        if not _is_a(value, kind):
            raise ValueError(f"{origin}.{name} must be {_type_name(kind)}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{origin}.{name} must be finite, got {value!r}")


def _is_a(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in args and isinstance(value, str)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, args[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _type_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args if arg is not types.NoneType)
    if origin is tuple:
        return f"a list of {PLURALS[args[0]]}"
    names: dict[Any, str] = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a text",
    }
    return names[kind]
