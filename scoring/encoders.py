"""Encoders to be fine-tuned: ShareBERT exports and folders of Hugging Face encoders, with their weights or new ones."""

from __future__ import annotations

import copy
import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exports.export import Export
from exports.files import CARD, TOKENIZER
from exports.forms import write_export
from exports.hub_weights import LOCAL, load_hub_model, naming_folder
from exports.kinds import Classifier
from exports.read import load_model, read_config
from exports.tokenizer import (
    load_tokenizer,
    pair_type,
    require_special_tokens,
    transformers_settings,
    vocabulary_size,
)
from exports.weight_source import TensorWeights
from scoring.architecture import Inputs, inputs_of, read_model_type, set_dropout
from scoring.data import Texts
from scoring.recipe import FineTuneRecipe
from scoring.tasks import Task
from sharebert import ShareBertForMaskedLM, initialize
from sharebert.config import MODEL_TYPE
from sharebert_common.errors import BadInput
from sharebert_common.files import whole_or_absent_folder
from sharebert_common.inference_tokenizer import for_inference

RANDOM = "random:"
"""Before a folder: the architecture there, with new weights for each seed."""


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows: lists of ids by the name of the model's argument."""

    columns: Mapping[str, list[list[int]]]

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(ids) for ids in self.columns["input_ids"]]


class Encoder(ABC):
    """An architecture, its tokenizer, and the weights that fine-tuning starts from. `build` makes a classifier."""

    def __init__(self, spec: str, settings: FineTuneRecipe) -> None:
        self.spec = spec
        self.fresh = spec.startswith(RANDOM)
        self.folder = Path(spec.removeprefix(RANDOM))
        self.settings = settings

    tokenizer: Any
    """A fast tokenizer of transformers."""
    config: Any
    """Its config, with `hidden_size`, `num_hidden_layers` and `num_attention_heads`."""
    positions: int
    """The longest row that the model takes, in tokens."""
    words: int
    """Rows of its word embedding."""
    inputs: Inputs
    """What the model takes."""
    sharing: str | None = None
    """How a ShareBERT shares matrices; None for another model."""
    unused_settings: frozenset[str] = frozenset()
    """Settings that have no effect on this kind of encoder; a result does not name them."""

    @abstractmethod
    def build(self, task: Task, seed: int) -> nn.Module:
        """A classifier for `task`: `forward(input_ids=…, attention_mask=…, labels=…)` gives `.loss`, `.logits`.

        What is not loaded (the classifier layer; everything for a `random:` spec) depends on the seed alone.
        """

    @abstractmethod
    def new_parameters(self, model: nn.Module) -> list[str]:
        """Names of the parameters of a model from `build` that the folder does not hold: the classifier's."""

    @abstractmethod
    def save(self, model: nn.Module, task: Task, scores: str, out: Path) -> None:
        """Save a fine-tuned classifier in `out`; `scores` is a table in Markdown for its card."""

    def encode(self, texts: Texts, where: str) -> Encoded:
        """Tokenise rows, cut to `max_length`.

        Raises BadInput: a row has more tokens than the model has positions, or an id that the model does not have.
        """
        pairs = tuple(map(list, zip(*texts, strict=True)))
        encoded = self.tokenizer(*pairs, truncation=True, max_length=self.settings.max_length)
        for row, ids in enumerate(encoded["input_ids"], 1):
            if len(ids) > self.positions:
                raise BadInput(
                    f"{where}: example {row} has {len(ids)} tokens, and {self.folder} has {self.positions} positions; "
                    f"finetune.max_length={self.positions} cuts longer texts"
                )
        return self.usable(encoded)

    def usable(self, encoded: Any) -> Encoded:
        """The columns of a tokenizer's output that the model takes.

        Raises BadInput: an id or a token type that the model does not have.
        """
        largest = max((max(ids, default=0) for ids in encoded["input_ids"]), default=0)
        if largest >= self.words:
            raise BadInput(
                f"{self.folder}: the tokenizer gives the id {largest}, but the model has {self.words} words: "
                "this is another model's tokenizer"
            )
        columns = {name: encoded[name] for name in self.tokenizer.model_input_names if name in encoded}
        return Encoded(self.inputs.usable(columns, str(self.folder)))

    def collate(self, encoded: Encoded, rows: list[int]) -> dict[str, Tensor]:
        """Some rows as a batch [B, T], padded to the longest of them."""
        batch = {name: [values[row] for row in rows] for name, values in encoded.columns.items()}
        padded = self.tokenizer.pad(batch, return_tensors="pt")
        return {name: values for name, values in padded.items() if name in self.inputs.arguments}


def open_encoder(spec: str, settings: FineTuneRecipe) -> Encoder:
    """The encoder of `FOLDER`, or, for `random:FOLDER`, one of its architecture with new weights.

    Raises BadInput, naming the file: something missing, damaged, or not a model.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()  # no warning about new weights: they are intended
    transformers.utils.logging.disable_progress_bar()
    folder = Path(spec.removeprefix(RANDOM))
    kind = read_model_type(folder)
    return ShareBertExport(spec, settings) if kind == MODEL_TYPE else HuggingFaceEncoder(spec, settings)


class ShareBertExport(Encoder):
    """An export of this project, read by this project: the code in the folder does not run."""

    def __init__(self, spec: str, settings: FineTuneRecipe) -> None:
        super().__init__(spec, settings)
        from transformers import PreTrainedTokenizerFast

        config = read_config(self.folder)
        if settings.dropout is not None:
            config = dataclasses.replace(
                config, hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout
            )
        self.config, self.sharing = config, config.sharing
        self.positions, self.words = config.max_position_embeddings, config.vocab_size
        arguments = frozenset({"input_ids", "attention_mask", "token_type_ids"})
        self.inputs = Inputs(self.positions, config.type_vocab_size, arguments)
        tokenizer = load_tokenizer(self.folder / TOKENIZER)
        require_special_tokens(tokenizer, self.folder / TOKENIZER)
        words = vocabulary_size(tokenizer)
        if words > self.words:
            raise BadInput(
                f"{self.folder / TOKENIZER}: {words} words, but the model has {self.words}: "
                "this is another model's tokenizer"
            )
        ready, _ = for_inference(tokenizer, pair_type(config))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=ready, **transformers_settings(config))
        if not self.fresh:
            _ = self._weights

    @functools.cached_property
    def _weights(self) -> dict[str, Tensor]:
        """The tensors of the encoder, without those of any head."""
        return _encoder_tensors(load_model(self.folder))

    def build(self, task: Task, seed: int) -> nn.Module:
        """A `ShareBertForSequenceClassification`. New weights start as in pretraining with `init: variance`."""
        from scoring.fake_quantise import FakeQuantisedClassifier
        from sharebert.hub import ShareBertForSequenceClassification, ShareBertHubConfig

        torch.manual_seed(seed)
        values = {key: value for key, value in self.config.to_dict().items() if key != "model_type"}
        config = ShareBertHubConfig(**values, **self._kind(task).config_keys())
        rounds = self.settings.quantise.bits is not None
        model = (
            FakeQuantisedClassifier(config, self.settings.quantise)
            if rounds
            else ShareBertForSequenceClassification(config)
        )
        weights = self._fresh_weights(seed) if self.fresh else self._weights
        model.load_state_dict({**weights, **{n: t for n, t in model.state_dict().items() if "classifier." in n}})
        return model

    def new_parameters(self, model: nn.Module) -> list[str]:
        """See `Encoder.new_parameters`."""
        return [name for name, _ in model.named_parameters() if name.startswith("classifier.")]

    def save(self, model: Any, task: Task, scores: str, out: Path) -> None:
        """Write an export with a classifier, which `AutoModelForSequenceClassification` loads."""
        sections = {
            f"Fine-tuned on {task.name}": f"{scores}\n\nLoad it with `AutoModelForSequenceClassification`, or with "
            '`pipeline("text-classification", model=folder, trust_remote_code=True)`.'
        }
        export = Export(
            dataclasses.replace(model.config.plain(), mlm_head="none"),  # LoRA may have changed how it shares
            self._kind(task),
            TensorWeights(model.state_dict()),
            tokenizer=self.folder / TOKENIZER,
            card_sections=sections,
        )
        write_export(export, out)

    def _kind(self, task: Task) -> Classifier:
        return Classifier(label_names(task), problem_type(task), self.settings.pooling)

    def _fresh_weights(self, seed: int) -> dict[str, Tensor]:
        model = ShareBertForMaskedLM(self.config)
        initialize(model, "variance", seed)
        return _encoder_tensors(model)


def _encoder_tensors(model: ShareBertForMaskedLM) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mlm_head.")}


class HuggingFaceEncoder(Encoder):
    """Any encoder that `AutoModelForSequenceClassification` loads from a folder without remote code."""

    unused_settings = frozenset({"pooling", "quantise"})
    _missing: frozenset[str] = frozenset()
    """Parameters that the folder does not hold."""

    def __init__(self, spec: str, settings: FineTuneRecipe) -> None:
        super().__init__(spec, settings)
        from transformers import AutoConfig, AutoTokenizer

        if settings.pooling != "pooler":
            raise BadInput(
                f"finetune.pooling: {settings.pooling} is for ShareBERT exports; {self.folder} has a head of its class"
            )
        if settings.quantise.bits is not None:
            raise BadInput(f"finetune.quantise: is for ShareBERT exports, and {self.folder} is another model")
        with naming_folder(self.folder):
            self.config = AutoConfig.from_pretrained(self.folder, **LOCAL)
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, use_fast=True, **LOCAL)
        if self.tokenizer.pad_token is None:
            raise BadInput(f"{self.folder}: its tokenizer has no padding token")
        with naming_folder(self.folder):
            self.inputs = inputs_of(self.config)
        self.words = self.config.vocab_size
        self.positions = min(self.inputs.positions or self.tokenizer.model_max_length, self.tokenizer.model_max_length)
        if settings.dropout is not None:
            set_dropout(self.config, settings.dropout, str(self.folder))

    def build(self, task: Task, seed: int) -> nn.Module:
        """The sequence classifier that transformers has for this encoder."""
        from transformers import AutoModelForSequenceClassification

        config = copy.deepcopy(self.config)
        names = label_names(task)
        config.update(
            {
                "id2label": dict(enumerate(names)),
                "label2id": {name: number for number, name in enumerate(names)},
                "problem_type": problem_type(task),
            }
        )
        torch.manual_seed(seed)
        if self.fresh:
            with naming_folder(self.folder):
                return AutoModelForSequenceClassification.from_config(config)
        # the folder may hold a classifier for another task, or none
        model, self._missing = load_hub_model(AutoModelForSequenceClassification, self.folder, "head", config=config)
        return model

    def new_parameters(self, model: Any) -> list[str]:
        """See `Encoder.new_parameters`; for some folders they are those of the pooler as well."""
        encoder = f"{model.base_model_prefix}."
        return [name for name, _ in model.named_parameters() if not name.startswith(encoder) or name in self._missing]

    def save(self, model: Any, task: Task, scores: str, out: Path) -> None:
        """Write it with `save_pretrained`, whole or not at all."""
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BadInput(f"{out}: exists; choose another folder, or remove it first")
        with whole_or_absent_folder(out) as folder:
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            (folder / CARD).write_text(f"# Fine-tuned on {task.name}\n\n{scores}\n", encoding="utf-8")


def label_names(task: Task) -> tuple[str, ...]:
    """The name of each score that a classifier for `task` gives."""
    return ("score",) if task.regression else tuple(task.labels)


def problem_type(task: Task) -> str:
    """The name of the task's loss in transformers."""
    return "regression" if task.regression else "single_label_classification"
