"""The numbers of a comparison, read from the files of its pieces alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from pydantic import TypeAdapter

from comparison.lines import Line, Planned
from comparison.pieces import NOT_RUN, Finder
from comparison.recipe import CompareRecipe, Keys
from comparison.rows import BEFORE, Row
from comparison.text import to_text
from comparison.times import kept
from compress.measure import Measured
from compress.report import read_report, result_row
from pretrain.distill.recipe import DistillRecipe
from pretrain.plan.estimate import PLAN_DEFAULTS, Assumptions, flops_of_token, make_plan
from pretrain.recipe import TrainRecipe
from sharebert_common.errors import BadInput
from sharebert_common.files import write_atomically
from sharebert_common.recipe import load, plain
from sharebert_common.run_files import peek_state

FORMAT = "sharebert compare 1"

JSON, TABLE = "comparison.json", "comparison.md"


def write(recipe: CompareRecipe, rows: Sequence[Row]) -> str:
    """Write comparison.json and comparison.md into the folder of the comparison; the table as text."""
    lines, planned = lines_of(recipe, rows), [plan(name, keys, recipe) for name, keys in recipe.planned.items()]
    text = to_text(lines, planned, recipe)
    content = {
        "format": FORMAT,
        "recipe": plain(recipe),
        "rows": [dataclasses.asdict(line) for line in lines],
        "planned": [dataclasses.asdict(one) for one in planned],
    }
    write_atomically(Path(recipe.folder) / JSON, json.dumps(content, indent=1) + "\n")
    write_atomically(Path(recipe.folder) / TABLE, text + "\n")
    return text


def lines_of(recipe: CompareRecipe, rows: Sequence[Row]) -> list[Line]:
    """The numbers of all rows, as the files are now. Pieces that were made with other keys do not count."""
    found = Finder(recipe, list(rows))
    missing = found.find(list(rows))
    lines: dict[str, Line] = {}
    for row in rows:
        why = missing.get(row.name, "")
        line = _trained(row, found, why) if row.trial is not None else _compressed(row, found, why, lines[row.of])
        lines[row.name] = line
        _add_scores(line, found)
    for name, times in kept(recipe, {name: piece.digest for name, piece in found.models.items()}).items():
        lines[name].latency_ms = times
    reference = lines[recipe.reference or rows[0].name]
    for row in rows:
        line = lines[row.name]
        line.parameters_of_reference = ratio(line.parameters, reference.parameters)
        line.of_reference = ratio(line.score, reference.score)
        if line.source is not None:
            line.of_source = ratio(line.score, lines[line.source].score)
    return list(lines.values())


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """The first over the second; None where one is missing or the second is zero."""
    return ours / theirs if ours is not None and theirs else None


def plan(name: str, keys: Keys, recipe: CompareRecipe) -> Planned:
    """The plan of a training at its real size. Raises BadInput, naming it."""
    differs = {key: value for key, value in keys.items() if key != "base"}
    try:
        training = load(
            TrainRecipe,
            keys.get("base"),
            [f"{key}={json.dumps(value)}" for key, value in differs.items()],
            defaults=PLAN_DEFAULTS,
        )
        made = make_plan(training, recipe.planned_gpus, recipe.planned_gpu, Assumptions())
    except BadInput as error:
        raise BadInput(f"planned.{name}: {error}") from error
    speed = made.speeds[len(made.speeds) // 2]
    return Planned(
        name=name,
        parameters=made.parameters["all"] - made.parameters["head"],
        tokens=made.tokens,
        flops=made.flops_per_token * made.tokens,
        gpu_hours=speed["hours"] * recipe.planned_gpus,
        utilisation=speed["utilisation"],
    )


def _trained(row: Row, found: Finder, why: str) -> Line:
    assert row.trial is not None
    learns = f", teacher {row.asked.teacher}" if row.asked.teacher else ""
    line = Line(name=row.name, made=f"{row.asked.train}{learns}")
    piece = found.models.get(row.name)
    if piece is None:
        state = peek_state(row.trial.run)
        progress = f"training, step {state['step']:,} of {row.trial.recipe.steps:,}"
        line.state = progress if state["step"] and why == NOT_RUN else why
        return line
    asked, training = row.trial.recipe, dataclasses.replace(row.trial.recipe, distill=DistillRecipe()).resolve()
    line.tokens = asked.steps * asked.data.global_batch * training.seq_len
    line.flops = line.tokens * flops_of_token(asked, training)
    _add_measured(line, TypeAdapter(Measured).validate_python(piece.notes["measured"]))
    return line


def _compressed(row: Row, found: Finder, why: str, source: Line) -> Line:
    learns = f", teacher {row.asked.teacher}" if row.asked.teacher else ""
    line = Line(name=row.name, made=f"{row.of}, {row.asked.compress}{learns}", source=row.of)
    piece = found.models.get(row.name)
    if piece is None:
        line.state = why
        return line
    try:
        _, _, steps = read_report(piece.folder)
        result = result_row(steps)
        if row.before is not None and row.after is not None:
            steps = [*read_report(found.places.model(f"{row.name}{BEFORE}", trained=False))[2], *steps]
    except BadInput as error:
        line.state = str(error)
        return line
    _add_measured(line, result)
    for key in ("tokens", "flops"):
        before = getattr(source, key)
        if before is not None:
            setattr(line, key, before + sum(step.notes.get(key, 0) for step in steps))
    return line


def _add_measured(line: Line, measured: Measured) -> None:
    line.parameters, line.bytes, line.loss = measured.parameters, measured.bytes, measured.loss


def _add_scores(line: Line, found: Finder) -> None:
    recipe, missing = found.recipe, []
    for task in recipe.tasks:
        values = []
        for seed in recipe.seeds:
            if (piece := found.classifiers.get((line.name, task, seed))) is not None:
                one = Measured(name="", folder="", form="", scores=piece.notes["scores"]).headline
                assert one is not None
                values.append(one[0])
        if values:
            line.scores[task] = values
        if len(values) < len(recipe.seeds):
            missing.append(f"{task} {len(values)} of {len(recipe.seeds)} seeds")
    if recipe.tasks and not missing:
        line.score = mean(mean(values) for values in line.scores.values())
    if not line.state and missing:
        line.state = ", ".join(missing)
