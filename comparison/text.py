"""The table of a comparison as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from comparison.lines import Line, Planned
from comparison.pieces import NOT_RUN
from comparison.recipe import CompareRecipe

ENOUGH = 0.97
"""Share of its source's score that a row must have to be named as the smallest or the fastest."""


def to_text(lines: Sequence[Line], planned: Sequence[Planned], recipe: CompareRecipe) -> str:
    """The table, what is not whole, the best rows, and the figures that were not measured here."""
    parts = ["Measured here:", table(lines, recipe)]
    open_rows = [f"- {line.name}: {line.state}" for line in lines if line.state]
    if open_rows:
        parts += ["Not whole:", "\n".join(open_rows)]
    parts += best(lines)
    if planned:
        parts += [
            f"Estimated, not run: the trainings at their real size, on {recipe.planned_gpus} {recipe.planned_gpu} at "
            f"{planned[0].utilisation:.0%} of their peak:",
            _markdown(
                ["training", "parameters without head", "tokens", "FLOPs", "GPU hours"],
                [
                    [p.name, f"{p.parameters:,}", f"{p.tokens:,}", f"{p.flops:.2e}", f"{p.gpu_hours:,.1f}"]
                    for p in planned
                ],
            ),
        ]
    if recipe.published:
        parts += [
            "Published by others, not measured here:",
            _markdown(["model", "figure", "source"], [[p.model, p.figure, p.source] for p in recipe.published]),
        ]
    return "\n\n".join(parts)


def table(lines: Sequence[Line], recipe: CompareRecipe) -> str:
    """The rows; scores are means over the dev metrics times 100, mean ± standard deviation over the seeds."""
    shapes = list(recipe.report.latency)
    reference = recipe.reference or lines[0].name
    head = ["row", "made from", "parameters", f"parameters / {reference}", "MB", "MLM loss", *recipe.tasks]
    head += ["mean", f"mean / {reference}", "mean / its source"]
    head += [*(f"{shape}, ms" for shape in shapes), "tokens", "FLOPs"]
    return _markdown(head, [_cells(line, recipe, shapes) for line in lines])


def best(lines: Sequence[Line]) -> list[str]:
    """A line for the smallest and one for the fastest of the rows that keep enough of their source's score."""
    fit = [line for line in lines if line.of_source is not None and line.of_source >= ENOUGH]
    found = []
    sized = [line for line in fit if line.bytes is not None]
    if sized:
        smallest = min(sized, key=lambda line: line.bytes or 0)
        found.append(
            f"Smallest file with {ENOUGH:.0%} or more of its source's score: {smallest.name}, "
            f"{(smallest.bytes or 0) / 1e6:.3f} MB."
        )
    timed = {line.name: times for line in fit if (times := list(fastest(line).values()))}
    if timed:
        name = min(timed, key=lambda name: timed[name][0][0])
        ms, runtime = timed[name][0]
        found.append(f"Least time with {ENOUGH:.0%} or more of its source's score: {name}, {ms:.1f} ms ({runtime}).")
    return found


def fastest(line: Line) -> dict[str, tuple[float, str]]:
    """Shape → the least milliseconds of all runtimes, and the runtime."""
    found: dict[str, tuple[float, str]] = {}
    for runtime, times in line.latency_ms.items():
        for shape, ms in times.items():
            found[shape] = min(found.get(shape, (ms, runtime)), (ms, runtime))
    return found


def _cells(line: Line, recipe: CompareRecipe, shapes: Sequence[str]) -> list[str]:
    times = fastest(line)
    return [
        line.name,
        line.made,
        _or_not_run(line.parameters, ",d"),
        _or_not_run(line.parameters_of_reference, ".3f"),
        NOT_RUN if line.bytes is None else f"{line.bytes / 1e6:.3f}",
        "no head" if line.loss is None and line.bytes is not None else _or_not_run(line.loss, ".4f"),
        *(_score(line.scores.get(task, []), len(recipe.seeds)) for task in recipe.tasks),
        NOT_RUN if line.score is None else f"{100 * line.score:.1f}",
        _or_not_run(line.of_reference, ".1%"),
        "" if line.source is None else _or_not_run(line.of_source, ".1%"),
        *(f"{times[shape][0]:.1f} ({times[shape][1]})" if shape in times else NOT_RUN for shape in shapes),
        _or_not_run(line.tokens, ",d"),
        _or_not_run(line.flops, ".2e"),
    ]


def _or_not_run(value: float | None, form: str) -> str:
    return NOT_RUN if value is None else format(value, form)


def _score(values: Sequence[float], seeds: int) -> str:
    if not values:
        return NOT_RUN
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}" + (f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else "")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
