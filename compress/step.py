"""What a step is: the seam between `sharebert compress` and each way to make a model smaller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from exports.read import read_export
from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput

FormName = Literal["compact", "dense", "onnx", "hub"]
"""How a model lies in its folder: compact (also with packed factors), dense (`megatron_bert` that this project wrote),
onnx, or the folder of any other BERT-like encoder that plain transformers loads."""


MASK_RATE = 0.15
"""Share of a row's tokens that are predicted where a loss is measured; every one of them is [MASK]."""


@dataclass(frozen=True)
class Source:
    """The model that a step starts from: a whole folder that nobody changes."""

    folder: Path
    form: FormName


class Tools(Protocol):
    """What the frame gives to a step. Everything is made when it is first asked for."""

    seed: int
    """Decides every random choice of a step."""

    scratch: Path
    """A folder for intermediate files of this step. It is kept when the process dies, and removed once the step's
    result is whole, so that a long step can go on where it stood."""

    def calibration(self) -> Tensor:
        """Token ids [rows, length] int64 of the calibration dataset's train split, padded with the pad id.

        Raises BadInput: the recipe names no dataset, or its tokenizer is not the source's.
        """
        ...

    def calibration_dataset(self) -> Path:
        """The folder of the calibration dataset, for a step that trains on all of it. Raises BadInput as above."""
        ...

    def teacher(self) -> Path:
        """The folder of the recipe's teacher. Raises BadInput: the recipe names none."""
        ...

    def masked_lm_loss(self, folder: Path) -> float:
        """The loss in nats of the model in `folder` on the validation rows of the report."""
        ...

    def say(self, line: str) -> None:
        """Print a line of progress."""
        ...


class NeedsNoRows:
    """A base of steps that ask for no rows and no teacher, and say no config; a step overrides what is otherwise."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return False

    @property
    def needs_validation(self) -> bool:
        """See `Step.needs_validation`."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """See `Step.needs_teacher`."""
        return False

    def result_config(self, config: ShareBertConfig) -> ShareBertConfig | None:
        """See `Step.result_config`."""
        return None


class FromCompact(NeedsNoRows):
    """A base of steps from a compact export to a compact export."""

    NAME: ClassVar[str]
    """Of the step in a recipe."""

    def result_form(self, source: FormName) -> FormName:
        """See `Step.result_form`. Raises BadInput for other forms."""
        if source != "compact":
            raise BadInput(f"{self.NAME}: takes a compact export, this one is {source}")
        return source

    def check(self, source: Source) -> None:
        """See `Step.check`."""
        self.result_form(source.form)
        self.check_config(read_export(source.folder).config)

    def check_ahead(self, form: FormName, config: ShareBertConfig | None) -> None:
        """See `Step.check_ahead`."""
        self.result_form(form)
        if config is not None:
            self.check_config(config)

    def check_config(self, config: ShareBertConfig) -> None:
        """Raise BadInput, with one line, if this step cannot take a model of this config."""

    def result_config(self, config: ShareBertConfig) -> ShareBertConfig:
        """See `Step.result_config`."""
        return config


def check_one_pair(step: str, config: ShareBertConfig) -> None:
    """Raise BadInput, naming the step, for a model with several feed-forward pairs."""
    if config.ffn_pairs > 1:
        raise BadInput(f"{step}: takes a model with one feed-forward pair, this one has ffn_pairs: {config.ffn_pairs}")


def check_task_weight(step: str, weight: float, config: ShareBertConfig) -> None:
    """Raise BadInput, naming the step, for a weight of a masked-language-model loss that the model does not have."""
    if config.mlm_head == "none" and weight > 0:
        raise BadInput(f"{step}.task_weight: this model has no masked-language-model head; set it to 0")


class Step(Protocol):
    """One step. It is a frozen pydantic dataclass: its fields are its keys in a recipe, each with a docstring."""

    @property
    def needs_calibration(self) -> bool:
        """Whether it asks for calibration rows, so that a recipe without a dataset is refused before any work."""
        ...

    @property
    def needs_validation(self) -> bool:
        """Whether it asks for the loss on validation rows, so that a recipe without them is refused before any work."""
        ...

    @property
    def needs_teacher(self) -> bool:
        """Whether it learns from a teacher, so that a recipe without one is refused before any work."""
        ...

    def check(self, source: Source) -> None:
        """Raise BadInput, with one line, if this step cannot take `source`. Called before any work."""
        ...

    def check_ahead(self, form: FormName, config: ShareBertConfig | None) -> None:
        """Raise BadInput, with one line, for what is wrong before the source is there, while an earlier step has to
        make it.

        Args:
            form: of the source.
            config: of a compact or dense source, as far as it is known; None where it is not.
        """
        ...

    def result_form(self, source: FormName) -> FormName:
        """The form of the result, so that a recipe's later steps can be checked before the first one runs."""
        ...

    def result_config(self, config: ShareBertConfig) -> ShareBertConfig | None:
        """The config of a result that is compact or dense, for a source of this config; None: not known.

        Which heads and columns stay is known later, how many is known now. A step that chooses that too gives the
        config of its source: what cannot take the whole model cannot take a part of it. A dense model has `sharing:
        none`.
        """
        ...

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """Write the result, a whole model, into the new folder `out`.

        Returns what the report should say about the step beside what it measures: plain JSON values.
        """
        ...
