"""The table looks at pieces and leaves them alone, also those of a comparison that is running."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from small_comparison import QUANTISE, base_recipe, small

from comparison.maker import Maker
from comparison.pieces import Compress, Finder, FineTune, Piece, Pieces, Wanted
from comparison.recipe import CompareRecipe
from comparison.rows import Row, checked
from comparison.run import compare
from compress.step_folders import StepFolder
from data_prep.lock import locked
from sharebert_common.errors import FINISHED

SST2 = "sst2"


class Writer(Pieces):
    """Writes the records of all pieces, without any work. A classifier is kept where that is wanted."""

    def piece(self, wanted: Wanted) -> Piece:
        place = StepFolder(wanted.folder.parent, wanted.folder.name)
        place.open(wanted.identity)
        if not isinstance(wanted.how, FineTune) or wanted.how.keep:
            place.model.mkdir(parents=True)
            (place.model / "config.json").write_text(json.dumps(str(wanted.folder)))
        return Piece.of_record(place.model, place.finish(wanted.identity, {"lr": 1e-3, "scores": {"dev acc": [0.5]}}))

    def run_of(self, row: Row, teacher: str | None) -> Path:
        assert row.trial is not None
        return row.trial.run


@pytest.fixture
def recipe(dataset: Path, tmp_path: Path) -> CompareRecipe:
    (tmp_path / "int4.yaml").write_text(json.dumps({"steps": ["trim", QUANTISE]}))
    rows = {
        "veps": {"train": str(base_recipe(tmp_path, dataset))},
        "veps-int4": {"of": "veps", "compress": str(tmp_path / "int4.yaml")},
    }
    return small(tmp_path, dataset, rows)


def write(recipe: CompareRecipe, rows: list[Row]) -> Writer:
    writer = Writer(recipe, rows)
    for row in rows:
        writer.go_through(row)
    return writer


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in sorted(folder.rglob("*")))
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in files
    }


def test_the_finder_leaves_the_disk_as_it_is(recipe: CompareRecipe) -> None:
    """Pieces that are whole, that a row needs more of, that are being made, and that other keys made."""
    rows = checked(recipe)
    write(recipe, rows[:1])  # nobody needs the classifiers yet
    classifiers = Path(recipe.folder) / "classifiers" / "veps" / SST2
    running = StepFolder(classifiers, "seed-2")
    running.open({"being": "made"})
    (running.scratch / "scores").mkdir()
    before = state(Path(recipe.folder))
    alone, both = Finder(recipe, rows[:1]), Finder(recipe, rows)
    assert alone.find(rows[:1]) == {}
    assert {seed for _, _, seed in alone.classifiers} == set(recipe.seeds)
    assert both.find(rows).keys() == {"veps-int4"}
    assert not both.classifiers, "without a classifier, the score alone is no piece that a row can be made from"
    recipe.finetune.epochs = 9
    Finder(recipe, rows).find(rows)
    assert state(Path(recipe.folder)) == before


def test_a_score_without_its_classifier_is_made_again_by_the_maker_alone(
    recipe: CompareRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = checked(recipe)
    write(recipe, rows[:1])
    made: list[Path] = []

    def make(self: Maker, how: object, place: StepFolder) -> dict[str, object]:
        made.append(place.model)
        assert not place.model.with_name(f"{place.name}.json").exists(), "the record goes before its files"
        place.model.mkdir(parents=True, exist_ok=True)
        (place.model / "config.json").write_text("{}")
        return {"lr": 1e-3, "scores": {"dev acc": [0.6]}}

    monkeypatch.setattr(Maker, "_make", make)
    monkeypatch.setattr(Maker, "run_of", Writer.run_of)
    Maker(recipe, rows[:1]).go_through(rows[0])
    assert made == []
    Maker(recipe, rows).go_through(rows[0])
    assert made == [Path(recipe.folder) / "classifiers" / "veps" / SST2 / f"seed-{seed}" for seed in recipe.seeds]
    Maker(recipe, rows).go_through(rows[0])
    assert len(made) == len(recipe.seeds)


def test_one_process_makes_pieces_and_the_table_needs_no_lock(
    recipe: CompareRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, begun = Path(recipe.folder), threading.Event()
    monkeypatch.setattr(Maker, "go_through", lambda *_: begun.set())
    worker = threading.Thread(target=compare, args=(recipe,))
    with locked(folder):
        assert compare(recipe, only_table=True)[0] == FINISHED
        worker.start()
        line, heard, end = f"another process works in {folder}; waiting until it ends", "", time.monotonic() + 60
        while line not in heard and time.monotonic() < end:
            heard += capsys.readouterr().err
            time.sleep(0.01)
        assert line in heard
        assert not begun.is_set()
    worker.join(60)
    assert begun.is_set()


def test_a_compressed_classifier_is_scored_and_not_kept(recipe: CompareRecipe) -> None:
    """Its piece is known by the classifier that it is made from."""
    rows = checked(recipe)
    writer = write(recipe, rows)
    found = Finder(recipe, rows)
    assert found.find(rows) == {}
    assert found.classifiers == writer.classifiers
    wanted: list[Wanted] = []

    class Noting(Finder):
        def piece(self, one: Wanted) -> Piece:
            wanted.append(one)
            return super().piece(one)

    Noting(recipe, rows).find(rows)
    last = wanted[-1]
    assert isinstance(last.how, Compress)
    assert last.how.only_score
    assert last.identity["source"] == found.classifiers["veps", SST2, recipe.seeds[-1]].digest
