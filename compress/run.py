"""`sharebert compress`: the steps of a recipe one after the other, a report after each, and OUT whole or absent."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.as_is import check_labels
from compress.measure import OF_A_FOLDER, Measured, is_baseline, measure, measure_baseline, needs_task
from compress.recipe import CompressRecipe, RowsRecipe
from compress.report import STEP, check_replaceable, model_files, table, write_report
from compress.source import is_classifier, open_source
from compress.step import FormName, Source, Step
from compress.step_folders import StepFolder, checksums, digest
from compress.steps import all_steps
from compress.tools import RecipeTools, open_rows
from data_prep.lock import LOCK, locked
from data_prep.shards.reader import open_dataset
from exports.read import read_config
from scoring.data import load_task
from scoring.recipe import BLIMP, PROBE, EvaluateRecipe
from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256, whole_or_absent_folder, write_atomically
from sharebert_common.recipe import plain

MARK = ".steps-of-compress"
"""A file in OUT.steps. A folder of that name without it is somebody else's, and is left alone."""

ONCE = ("awq", "onnx_int8")
"""Steps that take no model that they have made. `quantise` does: it rounds the numbers that codes stand for."""

ROOM = 3
"""Free space that a result needs, as a multiple of its source: the result, what it is made from, and a report."""


def compress(folder: Path, recipe: CompressRecipe, out: Path) -> str:
    """Compress the model in `folder` into the new folder `out`; the table of the report.

    The result of every step is kept in `out`.steps, and taken up again if the command is called again after it was
    killed. It is removed once `out` is whole, unless the recipe keeps it. Another process that works there is waited
    for.

    Raises BadInput before the first step: no model in `folder`, a step that cannot take what it would get, no teacher
    for a step that needs one, a dataset of another tokenizer, too little disk, `out` holds something else.
    """
    source = open_source(folder)
    steps = all_steps(recipe.steps)
    check_all(source, recipe, steps, out)
    parent = steps_of(out)
    with locked(parent, who="process", at=parent):
        (parent / MARK).touch()
        return _compressed(source, recipe, steps, out)


def _compressed(source: Source, recipe: CompressRecipe, steps: list[tuple[str, Step]], out: Path) -> str:
    """See `compress`; nobody else works in `out`.steps."""
    parent = steps_of(out)
    rows = Rows(recipe, parent, say)
    current, files = source, checksums(source.folder)
    rows.add("source", "source", source.folder, {}, files)
    for number, (name, step) in enumerate(steps, 1):
        place = StepFolder(parent, f"{number}-{name}")
        record = run_step(name, step, current, files, place, recipe)
        current, files = open_source(place.model), record["files"]
        rows.add(f"{number} {name}", STEP, current.folder, record["notes"], files)
        say(table(rows.rows))
    for reference in recipe.report.references:
        rows.add_reference(reference)
    check_replaceable(out)  # hours later, something else may be there
    with whole_or_absent_folder(out) as whole:
        shutil.copytree(current.folder, whole, dirs_exist_ok=True)
        text = write_report(whole, rows.rows, recipe, rows.files)
    if not recipe.keep_steps:
        shutil.rmtree(parent, ignore_errors=True)
    return text


def steps_of(out: Path) -> Path:
    """The folder of the results of steps."""
    return out.with_name(f"{out.name}.steps")


def check_all(source: Source, recipe: CompressRecipe, steps: list[tuple[str, Step]], out: Path) -> None:
    """Raise BadInput for what can be known before the first step."""
    steps[0][1].check(source)
    check_steps(steps, recipe, source.form, read_config(source.folder) if source.form == "compact" else None)
    if recipe.teacher is not None:
        open_source(Path(recipe.teacher))
    for key in ("calibration", "validation"):
        rows = getattr(recipe, key)
        if rows.dataset is not None:
            open_rows(key, rows, source.folder)
    for reference in recipe.report.references:
        if needs_task(reference) and recipe.task is None:
            raise BadInput(f"report.references: {reference} needs a task to be scored on")
        if needs_task(reference) and recipe.task is not None and recipe.task.task in (BLIMP, PROBE):
            raise BadInput(f"report.references: {reference} needs a task with labels, {recipe.task.task} has none")
        if is_baseline(reference):
            continue
        other = open_source(Path(reference.partition(":")[2] if reference.startswith(OF_A_FOLDER) else reference))
        as_is = not needs_task(reference) and is_classifier(other.folder)
        if as_is and recipe.task is not None and recipe.task.task not in (BLIMP, PROBE):
            check_labels(other.folder, load_task(recipe.task.task, recipe.task.data).task)
    parent = steps_of(out)
    here, there = source.folder.resolve(), out.resolve()
    if here == there:
        raise BadInput(f"{out}: is the source; choose another folder for the result")
    if here.is_relative_to(there) or here.is_relative_to(parent.resolve()) or there.is_relative_to(here):
        raise BadInput(
            f"{out}: the result, or {parent.name}, would hold the source or lie in it; choose another folder"
        )
    if parent.exists() and not (parent / MARK).is_file() and not (parent.is_dir() and _is_empty(parent)):
        raise BadInput(f"{parent}: holds something else than results of steps; choose another OUT, or remove it first")
    check_replaceable(out)
    needed = ROOM * sum(path.stat().st_size for path in source.folder.rglob("*") if path.is_file())
    nearest = next(place for place in (out.parent, *out.parent.parents, Path()) if place.is_dir())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise BadInput(f"{out}: its disk has {free / 1e6:,.0f} MB left, and this may need {needed / 1e6:,.0f} MB")


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but the lock of a process that died before it did anything."""
    return all(path.name == LOCK for path in folder.iterdir())


def check_steps(
    steps: Sequence[tuple[str, Step]], recipe: CompressRecipe, form: FormName, config: ShareBertConfig | None
) -> tuple[FormName, ShareBertConfig | None]:
    """Raise BadInput for a step that cannot take what those before it make of a model of a form and a config.

    Returns form and config of the result. A config is None where it is not known.
    """
    for number, (name, step) in enumerate(steps):
        if name in ONCE and name in [other for other, _ in steps[:number]]:
            raise BadInput(f"steps: {name} stands there twice, and would round codes; leave one of them out")
        step.check_ahead(form, config)
        form = step.result_form(form)
        config = step.result_config(config) if config is not None and form in ("compact", "dense") else None
        if step.needs_calibration and recipe.calibration.dataset is None:
            raise BadInput(f"calibration.dataset: {name} looks at rows of text as it is set here; name a dataset")
        if step.needs_validation and recipe.validation.dataset is None:
            raise BadInput(f"validation.dataset: {name} looks at the loss as it is set here; name a dataset")
        if step.needs_teacher and recipe.teacher is None:
            raise BadInput(f"teacher: {name} learns from a teacher; name its folder")
    return form, config


def run_step(
    name: str, step: Step, source: Source, files: dict[str, str], place: StepFolder, recipe: CompressRecipe
) -> dict[str, Any]:
    """Run a step, or take its result from before; its record. `files` are the checksums of the source's files."""
    identity = {
        "step": name,
        "keys": plain(step),
        "seed": recipe.seed,
        "calibration": identity_of(recipe.calibration),
        "validation": identity_of(recipe.validation) if step.needs_validation else None,
        "source": digest(files),
        "version": version("sharebert"),
    }
    if step.needs_teacher:
        assert recipe.teacher is not None  # `check_all` has looked
        identity["teacher"] = digest(model_files(checksums(Path(recipe.teacher))))
    record = place.result(identity, say)
    if record is None:
        step.check(source)
        place.open(identity)
        with whole_or_absent_folder(place.model) as folder:
            notes = step.apply(source, RecipeTools(recipe, source.folder, place.scratch, say), folder)
        record = place.finish(identity, notes)
    else:
        say(f"{place.model}: whole already")
    return record


def identity_of(rows: RowsRecipe) -> dict[str, Any] | None:
    """What tells some rows from all others, wherever their dataset lies."""
    if rows.dataset is None:
        return None
    return {"fingerprint": open_dataset(rows.dataset).manifest["fingerprint"], "rows": rows.rows}


def identity_of_task(task: EvaluateRecipe | None) -> dict[str, Any] | None:
    """What tells a task from all others, wherever its files lie: keys, and checksums of its rows and of the models that
    teach it or make further rows. Rows of the hub are known by their name."""
    if task is None:
        return None
    given = plain(task)
    data, distill = given["data"], given["finetune"]["distill"]
    paths = [data["path"], data["augment"]["model"], distill["teacher"]]
    data["path"] = data["augment"]["model"] = distill["teacher"] = given["output"] = None
    return {**given, "files": [None if path is None else _checksum(Path(path)) for path in paths]}


def _checksum(path: Path) -> str:
    return file_sha256(path) if path.is_file() else digest(model_files(checksums(path)))


class Rows:
    """The rows of the report. Each is kept in a file as soon as it was measured."""

    def __init__(self, recipe: CompressRecipe, parent: Path, say: Callable[[str], None]) -> None:
        self.rows: list[Measured] = []
        self.files: dict[str, str] = {}
        self._recipe, self._parent, self._say = recipe, parent, say
        self._asked = {
            "task": identity_of_task(recipe.task),
            "report": plain(recipe.report),
            "validation": identity_of(recipe.validation),
            "version": version("sharebert"),
        }

    def add(self, name: str, role: str, folder: Path, notes: dict[str, Any], files: dict[str, str]) -> None:
        """Measure the model in `folder`, or take the row from before if its files and the recipe are the same.

        `files` are the checksums of its files.
        """
        self.files[str(folder)] = digest(model_files(files))
        kept = self._parent / f"{name.replace(' ', '-').replace('/', '-')}.row.json"
        asked = {"files": self.files[str(folder)], "asked": self._asked, "notes": notes}
        try:
            record = json.loads(kept.read_text(encoding="utf-8"))
            if record["asked"] == json.loads(json.dumps(asked)):
                self.rows.append(Measured(**{**record["row"], "folder": str(folder)}))  # it may have been moved
                return
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._say(f"measuring {name}")
        row = measure(name, folder, self._recipe, self._parent / "scores", {"role": role, **notes})
        self.rows.append(row)
        write_atomically(kept, json.dumps({"asked": asked, "row": vars(row)}) + "\n")

    def add_reference(self, name: str) -> None:
        """Measure a model beside."""
        if needs_task(name):
            self.rows.append(measure_baseline(name, self._recipe, self._parent / "scores"))
        else:
            self.add(f"reference {Path(name).name}", "reference", Path(name), {}, checksums(Path(name)))


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
