"""The step `distil`: the model is trained further with a teacher, by a training of `pretrain`."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from compress.step import FromCompact, Source, Tools
from exports.read import sparse_names
from pretrain.distill.recipe import LOSSES, DistillRecipe
from pretrain.export.consolidate import consolidate
from pretrain.flops import flops_per_token
from pretrain.recipe import TrainRecipe
from pretrain.sweep.recipe import Trial
from pretrain.sweep.runner import run_one
from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT, parse

CHECKPOINTS = 20
"""Checkpoints of the training: what a kill loses is at most one part of so many."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Distil(FromCompact):
    """Train the model further on the calibration dataset, with the recipe's `teacher`. What `prune_weights` removed
    stays so."""

    NAME = "distil"

    steps: Annotated[int, Field(ge=1)] = 2000
    """Steps of the training. All rows of the dataset's train split take part, not only `calibration.rows`."""
    rows: Annotated[int, Field(ge=1)] = 64
    """Rows of a step."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """The highest learning rate."""
    losses: dict[str, Any] = field(default_factory=lambda: {"logits": 1.0, "temperature": 2.0})
    """Keys of `distill` of a train recipe, without `teacher`: the weights of the losses."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return True

    @property
    def needs_teacher(self) -> bool:
        """See `Step.needs_teacher`."""
        return True

    def check_config(self, config: ShareBertConfig) -> None:
        """See `FromCompact.check_config`."""
        if not parse(DistillRecipe, self.losses, "distil.losses").weights:
            raise BadInput(f"distil.losses: no loss with the teacher has a weight; give one of {', '.join(LOSSES)}")
        if config.mlm_head == "none":
            raise BadInput("distil: takes a model with a masked-language-model head, and this one has none")

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`. The run lies in the scratch folder; after a kill it resumes from its newest checkpoint.

        Raises Stopped: the process was asked to stop; CommandError: the training failed.
        """
        recipe = self.training(source.folder, tools.calibration_dataset(), tools.teacher(), tools.scratch, tools.seed)
        training = recipe.resolve()
        run_one(Trial("distil", tools.seed, {}, recipe), tools.say)
        consolidate(Path(recipe.run), out)
        tokens = self.steps * self.rows * training.seq_len
        a_token = flops_per_token(
            training.model.config, training.seq_len, recipe.data.highest_mask_rate, self.rows * training.seq_len
        )
        return {"steps": self.steps, "tokens": tokens, "flops": a_token * tokens}

    def training(self, model: Path, dataset: Path, teacher: Path, scratch: Path, seed: int) -> TrainRecipe:
        """The recipe of the training. Raises BadInput: a key of `losses` that does not exist or is wrong."""
        values = {
            "run": str(scratch / "runs" / "distil"),
            "seed": seed,
            "steps": self.steps,
            "data": {
                "dataset": str(dataset),
                "global_batch": self.rows,
                "micro_batch": self.rows,
            },
            "model": {"init_from": str(model), "keep_zeros": bool(sparse_names(model))},
            "distill": {**self.losses, "teacher": str(teacher)},
            "optimizer": {"lr": self.lr},
            "precision": "fp32",
            "zero": {"stage": 0},
            "checkpoint": {"every": max(1, self.steps // CHECKPOINTS), "keep": 1},
            "validate": {"every": 0},
        }
        return parse(TrainRecipe, values, "distil")
