"""The step `prune_to_latency`: heads, columns and layers go until the time is a given share of what it was."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compress.calibrate import Batch, calibration_batches
from compress.prune.gate_training import GateTraining
from compress.prune.latency_table import LatencyTable, keep_table, kept_table, measure_table
from compress.prune.structure import Inputs, fisher
from compress.prune.structure_search import Structure, by_gradients, check_target, search
from compress.prune.structure_step import sliced, without_layers
from compress.shape_times import Call, batch_shape, shape_times
from compress.step import FromCompact, Source, Tools, check_one_pair, check_task_weight
from compress.training import with_biases
from exports.export import Export, model_of
from exports.forms import write_export
from exports.read import load_model, read_export
from exports.weight_source import all_tensors
from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

TABLE = "latency_table.json"
"""The measured times, in the scratch folder."""

GATES = "gates"
"""What the training of gates saves, a folder in the scratch folder."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class PruneToLatency(FromCompact):
    """Remove heads, feed-forward columns and layers until the predicted time is a share of what it was."""

    NAME = "prune_to_latency"

    latency: Annotated[float, Field(gt=0, le=1)]
    """The time of the result as a share of the source's, on the CPU of this machine."""
    timed: Annotated[str, AfterValidator(batch_shape)] | None = None
    """The batch that is timed, as rows x tokens; none: one row as long as calibration rows."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of a timed call."""
    method: Literal["fisher", "hard_concrete"] = "fisher"
    """How parts are chosen. fisher: by squared gradients on calibration rows, without training; hard_concrete: gates on
    the parts are trained, with biases and norms."""
    rescale: bool = False
    """fisher: multiply what stays by factors, and add to biases, by least squares as in `prune_structure`."""
    steps: Annotated[int, Field(ge=5)] = 1000
    """hard_concrete: steps of the training, each with `batch` calibration rows."""
    batch: Annotated[int, Field(ge=1)] = 32
    """hard_concrete: calibration rows of a step."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """hard_concrete: the highest learning rate of biases and norms; it rises over the first steps, and falls to zero as
    a cosine."""
    gate_lr: Annotated[float, Field(gt=0)] = 0.1
    """hard_concrete: the learning rate of the gates."""
    task_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    """hard_concrete: weight of the masked-language-model loss; the rest is of the squared error of the last hidden
    states, with the source as teacher."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return True

    def check_config(self, config: ShareBertConfig) -> None:
        """See `FromCompact.check_config`."""
        if not config.generates:
            raise BadInput(
                f"prune_to_latency: takes models with sharing: veps or eps, this one has {config.sharing}; "
                "use prune_structure with layers"
            )
        check_one_pair("prune_to_latency", config)
        if self.timed is not None and self.call(0).tokens > config.max_position_embeddings:
            raise BadInput(
                f"prune_to_latency.timed: {self.timed} has more tokens than the model's "
                f"{config.max_position_embeddings} positions"
            )
        if self.method == "hard_concrete":
            if self.rescale:
                raise BadInput(
                    "prune_to_latency.rescale: is for method: fisher; hard_concrete trains factors and biases itself"
                )
            check_task_weight("prune_to_latency", self.task_weight, config)

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        export = read_export(source.folder)
        table = self.table(export.config, self.call(tools.calibration().shape[1]), tools)
        check_target(table, self.latency, "prune_to_latency.latency")
        notes: dict[str, Any] = {}
        if self.method == "fisher":
            structure, result, loss = self.by_fisher(export, table, source, tools)
            what = "loss" if export.config.mlm_head != "none" else "error of hidden states"  # as `masked_loss` says
            when = " before least squares" if self.rescale else ""
            notes[f"{what} on calibration rows{when}"] = round(loss, 4)
        else:
            structure, result = self.by_gates(export, table, source, tools)
        write_export(result, out)
        before, after = shape_times([export.config, result.config], table.call)
        heads = result.config.kept_heads or range(result.config.heads)
        return notes | {
            "heads": list(heads),
            "columns": len(structure.columns),
            "layers": structure.layers,
            "predicted share of the time": round(table.of(structure.shape), 4),
            "measured share of the time": round(after / before, 4),
            "table": _short(table),
        }

    def table(self, config: ShareBertConfig, call: Call, tools: Tools) -> LatencyTable:
        """The table in the scratch folder; where this machine has measured none, a new one."""
        path = tools.scratch / TABLE
        if (kept := kept_table(path, config, call)) is not None:
            return kept
        shutil.rmtree(tools.scratch / GATES, ignore_errors=True)  # their structure may be for another machine's times
        tools.say(f"prune_to_latency: timing shapes with {call.rows}x{call.tokens} words")
        table = measure_table(config, call)
        keep_table(path, table)
        return table

    def call(self, tokens: int) -> Call:
        """What is timed; `tokens` is the length of a row unless the recipe says it."""
        rows, length = (1, tokens) if self.timed is None else map(int, self.timed.split("x"))
        return Call(rows, length, self.threads)

    def by_fisher(
        self, export: Export, table: LatencyTable, source: Source, tools: Tools
    ) -> tuple[Structure, Export, float]:
        """What stays, the model with that alone, and the loss on calibration rows, which is that before `rescale`."""
        model = load_model(source.folder)
        rows = calibration_batches(source, tools)
        rankings = by_gradients(fisher(model, rows, tools.seed))
        structure, loss = search(model, rankings, table, self.latency, rows)
        return structure, cut(export, structure, rows=rows if self.rescale else None), loss

    def by_gates(self, export: Export, table: LatencyTable, source: Source, tools: Tools) -> tuple[Structure, Export]:
        """What stays, and the model with its biases and norms after the training."""
        model, teacher = load_model(source.folder), load_model(source.folder)
        rows = calibration_batches(source, tools, self.batch)
        training = GateTraining(model, teacher, table, self.latency, self.task_weight, tools.seed)

        def say(step: int, loss: float, share: float) -> None:
            tools.say(f"prune_to_latency: step {step} of {self.steps}, loss {loss:.4f}, predicted share {share:.3f}")

        kept = training.run(rows, self.steps, self.lr, self.gate_lr, tools.scratch / GATES, say)
        return kept.structure, cut(with_biases(export, model), kept.structure, kept.heads[0], kept.columns[0])


def cut(
    export: Export,
    structure: Structure,
    heads: Tensor | None = None,
    columns: Tensor | None = None,
    rows: Sequence[Batch] | None = None,
) -> Export:
    """The export with the parts of a structure only; with factors on its heads [heads] and columns [columns].

    With `rows`, factors and biases by least squares on them too. Tensors keep their dtypes, but for the new factors,
    which are float32.
    """
    tensors = {name: tensor.float() for name, tensor in all_tensors(export.weights).items()}
    config = export.config
    removed = sorted(set(range(config.num_hidden_layers)) - set(structure.layers))
    if removed:
        inputs = None if rows is None else Inputs(model_of(config, tensors), rows)
        tensors = without_layers(tensors, removed, inputs, config.branch_gain)
        config = dataclasses.replace(config, num_hidden_layers=len(structure.layers))
    factors = [None if heads is None else heads.repeat_interleave(config.head_size), columns]
    kept = [
        None if factor is None and len(own) == there else own
        for own, there, factor in zip(structure, (config.heads, config.inner_size), factors, strict=False)
    ]
    if kept != [None, None]:
        inputs = None if rows is None else Inputs(model_of(config, tensors), rows)
        config, tensors = sliced(config, tensors, kept[0], kept[1], inputs)
    for name, factor in zip(("kept_attention_scale", "kept_inner_scale"), factors, strict=True):
        if factor is not None:
            tensors[f"sharebert.{name}"] = tensors[f"sharebert.{name}"] * factor[factor != 0]
    return export.with_model(config, tensors)


def _short(table: LatencyTable) -> dict[str, Any]:
    """What the report says about the table: milliseconds, rounded."""
    parts = {
        name: {number: round(ms, 3) for number, ms in getattr(table, name).items()}
        for name in ("heads", "columns", "layers")
    }
    return {**table.call._asdict(), "ms": round(table.ms, 3), **parts}
