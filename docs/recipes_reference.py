"""Writes docs/recipes-reference.md from the docstrings of the recipes: `python -m docs.recipes_reference`."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from cluster.recipe import ClusterRecipe
from comparison.recipe import CompareRecipe
from compress.recipe import CompressRecipe
from compress.steps import STEPS
from data_prep.recipe import PrepRecipe
from pretrain.recipe import TrainRecipe
from pretrain.sweep.recipe import SweepRecipe
from scoring.recipe import EvaluateRecipe
from sharebert_common.recipe import dataclasses_in, keys

PAGE = Path(__file__).with_name("recipes-reference.md")

RECIPES = {
    "sharebert prep": PrepRecipe,
    "sharebert train": TrainRecipe,
    "sharebert sweep": SweepRecipe,
    "sharebert submit --cluster": ClusterRecipe,
    "sharebert evaluate --recipe": EvaluateRecipe,
    "sharebert compress": CompressRecipe,
    "sharebert compare": CompareRecipe,
}
"""Command → the recipe that it takes."""

INTRODUCTION = """# All keys of all recipes

`python -m docs.recipes_reference` writes this page from the code; do not edit it. `sharebert VERB --help` prints
the same keys. A key with dots stands inside another: `data.global_batch=64` on the command line is
`data: {global_batch: 64}` in a recipe. A key without a default is required.
"""


def type_text(kind: Any) -> str:
    """A type in words: `number`, `text`, `list of texts`, or the values that it allows."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(part) for part in inner))
    if origin in (list, tuple):
        return f"list of {type_text(inner[0])}"
    if origin is dict:
        return "mapping"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "none", Any: "any"}
    if dataclasses_in(kind):
        return "keys"
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def value_text(value: Any) -> str:
    """A default as it is written in a recipe."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(value_text(item) for item in value)}]"
    return "{}" if value == {} else str(value)


def table(schema: type) -> str:
    """The keys of a schema as a Markdown table."""
    lines = ["| key | what it is | type | default |", "|---|---|---|---|"]
    for name, kind, field, text in keys(schema):
        holds_keys = bool(dataclasses_in(kind))
        given = "" if holds_keys or field.is_required() else value_text(field.get_default(call_default_factory=True))
        cells = (f"`{name}`", text, type_text(kind), f"`{given}`" if given else "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for command, schema in RECIPES.items():
        summary = " ".join(str(schema.__doc__).split("\n\n")[0].split())
        parts.append(f"## `{command}`\n\n{summary}\n\n{table(schema)}\n")
    for name, step in STEPS.items():
        summary = " ".join(str(step.__doc__).split("\n\n")[0].split())
        parts.append(f"### The step `{name}` of `sharebert compress`\n\n{summary}\n\n{table(step)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
