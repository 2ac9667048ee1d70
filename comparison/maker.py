"""Makes the pieces of a comparison, or finds those that are there."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.recipe import CompareRecipe
from comparison.rows import BEFORE, UNTIMED, Places, Row, evaluation, of_classifier, saved
from compress.measure import measure
from compress.recipe import CompressRecipe, RowsRecipe
from compress.report import model_files, read_report, result_row
from compress.run import compress
from compress.step_folders import StepFolder, checksums, digest
from exports.files import CONFIG
from pretrain.export.consolidate import consolidate
from pretrain.recipe import TrainRecipe
from pretrain.sweep.runner import run_one
from scoring.recipe import EvaluateRecipe
from scoring.report import file_name, read_results
from scoring.score import evaluate
from sharebert_common.errors import BadInput, CommandError
from sharebert_common.files import make_folders, write_atomically
from sharebert_common.recipe import load, plain

NOT_RUN = "not run"
"""Why a piece is missing."""


@dataclass(frozen=True)
class Piece:
    """A piece that is whole."""

    folder: Path
    digest: str
    """Of the model's files in it."""
    notes: dict[str, Any]

    @classmethod
    def of_record(cls, folder: Path, record: dict[str, Any]) -> Piece:
        """The piece in `folder` that a record of `compress.step_folders` tells of."""
        return cls(folder, digest(model_files(record["files"])), record["notes"])


class Maker:
    """Makes the pieces of rows, one after the other. A piece is known by what it is made from: keys, and checksums of
    the models that it needs."""

    def __init__(self, recipe: CompareRecipe, rows: list[Row]) -> None:
        self.recipe, self.places, self.saved = recipe, Places(Path(recipe.folder)), saved(rows)
        self.models: dict[str, Piece] = {}
        self.classifiers: dict[tuple[str, str, int], Piece] = {}
        """Of a row (with BEFORE: before the steps that follow), a task and a seed."""
        self.evaluations: dict[tuple[str, str], EvaluateRecipe] = {}
        """Of a row and a task, with the first seed: reading the keys takes longer than all else of a search."""
        self.digests: dict[str, str] = {}
        """Of folders of models that make further rows."""

    def make(self, row: Row) -> None:
        """Make what is missing of a row. Raises CommandError: something failed, or a row that it needs did."""
        for other in (row.asked.of, row.asked.teacher, row.asked.task_teacher):
            if other is not None and other not in self.models:
                raise CommandError(f"not made, because {other} was not")
        if row.trial is not None:
            self.train(row)
            tuned = self.models[row.name]
        else:
            tuned = source = self.models[row.of]
            if row.before is not None:
                name = f"{row.name}{BEFORE}" if row.after else row.name
                tuned = source = self.compressed(row, name, source, row.before)
            if row.after is not None:
                source = self.compressed(row, row.name, source, row.after)
            self.models[row.name] = source
        for task in self.recipe.tasks:
            if row.tunes:
                self.fine_tune(row, tuned, task)
            if row.after is not None:
                for seed in self.recipe.seeds:
                    self.score_compressed(row, row.after, task, seed)

    def train(self, row: Row) -> None:
        """Train a row, and export and measure its model."""
        assert row.trial is not None
        run, teacher = row.trial.run, self.teacher(row)
        self.finish_training(row, teacher)

        def make(place: StepFolder) -> dict[str, Any]:
            consolidate(run, place.model)
            rows = RowsRecipe(dataset=self.recipe.dataset, rows=self.recipe.validation_rows)
            asked = CompressRecipe(steps=["trim"], validation=rows, report=UNTIMED)
            return {"measured": dataclasses.asdict(measure(row.name, place.model, asked, place.scratch, {}))}

        identity = {"train": _keys(row.trial.recipe, row), "rows": self.recipe.validation_rows, "teacher": teacher}
        self.models[row.name] = self.piece(self.places.model(row.name, trained=True), identity, make)

    def finish_training(self, row: Row, teacher: str | None) -> None:
        """Train, or resume. `teacher` is the checksum of the teacher's files.

        Raises BadInput: the run was begun with other keys, or another teacher.
        """
        assert row.trial is not None
        run = row.trial.run
        note, other = run.with_name(f"{run.name}.teacher.json"), row.asked.teacher
        if why := differs(row, run):
            raise BadInput(f"{run}: {why}; remove it to train it again")
        if not (run / "config.yaml").is_file():
            make_folders(note.parent)
            write_atomically(note, json.dumps(teacher) + "\n")
        elif other is not None and (learnt := _noted(note)) != teacher:
            how = (
                f"learnt from a '{other}' that was made anew since"
                if learnt
                else f"does not say which '{other}' it has"
            )
            raise BadInput(f"{run}: {how}; remove it to train it again")
        run_one(row.trial, say)

    def teacher(self, row: Row) -> str | None:
        """The checksum of the files of a row's teacher."""
        return self.models[row.asked.teacher].digest if row.asked.teacher is not None else None

    def compressed(self, row: Row, name: str, source: Piece, steps: CompressRecipe) -> Piece:
        """The result of steps; `compress` itself goes on after the last step that is whole."""

        def make(place: StepFolder) -> dict[str, Any]:
            compress(source.folder, steps, place.model)
            return {}

        identity = {"compress": plain(steps), "source": source.digest, "teacher": self.teacher(row)}
        return self.piece(self.places.model(name, trained=False), identity, make)

    def fine_tune(self, row: Row, model: Piece, task: str) -> None:
        """The classifiers of a row for a task. Later seeds have the learning rate that the first one chose."""
        lr, keep, teacher = None, row.tuned in self.saved, row.asked.task_teacher
        learns = self.classifier(teacher, task, self.recipe.seeds[0]).digest if teacher is not None else None
        copies = self.digest_of(self.recipe.tasks[task].augment.model)
        for seed in self.recipe.seeds:
            recipe = self.evaluation(row, task, seed, lr)
            identity = {"evaluate": plain(recipe), "model": model.digest, "teacher": learns, "augment": copies}

            def make(place: StepFolder, recipe: Any = recipe) -> dict[str, Any]:
                scores = place.scratch / "scores"
                evaluate(
                    dataclasses.replace(recipe, output=str(scores)),
                    [str(model.folder)],
                    save=place.model if keep else None,
                    augmented_rows=self.places.folder / "augmented" / task,
                )
                (result,) = read_results(scores / file_name(task))
                return {"scores": result.flat(), "lr": result.lr}

            place = self.places.classifiers(row.tuned, task) / Places.of_seed(seed)
            if keep and not (place / CONFIG).is_file():  # it was scored when no row needed it
                StepFolder(place.parent, place.name).remove()
            piece = self.piece(place, identity, make)
            lr = piece.notes["lr"]
            self.classifiers[row.tuned, task, seed] = piece

    def score_compressed(self, row: Row, after: CompressRecipe, task: str, seed: int) -> None:
        """The score of a classifier after the steps that follow fine-tuning. Only the score is kept."""
        source = self.classifier(row.tuned, task, seed)
        recipe = dataclasses.replace(of_classifier(after), task=self.evaluation(row, task, seed))

        def make(place: StepFolder) -> dict[str, Any]:
            out = place.scratch / "out"
            compress(source.folder, recipe, out)
            _, _, rows = read_report(out)
            return {"scores": result_row(rows).scores}

        identity = {"compress": plain(recipe), "source": source.digest}
        place = self.places.classifiers(row.name, task) / Places.of_seed(seed)
        self.classifiers[row.name, task, seed] = self.piece(place, identity, make)

    def evaluation(self, row: Row, task: str, seed: int, lr: float | None = None) -> EvaluateRecipe:
        """One fine-tuning of a row. `lr` is that of the first seed; None where it is to be chosen."""
        if (row.name, task) not in self.evaluations:
            self.evaluations[row.name, task] = evaluation(self.recipe, row, task)
        first = self.evaluations[row.name, task]
        finetune = first.finetune if lr is None else dataclasses.replace(first.finetune, lr=[lr])
        return dataclasses.replace(first, seeds=[seed], finetune=finetune)

    def digest_of(self, model: str | None) -> str | None:
        """The checksum of the files of a model that makes further rows."""
        if model is not None and model not in self.digests:
            self.digests[model] = digest(model_files(checksums(Path(model))))
        return self.digests[model] if model is not None else None

    def classifier(self, name: str, task: str, seed: int) -> Piece:
        """A classifier of a row. Raises CommandError where it was not made."""
        if (found := self.classifiers.get((name, task, seed))) is None:
            raise CommandError(f"not made, because {name} has no classifier for {task} with seed {seed}")
        return found

    def piece(self, folder: Path, identity: dict[str, Any], make: Callable[[StepFolder], dict[str, Any]]) -> Piece:
        """A piece from before, if the same made it and its files are whole; otherwise it is made."""
        place, identity = StepFolder(folder.parent, folder.name), self.movable(identity)
        record = place.result(identity, say)
        if record is None:
            say(f"making {folder}")
            place.open(identity)
            record = place.finish(identity, make(place))
        return Piece.of_record(folder, record)

    def movable(self, value: Any) -> Any:
        """What a piece is made from, with paths inside the folder of the comparison relative to it."""
        if isinstance(value, dict):
            return {key: self.movable(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.movable(one) for one in value]
        inside = isinstance(value, str) and value.startswith(f"{self.places.folder}/")
        return value[len(f"{self.places.folder}/") :] if inside else value


class Finder(Maker):
    """Finds the pieces that are whole and up to date by their records alone, and makes none."""

    def find(self, rows: list[Row]) -> dict[str, str]:
        """Note what there is of all rows; what keeps models from being whole, by row."""
        missing = {}
        for row in rows:
            try:
                self.make(row)
            except CommandError as error:
                missing[row.name] = str(error)
        return missing

    def fine_tune(self, row: Row, model: Piece, task: str) -> None:
        """See `Maker.fine_tune`. It ends at the first seed that is missing."""
        with suppress(CommandError):
            super().fine_tune(row, model, task)

    def score_compressed(self, row: Row, after: CompressRecipe, task: str, seed: int) -> None:
        """See `Maker.score_compressed`."""
        with suppress(CommandError):
            super().score_compressed(row, after, task, seed)

    def finish_training(self, row: Row, teacher: str | None) -> None:
        """See `Maker.finish_training`."""
        assert row.trial is not None
        if why := differs(row, row.trial.run):
            raise CommandError(why)

    def piece(self, folder: Path, identity: dict[str, Any], make: Callable[[StepFolder], dict[str, Any]]) -> Piece:
        """See `Maker.piece`. Raises CommandError where it is not there."""
        try:
            record = json.loads(folder.with_name(f"{folder.name}.json").read_text(encoding="utf-8"))
            same, piece = record["identity"] == self.movable(identity), Piece.of_record(folder, record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CommandError(NOT_RUN) from error
        if not same:
            raise CommandError("made with other keys, or from another model")
        return piece


def differs(row: Row, run: Path) -> str:
    """How the keys that a run was begun with differ from those of the row; empty where they do not."""
    assert row.trial is not None
    if not (run / "config.yaml").is_file():
        return ""
    same = _keys(load(TrainRecipe, run / "config.yaml"), row) == _keys(row.trial.recipe, row)
    return "" if same else "was trained with other keys than the row has now"


def _noted(note: Path) -> Any:
    """The checksum that was noted of a run's teacher; None where it cannot be read."""
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _keys(recipe: TrainRecipe, row: Row) -> dict[str, Any]:
    """The keys of a row's training, without what a run settles by itself, and without folders of the comparison, so
    that it may be moved."""
    keys = plain(recipe)
    teacher = {"teacher": None} if row.asked.teacher is not None else {}
    data = {**keys["data"], "micro_batch": None}
    return {**keys, "run": None, "data": data, "distill": {**keys["distill"], **teacher}}


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
