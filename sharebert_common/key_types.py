"""What the type of a recipe's key says about a value, before pydantic converts it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NULLS = ("", "~", "null", "Null", "NULL")


def key_path(key: str) -> tuple[str, ...]:
    """`a.b[0]` as ("a", "b", "0")."""
    return tuple(re.findall(r"[^.\[\]]+", key))


def type_at(schema: type, path: tuple[str, ...]) -> Any:
    """The type of a key of `schema`; None where there is no such key, or its type says nothing about it."""
    here: Any = schema
    for number, part in enumerate(path):
        found = [inner for member in members(here) if (inner := _type_inside(member, part)) is not None]
        if not found:
            return None
        here = found[0]
        if number == len(path) - 1:
            short = getattr(schema, "SHORTHAND", {}).get(path[0]) if len(path) == 1 else None
            if short:  # a plain value is short for a mapping, and the mapping itself may be given too
                here = Union[here, type_at(schema, (*path, short))]  # noqa: UP007
    return here


def members(key_type: Any) -> list[Any]:
    """The types of a union, or the one type."""
    if get_origin(key_type) in (Union, UnionType):
        return [member for part in get_args(key_type) for member in members(part)]
    return [key_type]


def takes_text(key_type: Any) -> bool:
    """Whether a plain value of this type is always a text, also one that is short for a list of mappings (a path)."""
    kinds = members(key_type)
    return any(_is_text(kind) or _is_list_of_mappings(kind) for kind in kinds) and not any(
        kind in (int, float, bool, Any) for kind in kinds
    )


def is_structure(key_type: Any, value: str) -> bool:
    """Whether a value on the command line is a list, a mapping or null, and its type takes that."""
    from yaml import YAMLError, safe_load

    kinds = members(key_type)
    if value.strip() in _NULLS:
        return NoneType in kinds or not value.strip()
    if value.lstrip()[0] not in "[{" or all(_is_text(kind) or kind is NoneType for kind in kinds):
        return False
    try:
        return isinstance(safe_load(value), (list, dict))
    except YAMLError:
        return False


def booleans_for_numbers(key_type: Any, value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys whose value is true or false where their type has numbers; pydantic would take them for 1 and 0."""
    kinds = members(key_type)
    if isinstance(value, bool):
        if (int in kinds or float in kinds) and bool not in kinds and Any not in kinds:
            yield path
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        for kind in kinds:
            if (inside := _type_inside(kind, str(key))) is not None:
                yield from booleans_for_numbers(inside, inner, (*path, str(key)))


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind)))


def _is_list_of_mappings(kind: Any) -> bool:
    return get_origin(kind) is list and is_dataclass(get_args(kind)[0])


def _type_inside(kind: Any, part: str) -> Any:
    if isinstance(kind, type) and is_dataclass(kind):
        return get_type_hints(kind).get(part)
    match get_origin(kind), get_args(kind):
        case origin, (*_, inner) if origin is dict or (origin is list and part.isdigit()):
            return inner
    return None
