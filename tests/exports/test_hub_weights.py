"""A folder of Hugging Face has all weights that its config asks for, but for a head that is trained anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_folders import hub_folder
from safetensors.torch import load_file, save_file

from compress.dense.hub_onnx import open_for_onnx
from compress.source import open_hub_model
from scoring.blimp.masked_lm import open_masked_lm
from scoring.distill.teacher import _load
from scoring.encoders import open_encoder
from scoring.recipe import FineTuneRecipe
from scoring.tasks import TASKS
from sharebert_common.errors import BadInput


def configured(folder: Path, **changes: Any) -> Path:
    """Change the folder's `config.json` alone."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def without(folder: Path, start: str) -> Path:
    """Take the weights away whose names begin with `start`."""
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(start)}
    save_file(kept, file, metadata={"format": "pt"})
    return folder


def fine_tuned(folder: Path) -> Any:
    return open_encoder(str(folder), FineTuneRecipe()).build(TASKS["sst2"], 1)


USERS: dict[str, Callable[[Path], Any]] = {
    "MaskedLM": lambda folder: open_masked_lm(str(folder), torch.device("cpu")),
    "SequenceClassification": lambda folder: open_hub_model(folder, "SequenceClassification"),
    "": open_hub_model,
    "teacher": _load,
    "fine-tuned": fine_tuned,
}


def head_of(user: str) -> str:
    return "SequenceClassification" if user in ("teacher", "fine-tuned") else user


@pytest.mark.parametrize("user", USERS)
def test_layers_that_are_missing_or_of_another_size_are_refused(tmp_path: Path, user: str) -> None:
    for name, changes, message in (
        ("short", {"num_hidden_layers": 4}, r"short: '.*layer\.2\..*' is not among its weights; are the weights those"),
        ("wide", {"intermediate_size": 128}, r"wide: '.*' is \[64\] among its weights, and \[128\] by config\.json"),
    ):
        folder = configured(hub_folder(tmp_path / name, head_of(user)), **changes)
        with pytest.raises(BadInput, match=message):
            USERS[user](folder)
    assert USERS[user](hub_folder(tmp_path / "whole", head_of(user))) is not None


def test_a_head_of_another_task_starts_anew(tmp_path: Path) -> None:
    """For fine-tuning alone: its own head is what a classifier is scored by."""
    three = hub_folder(tmp_path / "three", "SequenceClassification", num_labels=3)
    folder = without(configured(three, id2label={"0": "no", "1": "yes"}), "bert.pooler")
    encoder = open_encoder(str(folder), FineTuneRecipe())
    new = encoder.new_parameters(encoder.build(TASKS["sst2"], 1))
    assert new == ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    for user in ("SequenceClassification", "teacher"):
        with pytest.raises(BadInput, match=r"'bert\.pooler\.dense\.bias' is not among its weights"):
            USERS[user](folder)


def test_random_weights_are_for_any_config(tmp_path: Path) -> None:
    folder = configured(hub_folder(tmp_path / "hub", "MaskedLM"), num_hidden_layers=4)
    model = open_encoder(f"random:{folder}", FineTuneRecipe()).build(TASKS["sst2"], 1)
    assert len(model.bert.encoder.layer) == 4


def test_a_pooler_that_the_folder_lacks_is_left_out(tmp_path: Path) -> None:
    folder = without(hub_folder(tmp_path / "hub", ""), "pooler")
    assert open_for_onnx(folder).pooler is None
    ids = torch.tensor([[2, 7, 3]])
    assert open_hub_model(folder)(input_ids=ids).last_hidden_state.shape == (1, 3, 32)
    assert open_hub_model(hub_folder(tmp_path / "with", "")).pooler is not None
