"""The score of a classifier as it is, in any form: nothing is fine-tuned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from compress.source import open_hub_model
from compress.step import FormName
from scoring.architecture import read_labels
from scoring.classifier import Classifier
from scoring.data import load_task
from scoring.encoders import Encoder, HuggingFaceEncoder, ShareBertExport, label_names
from scoring.metrics import measure
from scoring.recipe import EvaluateRecipe, FineTuneRecipe
from scoring.tasks import Task
from sharebert_common.errors import BadInput


def score_as_is(folder: Path, form: FormName, recipe: EvaluateRecipe) -> dict[str, list[float]]:
    """The scores of the classifier in `folder` on the rows of a task: "split metric" → its value in a list of one.

    Raises BadInput: the task has other labels than the classifier.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    data = load_task(recipe.task, recipe.data)
    settings = FineTuneRecipe(max_length=recipe.finetune.max_length)
    spec = str(folder)
    encoder: Encoder = ShareBertExport(spec, settings) if form == "compact" else HuggingFaceEncoder(spec, settings)
    check_labels(folder, data.task)
    classifier = Classifier(encoder, model_of(folder, form), torch.device("cpu"), data.task.regression)
    found: dict[str, list[float]] = {}
    for split, rows in data.held_out.items():
        values = measure(data.task.metrics, classifier.predict(rows.texts), rows.labels)
        found |= {f"{split} {metric}": [value] for metric, value in values.items()}
    return found


def check_labels(folder: Path, task: Task) -> None:
    """Raise BadInput where the classifier in `folder` has other labels than a task."""
    given, wanted = read_labels(folder), list(label_names(task))
    if given != wanted and not (task.regression and len(given) == 1):
        raise BadInput(f"{folder}: its labels are {', '.join(given)}; those of {task.name} are {', '.join(wanted)}")


def model_of(folder: Path, form: FormName) -> nn.Module:
    """The classifier in `folder`, called with the arguments of transformers; its output has `logits`."""
    if form == "onnx":
        return _OnnxClassifier(folder)
    if form == "compact":
        from sharebert.hub import ShareBertForSequenceClassification

        return ShareBertForSequenceClassification.from_pretrained(folder).eval()  # type: ignore[no-any-return]
    return open_hub_model(folder, "SequenceClassification")  # type: ignore[no-any-return]


class _OnnxClassifier(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        from compress.dense.runtime import OnnxModel

        self.session = OnnxModel(folder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.session.logits(input_ids, attention_mask, token_type_ids))
