"""Makes all rows of a comparison, one piece after the other. A piece that is whole is not made again."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comparison import times
from comparison.recipe import CompareRecipe
from comparison.rows import BEFORE, UNTIMED, Piece, Places, Row, checked, evaluation, saved
from comparison.table import write
from compress.measure import measure
from compress.recipe import CompressRecipe, RowsRecipe
from compress.report import model_files, read_report, result_row
from compress.run import compress
from compress.step_folders import StepFolder, digest
from pretrain.export.consolidate import consolidate
from pretrain.recipe import TrainRecipe
from pretrain.sweep.runner import Stopped, run_one
from scoring.report import file_name, read_results
from scoring.score import evaluate
from sharebert import ShareBertError
from sharebert_common.errors import FAILED, FINISHED, STOPPED, BadInput, CommandError
from sharebert_common.files import make_folders
from sharebert_common.recipe import load, plain
from sharebert_common.run_files import peek_state


def compare(recipe: CompareRecipe, *, only_table: bool = False, time_again: bool = False) -> tuple[int, str]:
    """Make what is missing of all rows, and write the table after each row. Then time all models in turns.

    Args:
        recipe: of the comparison.
        only_table: make nothing, and write the table of what there is.
        time_again: time all models again, also where that was done.

    Returns an exit code (FAILED where some row failed; STOPPED where a training was asked to stop), and the table.
    Raises BadInput before the first row: what is wrong in the recipe.
    """
    rows = checked(recipe)
    make_folders(Path(recipe.folder))
    code, makers, table = FINISHED, Makers(recipe, rows), write(recipe, rows)
    for row in [] if only_table else rows:
        try:
            makers.make(row)
        except Stopped as error:
            say(f"{row.name}: {error}")
            code = STOPPED
            break
        except (CommandError, ShareBertError) as error:
            say(f"{row.name}: {error}")
            code = FAILED
        table = write(recipe, rows)
    made = makers.models
    if recipe.report.latency and made and code != STOPPED:
        timed = times.kept(recipe, {name: piece.digest for name, piece in made.items()})
        if time_again or timed.keys() != made.keys():
            times.take(recipe, made, say)
            table = write(recipe, rows)
    return code, table


class Makers:
    """What makes the pieces of rows."""

    def __init__(self, recipe: CompareRecipe, rows: list[Row]) -> None:
        self.recipe, self.places, self.saved = recipe, Places(Path(recipe.folder)), saved(rows)
        self.models: dict[str, Piece] = {}
        self.classifiers: dict[tuple[str, str, int], Piece] = {}
        """Of a row (with BEFORE: before the steps that follow), a task and a seed."""

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
                tuned = source = self.compressed(name, source, row.before)
            if row.after is not None:
                source = self.compressed(row.name, source, row.after)
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
        run = row.trial.run
        if peek_state(run)["state"] == "finished" and _keys(load(TrainRecipe, run / "config.yaml")) != _keys(
            row.trial.recipe
        ):
            raise BadInput(f"{run}: was trained with other keys than the row has now; remove it to train it again")
        run_one(row.trial, say)

        def make(place: StepFolder) -> dict[str, Any]:
            consolidate(run, place.model)
            rows = RowsRecipe(dataset=self.recipe.dataset, rows=self.recipe.validation_rows)
            asked = CompressRecipe(steps=["trim"], validation=rows, report=UNTIMED)
            return {"measured": dataclasses.asdict(measure(row.name, place.model, asked, place.scratch, {}))}

        identity = {"train": plain(row.trial.recipe), "rows": self.recipe.validation_rows}
        self.models[row.name] = self.piece(self.places.model(row.name, trained=True), identity, make)

    def compressed(self, name: str, source: Piece, steps: CompressRecipe) -> Piece:
        """The result of steps; `compress` itself goes on after the last step that is whole."""

        def make(place: StepFolder) -> dict[str, Any]:
            compress(source.folder, steps, place.model)
            return {}

        identity = {"compress": plain(steps), "source": source.digest}
        return self.piece(self.places.model(name, trained=False), identity, make)

    def fine_tune(self, row: Row, model: Piece, task: str) -> None:
        """The classifiers of a row for a task. Later seeds have the learning rate that the first one chose."""
        lr, keep = None, row.tuned in self.saved
        for seed in self.recipe.seeds:
            recipe = evaluation(self.recipe, row, task, seed, lr)
            identity = {"evaluate": plain(recipe), "model": model.digest, "kept": keep}

            def make(place: StepFolder, recipe: Any = recipe) -> dict[str, Any]:
                scores = place.scratch / "scores"
                evaluate(
                    dataclasses.replace(recipe, output=str(scores)),
                    [str(model.folder)],
                    save=place.model if keep else None,
                )
                (result,) = read_results(scores / file_name(task))
                return {"scores": result.flat(), "lr": result.lr}

            place = self.places.classifiers(row.tuned, task) / Places.of_seed(seed)
            piece = self.piece(place, identity, make)
            lr = piece.notes["lr"]
            self.classifiers[row.tuned, task, seed] = piece

    def score_compressed(self, row: Row, after: CompressRecipe, task: str, seed: int) -> None:
        """The score of a classifier after the steps that follow fine-tuning. Only the score is kept."""
        source = self.classifiers[row.tuned, task, seed]
        recipe = dataclasses.replace(after, task=evaluation(self.recipe, row, task, seed), validation=RowsRecipe())

        def make(place: StepFolder) -> dict[str, Any]:
            out = place.scratch / "out"
            compress(source.folder, recipe, out)
            _, _, rows = read_report(out)
            return {"scores": result_row(rows).scores}

        identity = {"compress": plain(recipe), "source": source.digest}
        place = self.places.classifiers(row.name, task) / Places.of_seed(seed)
        self.classifiers[row.name, task, seed] = self.piece(place, identity, make)

    def piece(self, folder: Path, identity: dict[str, Any], make: Callable[[StepFolder], dict[str, Any]]) -> Piece:
        """A piece from before, if the same made it and its files are whole; otherwise it is made."""
        place = StepFolder(folder.parent, folder.name)
        record = place.result(identity, say)
        if record is None:
            say(f"making {folder}")
            place.open(identity)
            record = place.finish(identity, make(place))
        return Piece(folder, digest(model_files(record["files"])), record["notes"])


def _keys(recipe: TrainRecipe) -> dict[str, Any]:
    """The keys of a training, without what a run settles by itself."""
    keys = plain(recipe)
    return {**keys, "data": {**keys["data"], "micro_batch": None}}


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
