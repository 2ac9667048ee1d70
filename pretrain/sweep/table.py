"""The table of a sweep, computed from the files of its runs: `config.yaml`, `log.jsonl`, and the newest checkpoint.

So it stays the same when a dataset is moved or removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from pretrain.checkpoint import format as checkpoint
from pretrain.data.datasets import micro_shape
from pretrain.model import ModelChoice
from pretrain.plan.estimate import flops_of_token
from pretrain.recipe import ResolvedTraining, TrainRecipe
from pretrain.run.folder import RunFolder
from sharebert import ShareBertConfig, ShareBertError, ShareBertForMaskedLM
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load
from sharebert_common.run_files import read_log


@dataclass(frozen=True)
class Curve:
    """What one run's log says."""

    tokens: list[int]
    """That were trained at each validation."""
    losses: list[float]
    """Of held-out rows, at the same points."""
    step_s: float
    """Median of the logged seconds of a step."""
    whole: bool
    """Whether the last step was validated."""


@dataclass(frozen=True)
class Row:
    """One row of the table: an arm at one point of the grid, over its seeds that finished."""

    name: str
    seeds: int
    loss: float
    """Mean final validation loss, in nats."""
    loss_sd: float | None
    """Standard deviation over the seeds (n - 1); None for one seed."""
    tokens_to_reference: float | None
    """Mean of the tokens after which a seed has reached the reference's mean final loss; None where some never does."""
    share: float | None
    """The same, over the tokens of a whole run of the reference."""
    parameters: int | None
    """Learned numbers without the MLM head; None where a run has no checkpoint and its dataset is not there."""
    flops_a_step: float | None
    """In the mean over a run; None likewise."""
    step_s: float
    """Median over the seeds."""


def read_curve(run: Path) -> Curve:
    """The curve of a run. Raises BadInput where the run has no validation."""
    recipe, log = load(TrainRecipe, run / "config.yaml"), read_log(run)
    points = [line for line in log if "valid_loss" in line]
    if not points:
        raise BadInput(f"{run}: no validation yet; train with validate.every above 0")
    step_tokens = recipe.data.global_batch * _seq_len(recipe, log)
    return Curve(
        [point["step"] * step_tokens for point in points],
        [point["valid_loss"] for point in points],
        median([line["step_s"] for line in log if "step_s" in line] or [0.0]),
        points[-1]["step"] == recipe.steps,
    )


def tokens_to_reach(curve: Curve, loss: float) -> float | None:
    """Tokens after which a curve is first at or below `loss`, linear between validations; None where it never is."""
    for number, (tokens, found) in enumerate(zip(curve.tokens, curve.losses, strict=True)):
        if found <= loss:
            if number == 0:
                return float(tokens)
            before, earlier = curve.losses[number - 1], curve.tokens[number - 1]
            return earlier + (tokens - earlier) * (before - loss) / (before - found)
    return None


def rows_of(runs: dict[str, list[Path]], reference: str) -> list[Row]:
    """The rows of a table.

    Args:
        runs: directories of the runs of each row, one a seed. Runs that are not finished are left out.
        reference: the row whose final loss is to be reached.
    """
    read = {name: {path: _curve_or_none(path) for path in paths} for name, paths in runs.items()}
    curves = {
        name: {path: curve for path, curve in of_row.items() if curve is not None and curve.whole}
        for name, of_row in read.items()
    }
    goal = curves[reference].values()
    goal_loss = mean(curve.losses[-1] for curve in goal) if goal else None
    rows = []
    for name, of_row in curves.items():
        if not of_row:
            continue
        ended = of_row.values()
        finals = [curve.losses[-1] for curve in ended]
        reached = [None if goal_loss is None else tokens_to_reach(curve, goal_loss) for curve in ended]
        tokens = None if None in reached else mean(value for value in reached if value is not None)
        parameters, flops = _size_of_run(next(iter(of_row)))
        rows.append(
            Row(
                name,
                len(ended),
                mean(finals),
                stdev(finals) if len(finals) > 1 else None,
                tokens,
                None if tokens is None else tokens / mean(curve.tokens[-1] for curve in goal),
                parameters,
                flops,
                median(curve.step_s for curve in ended),
            )
        )
    return rows


def to_text(rows: Sequence[Row], reference: str, unfinished: int = 0) -> str:
    """The rows as a Markdown table, the name of the reference, and how many trials are not finished."""
    known = any(row.name == reference for row in rows)
    lines = [
        "| row | seeds | final loss | tokens to the reference's | share | parameters | GFLOPs a step | s a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = "" if row.loss_sd is None else f" ± {row.loss_sd:.4f}"
        tokens, share = "never" if known else "", ""
        if row.tokens_to_reference is not None and row.share is not None:
            tokens, share = f"{row.tokens_to_reference:,.0f}", f"{row.share:.3f}"
        parameters = "unknown" if row.parameters is None else f"{row.parameters:,}"
        gflops = "unknown" if row.flops_a_step is None else f"{row.flops_a_step / 1e9:.3f}"
        lines.append(
            f"| {row.name} | {row.seeds} | {row.loss:.4f}{spread} | {tokens} | {share} | {parameters} | {gflops} "
            f"| {row.step_s:.4f} |"
        )
    lines += ["", f"The reference is {reference}{'' if known else ', which is not finished'}."]
    return "\n".join([*lines, *(["", f"{unfinished} trials are not finished"] if unfinished else [])])


def _curve_or_none(run: Path) -> Curve | None:
    try:
        return read_curve(run)
    except (BadInput, OSError):
        return None  # it has not begun, or has not validated yet


def _seq_len(recipe: TrainRecipe, log: Sequence[dict[str, Any]]) -> int:
    """Tokens of a row, as the log counted them; where it has no line of a step, as the dataset says.

    Raises BadInput where neither is there.
    """
    counted = next((line for line in log if line.get("rows") and "tokens" in line), None)
    return recipe.resolve().seq_len if counted is None else int(counted["tokens"]) // int(counted["rows"])


def _size_of_run(run: Path) -> tuple[int | None, float | None]:
    """`size_of` for the model that a run has trained; None where that is not known."""
    recipe = load(TrainRecipe, run / "config.yaml")
    try:
        config = _trained_model(run)
        if config is None:  # its checkpoints were removed
            return _size_of(recipe, recipe.resolve())
        choice = ModelChoice(config, recipe.model.init, init_from=None)
        seq_len = _seq_len(recipe, read_log(run))
        return _size_of(recipe, ResolvedTraining([], choice, seq_len, *micro_shape(recipe.data, world_size=1)))
    except BadInput:
        return None, None


def _trained_model(run: Path) -> ShareBertConfig | None:
    """The model's whole config, from the newest checkpoint that can be read; None where there is none."""
    for folder in checkpoint.found(RunFolder(run).checkpoints):
        try:
            return ShareBertConfig.from_dict(checkpoint.read_manifest(folder).training["model"])
        except (BadInput, ShareBertError):
            continue
    return None


def size_of(recipe: TrainRecipe) -> tuple[int, float]:
    """Parameters without the head, and FLOPs of a step in the mean over a run.

    Where there is no dataset, sizes that the recipe leaves to it are the defaults.
    """
    return _size_of(recipe, recipe.resolve(needs_data=False))


def _size_of(recipe: TrainRecipe, training: ResolvedTraining) -> tuple[int, float]:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in ShareBertForMaskedLM(training.model.config).sharebert.parameters())
    return parameters, flops_of_token(recipe, training) * recipe.data.global_batch * training.seq_len
