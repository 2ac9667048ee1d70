"""Exports to compress, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model, tiny_tokenizer

from exports.export import Export
from exports.forms import write_export
from sharebert import ShareBertConfig


def tiny_export(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A compact export of a tiny model with its tokenizer."""
    place = folder.parent / f"{folder.name}-tokenizer"
    place.mkdir(parents=True, exist_ok=True)
    write_export(Export.of_model(tiny_model(seed, **changes), tokenizer=tiny_tokenizer(place)), folder)
    return folder


def tokens_of(config: ShareBertConfig, rows: int = 3, length: int = 9) -> torch.Tensor:
    """Random ordinary words [rows, length]."""
    return torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(1))
