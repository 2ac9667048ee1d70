"""What a scoring shows: a file of JSON a model, a table of all models of a task, curves in TensorBoard."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sharebert_common.errors import BadInput
from sharebert_common.files import write_atomically

TABLE, BOARD = "results.md", "tensorboard"


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a model scored on a task."""

    task: str
    model: str
    """As it was named on the command line."""
    scores: dict[str, dict[str, list[float]]]
    """Split → metric → one value a seed."""
    parameters: int
    """Learned numbers, the classifier's included, those of a masked-language-model head not."""
    bytes: int
    """Of the parameters in memory; of TF-IDF, pickled."""
    latency_ms: float
    """Median time of one text of the first dev split, alone, tokenisation included."""
    device: str
    threads: int
    """That PyTorch used."""
    train_rows: int
    fit_s: list[float]
    """Time of each fit, a seed."""
    seeds: list[int] = field(default_factory=list)
    """Empty for what has no chance in it."""
    lr: float | None = None
    sweep: dict[str, float | None] = field(default_factory=dict)
    """Where learning rates were tried: the mean of the dev metrics with the first seed; null where it diverged."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The recipe's `finetune`."""
    versions: dict[str, str] = field(default_factory=dict)


def file_name(name: str) -> str:
    """A model's or task's name as that of a file: what is no letter, digit, dot or minus becomes a minus."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"


def write_result(folder: Path, result: Result) -> None:
    """Write a result, and the table of all results in `folder`."""
    values = TypeAdapter(Result).dump_python(result, mode="json")
    write_atomically(folder / f"{file_name(result.model)}.json", json.dumps(values, indent=2) + "\n")
    write_atomically(folder / TABLE, table(read_results(folder)) + "\n")


def read_results(folder: Path) -> list[Result]:
    """All results in `folder`, the best first. Raises BadInput, naming the file that is none."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(TypeAdapter(Result).validate_json(path.read_bytes()))
        except (ValidationError, OSError) as error:
            raise BadInput(f"{path}: not a result of evaluate; remove it") from error
    return sorted(found, key=lambda result: -headline(result))


def headline(result: Result) -> float:
    """The mean over seeds of all metrics on the dev splits."""
    dev = (values for split, metrics in result.scores.items() if split != "test" for values in metrics.values())
    return mean(mean(values) for values in dev)


def table(results: Sequence[Result]) -> str:
    """Results of one task as a table in Markdown; scores are times 100: mean ± standard deviation (least to most)."""
    columns = list(dict.fromkeys((split, metric) for r in results for split in r.scores for metric in r.scores[split]))
    head = ["model", "parameters", "MB", "ms a text", "train rows", "epochs", "lr", "seeds"]
    rows = [[*head, *(f"{split} {metric}" for split, metric in columns)]]
    for result in results:
        rows.append(
            [
                result.model,
                f"{result.parameters:,}",
                f"{result.bytes / 1e6:,.1f}",
                f"{result.latency_ms:.2f}",
                f"{result.train_rows:,}",
                str(result.settings.get("epochs", "")),
                "" if result.lr is None else f"{result.lr:g}",
                str(len(result.seeds) or ""),
                *(_spread(result.scores.get(split, {}).get(metric, [])) for split, metric in columns),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    marks = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([lines[0], "| " + " | ".join(marks) + " |", *lines[1:]])


class Board:
    """TensorBoard's curves of one fine-tuning."""

    def __init__(self, folder: Path, model: str, label: str) -> None:
        """`label` names the fine-tuning among those of the model, for instance by its seed."""
        from torch.utils.tensorboard import SummaryWriter

        path = folder / BOARD / file_name(model) / label
        for old in path.glob("events.*"):
            old.unlink()  # of an earlier evaluation: its curve would run through this one's
        self._writer = SummaryWriter(str(path))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One point of each curve."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"
