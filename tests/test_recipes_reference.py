"""The page of all keys is what the code says now."""

from __future__ import annotations

from typing import Any, Literal, Optional

import pytest

from docs.recipes_reference import PAGE, RECIPES, page, type_text, value_text
from sharebert_common.recipe import keys


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m docs.recipes_reference"


def test_every_key_has_a_sentence() -> None:
    without = [
        f"{command}: {name}" for command, schema in RECIPES.items() for name, _, _, text in keys(schema) if not text
    ]
    assert not without


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int, "whole number"),
        (Optional[float], "number or none"),  # noqa: UP045 - both spellings of a union occur
        (float | None, "number or none"),
        (list[str], "list of text"),
        (Literal["a", 8], "`a`, `8`"),
        (dict[str, Any], "mapping"),
    ],
)
def test_types_are_written_in_words(kind: Any, text: str) -> None:
    assert type_text(kind) == text


def test_defaults_are_written_as_in_a_recipe() -> None:
    assert [value_text(v) for v in (None, True, [5e-5], {}, "fp32")] == ["none", "true", "[5e-05]", "{}", "fp32"]
