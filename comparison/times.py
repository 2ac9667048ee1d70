"""Times of all models of a comparison: taken in turns when all rows are made, so that other work on the machine changes
all of them alike."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from comparison.pieces import Piece
from comparison.recipe import CompareRecipe
from compress import latency
from compress.source import open_source
from sharebert_common.errors import BadInput
from sharebert_common.files import write_atomically
from sharebert_common.recipe import plain

TIMES = "times.json"

ROUNDS = 3
"""How often each model is timed, in a process of its own each time."""


Times = dict[str, dict[str, float]]
"""Runtime → rows x tokens → milliseconds."""


def kept(recipe: CompareRecipe, digests: Mapping[str, str]) -> dict[str, Times]:
    """Times of rows that were taken of the models with these digests, as `report` asks for now."""
    try:
        found = json.loads((Path(recipe.folder) / TIMES).read_text(encoding="utf-8"))
        if found["report"] != plain(recipe.report):
            return {}
        return {name: row["ms"] for name, row in found["rows"].items() if digests.get(name) == row["digest"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def take(recipe: CompareRecipe, models: Mapping[str, Piece], say: Callable[[str], None]) -> None:
    """Time all models in rounds, and keep the medians."""
    runtimes = {name: latency.runtimes(open_source(model.folder).form) for name, model in models.items()}
    found: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in models}
    shapes, threads, repeats = recipe.report.latency, recipe.report.threads, recipe.report.repeats
    for round_ in range(1, ROUNDS + 1):
        say(f"timing {len(models)} models, round {round_} of {ROUNDS}")
        for name, model in models.items():
            for runtime in list(runtimes[name]):
                try:
                    times = latency.measure(model.folder, runtime, shapes, threads, repeats)["ms"]
                except BadInput as error:
                    say(f"{name}: not timed: {error}")
                    runtimes[name].remove(runtime)
                    continue
                for shape, ms in times.items():
                    found[name].setdefault(runtime, defaultdict(list))[shape].append(ms)
    rows: dict[str, Any] = {
        name: {
            "digest": models[name].digest,
            "ms": {runtime: {shape: median(ms) for shape, ms in times.items()} for runtime, times in by.items()},
        }
        for name, by in found.items()
    }
    content = {"report": plain(recipe.report), "rounds": ROUNDS, "rows": rows}
    write_atomically(Path(recipe.folder) / TIMES, json.dumps(content, indent=1) + "\n")
