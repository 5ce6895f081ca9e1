# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rebuilds dataclasses from the JSON of `dataclasses.asdict`, by the types of their fields.

A new field needs no code here and keeps its type: an Enum does not become a plain string.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def decoded(kind: type[T], value: object) -> T:
    """Missing fields have their defaults. Raises ValueError or TypeError for a value of another type."""
    decode: Callable[[Any], T] = _decoder(kind)  # type: ignore[arg-type]
    return decode(value)


@functools.cache
def _decoder(kind: Any) -> Callable[[Any], Any]:
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _of_fields(kind)
    if origin is tuple and inner[1:] == (...,):
        each = _decoder(inner[0])
        return lambda value: tuple(map(each, _checked(list, value)))
    if origin is Mapping and inner[0] is str:
        of_value = _decoder(inner[1])
        return lambda value: {key: of_value(one) for key, one in _checked(dict, value).items()}
    if origin is types.UnionType and len(inner) == 2 and inner[1] is type(None):
        given = _decoder(inner[0])
        return lambda value: None if value is None else given(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    if kind is float:
        return lambda value: float(_checked((float, int), value))
    if kind in (str, int, bool):
        return functools.partial(_checked, kind)
    raise NotImplementedError(f"{kind} cannot be kept")


def _of_fields(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    decoders = {one.name: _decoder(hints[one.name]) for one in fields(kind)}

    def decode(value: Any) -> Any:
        table = _checked(dict, value)
        return kind(**{key: decoders[key](one) for key, one in table.items() if key in decoders})

    return decode


def _checked(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"expected {kind}, not {type(value)}")
    return value
