"""The step `pc_lora`: matrices fade out while low-rank products learn, with the model itself as teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from compress.calibrate import Batch, calibration_batches, hidden_states, objective
from compress.dense.hub_onnx import head_of, open_for_onnx, write_model_onnx
from compress.encoder_loss import encoder_loss, outputs, rows_of
from compress.low_rank.fading import FadingMatrices, Schedule, base_share
from compress.low_rank.fading_linears import fade, linears_of, put, ranks_of, second_moments, trained_of
from compress.low_rank.step import low_rank_config, products, rank_notes, with_products
from compress.prune.structure import Inputs
from compress.source import WEIGHTS, config_of, copy_model
from compress.step import FormName, NeedsNoRows, Source, Tools, check_task_weight
from compress.training import batch_order, biases_and_norms, train, with_biases
from exports.forms import write_export
from exports.onnx import FILE, OPSET, check_onnx
from exports.read import load_model, read_export
from sharebert.config import ShareBertConfig
from sharebert.heads import ShareBertForMaskedLM
from sharebert.shared_linear import LowRank
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

PROGRESS = "pc_lora.pt"
"""The state of the training, in the scratch folder."""

MOMENT_BATCHES = 64
"""Batches that the products at the start are nearest on."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class PcLora(NeedsNoRows):
    """Train a low-rank product for each matrix while the matrix fades out (PC-LoRA). Of a compact export the result is
    as that of `low_rank`; of a dense export, or an encoder of Hugging Face, it is an ONNX file with the products."""

    rank: Annotated[int, Field(ge=1)]
    """Rank of each product, below the hidden size."""
    ranks: dict[str, Annotated[int, Field(ge=1)]] = field(default_factory=dict)
    """Other ranks for some matrices, by a pattern of their names; the first pattern that fits counts. Of a compact
    export as in `low_rank`; of a dense one or an encoder of Hugging Face as {"*.intermediate.dense": 96}."""
    steps: Annotated[int, Field(ge=1)] = 2000
    """Steps of the training, each with `batch` calibration rows."""
    fade: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Part of the steps after which nothing of the matrices is left."""
    schedule: Schedule = "sine"
    """How the matrices fade: linear; sine, fast at first; cosine, slowly at first and last."""
    start: Literal["svd", "zero"] = "svd"
    """svd: products start as in `low_rank`, and what they lack fades out; zero: they start at zero, as in the paper."""
    task_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the masked-language-model loss, or of a classifier's distance from its own answers before; the rest is
    of the squared error of the states of each layer. An encoder without a head takes 0."""
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
        if source.form != "compact":
            self.check_ahead(source.form, None)
            self.check_encoder(source.folder)
            return
        self.check_ahead(source.form, read_export(source.folder).config)

    def check_ahead(self, form: FormName, config: ShareBertConfig | None) -> None:
        """See `Step.check_ahead`."""
        if self.result_form(form) == "onnx":
            check_onnx(OPSET)
        elif config is not None:
            self.result_config(config)
            check_task_weight("pc_lora", self.task_weight, config)

    def check_encoder(self, folder: Path) -> None:
        """Raise BadInput where the model in `folder`, which is no compact export, cannot be taken."""
        if "quantization_config" in config_of(folder):
            raise BadInput(f"pc_lora: {folder} is quantised; take the model before")
        head = head_of(folder)
        if not head and self.task_weight > 0:
            raise BadInput(f"pc_lora.task_weight: {folder} has no head; set it to 0")
        ranks_of(linears_of(open_for_onnx(folder)), self.rank, self.ranks, folder)

    def result_form(self, source: FormName) -> FormName:
        """See `Step.result_form`. Stock classes have no pairs of matrices, so that an encoder becomes an ONNX file."""
        if source == "onnx":
            raise BadInput(
                "pc_lora: takes a compact export, a dense one or an encoder of Hugging Face, not an ONNX file"
            )
        return "compact" if source == "compact" else "onnx"

    def result_config(self, config: ShareBertConfig) -> ShareBertConfig:
        """See `Step.result_config`."""
        return low_rank_config("pc_lora", config, self.rank, self.ranks)

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        if source.form != "compact":
            model, notes = self.low_rank_encoder(source.folder, tools)
            copy_model(source.folder, out, *WEIGHTS)
            write_model_onnx(model, source.folder, out / FILE, OPSET)
            return notes
        export, teacher, student = (
            read_export(source.folder),
            load_model(source.folder).requires_grad_(False),
            load_model(source.folder).requires_grad_(False),
        )
        rows = calibration_batches(source, tools, self.batch)
        fading = self.fading(student, rows)
        student.sharebert.sharing = fading
        trained = [*fading.parameters(), *biases_and_norms(student).values()]
        for parameter in trained:
            parameter.requires_grad_()

        def loss_of(share: float, batch: Batch) -> Tensor:
            fading.share = share
            return self.loss(student, teacher, batch)

        self.train(loss_of, trained, rows, tools)
        fading.share = 0.0
        config = self.result_config(export.config)
        write_export(with_products(with_biases(export, student), config, fading.products()), out)
        return rank_notes(config) | {"steps": self.steps, "tokens": self.tokens(rows, tools.seed)}

    def low_rank_encoder(self, folder: Path, tools: Tools) -> tuple[Any, dict[str, Any]]:
        """A model whose layers have matrices of their own, with trained products in their place, as pairs of
        `nn.Linear`; and what the report says about it.
        """
        teacher, student = (open_for_onnx(folder).requires_grad_(False) for _ in range(2))
        head, tokens = head_of(folder), tools.calibration()
        rows = rows_of(tokens, folder, head, tools.seed, self.batch)
        linears = linears_of(student)
        ranks = ranks_of(linears, self.rank, self.ranks, folder)
        moments = second_moments(student, linears, rows[:MOMENT_BATCHES], outputs)
        fading = fade(student, ranks, moments, from_zero=self.start == "zero")
        trained = trained_of(student)
        for parameter in trained:
            parameter.requires_grad_()

        def loss_of(share: float, batch: Batch) -> Tensor:
            for module in fading.values():
                module.share = share
            return encoder_loss(student, teacher, batch, head, self.task_weight)

        self.train(loss_of, trained, rows, tools)
        put(student, {name: module.pair() for name, module in fading.items()})
        used = {"rank": self.rank} | ({"ranks": dict(self.ranks)} if self.ranks else {})
        notes = used | {"matrices": len(fading), "steps": self.steps, "tokens": self.tokens(rows, tools.seed)}
        return student.requires_grad_(False), notes

    def tokens(self, rows: list[Batch], seed: int) -> int:
        """Tokens of all steps of the training."""
        return sum(rows[number].tokens.numel() for number in batch_order(len(rows), self.steps, seed))

    def fading(self, model: ShareBertForMaskedLM, rows: list[Batch]) -> FadingMatrices:
        """The matrices of the model, and the products at the start."""
        with torch.no_grad():
            made = model.sharebert.layer_weights()
        matrices: dict[str, Any] = {**made.of_layer(0)._asdict(), "pooler": made.pooler}
        moments = Inputs(model, rows[:MOMENT_BATCHES]).second_moments
        found: dict[str, LowRank] = products(model, self.result_config(model.config), moments)
        return FadingMatrices(matrices, found, from_zero=self.start == "zero")

    def train(
        self, loss_of: Callable[[float, Batch], Tensor], trained: list[nn.Parameter], rows: list[Batch], tools: Tools
    ) -> None:
        """Train until nothing of the matrices is left. It goes on after the last save in the scratch folder.

        `loss_of` is given λ and a batch.
        """

        def share(step: int) -> float:
            return base_share(self.schedule, step / max(1, round(self.fade * self.steps)))

        def say(step: int, loss: float) -> None:
            tools.say(f"pc_lora: step {step} of {self.steps}, λ {share(step):.3f}, loss {loss:.4f}")

        groups = [{"params": trained, "lr": self.lr}]
        path = tools.scratch / PROGRESS
        train(groups, lambda step, batch: loss_of(share(step), batch), rows, self.steps, tools.seed, path, say)

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
