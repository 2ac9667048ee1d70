"""The table of a sweep, computed from `config.yaml` and `log.jsonl` of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

import torch

from pretrain.plan.estimate import flops_of_token
from pretrain.recipe import TrainRecipe
from sharebert import ShareBertForMaskedLM
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
    parameters: int
    """Learned numbers without the MLM head."""
    flops_a_step: float
    step_s: float
    """Median over the seeds."""


def read_curve(run: Path) -> Curve:
    """The curve of a run. Raises BadInput where the run has no validation."""
    recipe = load(TrainRecipe, run / "config.yaml")
    seq_len = recipe.resolve(needs_data=False).seq_len
    log = read_log(run)
    points = [line for line in log if "valid_loss" in line]
    if not points:
        raise BadInput(f"{run}: no validation yet; train with validate.every above 0")
    step_tokens = recipe.data.global_batch * seq_len
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


def rows_of(runs: dict[str, list[Path]], reference: str | None) -> list[Row]:
    """The rows of a table.

    Args:
        runs: directories of the runs of each row, one a seed. Runs that are not finished are left out.
        reference: the row whose final loss is to be reached; the first one where None.
    """
    curves = {
        name: [c for c in map(_curve_or_none, paths) if c is not None and c.whole] for name, paths in runs.items()
    }
    goal = curves[reference or next(iter(runs))]
    goal_loss = mean(curve.losses[-1] for curve in goal) if goal else None
    rows = []
    for name, found in curves.items():
        if not found:
            continue
        finals = [curve.losses[-1] for curve in found]
        reached = [None if goal_loss is None else tokens_to_reach(curve, goal_loss) for curve in found]
        tokens = None if None in reached else mean(value for value in reached if value is not None)
        configs = (path / "config.yaml" for path in runs[name])
        parameters, flops = size_of(load(TrainRecipe, next(file for file in configs if file.exists())))
        rows.append(
            Row(
                name,
                len(found),
                mean(finals),
                stdev(finals) if len(finals) > 1 else None,
                tokens,
                None if tokens is None else tokens / mean(curve.tokens[-1] for curve in goal),
                parameters,
                flops,
                median(curve.step_s for curve in found),
            )
        )
    return rows


def to_text(rows: Sequence[Row], unfinished: int = 0) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| row | seeds | final loss | tokens to the reference's | share | parameters | GFLOPs a step | s a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = "" if row.loss_sd is None else f" ± {row.loss_sd:.4f}"
        tokens, share = "never", ""
        if row.tokens_to_reference is not None and row.share is not None:
            tokens, share = f"{row.tokens_to_reference:,.0f}", f"{row.share:.3f}"
        lines.append(
            f"| {row.name} | {row.seeds} | {row.loss:.4f}{spread} | {tokens} | {share} | {row.parameters:,} "
            f"| {row.flops_a_step / 1e9:.3f} | {row.step_s:.4f} |"
        )
    return "\n".join([*lines, *([f"{unfinished} trials are not finished"] if unfinished else [])])


def _curve_or_none(run: Path) -> Curve | None:
    try:
        return read_curve(run)
    except (BadInput, OSError):
        return None  # it has not begun, or has not validated yet


def size_of(recipe: TrainRecipe) -> tuple[int, float]:
    """Parameters without the head, and FLOPs of a step in the mean over a run."""
    training = recipe.resolve(needs_data=False)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in ShareBertForMaskedLM(training.model.config).sharebert.parameters())
    seq_len = training.seq_len
    return parameters, flops_of_token(recipe, training) * recipe.data.global_batch * seq_len
