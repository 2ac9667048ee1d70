"""What stands in a report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pretrain.report.curves import curves
from pretrain.report.page import Block, Heading, Plots, Table, to_html, to_markdown
from pretrain.report.run_data import RunData, read_run
from sharebert_common.errors import BadInput
from sharebert_common.files import make_folders, write_atomically


def report(folders: Sequence[Path], out: Path) -> Path:
    """Write a report of the runs to `out`, an .html or .md file. Returns `out`.

    A Markdown report has its plots in files beside it: NAME-1.svg and so on.
    Raises BadInput: a folder that is no run, another ending.
    """
    if out.suffix not in (".html", ".md"):
        raise BadInput(f"--out: {out}: name an .html or .md file")
    runs = [read_run(folder) for folder in folders]
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    blocks = page(runs)
    make_folders(out.parent)
    if out.suffix == ".md":
        svgs = [svg for block in blocks if isinstance(block, Plots) for svg in block.svgs]
        pictures = [f"{out.stem}-{number}.svg" for number in range(1, len(svgs) + 1)]
        for name, svg in zip(pictures, svgs, strict=True):
            write_atomically(out.parent / name, svg)
        write_atomically(out, to_markdown(title, blocks, pictures))
    else:
        write_atomically(out, to_html(title, blocks))
    return out


def page(runs: Sequence[RunData]) -> list[Block]:
    """The blocks of a report: results and curves of all runs together, then what belongs to each."""
    names = [run.name for run in runs]
    summaries = [summary(run) for run in runs]
    rows = [[key, *(one[key] for one in summaries)] for key in summaries[0]]
    blocks: list[Block] = [Heading("Results"), Table(["", *names], rows), Heading("Curves"), Plots(curves(runs))]
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    different = [key for key in keys if len({str(run.config.get(key)) for run in runs}) > 1]
    if len(runs) > 1:
        blocks += [Heading("Keys that differ"), _config_table(runs, different)]
    for run in runs:
        of_run = f" of {run.name}" if len(runs) > 1 else ""
        if run.events:
            events = [[_time(event["time"]), event["step"], event["text"]] for event in run.events]
            blocks += [Heading(f"Events{of_run}"), Table(["time (UTC)", "step", "what happened"], events)]
        if run.samples:
            blocks += [Heading(f"Sentences{of_run}"), _samples(run)]
        if run.attempts:
            blocks += [Heading(f"Environment{of_run}"), _environment(run)]
    blocks += [Heading("Recipe"), _config_table(runs, [key for key in keys if key not in different or len(runs) == 1])]
    return blocks


def summary(run: RunData) -> dict[str, str]:
    """The results of a run: what it reached, and what that took."""
    state, wall = run.state, run.wall_s
    best = min((loss for _, loss in run.points("valid_loss")), default=None)
    return {
        "state": f"{state['state'] or 'unknown'}" + (f": {state['reason']}" if state["reason"] else ""),
        "steps": f"{run.lines[-1]['step']:,} of {state['steps']:,}",
        "tokens": _number(run.last("tokens"), ",.0f"),
        "epochs": _number(run.last("epoch"), ".2f"),
        "training loss": _number(run.last("loss"), ".4f"),
        "validation loss, last": _number(run.last("valid_loss"), ".4f"),
        "validation loss, lowest": _number(best, ".4f"),
        "validation accuracy": _number(run.last("valid_accuracy"), ".4f"),
        "tokens a second, last": _number(run.last("tokens_per_s"), ",.0f"),
        "share of the peak": _number(run.last("mfu"), ".1%"),
        "attempts": str(len(run.attempts) or 1),
        "skipped steps": _number(run.last("skipped"), ".0f"),
        "hours of steps": f"{run.useful_s / 3600:,.2f}",
        "hours since the first start": _number(None if wall is None else wall / 3600, ",.2f"),
        "goodput": _number(None if not wall else min(1.0, run.useful_s / wall), ".1%"),
        "device-hours of steps": f"{run.useful_s * run.ranks / 3600:,.2f} ({run.ranks} ranks)",
        "highest memory, GiB": _number((run.last("memory_bytes") or 0) / 2**30 or None, ".2f"),
    }


def _config_table(runs: Sequence[RunData], keys: Sequence[str]) -> Table:
    return Table(
        ["key", *(run.name for run in runs)], [[key, *(run.config.get(key, "") for run in runs)] for key in keys]
    )


def _samples(run: RunData) -> Table:
    """The likeliest words of each sentence: at the first look, in the middle, and at the last."""
    chosen = sorted({0, len(run.samples) // 2, len(run.samples) - 1})
    shown = [(run.samples[index][0], _rows(run.samples[index][1])) for index in chosen]
    sentences = [sentence for sentence, _ in shown[-1][1]]
    rows: list[list[Any]] = []
    for number, sentence in enumerate(sentences):
        rows += [
            [sentence if step == shown[0][0] else "", step, table[number][1]]
            for step, table in shown
            if number < len(table)
        ]
    return Table(["sentence", "step", "likeliest words"], rows)


def _rows(markdown: str) -> list[list[str]]:
    """The cells of the rows of a Markdown table."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.rstrip("\n").split("\n")[2:]]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in cells]


def _environment(run: RunData) -> Table:
    rows = []
    for number, attempt in enumerate(run.attempts, 1):
        packages = attempt.get("packages", {})
        versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "deepspeed") if packages.get(name))
        device = (attempt.get("gpu") or attempt.get("cpu") or {}).get("name", "")
        hosts = ", ".join(dict.fromkeys(attempt.get("hosts", [])))
        commit = (attempt.get("commit") or "")[:12]
        rows.append([number, _time(attempt["time"]), attempt.get("ranks", 1), hosts, device, versions, commit])
    return Table(["attempt", "start (UTC)", "ranks", "machines", "device", "versions", "commit"], rows)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
