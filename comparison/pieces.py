"""The pieces of a comparison: where each lies, what it is made from, and which are there. Nothing here writes."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.recipe import CompareRecipe
from comparison.rows import BEFORE, Places, Row, evaluation, of_classifier, saved
from compress.recipe import CompressRecipe
from compress.report import model_files
from compress.step_folders import checksums, digest
from exports.files import CONFIG
from pretrain.recipe import TrainRecipe
from scoring.recipe import EvaluateRecipe
from sharebert_common.errors import CommandError
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


@dataclass(frozen=True)
class ExportRun:
    """How a piece is made: the run of a row is exported and measured."""

    name: str
    run: Path


@dataclass(frozen=True)
class Compress:
    """How a piece is made: steps are applied to a model, whose result is kept; of a classifier, the score alone."""

    source: Path
    recipe: CompressRecipe
    only_score: bool = False


@dataclass(frozen=True)
class FineTune:
    """How a piece is made: a model is fine-tuned with one seed and scored; the classifier is kept if a row needs it."""

    model: Path
    recipe: EvaluateRecipe
    keep: bool


@dataclass(frozen=True)
class Wanted:
    """A piece that a row needs."""

    folder: Path
    identity: dict[str, Any]
    """What it is made from: keys, and checksums of models. The same again makes the same piece."""
    how: ExportRun | Compress | FineTune

    def serves(self, record: dict[str, Any]) -> bool:
        """Whether the piece that a record tells of has the file that rows need: none kept its classifier before some
        row needed it."""
        return not (isinstance(self.how, FineTune) and self.how.keep) or CONFIG in record["files"]


class Pieces(ABC):
    """Goes through the pieces of rows, one after the other."""

    def __init__(self, recipe: CompareRecipe, rows: list[Row]) -> None:
        self.recipe, self.places, self.saved = recipe, Places(Path(recipe.folder)), saved(rows)
        self.models: dict[str, Piece] = {}
        self.classifiers: dict[tuple[str, str, int], Piece] = {}
        """Of a row (with BEFORE: before the steps that follow), a task and a seed."""
        self._evaluations: dict[tuple[str, str], EvaluateRecipe] = {}
        """Of a row and a task, with the first seed: reading the keys takes longer than all else of a search."""
        self._digests: dict[str, str] = {}
        """Of folders of models that make further rows."""

    @abstractmethod
    def piece(self, wanted: Wanted) -> Piece:
        """The piece that is wanted. Raises CommandError where there is none."""

    @abstractmethod
    def run_of(self, row: Row, teacher: str | None) -> Path:
        """The finished run of a row. `teacher` is the checksum of the teacher's files.

        Raises CommandError: there is none, or it was begun with other keys, or another teacher.
        """

    def go_through(self, row: Row) -> None:
        """All pieces of a row. Raises CommandError: one is missing, or a row that it needs is."""
        for other in (row.asked.of, row.asked.teacher, row.asked.task_teacher):
            if other is not None and other not in self.models:
                raise CommandError(f"not made, because {other} was not")
        if row.trial is not None:
            tuned = self.models[row.name] = self.trained(row)
        else:
            tuned = source = self.models[row.of]
            if row.before is not None:
                name = f"{row.name}{BEFORE}" if row.after else row.name
                tuned = source = self._compressed(row, name, source, row.before)
            if row.after is not None:
                source = self._compressed(row, row.name, source, row.after)
            self.models[row.name] = source
        for task in self.recipe.tasks:
            if row.tunes:
                self.fine_tuned(row, tuned, task)
            if row.after is not None:
                for seed in self.recipe.seeds:
                    self.score_compressed(row, row.after, task, seed)

    def trained(self, row: Row) -> Piece:
        """The export of a row's training."""
        assert row.trial is not None
        teacher = self._teacher(row)
        run = self.run_of(row, teacher)
        identity = {"train": keys_of(row.trial.recipe, row), "rows": self.recipe.validation_rows, "teacher": teacher}
        return self._piece(self.places.model(row.name, trained=True), identity, ExportRun(row.name, run))

    def fine_tuned(self, row: Row, model: Piece, task: str) -> None:
        """The classifiers of a row for a task. Later seeds have the learning rate that the first one chose."""
        lr, keep, teacher = None, row.tuned in self.saved, row.asked.task_teacher
        learns = self._classifier(teacher, task, self.recipe.seeds[0]).digest if teacher is not None else None
        copies = self._digest_of(self.recipe.tasks[task].augment.model)
        for seed in self.recipe.seeds:
            recipe = self._evaluation(row, task, seed, lr)
            identity = {"evaluate": plain(recipe), "model": model.digest, "teacher": learns, "augment": copies}
            place = self.places.classifiers(row.tuned, task) / Places.of_seed(seed)
            piece = self._piece(place, identity, FineTune(model.folder, recipe, keep))
            lr = piece.notes["lr"]
            self.classifiers[row.tuned, task, seed] = piece

    def score_compressed(self, row: Row, after: CompressRecipe, task: str, seed: int) -> None:
        """The score of a classifier after the steps that follow fine-tuning. Only the score is kept."""
        source = self._classifier(row.tuned, task, seed)
        recipe = dataclasses.replace(of_classifier(after), task=self._evaluation(row, task, seed))
        identity = {"compress": plain(recipe), "source": source.digest}
        place = self.places.classifiers(row.name, task) / Places.of_seed(seed)
        how = Compress(source.folder, recipe, only_score=True)
        self.classifiers[row.name, task, seed] = self._piece(place, identity, how)

    def _compressed(self, row: Row, name: str, source: Piece, steps: CompressRecipe) -> Piece:
        """The result of steps."""
        identity = {"compress": plain(steps), "source": source.digest, "teacher": self._teacher(row)}
        return self._piece(self.places.model(name, trained=False), identity, Compress(source.folder, steps))

    def _piece(self, folder: Path, identity: dict[str, Any], how: ExportRun | Compress | FineTune) -> Piece:
        return self.piece(Wanted(folder, self._movable(identity), how))

    def _teacher(self, row: Row) -> str | None:
        """The checksum of the files of a row's teacher."""
        return self.models[row.asked.teacher].digest if row.asked.teacher is not None else None

    def _evaluation(self, row: Row, task: str, seed: int, lr: float | None = None) -> EvaluateRecipe:
        """One fine-tuning of a row. `lr` is that of the first seed; None where it is to be chosen."""
        if (row.name, task) not in self._evaluations:
            self._evaluations[row.name, task] = evaluation(self.recipe, row, task)
        first = self._evaluations[row.name, task]
        finetune = first.finetune if lr is None else dataclasses.replace(first.finetune, lr=[lr])
        return dataclasses.replace(first, seeds=[seed], finetune=finetune)

    def _digest_of(self, model: str | None) -> str | None:
        """The checksum of the files of a model that makes further rows."""
        if model is not None and model not in self._digests:
            self._digests[model] = digest(model_files(checksums(Path(model))))
        return self._digests[model] if model is not None else None

    def _classifier(self, name: str, task: str, seed: int) -> Piece:
        """A classifier of a row. Raises CommandError where it was not made."""
        if (found := self.classifiers.get((name, task, seed))) is None:
            raise CommandError(f"not made, because {name} has no classifier for {task} with seed {seed}")
        return found

    def _movable(self, value: Any) -> Any:
        """What a piece is made from, with paths inside the folder of the comparison relative to it."""
        if isinstance(value, dict):
            return {key: self._movable(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._movable(one) for one in value]
        inside = isinstance(value, str) and value.startswith(f"{self.places.folder}/")
        return value[len(f"{self.places.folder}/") :] if inside else value


class Finder(Pieces):
    """Finds the pieces that are whole and up to date by their records alone. It leaves the disk as it is."""

    def find(self, rows: list[Row]) -> dict[str, str]:
        """Note what there is of all rows; what keeps models from being whole, by row."""
        missing = {}
        for row in rows:
            try:
                self.go_through(row)
            except CommandError as error:
                missing[row.name] = str(error)
        return missing

    def piece(self, wanted: Wanted) -> Piece:
        """See `Pieces.piece`."""
        folder = wanted.folder
        try:
            record = json.loads(folder.with_name(f"{folder.name}.json").read_text(encoding="utf-8"))
            same, serves = record["identity"] == wanted.identity, wanted.serves(record)
            piece = Piece.of_record(folder, record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CommandError(NOT_RUN) from error
        if not same:
            raise CommandError("made with other keys, or from another model")
        if not serves:
            raise CommandError("scored, but its classifier was not kept, and a row needs it now")
        return piece

    def run_of(self, row: Row, teacher: str | None) -> Path:
        """See `Pieces.run_of`; whether it has ended, the record of its export tells."""
        assert row.trial is not None
        if why := differs(row, row.trial.run):
            raise CommandError(why)
        return row.trial.run

    def fine_tuned(self, row: Row, model: Piece, task: str) -> None:
        """See `Pieces.fine_tuned`. It ends at the first seed that is missing."""
        with suppress(CommandError):
            super().fine_tuned(row, model, task)

    def score_compressed(self, row: Row, after: CompressRecipe, task: str, seed: int) -> None:
        """See `Pieces.score_compressed`."""
        with suppress(CommandError):
            super().score_compressed(row, after, task, seed)


def differs(row: Row, run: Path) -> str:
    """How the keys that a run was begun with differ from those of the row; empty where they do not."""
    assert row.trial is not None
    if not (run / "config.yaml").is_file():
        return ""
    same = keys_of(load(TrainRecipe, run / "config.yaml"), row) == keys_of(row.trial.recipe, row)
    return "" if same else "was trained with other keys than the row has now"


def keys_of(recipe: TrainRecipe, row: Row) -> dict[str, Any]:
    """The keys of a row's training, without what a run settles by itself, and without folders of the comparison, so
    that it may be moved."""
    keys = plain(recipe)
    teacher = {"teacher": None} if row.asked.teacher is not None else {}
    data = {**keys["data"], "micro_batch": None}
    return {**keys, "run": None, "data": data, "distill": {**keys["distill"], **teacher}}
