"""Makes the pieces of a comparison."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from comparison.pieces import Compress, ExportRun, FineTune, Piece, Pieces, Wanted, differs
from comparison.rows import UNTIMED, Row
from compress.measure import measure
from compress.recipe import CompressRecipe, RowsRecipe
from compress.report import read_report, result_row
from compress.run import compress
from compress.step_folders import StepFolder
from pretrain.export.consolidate import consolidate
from pretrain.sweep.runner import run_one
from scoring.report import file_name, read_results
from scoring.score import evaluate
from sharebert_common.errors import BadInput
from sharebert_common.files import make_folders, write_atomically


class Maker(Pieces):
    """Makes the pieces that are not there, or not whole, or were made from something else."""

    def run_of(self, row: Row, teacher: str | None) -> Path:
        """See `Pieces.run_of`: trains, or resumes."""
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
        return run

    def piece(self, wanted: Wanted) -> Piece:
        """See `Pieces.piece`."""
        place = StepFolder(wanted.folder.parent, wanted.folder.name)
        record = place.result(wanted.identity, say)
        if record is not None and not wanted.serves(record):
            say(f"{place.model}: no row needed its classifier, and one needs it now")
            place.remove()
            record = None
        if record is None:
            say(f"making {place.model}")
            place.open(wanted.identity)
            record = place.finish(wanted.identity, self._make(wanted.how, place))
        return Piece.of_record(place.model, record)

    def _make(self, how: ExportRun | Compress | FineTune, place: StepFolder) -> dict[str, Any]:
        """Make a piece in its place; its notes."""
        match how:
            case ExportRun():
                return self._export(how, place)
            case FineTune():
                return self._fine_tune(how, place)
            case Compress(only_score=False):
                compress(how.source, how.recipe, place.model)  # it goes on after the last step that is whole
                return {}
            case Compress():
                out = place.scratch / "out"
                compress(how.source, how.recipe, out)
                return {"scores": result_row(read_report(out)[2]).scores}

    def _export(self, how: ExportRun, place: StepFolder) -> dict[str, Any]:
        consolidate(how.run, place.model)
        rows = RowsRecipe(dataset=self.recipe.dataset, rows=self.recipe.validation_rows)
        asked = CompressRecipe(steps=["trim"], validation=rows, report=UNTIMED)
        return {"measured": dataclasses.asdict(measure(how.name, place.model, asked, place.scratch, {}))}

    def _fine_tune(self, how: FineTune, place: StepFolder) -> dict[str, Any]:
        scores, task = place.scratch / "scores", how.recipe.task
        evaluate(
            dataclasses.replace(how.recipe, output=str(scores)),
            [str(how.model)],
            save=place.model if how.keep else None,
            augmented_rows=self.places.folder / "augmented" / task,
        )
        (result,) = read_results(scores / file_name(task))
        return {"scores": result.flat(), "lr": result.lr}


def _noted(note: Path) -> Any:
    """The checksum that was noted of a run's teacher; None where it cannot be read."""
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
