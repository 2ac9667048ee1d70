"""The report of a compression: a table, JSON, a picture and curves; and the check that computes it again.

OUT/REPORT.md  OUT/report.json  OUT/report.png (with matplotlib)  OUT/tensorboard/
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from compress.as_is import score_as_is
from compress.measure import Measured, counts, same, sizes
from compress.recipe import CompressRecipe
from compress.source import BOARD, JSON, OF_A_REPORT, PICTURE, TABLE, is_classifier, open_source
from compress.step_folders import checksums, digest
from compress.tools import installed, masked_lm_loss
from sharebert_common.errors import BadInput
from sharebert_common.recipe import plain

FORMAT = "sharebert compress 1"
STEP = "step"
"""The note `role` of a row that is the result of a step."""


def write_report(folder: Path, rows: Sequence[Measured], recipe: CompressRecipe, files: dict[str, str]) -> str:
    """Write all files of the report into the model's folder; the table as text.

    Args:
        folder: of the result.
        rows: the source, the result of every step in order, then the references.
        recipe: of the command.
        files: folder → digest of its files, of each row that has one; `check` skips folders that changed since.
    """
    text = table(rows)
    content = {
        "format": FORMAT,
        "recipe": plain(recipe),
        "files": files,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (folder / JSON).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    notes = [f"- {row.name}: {key}: {value}" for row in rows for key, value in row.notes.items()]
    (folder / TABLE).write_text("\n".join(["# Compression", "", text, "", *notes, ""]), encoding="utf-8")
    write_picture(folder / PICTURE, rows)
    write_curves(folder / BOARD, rows, text)
    return text


def table(rows: Sequence[Measured]) -> str:
    """The rows in Markdown; columns that no row has a value for are left out."""
    shapes = list(dict.fromkeys(shape for row in rows for times in row.latency_ms.values() for shape in times))
    columns: dict[str, list[str]] = {
        "model": [row.name for row in rows],
        "parameters": [_count(row.parameters) for row in rows],
        "non-zero": [_count(row.nonzeros) for row in rows],
        "MB": [_megabytes(row.bytes) for row in rows],
        "MB, gzip": [_megabytes(row.gzip_bytes) for row in rows],
        "MLM loss": ["" if row.loss is None else f"{row.loss:.4f}" for row in rows],
        "score": [
            "" if row.headline is None else f"{100 * row.headline[0]:.1f} ± {100 * row.headline[1]:.1f}" for row in rows
        ],
        "runtime": [" / ".join(row.latency_ms) for row in rows],
    }
    for shape in shapes:
        columns[f"{shape}, ms"] = [
            " / ".join(f"{times[shape]:.1f}" for times in row.latency_ms.values() if shape in times) for row in rows
        ]
    columns["peak MB"] = [" / ".join(f"{peak / 1e6:.0f}" for peak in row.peak_bytes.values()) for row in rows]
    kept = {name: values for name, values in columns.items() if any(values)}
    widths = [max(map(len, (name, *values))) for name, values in kept.items()]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if n == 0 else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    return "\n".join([line(list(kept)), line(rule), *(line(cells) for cells in zip(*kept.values(), strict=True))])


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.3f}"


def write_picture(path: Path, rows: Sequence[Measured]) -> None:
    """Score against bytes and against latency, or the loss where there is no score; nothing without matplotlib."""
    if not installed("matplotlib"):
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scored = any(row.headline is not None for row in rows)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, label in zip(axes, ("MB on disk", "ms, first shape, fastest runtime"), strict=True):
        for row in rows:
            height = (row.headline[0] if row.headline else None) if scored else row.loss
            first = [next(iter(times.values())) for times in row.latency_ms.values() if times]
            place = (row.bytes or 0) / 1e6 if axis is axes[0] else min(first, default=0.0)
            if height is None or not place:
                continue
            axis.plot(place, height, "o")
            axis.annotate(row.name, (place, height), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel("score" if scored else "masked-LM loss, nats")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_curves(folder: Path, rows: Sequence[Measured], text: str) -> None:
    """Curves over the steps for TensorBoard (0 is the source), and the table as text."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as board:
        board.add_text("compress/table", text, 0)
        for number, row in enumerate(rows):
            for tag, value in numbers_of(row).items():
                board.add_scalar(f"compress/{tag}", value, number)


def numbers_of(row: Measured) -> dict[str, float]:
    """The numbers of a row by a tag each."""
    found: dict[str, float | None] = {
        "parameters": row.parameters,
        "nonzeros": row.nonzeros,
        "bytes": row.bytes,
        "gzip_bytes": row.gzip_bytes,
        "loss": row.loss,
        "score": row.headline[0] if row.headline else None,
    }
    found |= {f"ms/{runtime}/{shape}": ms for runtime, times in row.latency_ms.items() for shape, ms in times.items()}
    found |= {f"peak_bytes/{runtime}": peak for runtime, peak in row.peak_bytes.items()}
    return {tag: float(value) for tag, value in found.items() if value is not None and math.isfinite(value)}


def read_report(folder: Path) -> tuple[CompressRecipe, dict[str, str], list[Measured]]:
    """Recipe, digests and rows of the report in a folder. Raises BadInput, naming the file."""
    path = folder / JSON
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        recipe = TypeAdapter(CompressRecipe).validate_python(content["recipe"])
        rows = [TypeAdapter(Measured).validate_python(row) for row in content["rows"]]
        if not any(row.notes.get("role") == STEP for row in rows):
            raise ValueError("it has no row of a step")
        return recipe, dict(content["files"]), rows
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; is {folder} a result of `sharebert compress`?") from None
    except (ValueError, KeyError, TypeError, ValidationError, OSError) as error:
        raise BadInput(f"{path}: not readable as a report ({' '.join(str(error).split())})") from error


def check(folder: Path) -> str:
    """Compute the numbers of a report again, from the folders that are still as they were; a line for each row.

    Counts, bytes and losses must be the same, and so must the score of a classifier that is scored as it is. Scores
    after fine-tuning, times and memory are not computed again: they cost hours, or differ from run to run.

    Raises BadInput, with all differences, if there are any.
    """
    recipe, files, rows = read_report(folder)
    lines, wrong = [], []
    for row in rows:
        place = folder if row is result_row(rows) else Path(row.folder)
        if not row.folder or not place.is_dir():
            lines.append(f"{row.name}: not checked, its folder is not there")
            continue
        if digest(model_files(checksums(place))) != files.get(row.folder):
            if place == folder:
                wrong.append(f"{row.name}: the files of {place} are not those of the report")
            else:
                lines.append(f"{row.name}: not checked, {place} has changed since")
            continue
        numbers = (*counts(place), *sizes(place))
        found: dict[str, float | None] = dict(
            zip(("parameters", "nonzeros", "bytes", "gzip_bytes"), numbers, strict=True)
        )
        if row.loss is not None:
            found["loss"] = masked_lm_loss(place, recipe.validation)
        if row.scores and recipe.task is not None and is_classifier(place):
            again = score_as_is(place, open_source(place).form, recipe.task)
            if again != row.scores:
                wrong.append(f"{row.name}: its scores are {again}, the report says {row.scores}")
        differ = [key for key, value in found.items() if not same(value, getattr(row, key))]
        wrong += [f"{row.name}: {key} is {found[key]}, the report says {getattr(row, key)}" for key in differ]
        if not differ:
            lines.append(f"{row.name}: {', '.join(found)} are right")
    if not (folder / TABLE).is_file():
        wrong.append(f"{folder / TABLE}: missing")
    elif table(rows) not in (folder / TABLE).read_text(encoding="utf-8", errors="replace"):
        wrong.append(f"{folder / TABLE}: its table is not that of {JSON}")
    if wrong:
        raise BadInput("; ".join(wrong))
    return "\n".join(lines)


def check_replaceable(out: Path) -> None:
    """Raise BadInput where `out` exists, unless it is empty, or a result of `compress` to which nothing was added."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    advice = "choose another folder, or remove it first"
    try:
        _, files, rows = read_report(out)
    except BadInput as error:
        raise BadInput(f"{out}: exists and is no result of `compress`; {advice}") from error
    if digest(model_files(checksums(out))) != files.get(result_row(rows).folder):
        raise BadInput(f"{out}: its files are not those that `compress` wrote; {advice}")


def result_row(rows: Sequence[Measured]) -> Measured:
    """The row of the last step: what lies in OUT."""
    return [row for row in rows if row.notes.get("role") == STEP][-1]


def model_files(files: dict[str, str]) -> dict[str, str]:
    """Of the checksums of a folder's files, those of the model's files, without those of a report."""
    return {name: value for name, value in files.items() if name.split("/")[0] not in OF_A_REPORT}
