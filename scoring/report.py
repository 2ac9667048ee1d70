"""What `evaluate` writes: one JSON file a model, a table of all models of a task, and curves for TensorBoard."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sharebert_common.errors import BadInput
from sharebert_common.files import write_atomically

TABLE, BOARD = "results.md", "tensorboard"
LONGEST_NAME = 200
"""Bytes of a file name without its suffix; file systems allow 255, and a temporary file's name is longer."""

Scores = dict[str, dict[str, float]]
"""Split → metric → value."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The scores of one model on one task, and what they cost."""

    task: str
    model: str
    """Its name on the command line."""
    scores: dict[str, dict[str, list[float]]]
    """Split → metric → one value a seed."""
    details: dict[str, dict[str, float]] = field(default_factory=dict)
    """For BLiMP: `field`, `linguistics_term` or `UID` → its name → accuracy. For a probe: "property, accuracy" or
    "property, F1" → layer → value."""
    parameters: int
    """Learned numbers, with the head that is used: a classifier, or for BLiMP the masked-language-model head; for a
    probe without any."""
    trained_parameters: int | None = None
    """Those that were trained; null where all were."""
    bytes: int
    """The size of the parameters in memory; for TF-IDF, the size of its pickle."""
    latency_ms: float
    """The median time of one text of the first dev split (BLiMP: one sentence), alone, with tokenisation."""
    device: str
    threads: int
    """Threads that PyTorch used."""
    train_rows: int
    fit_s: list[float]
    """Seconds of the fit, for each seed."""
    seeds: list[int] = field(default_factory=list)
    """Empty for a model that no random numbers enter."""
    lr: float | None = None
    """The learning rate of all seeds; null for a baseline."""
    sweep: dict[str, float | None] = field(default_factory=dict)
    """Learning rate → mean of the dev metrics with the first seed, if several were tried; null if the loss diverged."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The keys of the recipe's `finetune` that had an effect on this model; BLiMP and probes: what was scored."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package → version."""
    skipped_rows: dict[str, int] = field(default_factory=dict)
    """File → the number of its bad rows, if any were skipped."""

    def flat(self) -> dict[str, list[float]]:
        """The scores as "split metric" → one value a seed."""
        return {f"{split} {m}": values for split, metrics in self.scores.items() for m, values in metrics.items()}


def file_name(name: str) -> str:
    """A file name for a model or task: every character but letters, digits, `_`, `.` and `-` becomes `-`."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"


def result_file(folder: Path, model: str) -> Path:
    """The file of a model's result: named for the model.

    If the name is too long for a file, or another model has it already (`a/b` and `a-b` are alike as file names), it
    ends with a part of a hash of the model's name.
    """
    name = file_name(model)
    path = folder / f"{name}.json"
    if len(name.encode()) <= LONGEST_NAME and (not path.exists() or _read(path).model == model):
        return path
    return folder / f"{name[-60:]}-{hashlib.sha256(model.encode()).hexdigest()[:8]}.json"


def write_result(folder: Path, result: Result) -> None:
    """Write a result, and the table of all results in `folder`."""
    values = TypeAdapter(Result).dump_python(result, mode="json")
    write_atomically(result_file(folder, result.model), json.dumps(values, indent=2) + "\n")
    results = read_results(folder)
    details = details_table(results, list(dict.fromkeys(kind for r in results for kind in r.details)))
    write_atomically(folder / TABLE, "\n\n".join(filter(None, (table(results), details))) + "\n")


def read_results(folder: Path) -> list[Result]:
    """All results in `folder`, the best first. Raises BadInput, naming a file that is not a result."""
    return sorted(map(_read, sorted(folder.glob("*.json"))), key=lambda result: -headline(result))


def _read(path: Path) -> Result:
    try:
        return TypeAdapter(Result).validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise BadInput(f"{path}: not a result of evaluate; remove it") from error


def headline(result: Result) -> float:
    """The mean over seeds of all metrics on the dev splits."""
    dev = (values for split, metrics in result.scores.items() if split != "test" for values in metrics.values())
    return mean(mean(values) for values in dev)


def by_metric(scores: Sequence[Scores]) -> dict[str, dict[str, list[float]]]:
    """The scores of several seeds as split → metric → one value a seed."""
    return {split: {metric: [s[split][metric] for s in scores] for metric in scores[0][split]} for split in scores[0]}


def versions() -> dict[str, str]:
    """The versions of the packages that a score depends on."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "scikit-learn", "scipy")}


def table(results: Sequence[Result]) -> str:
    """Results of one task as a Markdown table; scores times 100, as mean ± standard deviation (lowest to highest)."""
    columns = list(dict.fromkeys((split, metric) for r in results for split in r.scores for metric in r.scores[split]))
    some_fixed = any(result.trained_parameters is not None for result in results)
    head = ["model", "parameters", *(["trained"] if some_fixed else []), "MB", "ms a text"]
    head += ["train rows", "epochs", "lr", "seeds"]
    rows = [[*head, *(f"{split} {metric}" for split, metric in columns)]]
    for result in results:
        rows.append(
            [
                result.model.replace("|", "\\|"),
                f"{result.parameters:,}",
                *([_trained(result)] if some_fixed else []),
                f"{result.bytes / 1e6:,.1f}",
                f"{result.latency_ms:.2f}",
                f"{result.train_rows:,}",
                str(result.settings.get("epochs", "")),
                "" if result.lr is None else f"{result.lr:g}",
                str(len(result.seeds) or ""),
                *(_spread(result.scores.get(split, {}).get(metric, [])) for split, metric in columns),
            ]
        )
    return _markdown(rows)


def details_table(results: Sequence[Result], kinds: Sequence[str]) -> str:
    """The details of each of `kinds` as a Markdown table: a row a name, a column a model; accuracies times 100."""
    with_details = [result for result in results if result.details]
    found = []
    for kind in kinds:
        names = sorted({name for result in with_details for name in result.details.get(kind, {})})
        rows = [[kind, *(result.model.replace("|", "\\|") for result in with_details)]]
        for name in names:
            values = [result.details.get(kind, {}).get(name) for result in with_details]
            rows.append([name, *("" if value is None else f"{100 * value:.1f}" for value in values)])
        found.append(_markdown(rows))
    return "\n\n".join(found)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    marks = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([lines[0], "| " + " | ".join(marks) + " |", *lines[1:]])


class Board:
    """The curves of one fine-tuning, for TensorBoard."""

    def __init__(self, folder: Path, model: str, label: str) -> None:
        """`label` distinguishes the fine-tunings of a model, for instance by the seed."""
        from torch.utils.tensorboard import SummaryWriter

        path = folder / BOARD / result_file(folder, model).stem / label
        for old in path.glob("events.*"):
            old.unlink()  # the curve of an earlier evaluation would be drawn into the new one
        self._writer = SummaryWriter(str(path))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Write all points, and close the file."""
        self._writer.close()


def _trained(result: Result) -> str:
    return f"{result.parameters if result.trained_parameters is None else result.trained_parameters:,}"


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"
