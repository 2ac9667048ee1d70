"""The numbers of a comparison, read from the files of its pieces alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import TypeAdapter

from comparison.lines import Line, Planned
from comparison.recipe import CompareRecipe, Keys
from comparison.rows import BEFORE, Places, Row
from comparison.text import to_text
from comparison.times import kept
from compress.measure import Measured
from compress.report import model_files, read_report, result_row
from compress.step_folders import digest
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
    """The numbers of all rows, as the files are now."""
    lines: dict[str, Line] = {}
    for row in rows:
        lines[row.name] = _trained(row, recipe) if row.trial is not None else _compressed(row, recipe, lines[row.of])
        _add_scores(lines[row.name], recipe)
    digests = {row.name: _digest(row, recipe) for row in rows}
    for name, times in kept(recipe, digests).items():
        if name in lines:
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


def _trained(row: Row, recipe: CompareRecipe) -> Line:
    assert row.trial is not None
    learns = f", teacher {row.asked.teacher}" if row.asked.teacher else ""
    line = Line(name=row.name, made=f"{row.asked.train}{learns}")
    run = row.trial.run
    state = peek_state(run)
    if state["state"] == "finished":
        asked, training = row.trial.recipe, dataclasses.replace(row.trial.recipe, distill=DistillRecipe()).resolve()
        line.tokens = asked.steps * asked.data.global_batch * training.seq_len
        line.flops = line.tokens * flops_of_token(asked, training)
    notes = _notes(Places(Path(recipe.folder)).model(row.name, trained=True))
    if notes is None:
        line.state = f"training, step {state['step']:,} of {row.trial.recipe.steps:,}" if state["step"] else "not run"
    else:
        _add_measured(line, TypeAdapter(Measured).validate_python(notes["measured"]))
    return line


def _compressed(row: Row, recipe: CompareRecipe, source: Line) -> Line:
    learns = f", teacher {row.asked.teacher}" if row.asked.teacher else ""
    line = Line(name=row.name, made=f"{row.of}, {row.asked.compress}{learns}", source=row.of)
    places = Places(Path(recipe.folder))
    folder = places.model(row.name, trained=False)
    if _notes(folder) is None:
        line.state = "not run"
        return line
    _, _, steps = read_report(folder)
    _add_measured(line, result_row(steps))
    if row.before is not None and row.after is not None:
        steps = [*read_report(places.model(f"{row.name}{BEFORE}", trained=False))[2], *steps]
    for key in ("tokens", "flops"):
        before = getattr(source, key)
        if before is not None:
            setattr(line, key, before + sum(step.notes.get(key, 0) for step in steps))
    return line


def _add_measured(line: Line, measured: Measured) -> None:
    line.parameters, line.bytes, line.loss = measured.parameters, measured.bytes, measured.loss


def _add_scores(line: Line, recipe: CompareRecipe) -> None:
    places, missing = Places(Path(recipe.folder)), []
    for task in recipe.tasks:
        found = []
        for seed in recipe.seeds:
            notes = _notes(places.classifiers(line.name, task) / Places.of_seed(seed))
            if notes is not None:
                one = Measured(name="", folder="", form="", scores=notes["scores"]).headline
                assert one is not None
                found.append(one[0])
        if found:
            line.scores[task] = found
        if len(found) < len(recipe.seeds):
            missing.append(f"{task} {len(found)} of {len(recipe.seeds)} seeds")
    if recipe.tasks and not missing:
        line.score = mean(mean(values) for values in line.scores.values())
    if not line.state and missing:
        line.state = ", ".join(missing)


def _digest(row: Row, recipe: CompareRecipe) -> str:
    """Of the files of a row's model; empty where it is not whole."""
    record = _record(Places(Path(recipe.folder)).model(row.name, trained=row.trial is not None))
    return digest(model_files(record["files"])) if record else ""


def _notes(folder: Path) -> dict[str, Any] | None:
    """What the record of a piece notes; None where the piece is not whole."""
    record = _record(folder)
    return dict(record["notes"]) if record else None


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(folder.with_name(f"{folder.name}.json").read_text(encoding="utf-8"))
        return record if {"files", "notes"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
