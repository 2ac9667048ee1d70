"""Exports to compress, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from compress.saved_state import save_state
from exports.export import Export
from exports.forms import write_export
from sharebert import ShareBertConfig


def tiny_export(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A compact export of a tiny model with its tokenizer."""
    place = folder.parent / f"{folder.name}-tokenizer"
    place.mkdir(parents=True, exist_ok=True)
    write_export(Export.of_model(tiny_model(seed, **changes), tokenizer=tiny_tokenizer(place)), folder)
    return folder


def export_with_dead_parts(folder: Path, head: int, columns: list[int], layer: int) -> Path:
    """A tiny export of three layers in which a head, some columns and a layer add nothing to the stream: the factors of
    heads, columns and branches are 0 there."""
    sizes = {"kept_heads": [0, 1, 2], "kept_columns": list(range(40)), "num_hidden_layers": 3}
    model = tiny_model(**sizes, branch_gain=0.5, learned_branch_gains=True, mlm_head="tied")
    with torch.no_grad():
        model.sharebert.kept_attention_scale.view(3, 8)[head] = 0
        model.sharebert.kept_inner_scale[columns] = 0
        model.sharebert.layers[layer].branch_gains.zero_()
    write_export(Export.of_model(model, tokenizer=tiny_tokenizer(folder.parent)), folder)
    return folder


def tokens_of(config: ShareBertConfig, rows: int = 3, length: int = 9) -> torch.Tensor:
    """Random ordinary words [rows, length]."""
    return torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(1))


@contextmanager
def killed(module: ModuleType, step: int) -> Iterator[list[int]]:
    """What runs in here dies after `module` saved its progress of this step. Yields the steps that were saved."""
    saved: list[int] = []

    def dies(path: Path, state: dict[str, Any]) -> None:
        save_state(path, state)
        saved.append(state["step"])
        if saved[-1] == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save_state", dies)
        with pytest.raises(KeyboardInterrupt):
            yield saved
