"""What the frame gives to a step (see `step.Tools`), and the masked-language-model loss of any form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.recipe import CompressRecipe, RowsRecipe
from compress.source import is_masked_lm, open_hub_model, open_source, positions_of
from compress.step import MASK_RATE
from data_prep.shards.reader import Dataset, open_dataset
from exports.read import load_model
from exports.tokenizer import load_tokenizer, training_tokenizer_sha256
from pretrain.objective import MaskedLanguageModelling
from pretrain.validate import ValidateRecipe, validate
from sharebert_common.errors import BadInput


class RecipeTools:
    """`Tools` from a recipe and the source of the whole command."""

    def __init__(self, recipe: CompressRecipe, model: Path, scratch: Path, say: Callable[[str], None]) -> None:
        self.recipe, self.model, self.scratch, self.say = recipe, model, scratch, say
        self.seed = recipe.seed

    def calibration(self) -> Tensor:
        """See `Tools.calibration`: rows spread evenly over the train split, read once."""
        return self._calibration_rows

    @property
    def _calibration(self) -> RowsRecipe:
        if self.recipe.calibration.dataset is None:
            raise BadInput("calibration.dataset: this step looks at activations; name a dataset")
        return self.recipe.calibration

    @functools.cached_property
    def _calibration_rows(self) -> Tensor:
        rows = self._calibration
        split = open_rows("calibration", rows, self.model).split("train")
        count = min(rows.rows, split.rows)
        tokens, _ = split.read(np.arange(count) * split.rows // count)
        return torch.from_numpy(np.asarray(tokens).astype(np.int64))

    def calibration_dataset(self) -> Path:
        """See `Tools.calibration_dataset`."""
        return open_rows("calibration", self._calibration, self.model).path

    def teacher(self) -> Path:
        """See `Tools.teacher`."""
        if self.recipe.teacher is None:
            raise BadInput("teacher: this step learns from a teacher; name its folder")
        return Path(self.recipe.teacher)

    def masked_lm_loss(self, folder: Path) -> float:
        """See `Tools.masked_lm_loss`. Raises BadInput: no dataset was named, or the model has no such head."""
        if self.recipe.validation.dataset is None:
            raise BadInput("validation.dataset: this step looks at the loss; name a dataset")
        loss = masked_lm_loss(folder, self.recipe.validation)
        if loss is None:
            raise BadInput(f"{folder}: has no masked-language-model head, so there is no loss")
        return loss


class UnfitRows(BadInput):
    """A dataset's rows are no rows for a model."""


def open_rows(key: str, rows: RowsRecipe, model: Path) -> Dataset:
    """The dataset of a key of the recipe.

    Raises UnfitRows: its tokenizer is not the model's, or its rows have more tokens than the model has positions.
    """
    assert rows.dataset is not None
    dataset, theirs = open_dataset(rows.dataset), model / "tokenizer.json"
    if theirs.is_file() and training_tokenizer_sha256(theirs) != dataset.manifest["tokenizer_sha256"]:
        ours = load_tokenizer(dataset.tokenizer_path).get_vocab()
        if ours != load_tokenizer(theirs).get_vocab():  # another file may hold the same words
            raise UnfitRows(f"{key}.dataset: {rows.dataset} was made with another tokenizer than that of {model}")
    positions = positions_of(model)
    if positions is not None and dataset.seq_len > positions:
        raise UnfitRows(
            f"{key}.dataset: {rows.dataset} has rows of {dataset.seq_len} tokens, and {model} has {positions} "
            "positions; name a dataset with shorter rows"
        )
    return dataset


def masked_lm_loss(folder: Path, rows: RowsRecipe) -> float | None:
    """Loss in nats of the model in `folder`, of any form; None without a masked-language-model head.

    The rows are those of a training's validation, in the same fixed order, all chosen tokens masked. Raises UnfitRows.
    """
    model = masked_lm(folder)
    if model is None:
        return None
    dataset = open_rows("validation", rows, folder)
    recipe = ValidateRecipe(rows=rows.rows)
    objective = MaskedLanguageModelling(torch.device("cpu"))
    return validate(objective, model, [dataset], recipe, mask_rate=MASK_RATE, whole_word=False).loss


def masked_lm(folder: Path) -> Callable[..., Any] | None:
    """The model in `folder` as `MaskedLanguageModelling` calls it; None without a masked-language-model head."""
    form = open_source(folder).form
    if form == "compact":
        model = load_model(folder)
        return None if model.config.mlm_head == "none" else model
    if form == "onnx":
        from compress.dense.runtime import OnnxModel

        session = OnnxModel(folder)
        return ByLogits(session.logits) if is_masked_lm(folder) else None
    if not is_masked_lm(folder):
        return None
    stock = open_hub_model(folder, "MaskedLM")
    return ByLogits(lambda tokens, mask: stock(input_ids=tokens, attention_mask=mask).logits)


class Sums(NamedTuple):
    """As `ShareBertForMaskedLM` returns them."""

    loss_sum: Tensor
    correct: Tensor


class ByLogits:
    """A model that gives logits [B, T, V], called as `ShareBertForMaskedLM` is."""

    def __init__(self, logits: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._logits = logits

    def __call__(
        self,
        tokens: Tensor,
        *,
        positions: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Sums:
        """The sums of the losses and of the right predictions at `positions`."""
        mask = torch.ones_like(tokens) if attention_mask is None else (attention_mask != 0).long()
        logits = self._logits(tokens, mask).flatten(0, 1)[positions].float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        hits = (logits.argmax(1) == labels).float()
        return Sums((losses * loss_weights).sum(), (hits * loss_weights).sum())


@functools.cache
def installed(package: str) -> bool:
    """Whether a package can be imported."""
    from importlib.util import find_spec

    return find_spec(package) is not None
