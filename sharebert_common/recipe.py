"""Recipes: a YAML file and `key=value` overrides become a checked dataclass.

Every stage reads its recipe through this module. OmegaConf reads and merges (`${run}/x` interpolation, `1e-3` is a
number); pydantic checks types, ranges and unknown keys. What wins: `key=value` over YAML over the dataclass's defaults.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from sharebert_common.errors import BadInput, nearest
from sharebert_common.key_types import booleans_for_numbers, is_structure, key_path, takes_text, type_at

T = TypeVar("T")

_OVERRIDE = re.compile(r"([A-Za-z_]\w*)(\.[\w-]+|\[\d+\])*=")
_IN_HOME = re.compile(r"~[\w.-]*/")

STRICT = ConfigDict(extra="forbid", defer_build=True, allow_inf_nan=False)
"""The pydantic config of every recipe dataclass: `@dataclass(config=STRICT, kw_only=True)`.

No key means anything with a number that is not finite; "none" or "never" is null or 0, as its docstring says.

Validators are built when a recipe is read, and docstrings are read for `--help`. The many processes that only unpickle
a recipe need neither, and both together take longer than the import of NumPy.
"""

MOST_SECONDS = 31_536_000
"""The longest time that a recipe can give: a year. Far longer ones overflow the clocks of Python and torch."""

CONFIGS = Path(__file__).parent / "configs"
"""The recipes that ship with the project: a link to the folder of that name in a checkout, a copy in a wheel."""


def find(recipe: str | Path) -> Path:
    """The file of a recipe, given by path, or by name among those that ship with the project.

    Raises BadInput, naming the nearest shipped recipe, where there is none.
    """
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    for candidate in (CONFIGS / path, CONFIGS / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = [file.relative_to(CONFIGS).with_suffix("").as_posix() for file in CONFIGS.glob("**/*.yaml")]
    if _OVERRIDE.match(str(recipe)):
        raise BadInput(f"{recipe}: the recipe comes first, before key=value (shipped: {', '.join(sorted(shipped))})")
    raise BadInput(
        f"{recipe}: no such recipe{nearest(str(path.with_suffix('')), shipped)} (shipped: {', '.join(sorted(shipped))})"
    )


def split_words(words: Sequence[str], schema: type) -> tuple[list[str], list[str]]:
    """Split the words of a command line into paths or names, and overrides.

    An override begins with `key=`. A path may hold "=" as well: `/runs/lr=1e-3`, or the existing folder `lr=1e-3` where
    `lr` is no key of `schema`.
    """
    paths: list[str] = []
    overrides: list[str] = []
    for word in words:
        match = _OVERRIDE.match(word)
        is_override = match is not None and (match[1] in _own_fields(schema) or not Path(word).exists())
        (overrides if is_override else paths).append(word)
    return paths, overrides


def load(
    schema: type[T],
    recipe: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """Read a recipe into `schema`, a dataclass.

    A schema may say in `SHORTHAND: ClassVar[dict[str, str]]` that a plain value of one of its keys
    is short for a mapping: with `{"model": "size"}`, `model: x` means `model: {size: x}`.

    Args:
        schema: a pydantic dataclass declared with `STRICT`.
        recipe: path or shipped name of a YAML file; None for defaults alone.
        overrides: `key.subkey=value`. Where the key is a text, the value is that text (or a text in quotes); otherwise
            it is YAML, but without comments: "#" is part of a value.
        defaults: nested values of keys that the recipe and the overrides may leave out.

    A value that begins with `~/` or `~user/` is below that home, whatever the key.

    Raises:
        BadInput: unreadable YAML, an unknown key (the nearest known one is named), a wrong value.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf  # 50 ms that a worker does without: it gets a recipe whole
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    where = "command line"
    merged: DictConfig | ListConfig = OmegaConf.create({})
    if recipe is not None:
        path = find(recipe)
        where = str(path)
        try:
            merged = OmegaConf.load(path)
        except (YAMLError, OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
        if not OmegaConf.is_dict(merged):
            raise BadInput(f"{path}: a recipe is a mapping of keys to values, this is something else")
    given: list[str] = []
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise BadInput(f"'{override}': an override is written key=value")
        try:
            given.append(_long_form(schema, _literal(schema, override)))
        except (OmegaConfBaseException, YAMLError) as error:
            raise BadInput(
                f"command line: '{override}': not readable as YAML: {' '.join(str(error).split())}"
            ) from error
    try:
        for key, inner in _shorthand(schema).items():
            raw = OmegaConf.to_container(merged).get(key)  # type: ignore[union-attr]
            if raw is not None and not isinstance(raw, dict):
                OmegaConf.update(merged, key, {inner: raw}, merge=False)
        together = OmegaConf.merge(defaults or {}, merged, OmegaConf.from_dotlist(given))
        values = _expand_home(OmegaConf.to_container(together, resolve=True))
    except (OmegaConfBaseException, YAMLError) as error:
        raise BadInput(f"{where}: {' '.join(str(error).split())}") from error
    return parse(schema, values, where, [key_path(override.partition("=")[0]) for override in overrides])


def _shorthand(schema: type) -> dict[str, str]:
    return getattr(schema, "SHORTHAND", {})


def _long_form(schema: type, override: str) -> str:
    """An override of a short key as one of the key that it stands for: `model=x` as `model.size=x`.

    So it adds to what other overrides say of that key, before and after it.
    """
    from omegaconf import OmegaConf

    key, _, value = override.partition("=")
    plain_value = OmegaConf.from_dotlist([f"value={value}"])["value"]
    inner = _shorthand(schema).get(key)
    short = inner is not None and plain_value is not None and not OmegaConf.is_dict(plain_value)
    return f"{key}.{inner}={value}" if short else override


def _literal(schema: type, override: str) -> str:
    """An override whose value YAML would change or cut, with the value in quotes.

    That is every plain value of a key that is a text (2024, off, `/x/run: 7`), and of any key a value with "#".
    """
    key, _, value = override.partition("=")
    if value.lstrip().startswith(("'", '"')):
        return override
    key_type = type_at(schema, key_path(key))
    if takes_text(key_type):
        if is_structure(key_type, value):
            return override
        text = os.path.expanduser(value) if value == "~" else value  # noqa: PTH111
        return f"{key}={json.dumps(text if '/' in text else text.strip(), ensure_ascii=False)}"
    if value.lstrip().startswith(("[", "{", "|", ">")):
        return override
    cut = re.search(r"(^|\s)#", value) or ("/" in value and value != value.strip())
    return f"{key}={json.dumps(value, ensure_ascii=False)}" if cut else override


def _expand_home(value: Any) -> Any:
    """The values of a recipe, in which paths below a home are absolute."""
    if isinstance(value, dict):
        return {key: _expand_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand_home(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) and _IN_HOME.match(value) else value  # noqa: PTH111


def parse(schema: type[T], values: Any, where: str, from_command_line: Collection[tuple[str, ...]] = ()) -> T:
    """Check plain values (mappings, lists, scalars) against `schema`.

    Raises BadInput. It names `where`, or the command line for the keys in `from_command_line`.
    """
    wrong: dict[str, list[str]] = {}

    def note(location: Sequence[str], message: str) -> None:
        given = any(tuple(location[: len(path)]) == path for path in from_command_line)
        wrong.setdefault("command line" if given else where, []).append(message)

    booleans = list(booleans_for_numbers(schema, values))
    for path in booleans:
        words = "YAML reads on, off, yes, no, true and false as booleans"
        note(path, f"{'.'.join(path)}: {words}; write a number, or quote a text")
    try:
        checked = TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        for e in _without_union_tags(error.errors()):
            if e["loc"] not in booleans:
                note(e["loc"], _explain(schema, e))
    if wrong:
        raise BadInput("; ".join(f"{place}: {'; '.join(messages)}" for place, messages in wrong.items()))
    return checked


def plain(config: Any) -> dict[str, Any]:
    """A config as nested dicts, lists and scalars, ready for YAML or JSON."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def to_yaml(config: Any) -> str:
    """A resolved config as YAML text, without the keys that have no value."""
    from omegaconf import OmegaConf

    given = TypeAdapter(type(config)).dump_python(config, mode="json", exclude_none=True)
    return OmegaConf.to_yaml(OmegaConf.create(given))


def describe(schema: type) -> str:
    """The keys of a schema, with types, defaults and docstrings, for `--help`."""
    lines = []
    for name, key_type, info, text in keys(schema):
        default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
        if dataclasses_in(key_type):
            lines.append(f"  {name}: {text}".rstrip())
        else:
            lines.append(f"  {name}: {text} [{_type_name(key_type)}, {default}]")
    return "\n".join(lines)


def _own_fields(schema: type) -> dict[str, FieldInfo]:
    return schema.__pydantic_fields__  # type: ignore[attr-defined, no-any-return]


def _docstrings(schema: type) -> dict[str, str]:
    """The string below each key of a schema, in one line."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    found = {}
    for two in pairwise(getattr(definition, "body", [])):
        match two:
            case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                found[key] = " ".join(text.split())
    return found


def keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, FieldInfo, str]]:
    """Every key of a schema, with dots before inner ones: its name, type, field and docstring."""
    hints, texts = get_type_hints(schema, include_extras=False), _docstrings(schema)
    for name, info in _own_fields(schema).items():
        yield prefix + name, hints[name], info, texts.get(name, "")
        for inner in dataclasses_in(hints[name]):
            yield from keys(inner, f"{prefix}{name}.")


def dataclasses_in(key_type: Any) -> list[type]:
    """The recipes that a key of this type holds."""
    if isinstance(key_type, type) and is_dataclass(key_type):
        return [key_type]
    return [found for arg in get_args(key_type) for found in dataclasses_in(arg)]


def _type_name(key_type: Any) -> str:
    if isinstance(key_type, type) and not get_args(key_type):
        return key_type.__name__
    return str(key_type).replace("typing.", "").replace("NoneType", "none")


_UNION_TAG = re.compile(
    r"(constrained-)?(str|int|float)|bool|none|(list|dict|tuple|literal|function-\w+)\[.*\]", re.DOTALL
)
"""What pydantic puts behind a key that may be one of several types, for each of them."""


def _without_union_tags(errors: Sequence[Any]) -> list[Any]:
    """The errors by keys that a recipe has. Of a key with several types, that of the type that fits best is kept."""
    found: dict[tuple[str, ...], Any] = {}
    for error in errors:
        location = tuple(str(part) for part in error["loc"])
        error["loc"] = tuple(part for part in location if not _UNION_TAG.fullmatch(part))
        error["of_several"] = error["loc"] != location
        found.setdefault(error["loc"], error)
    return [
        error
        for place, error in found.items()
        if not (
            error["of_several"] and any(len(other) > len(place) and other[: len(place)] == place for other in found)
        )
    ]


def _explain(schema: type, error: Any) -> str:
    location = list(error["loc"])
    key = ".".join(location)
    if error["type"] == "unexpected_keyword_argument":
        known = [name for name in _known_beside(schema, location) if name]
        return f"{key}: unknown key{nearest(location[-1], known)}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key}: required, and not given"
    if error["input"] is None and key and error["type"] != "value_error":
        return f"{key}: has no value; give it one, or leave it out"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "list_type" and isinstance(error["input"], bool):
        message = 'YAML reads this as a boolean; write a list, such as ["no"]'
    if error["type"] == "string_type" and isinstance(error["input"], (bool, int, float)):
        message = f"YAML reads this as a {_kind(error['input'])}; put it in quotes if it is a text"
    return (
        f"{key}: {message} (got {error['input']!r})"
        if key and error["type"] != "value_error"
        else (f"{key}: {message}" if key else message)
    )


def _kind(value: bool | int | float) -> str:
    return "boolean" if isinstance(value, bool) else "number"


def _known_beside(schema: type, location: list[str]) -> list[str]:
    here = [schema]
    for part in location[:-1]:
        inner = [
            found
            for level in here
            for field in fields(level)
            if field.name == part
            for found in dataclasses_in(get_type_hints(level)[part])
        ]
        here = inner or here  # list indices and names of classes are no field names
    return [field.name for level in here for field in fields(level)]
