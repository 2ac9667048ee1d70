"""A small comparison: a tiny BERT, a tiny VEPS, and what is made from them, on one made-up task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from made_tasks import rows, write_tsv
from tiny_runs import train_arguments

from comparison.recipe import CompareRecipe
from pretrain.recipe import TrainRecipe
from sharebert_common.recipe import load, to_yaml

QUANTISE = {"quantise": {"bits": 4, "small_bits": 6, "vectors": 8}}


def task(folder: Path, train: int = 64, dev: int = 40) -> Path:
    """A folder with files of SST-2, in words of the tests' dataset."""
    for split, count, seed in (("train", train, 0), ("dev", dev, 1)):
        made = [(text.replace("w", "word"), label) for text, label in rows(count, seed)]
        write_tsv(folder / f"{split}.tsv", ("sentence", "label"), made)
    return folder


def base_recipe(folder: Path, dataset: Path, **overrides: Any) -> Path:
    """A train recipe of a tiny model, written into `folder`."""
    file = folder / "train.yaml"
    given = {"steps": 30, "validate__every": 10, "zero__stage": 0, "checkpoint__every": 10, **overrides}
    file.write_text(to_yaml(load(TrainRecipe, None, train_arguments(dataset, folder / "unused", **given))))
    return file


def small(folder: Path, dataset: Path, rows: dict[str, Any], **keys: Any) -> CompareRecipe:
    """A recipe with these rows, written into `folder` and read."""
    file = folder / "table.yaml"
    content = {
        "folder": str(folder / "out"),
        "dataset": str(dataset),
        "rows": rows,
        "validation_rows": 16,
        "tasks": {"sst2": {"path": str(task(folder / "SST-2"))}},
        "finetune": {"epochs": 1, "batch": 32, "lr": [1e-3, 3e-3], "max_length": 16, "pooling": "mean"},
        "seeds": [1, 2],
        "report": {"latency": []},
    }
    file.write_text(json.dumps(content | keys))
    return load(CompareRecipe, file)
