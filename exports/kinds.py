"""What a model is for: masked language modelling, an encoder alone, or classification.

A kind says what follows from it: the class that transformers loads, further tensors, and further keys of `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput

CLASSIFIER_KEYS = ("id2label", "label2id", "problem_type", "classifier_pooling")
"""Keys of `config.json` that describe a classifier."""


@dataclass(frozen=True)
class MaskedLM:
    """An encoder and its masked-language-model head."""

    architecture: ClassVar[str] = "ForMaskedLM"
    """What transformers adds to the model's name for this class."""
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    task: ClassVar[str] = "fill-mask"
    """The pipeline of transformers that takes it."""

    def further_shapes(self, config: ShareBertConfig) -> dict[str, tuple[int, ...]]:
        """Tensors beside those of the encoder and the MLM head."""
        return {}

    def config_keys(self) -> dict[str, Any]:
        """Keys of `config.json` beside those of the encoder and the MLM head."""
        return {}


@dataclass(frozen=True)
class HeadlessEncoder:
    """An encoder alone."""

    architecture: ClassVar[str] = "Model"
    auto_class: ClassVar[str] = "AutoModel"
    task: ClassVar[str] = "feature-extraction"

    def further_shapes(self, config: ShareBertConfig) -> dict[str, tuple[int, ...]]:
        """See `MaskedLM`."""
        return {}

    def config_keys(self) -> dict[str, Any]:
        """See `MaskedLM`."""
        return {}


@dataclass(frozen=True)
class Classifier:
    """An encoder and a linear layer that gives a score for each label."""

    labels: tuple[str, ...]
    """The name of each label, in the order of the scores."""
    problem_type: str | None = None
    """The loss of transformers: `single_label_classification`, `regression` or `multi_label_classification`."""
    pooling: str = "pooler"
    """What the linear layer reads: `pooler`, the pooled output, or `mean`, the mean of the hidden states."""

    architecture: ClassVar[str] = "ForSequenceClassification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    task: ClassVar[str] = "text-classification"

    def further_shapes(self, config: ShareBertConfig) -> dict[str, tuple[int, ...]]:
        """See `MaskedLM`."""
        labels = len(self.labels)
        return {"classifier.weight": (labels, config.hidden_size), "classifier.bias": (labels,)}

    def config_keys(self) -> dict[str, Any]:
        """See `MaskedLM`."""
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "problem_type": self.problem_type,
            "classifier_pooling": self.pooling,
        }


Kind = MaskedLM | HeadlessEncoder | Classifier


def pretrained_kind(config: ShareBertConfig) -> MaskedLM | HeadlessEncoder:
    """The kind of a pretrained model: whether it has an MLM head."""
    return HeadlessEncoder() if config.mlm_head == "none" else MaskedLM()


def classifier_of(values: Mapping[str, Any], labels: int) -> Classifier:
    """The classifier with so many labels that a `config.json` describes; labels without a name get `LABEL_0`, ….

    Raises BadInput: the names are those of another number of labels.
    """
    names = {int(number): str(label) for number, label in (values.get("id2label") or {}).items()}
    if names and sorted(names) != list(range(labels)):
        raise BadInput(f"id2label: names {len(names)} labels, but the classifier has {labels}")
    return Classifier(
        labels=tuple(names.get(number, f"LABEL_{number}") for number in range(labels)),
        problem_type=values.get("problem_type"),
        pooling=values.get("classifier_pooling") or "pooler",
    )
