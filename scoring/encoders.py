"""Encoders to be fine-tuned: ShareBERT exports and folders of Hugging Face encoders, from their weights or anew."""

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

from exports.export import TOKENIZER, check_tensors, load_tokenizer, read_config, words_of, write_export
from exports.weights import read_weights
from scoring.architecture import Inputs, inputs_of, read_model_type, set_dropout
from scoring.data import Texts
from scoring.recipe import FineTuneRecipe
from scoring.tasks import Task
from sharebert import ShareBertConfig, ShareBertError, ShareBertForMaskedLM, initialize
from sharebert.config import MODEL_TYPE
from sharebert_common.errors import BadInput
from sharebert_common.recipe import plain

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # None would ask on the terminal
RANDOM = "random:"  # before a folder: its architecture, with new weights for each seed


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
    """An architecture, its tokenizer, and weights to start from. `build` makes a classifier."""

    def __init__(self, spec: str, settings: FineTuneRecipe) -> None:
        self.spec = spec
        self.fresh = spec.startswith(RANDOM)
        self.folder = Path(spec.removeprefix(RANDOM))
        self.settings = settings

    tokenizer: Any
    """A fast tokenizer of transformers."""
    positions: int
    """The longest row that the model takes, in tokens."""
    words: int
    """Rows of its word embedding."""
    inputs: Inputs
    """What the model takes."""

    def applied_settings(self) -> dict[str, Any]:
        """The settings that had an effect, for the result."""
        return plain(self.settings)

    @abstractmethod
    def build(self, task: Task, seed: int) -> nn.Module:
        """A classifier for `task`: `forward(input_ids=…, attention_mask=…, labels=…)` gives `.loss`, `.logits`.

        What is not loaded (the classifier itself; all of it for a `random:` spec) depends on the seed alone.
        """

    @abstractmethod
    def save(self, model: nn.Module, task: Task, scores: str, out: Path) -> None:
        """Keep a fine-tuned classifier as an export of the same kind; `scores` is a table in Markdown."""

    def encode(self, texts: Texts, where: str) -> Encoded:
        """Tokenise rows, cut to `max_length`.

        Raises BadInput: a row has more tokens than the model has positions, or a word that it does not have.
        """
        pairs = tuple(map(list, zip(*texts, strict=True)))
        encoded = self.tokenizer(*pairs, truncation=True, max_length=self.settings.max_length)
        for row, ids in enumerate(encoded["input_ids"], 1):
            if len(ids) > self.positions:
                raise BadInput(
                    f"{where}: example {row} has {len(ids)} tokens, and {self.folder} has {self.positions} positions; "
                    f"finetune.max_length={self.positions} cuts longer texts"
                )
            if max(ids) >= self.words:
                raise BadInput(
                    f"{self.folder}: the tokenizer gives the word {max(ids)}, and the model has {self.words}: "
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

    Raises BadInput or ShareBertError, naming the file: something missing, damaged, or of no model.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()  # of weights that start new, which is meant
    transformers.utils.logging.disable_progress_bar()
    folder = Path(spec.removeprefix(RANDOM))
    kind = read_model_type(folder)
    return ShareBertExport(spec, settings) if kind == MODEL_TYPE else HuggingFaceEncoder(spec, settings)


def naming_folder(folder: Path) -> Any:
    """A context in which the errors of transformers and safetensors become one line that names the folder."""
    return _BadFolder(folder)


class ShareBertExport(Encoder):
    """An export of this project, read by this project: none of the code in the folder runs."""

    def __init__(self, spec: str, settings: FineTuneRecipe) -> None:
        super().__init__(spec, settings)
        from transformers import PreTrainedTokenizerFast

        config = read_config(self.folder)
        if settings.dropout is not None:
            config = dataclasses.replace(
                config, hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout
            )
        self.config: ShareBertConfig = config
        self.positions, self.words = config.max_position_embeddings, config.vocab_size
        arguments = frozenset({"input_ids", "attention_mask", "token_type_ids"})
        self.inputs = Inputs(self.positions, config.type_vocab_size, arguments)
        words = words_of(load_tokenizer(self.folder / TOKENIZER))
        if words > self.words:
            raise ShareBertError(
                f"{self.folder / TOKENIZER}: {words} words, but the model has {self.words}: "
                "this is another model's tokenizer"
            )
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder)
        if not self.fresh:
            _ = self._weights

    @functools.cached_property
    def _weights(self) -> dict[str, Tensor]:
        """The encoder's tensors; of heads, none."""
        tensors = {n: t for n, t in read_weights(self.folder).items() if not n.startswith("classifier.")}
        check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, self.config, str(self.folder))
        return {name: tensor.float() for name, tensor in tensors.items() if not name.startswith("mlm_head.")}

    def build(self, task: Task, seed: int) -> nn.Module:
        """A `ShareBertForSequenceClassification`; a `random:` one starts as pretraining with `init: variance` does."""
        from sharebert.hub import ShareBertForSequenceClassification, ShareBertHubConfig

        torch.manual_seed(seed)
        values = {key: value for key, value in self.config.to_dict().items() if key != "model_type"}
        model = ShareBertForSequenceClassification(ShareBertHubConfig(**values, **self._settings(task)))
        weights = self._fresh_weights(seed) if self.fresh else self._weights
        model.load_state_dict({**weights, **{n: t for n, t in model.state_dict().items() if "classifier." in n}})
        return model

    def save(self, model: nn.Module, task: Task, scores: str, out: Path) -> None:
        """Write an export with a classifier, which `AutoModelForSequenceClassification` loads."""
        headless = dataclasses.replace(self.config, mlm_head="none")
        sections = {
            f"Fine-tuned on {task.name}": f"{scores}\n\nLoad it with `AutoModelForSequenceClassification`, or with "
            '`pipeline("text-classification", model=folder, trust_remote_code=True)`.'
        }
        write_export(
            out,
            headless,
            model.state_dict(),
            tokenizer=self.folder / TOKENIZER,
            sections=sections,
            settings=self._settings(task),
        )

    def _settings(self, task: Task) -> dict[str, Any]:
        return {**label_settings(task), "classifier_pooling": self.settings.pooling}

    def _fresh_weights(self, seed: int) -> dict[str, Tensor]:
        model = ShareBertForMaskedLM(self.config)
        initialize(model, "variance", seed)
        return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mlm_head.")}


class HuggingFaceEncoder(Encoder):
    """Any encoder that `AutoModelForSequenceClassification` takes from a folder, with no code of the folder's own."""

    def __init__(self, spec: str, settings: FineTuneRecipe) -> None:
        super().__init__(spec, settings)
        from transformers import AutoConfig, AutoTokenizer

        if settings.pooling != "pooler":
            raise BadInput(
                f"finetune.pooling: {settings.pooling} is for ShareBERT exports; {self.folder} has a head of its class"
            )
        with self._naming_folder():
            self.config = AutoConfig.from_pretrained(self.folder, **_LOCAL)
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, use_fast=True, **_LOCAL)
        if self.tokenizer.pad_token is None:
            raise BadInput(f"{self.folder}: its tokenizer has no padding token")
        with self._naming_folder():
            self.inputs = inputs_of(self.config)
        self.words = self.config.vocab_size
        self.positions = min(self.inputs.positions or self.tokenizer.model_max_length, self.tokenizer.model_max_length)
        if settings.dropout is not None:
            set_dropout(self.config, settings.dropout, str(self.folder))

    def build(self, task: Task, seed: int) -> nn.Module:
        """The sequence classifier of the encoder's own class."""
        from transformers import AutoModelForSequenceClassification

        config = copy.deepcopy(self.config)
        config.update(label_settings(task))
        torch.manual_seed(seed)
        with self._naming_folder():
            if self.fresh:
                return AutoModelForSequenceClassification.from_config(config)
            return AutoModelForSequenceClassification.from_pretrained(
                self.folder,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # of a classifier for another task
                **_LOCAL,
            )

    def applied_settings(self) -> dict[str, Any]:
        """All but `pooling`: the head of the encoder's class decides that."""
        return {key: value for key, value in plain(self.settings).items() if key != "pooling"}

    def save(self, model: Any, task: Task, scores: str, out: Path) -> None:
        """Write it as `save_pretrained` does."""
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BadInput(f"{out}: exists; choose another folder, or remove it first")
        model.save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        (out / "README.md").write_text(f"# Fine-tuned on {task.name}\n\n{scores}\n", encoding="utf-8")

    def _naming_folder(self) -> Any:
        return _BadFolder(self.folder)


class _BadFolder:
    """Turns what transformers and safetensors raise for a folder's files into one line."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        from safetensors import SafetensorError

        if isinstance(error, (OSError, ValueError, KeyError, SafetensorError)):
            cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise BadInput(f"{self._folder}: not to be loaded as a Hugging Face encoder ({cause})") from error


def label_settings(task: Task) -> dict[str, Any]:
    """What a config says of a task's labels; their number follows from `id2label`."""
    labels = ("score",) if task.regression else task.labels
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": "regression" if task.regression else "single_label_classification",
    }
