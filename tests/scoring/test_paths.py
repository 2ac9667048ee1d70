"""Paths with characters that mean something to a shell, to YAML, to glob or to a URL are only paths."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from made_tasks import blimp, sst2, tiny_export

from scoring.recipe import EvaluateRecipe
from scoring.score import evaluate
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["a=b", "[ab]", "run #7", "50%j", "what?*", "two  words", "~x", "é{a,b}$HOME", "a|b"])
def test_paths_are_only_paths(name: str, tmp_path: Path) -> None:
    root = tmp_path / name
    export = tiny_export(root / "export")
    save = root / "saved"

    def recipe(task: str, data: Path, *keys: str) -> EvaluateRecipe:
        paths = [f"data.path={json.dumps(str(data))}", f"output={json.dumps(str(root / 'out'))}"]
        return load(EvaluateRecipe, None, [f"task={task}", *paths, *keys])

    quick = ("seeds=1", "finetune.epochs=1")
    table = evaluate(recipe("sst2", sst2(root / "data", train=40, dev=8), *quick), ["majority", str(export)], save)
    assert len(table.split("\n")) == 4
    table = evaluate(recipe("sst2", root / "data", *quick), [str(save), f"random:{export}"])
    assert len(table.split("\n")) == 6
    assert len(list((root / "out" / "sst2").glob("*.json"))) == 4
    assert len(list((root / "out" / "sst2" / "tensorboard").glob("*/*/events*"))) == 3
    evaluate(recipe("blimp", blimp(root / "blimp", 2)), [str(export)])
    assert (root / "out" / "blimp" / "results.md").exists()


@pytest.mark.parametrize("task", ["sst2", "blimp"])
def test_an_output_below_a_file_is_one_line(task: str, tmp_path: Path) -> None:
    data = sst2(tmp_path / "data", train=8, dev=4) if task == "sst2" else blimp(tmp_path / "data", 2)
    (tmp_path / "file").write_text("mine")
    keys = [f"task={task}", f"data.path={data}", f"output={tmp_path / 'file' / 'out'}"]
    model = "majority" if task == "sst2" else str(tiny_export(tmp_path / "export"))
    with pytest.raises(BadInput, match=f"{tmp_path / 'file'}/out/{task}.*: cannot be made"):
        evaluate(load(EvaluateRecipe, None, keys), [model])
