"""A classifier that was fine-tuned on the task, and what it says of the train rows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from exports.distill_losses import LayerPairs, layer_pairs, refuse_no_pair, without_embeddings
from exports.files import CONFIG
from exports.hub_weights import load_hub_model
from scoring.architecture import read_labels, read_model_type
from scoring.classifier import Classifier
from scoring.data import TaskData
from scoring.distill.watch import AttentionScores
from scoring.encoders import Encoded, Encoder, label_names, open_encoder
from scoring.recipe import FineTuneRecipe, TaskDistillRecipe
from scoring.tasks import Task
from sharebert.config import MODEL_TYPE
from sharebert_common.errors import BadInput


class LayerOutputs(NamedTuple):
    """What layers of the teacher give for a batch; only what the recipe asks for is there."""

    states: tuple[Tensor, ...]
    """Hidden states [B, T, H]: the embeddings, and after each layer."""
    scores: dict[int, Tensor]
    """Layer → attention scores before softmax [B, heads, T, T]."""


class TaskTeacher:
    """A fine-tuned classifier, frozen. Its scores for the train rows are computed once, for all students and seeds.

    Args:
        settings: with `distill.teacher`.
        data: the task. The teacher reads its texts with its own tokenizer.
        device: where it runs.

    Raises BadInput: the folder holds no classifier, or one with other labels.
    """

    def __init__(self, settings: FineTuneRecipe, data: TaskData, device: torch.device) -> None:
        recipe = settings.distill
        assert recipe.teacher is not None
        self.recipe, self.folder, self._device = recipe, Path(recipe.teacher), device
        order = label_order(self.folder, data.task)
        encoder = open_encoder(recipe.teacher, FineTuneRecipe(max_length=settings.max_length))
        config = encoder.config
        self.layers, self.heads = int(config.num_hidden_layers), int(config.num_attention_heads)
        self.width = int(config.hidden_size)
        self._encoder = encoder
        self._rows = encoder.encode(data.train.texts, data.train.where)
        model = _load(self.folder).to(device).eval().requires_grad_(False)
        classifier = Classifier(encoder, model, device, data.task.regression)
        self.logits = torch.from_numpy(classifier.logits(self._rows))[:, order]
        """[N, labels] of all train rows, the labels in the task's order."""
        self._model: nn.Module | None = model if recipe.uses_layers else None
        self._scores: AttentionScores | None = None

    def pairs(self, encoder: Encoder) -> LayerPairs:
        """The pairs of layers for a student. Raises BadInput, naming the key, where one does not exist."""
        layers = int(encoder.config.num_hidden_layers), self.layers
        names = f"student {encoder.folder}", f"teacher {self.folder}"
        pairs = layer_pairs(self.recipe.layers, layers, "finetune.distill.layers", names)
        if self.recipe.attention and not without_embeddings(pairs):
            raise BadInput(
                "finetune.distill.layers: attention needs queries and keys, and embeddings (0) have none; name a pair "
                "of layers"
            )
        return pairs

    def check(self, encoder: Encoder, rows: Encoded) -> None:
        """Raise BadInput, naming the key, where a student cannot learn from this teacher's layers.

        Args:
            encoder: the student.
            rows: the train rows as the student's tokenizer cuts them.
        """
        self.pairs(encoder)
        if not self.recipe.uses_layers:
            return
        config = encoder.config
        if self.recipe.attention and config.num_attention_heads != self.heads:
            raise BadInput(
                f"finetune.distill.attention: the teacher {self.folder} has {self.heads} heads, {encoder.folder} has "
                f"{config.num_attention_heads}; use finetune.distill.hidden"
            )
        if rows.columns["input_ids"] != self._rows.columns["input_ids"]:
            raise BadInput(
                f"finetune.distill.teacher: {self.folder} cuts the texts into other tokens than {encoder.folder}; "
                "hidden states and attention need the same tokenizer, finetune.distill.logits does not"
            )

    @torch.no_grad()
    def layer_outputs(self, rows: list[int], layers: Sequence[int]) -> LayerOutputs:
        """What its layers give for some train rows, padded to the longest of them."""
        assert self._model is not None
        if self.recipe.attention and self._scores is None:
            self._scores = AttentionScores(self._model, range(1, self.layers + 1), str(self.folder))
        batch = {name: x.to(self._device) for name, x in self._encoder.collate(self._rows, rows).items()}
        output = self._model(**batch, output_hidden_states=True)
        scores = {} if self._scores is None else self._scores.take()
        return LayerOutputs(output.hidden_states, {layer: scores[layer] for layer in layers if layer in scores})


def label_order(folder: Path, task: Task) -> list[int]:
    """Where the score of each label of the task stands among the scores of the classifier in `folder`.

    Names of labels may stand in another order; LABEL_0, LABEL_1, … are the task's labels in its order.

    Raises BadInput: no classifier, or other labels.
    """
    key = "finetune.distill.teacher"
    try:
        read_model_type(folder)
    except BadInput as error:
        raise BadInput(f"{key}: {error}") from error
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        raise BadInput(
            f"{key}: {folder} is no classifier; give a folder that evaluate --save wrote, or any classifier of texts "
            "of Hugging Face"
        )
    given = read_labels(folder)
    wanted = [str(name) for name in label_names(task)]
    unnamed = task.regression or all(re.fullmatch(r"LABEL_\d+", name) for name in given)
    if len(given) == len(wanted) and unnamed:
        return list(range(len(given)))
    if sorted(given) != sorted(wanted):
        raise BadInput(
            f"{key}: {folder} scores the labels {', '.join(given)}; those of {task.name} are {', '.join(wanted)}"
        )
    return [given.index(name) for name in wanted]


def _load(folder: Path) -> nn.Module:
    """The classifier in a folder, with its own head."""
    if read_model_type(folder) == MODEL_TYPE:
        from sharebert.hub import ShareBertForSequenceClassification

        return ShareBertForSequenceClassification.from_pretrained(folder)  # type: ignore[no-any-return]
    from transformers import AutoModelForSequenceClassification

    model: nn.Module = load_hub_model(AutoModelForSequenceClassification, folder, "nothing")[0]
    return model


def uses_teacher(recipe: TaskDistillRecipe) -> bool:
    """Whether a recipe has a teacher.

    Raises BadInput: a teacher without a loss, or a loss without a teacher.
    """
    if recipe.teacher is None:
        for name in ("hidden", "attention", "layers"):
            if getattr(recipe, name):
                raise BadInput(f"finetune.distill.{name}: given, but finetune.distill.teacher is not")
        return False
    if not (recipe.logits or recipe.uses_layers):
        raise BadInput("finetune.distill.teacher: no loss with it has a weight; give one of logits, hidden, attention")
    if recipe.layers is not None:
        refuse_no_pair(recipe.layers, "finetune.distill.layers")
    return True
