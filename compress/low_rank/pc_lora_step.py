"""The step `pc_lora`: the shared matrices fade out while low-rank products learn, with the model itself as teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from compress.low_rank.fading import FadingMatrices, Schedule, base_share
from compress.low_rank.step import check_source, products, with_products
from compress.prune.calibrate import Batch, batches, hidden_states, objective
from compress.prune.structure import Inputs
from compress.step import FromCompact, Source, Tools, check_task_weight
from compress.training import batch_order, biases_and_norms, train, with_biases
from exports.forms import write_export
from exports.read import load_model, read_export
from sharebert.heads import ShareBertForMaskedLM
from sharebert.shared_linear import LowRank
from sharebert_common.recipe import STRICT

PROGRESS = "pc_lora.pt"
"""The state of the training, in the scratch folder."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class PcLora(FromCompact):
    """Train a low-rank product for each shared matrix while the matrix fades out (PC-LoRA); the result is as that of
    `low_rank`."""

    NAME = "pc_lora"

    rank: Annotated[int, Field(ge=1)]
    """Rank of each product, below the hidden size."""
    steps: Annotated[int, Field(ge=1)] = 2000
    """Steps of the training, each with `batch` calibration rows."""
    fade: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Part of the steps after which nothing of the matrices is left."""
    schedule: Schedule = "sine"
    """How the matrices fade: linear; sine, fast at first; cosine, slowly at first and last."""
    start: Literal["svd", "zero"] = "svd"
    """svd: products start as in `low_rank`, and what they lack fades out; zero: they start at zero, as in the paper."""
    task_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the masked-language-model loss; the rest is of the squared error of the states of each layer."""
    batch: Annotated[int, Field(ge=1)] = 32
    """Calibration rows of a step."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """The highest learning rate, of AdamW; it rises over the first steps, and falls to zero as a cosine."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return True

    def check(self, source: Source) -> None:
        """See `Step.check`."""
        self.result_form(source.form)
        config = read_export(source.folder).config
        check_source("pc_lora", config, self.rank)
        check_task_weight("pc_lora", self.task_weight, config)

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        export, teacher, student = (
            read_export(source.folder),
            load_model(source.folder).requires_grad_(False),
            load_model(source.folder).requires_grad_(False),
        )
        rows = batches(tools.calibration(), source.folder / "tokenizer.json", tools.seed, self.batch)
        fading = self.fading(student, rows)
        student.sharebert.sharing = fading
        trained = [*fading.parameters(), *biases_and_norms(student).values()]
        for parameter in trained:
            parameter.requires_grad_()
        self.train(student, teacher, fading, trained, rows, tools)
        write_export(with_products(with_biases(export, student), self.rank, fading.products()), out)
        order = batch_order(len(rows), self.steps, tools.seed)
        return {"rank": self.rank, "steps": self.steps, "tokens": sum(rows[n].tokens.numel() for n in order)}

    def fading(self, model: ShareBertForMaskedLM, rows: list[Batch]) -> FadingMatrices:
        """The matrices of the model, and the products at the start."""
        with torch.no_grad():
            made = model.sharebert.layer_weights()
        matrices: dict[str, Any] = {**made.of_layer(0)._asdict(), "pooler": made.pooler}
        found: dict[str, LowRank] = products(model, self.rank, Inputs(model, rows[:64]).second_moments)
        return FadingMatrices(matrices, found, from_zero=self.start == "zero")

    def train(
        self,
        student: ShareBertForMaskedLM,
        teacher: ShareBertForMaskedLM,
        fading: FadingMatrices,
        trained: list[nn.Parameter],
        rows: list[Batch],
        tools: Tools,
    ) -> None:
        """Train until nothing of the matrices is left. It goes on after the last save in the scratch folder."""

        def loss_of(step: int, batch: Batch) -> Tensor:
            fading.share = base_share(self.schedule, step / max(1, round(self.fade * self.steps)))
            return self.loss(student, teacher, batch)

        def say(step: int, loss: float) -> None:
            tools.say(f"pc_lora: step {step} of {self.steps}, λ {fading.share:.3f}, loss {loss:.4f}")

        groups = [{"params": trained, "lr": self.lr}]
        train(groups, loss_of, rows, self.steps, tools.seed, tools.scratch / PROGRESS, say)
        fading.share = 0.0

    def loss(self, student: ShareBertForMaskedLM, teacher: ShareBertForMaskedLM, batch: Batch) -> Tensor:
        """The weighted sum of both losses, a mean over rows."""
        ours: list[Tensor] = []
        hidden = hidden_states(student, batch, watch=_branches_of(ours))
        features = torch.zeros(())
        if self.task_weight < 1:
            theirs: list[Tensor] = []
            with torch.no_grad():
                expected = hidden_states(teacher, batch, watch=_branches_of(theirs))
            pairs = [*zip(ours, theirs, strict=True), (hidden, expected)]
            errors = [F.mse_loss(x, y) / y.square().mean() for x, y in pairs]
            features = torch.stack(errors).mean()
        if self.task_weight == 0:
            return features
        task = objective(student, batch, hidden, torch.Generator()) / len(batch.tokens)
        return self.task_weight * task + (1 - self.task_weight) * features


def _branches_of(found: list[Tensor]) -> Any:
    """A `Watch` that collects what each layer adds to the stream."""

    def watch(_: int, name: str, x: Tensor) -> None:
        if name == "branches":
            found.append(x)

    return watch
