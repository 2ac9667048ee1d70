"""A comparison goes on after a kill at any piece, and its table is what the files of its pieces say."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from small_comparison import QUANTISE, base_recipe, small

import comparison.maker
import compress.report
import pretrain.sweep.runner
from comparison.lines import Line
from comparison.recipe import CompareRecipe, RowRecipe
from comparison.rows import checked
from comparison.run import compare
from comparison.text import best
from comparison.times import ROUNDS
from compress import latency
from compress.recipe import ReportRecipe
from compress.step_folders import StepFolder
from data_prep.shards.reader import open_dataset
from exports.export import Export
from exports.forms import write_export
from pretrain.flops import flops_per_token
from pretrain.recipe import TrainRecipe
from pretrain.sweep.recipe import Trial
from scoring.distill import augment
from scoring.recipe import AugmentRecipe, TaskDataRecipe
from sharebert import ShareBertForMaskedLM, initialize
from sharebert_common.errors import FAILED, FINISHED, STOPPED, BadInput
from sharebert_common.recipe import load, to_yaml


class Trainings:
    """Stand-ins of trainings: each leaves a finished run, whose export has the weights at the start."""

    def __init__(self, code: int = FINISHED) -> None:
        self.begun: list[str] = []
        self.code = code

    def run_all(self, trials: Sequence[Trial], report: Any) -> int:
        (trial,) = trials
        if (trial.run / "state.json").exists():
            return FINISHED
        self.begun.append(trial.row)
        if self.code != FINISHED:
            return self.code
        trial.run.mkdir(parents=True)
        (trial.run / "config.yaml").write_text(to_yaml(trial.recipe))
        steps = trial.recipe.steps
        lines = [{"step": steps, "valid_loss": 5.0}, {"step": steps, "loss": 5.0, "step_s": 0.5}]
        (trial.run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (trial.run / "state.json").write_text(json.dumps({"state": "finished", "step": steps}))
        return FINISHED

    @staticmethod
    def consolidate(run: Path, out: Path) -> Path:
        recipe = load(TrainRecipe, run / "config.yaml")
        model = ShareBertForMaskedLM(recipe.resolve().model.config)
        initialize(model, "variance", 0)
        dataset = open_dataset(recipe.data.dataset[0].path)
        write_export(Export.of_model(model, tokenizer=dataset.tokenizer_path), out)
        return out


@pytest.fixture(scope="module")
def trainings() -> Iterator[Trainings]:
    made = Trainings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.sweep.runner, "run_all", made.run_all)
        patch.setattr(comparison.maker, "consolidate", made.consolidate)
        patch.setattr(compress.report, "write_picture", lambda *_: None)  # seconds, and not looked at here
        yield made


def written(folder: Path, dataset: Path) -> CompareRecipe:
    """A recipe of four rows, in `folder`."""
    base = str(base_recipe(folder, dataset))
    (folder / "int4.yaml").write_text(json.dumps({"steps": ["trim", QUANTISE]}))
    (folder / "pruned.yaml").write_text(
        json.dumps({"steps": [{"prune_structure": {"layers": 1}}, QUANTISE], "calibration": {"rows": 16}})
    )
    rows = {
        "bert": {"train": base, "keys": {"model.sharing": "none"}},
        "veps": {"train": base},
        "veps-int4": {"of": "veps", "compress": str(folder / "int4.yaml")},
        "veps-pruned": {"of": "veps", "compress": str(folder / "pruned.yaml")},
    }
    planned = {"small": {"base": "sharebert-small"}}
    published = [{"model": "TinyBERT", "figure": "96.8 %", "source": "a paper"}]
    return small(folder, dataset, rows, planned=planned, published=published)


@pytest.fixture
def recipe(dataset: Path, tmp_path: Path) -> CompareRecipe:
    return written(tmp_path, dataset)


@pytest.fixture(scope="module")
def whole(dataset: Path, trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareRecipe, str]:
    """A comparison that nothing disturbed, and its table."""
    made = written(tmp_path_factory.mktemp("whole"), dataset)
    code, text = compare(made)
    assert code == FINISHED
    return made, text


@pytest.fixture(autouse=True)
def _from_the_start(trainings: Trainings) -> None:
    trainings.begun.clear()
    trainings.code = FINISHED


class Killed(BaseException):
    """The process is killed."""


def rows_in(recipe: CompareRecipe) -> list[dict[str, Any]]:
    content = json.loads((Path(recipe.folder) / "comparison.json").read_text())
    return content["rows"]  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_comparison_killed_at_any_piece_goes_on(
    whole: tuple[CompareRecipe, str], recipe: CompareRecipe, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed before the record of each third piece is written; pieces with a record are not made again."""
    finish, finished, calls = StepFolder.finish, [], 0

    def stops(self: StepFolder, identity: dict[str, Any], notes: dict[str, Any]) -> dict[str, Any]:
        nonlocal calls
        inside = "scratch" in str(self.parent) or ".steps" in str(self.parent)  # a step inside a piece
        calls += not inside
        if not inside and calls % 3 == 0:
            raise Killed
        record = finish(self, identity, notes)
        if not inside:
            finished.append(str(self.model))
        return record

    monkeypatch.setattr(StepFolder, "finish", stops)
    kills = 0
    while True:
        try:
            code, again = compare(recipe)
            break
        except Killed:
            kills += 1
            assert kills < 50
    assert kills >= 4
    assert code == FINISHED
    assert trainings.begun == ["bert", "veps"]
    assert len(finished) == len(set(finished)), "a whole piece was made again"
    expected = [{**line, "made": ""} for line in rows_in(whole[0])]
    assert [{**line, "made": ""} for line in rows_in(recipe)] == expected
    assert "Not whole" not in again


def test_the_table_is_what_the_files_say(whole: tuple[CompareRecipe, str]) -> None:
    recipe, text = whole
    out = Path(recipe.folder)
    assert (out / "comparison.md").read_text() == text + "\n"
    lines = {line["name"]: line for line in rows_in(recipe)}
    for name, line in lines.items():
        model = out / ("exports" if name in ("bert", "veps") else "compressed") / name
        assert line["bytes"] == (model / "model.safetensors").stat().st_size
        seeds = [json.loads((out / f"classifiers/{name}/sst2/seed-{s}.json").read_text()) for s in (1, 2)]
        values = [seed["notes"]["scores"]["dev accuracy"][0] for seed in seeds]
        assert line["scores"]["sst2"] == values
        assert line["score"] == mean(values)
        assert f" {100 * mean(values):.1f} ± {100 * stdev(values):.1f} |" in text
        assert line["of_reference"] == pytest.approx(mean(values) / mean(lines["bert"]["scores"]["sst2"]))
        assert line["state"] == ""
    assert lines["veps-int4"]["of_source"] == pytest.approx(lines["veps-int4"]["score"] / lines["veps"]["score"])
    assert lines["bert"]["of_source"] is None
    assert lines["veps-int4"]["bytes"] < lines["veps"]["bytes"]
    report = json.loads((out / "compressed" / "veps-int4" / "report.json").read_text())
    assert lines["veps-int4"]["loss"] == report["rows"][-1]["loss"]
    config = next(row for row in checked(recipe) if row.name == "bert").trial.recipe.resolve().model.config  # type: ignore[union-attr]
    tokens = 30 * 10 * 32
    assert lines["bert"]["tokens"] == tokens
    assert lines["bert"]["flops"] == pytest.approx(tokens * flops_per_token(config, 32, 0.15, 10 * 32))
    assert lines["veps-pruned"]["tokens"] == tokens
    with_own = json.loads((out / "exports" / "bert" / "config.json").read_text())
    assert with_own["sharing"] == "none"


def test_seeds_have_the_rate_that_the_first_one_chose(whole: tuple[CompareRecipe, str]) -> None:
    recipe, _ = whole
    places = [Path(recipe.folder) / f"classifiers/bert/sst2/seed-{seed}.json" for seed in (1, 2)]
    first, second = (json.loads(place.read_text()) for place in places)
    assert first["notes"]["lr"] in (1e-3, 3e-3)
    assert second["identity"]["evaluate"]["finetune"]["lr"] == [first["notes"]["lr"]]


def test_a_row_that_fails_leaves_the_others(
    recipe: CompareRecipe, trainings: Trainings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all = trainings.run_all
    monkeypatch.setattr(
        pretrain.sweep.runner,
        "run_all",
        lambda given, report: FAILED if given[0].row == "veps" else run_all(given, report),
    )
    recipe.tasks.clear()
    code, text = compare(recipe)
    assert code == FAILED
    said = capsys.readouterr().err
    assert "veps: the training in " in said
    assert "veps-int4: not made, because veps was not" in said
    assert "- veps: not run" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| veps-int4 |")]
    assert row.count("not run") == 9  # every number: there is no task and no latency here
    assert "- bert:" not in text


def test_a_stop_ends_the_comparison(recipe: CompareRecipe, trainings: Trainings) -> None:
    trainings.code = STOPPED
    code, text = compare(recipe)
    assert code == STOPPED
    assert trainings.begun == ["bert"]
    assert "- bert: not run" in text


def test_a_run_of_other_keys_is_refused(
    recipe: CompareRecipe, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.tasks, recipe.rows = {}, {"bert": recipe.rows["bert"]}
    assert compare(recipe)[0] == FINISHED
    recipe.rows["bert"].keys["optimizer.lr"] = 0.5
    assert compare(recipe)[0] == FAILED
    assert "was trained with other keys than the row has now; remove it" in capsys.readouterr().err


def test_a_run_that_was_begun_with_other_keys_is_not_resumed(
    recipe: CompareRecipe, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.tasks, recipe.rows = {}, {"bert": recipe.rows["bert"]}
    run = checked(recipe)[0].trial.run  # type: ignore[union-attr]
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(checked(recipe)[0].trial.recipe))  # type: ignore[union-attr]
    recipe.rows["bert"].keys["optimizer.lr"] = 0.5
    code, text = compare(recipe)
    assert code == FAILED
    assert trainings.begun == []
    assert "was trained with other keys than the row has now; remove it" in capsys.readouterr().err
    assert "- bert: was trained with other keys than the row has now" in text


def test_the_table_has_no_numbers_of_other_keys(whole: tuple[CompareRecipe, str], tmp_path: Path) -> None:
    recipe = dataclasses.replace(whole[0], folder=str(shutil.copytree(whole[0].folder, tmp_path / "copy")))
    scored, losses = dataclasses.replace(recipe, seeds=[1, 2]), dataclasses.replace(recipe, validation_rows=8)
    scored.finetune = dataclasses.replace(recipe.finetune, epochs=2)
    for other, cell in ((scored, "sst2"), (losses, "loss")):
        compare(other, only_table=True)
        for found in rows_in(other):
            assert found["state"]
            assert not found["scores"]
            assert (found["loss"] is None) == (cell == "loss")
    compare(recipe, only_table=True)
    assert all(not found["state"] and found["scores"] for found in rows_in(recipe))


@pytest.mark.parametrize("damage", ["no folder", "a short report"])
def test_a_damaged_model_is_made_again(
    whole: tuple[CompareRecipe, str], tmp_path: Path, damage: str, trainings: Trainings
) -> None:
    recipe = dataclasses.replace(whole[0], folder=str(shutil.copytree(whole[0].folder, tmp_path / "copy")))
    result = Path(recipe.folder) / "compressed" / "veps-int4"
    report = (result / "report.json").read_text()
    if damage == "no folder":
        shutil.rmtree(result)
    else:
        (result / "report.json").write_text(report[:-20])
    assert "- veps-int4:" in compare(recipe, only_table=True)[1]
    code, text = compare(recipe)
    assert code == FINISHED
    assert "- veps-int4:" not in text
    assert json.loads((result / "report.json").read_text())["rows"]


def test_what_learns_from_a_row_is_made_again_with_it(
    recipe: CompareRecipe, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    bert, base = recipe.rows["bert"], recipe.rows["veps"].train
    learns = {"distill.logits": 1.0}
    int4 = recipe.rows["veps-int4"].compress
    recipe.rows = {
        "bert": bert,
        "student": RowRecipe(train=base, teacher="bert", keys=learns),
        "taught": RowRecipe(train=base, task_teacher="bert", finetune={"distill.hidden": 1.0}),
        "small": RowRecipe(of="taught", compress=int4, teacher="bert"),
    }
    recipe.seeds = [1]
    small = Path(recipe.folder) / "compressed" / "small.json"
    assert compare(recipe)[0] == FINISHED
    notes = {
        name: json.loads((Path(recipe.folder) / f"classifiers/{name}/sst2/seed-1.json").read_text())["identity"]
        for name in recipe.rows
    }
    teacher = notes["taught"]["evaluate"]["finetune"]["distill"]["teacher"]
    assert teacher == "classifiers/bert/sst2/seed-1"
    assert (Path(recipe.folder) / teacher / "model.safetensors").is_file()
    assert notes["taught"]["teacher"]
    assert notes["bert"]["teacher"] is None
    of_small = json.loads(small.read_text())["identity"]["teacher"]
    assert of_small
    shutil.rmtree(Path(recipe.folder) / "runs" / "bert,seed=0")
    bert.keys["model.hidden_dropout_prob"] = 0.25
    code, _ = compare(recipe)
    assert code == FAILED  # a run that learnt from the other is not thrown away
    said = capsys.readouterr().err
    assert "student: " in said
    assert "learnt from a 'bert' that was made anew since; remove it to train it again" in said
    again = json.loads((Path(recipe.folder) / "classifiers/taught/sst2/seed-1.json").read_text())["identity"]
    assert again["teacher"] != notes["taught"]["teacher"]
    assert [row["name"] for row in rows_in(recipe) if row["scores"]] == ["bert", "taught", "small"]
    assert json.loads(small.read_text())["identity"]["teacher"] != of_small
    (Path(recipe.folder) / "runs" / "student,seed=0.teacher.json").write_text("")
    compare(recipe)
    assert "does not say which 'bert' it has; remove it to train it again" in capsys.readouterr().err


def test_more_seeds_keep_what_there_is(whole: tuple[CompareRecipe, str], tmp_path: Path) -> None:
    recipe = dataclasses.replace(whole[0], folder=str(shutil.copytree(whole[0].folder, tmp_path / "copy")))
    sst2 = recipe.tasks["sst2"]
    compare(dataclasses.replace(recipe, seeds=[1, 2, 3], tasks={"mine": sst2, "sst2": sst2}), only_table=True)
    assert {row["state"] for row in rows_in(recipe)} == {"mine 0 of 3 seeds, sst2 2 of 3 seeds"}


def test_a_classifier_that_no_row_needs_any_more_counts(whole: tuple[CompareRecipe, str], tmp_path: Path) -> None:
    """And one that was not kept is made again when a row needs it."""
    recipe = dataclasses.replace(whole[0], folder=str(shutil.copytree(whole[0].folder, tmp_path / "copy")))
    recipe.rows = {name: row for name, row in recipe.rows.items() if name == "veps"}
    compare(recipe, only_table=True)
    assert [row["state"] for row in rows_in(recipe)] == [""]
    kept = Path(recipe.folder) / "classifiers" / "veps" / "sst2" / "seed-1"
    record = kept.with_name("seed-1.json")
    shutil.rmtree(kept)
    record.write_text(json.dumps(json.loads(record.read_text()) | {"files": {}}))
    assert compare(recipe)[0] == FINISHED
    assert not kept.exists()
    again = dataclasses.replace(recipe, rows=whole[0].rows)
    assert compare(again)[0] == FINISHED
    assert (kept / "config.json").is_file()


def test_further_rows_are_made_once(
    recipe: CompareRecipe, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, copies_of = [], augment.copies_of
    monkeypatch.setattr(augment, "copies_of", lambda *given: made.append(1) or copies_of(*given))
    recipe.rows = {"bert": recipe.rows["bert"]}
    recipe.seeds, recipe.tasks = [1], {}
    assert compare(recipe)[0] == FINISHED
    model = str(Path(recipe.folder) / "exports" / "bert")
    data = TaskDataRecipe(path=str(Path(recipe.folder).parent / "SST-2"), augment=AugmentRecipe(model=model, copies=2))
    again = dataclasses.replace(recipe, seeds=[1, 2], tasks={"sst2": data})
    assert compare(again)[0] == FINISHED
    assert len(list((Path(recipe.folder) / "augmented" / "sst2").iterdir())) == 1
    assert len(made) == 1


def test_a_row_without_its_teachers_classifier_is_left_out(
    recipe: CompareRecipe, trainings: Trainings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taught = RowRecipe(train=recipe.rows["veps"].train, task_teacher="bert")
    recipe.rows = {"bert": recipe.rows["bert"], "taught": taught}

    def fails(*_: Any, **__: Any) -> str:
        raise BadInput("no room")

    monkeypatch.setattr(comparison.maker, "evaluate", fails)
    assert compare(recipe)[0] == FAILED
    assert "taught: not made, because bert has no classifier for sst2 with seed 1" in capsys.readouterr().err


def line(name: str, **values: Any) -> Line:
    return Line(name=name, made="x", source="veps", **values)


def test_the_best_rows_keep_97_percent_of_the_score() -> None:
    rows = [
        line("small", bytes=10, of_source=0.969, latency_ms={"onnxruntime": {"1x32": 1.0}}),
        line("middle", bytes=20, of_source=0.97, latency_ms={"onnxruntime": {"1x32": 3.0}}),
        line("large", bytes=30, of_source=1.0, latency_ms={"pytorch": {"1x32": 9.0}, "onnxruntime": {"1x32": 2.0}}),
        Line(name="veps", made="x", bytes=1, latency_ms={"pytorch": {"1x32": 0.1}}),
    ]
    assert best(rows) == [
        "Smallest file with 97% or more of its source's score: middle, 0.000 MB.",
        "Least time with 97% or more of its source's score: large, 2.0 ms (onnxruntime).",
    ]


def test_what_was_not_measured_here_is_marked(recipe: CompareRecipe, trainings: Trainings) -> None:
    text = compare(recipe, only_table=True)[1]
    assert trainings.begun == []
    measured, estimated = text.split("Estimated, not run")
    assert "4,982,272" not in measured
    assert "| small | 4,983,040 | 11,776,000,000 |" in estimated
    assert "Published by others, not measured here:\n\n| model | figure | source |" in estimated
    assert "| TinyBERT | 96.8 % | a paper |" in estimated


def test_times_are_taken_in_turns_when_all_rows_are_made(
    whole: tuple[CompareRecipe, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(whole[0], report=ReportRecipe(latency=["1x16"]))
    timed: list[str] = []

    def measure(folder: Path, runtime: str, *_: Any) -> dict[str, Any]:
        timed.append(folder.name)
        return {"ms": {"1x16": float([len(timed), 100, 3][(len(timed) - 1) // len(recipe.rows) % ROUNDS])}}

    def ms() -> list[float]:
        return [line["latency_ms"]["pytorch"]["1x16"] for line in rows_in(recipe)]

    monkeypatch.setattr(latency, "measure", measure)
    code, text = compare(recipe)
    assert code == FINISHED
    assert timed == ROUNDS * list(recipe.rows)
    assert ms() == [3, 3, 3, 4]  # the medians of 1, 100, 3; of 2, 100, 3; of 3, 100, 3; of 4, 100, 3
    assert "| 3.0 (pytorch) |" in text
    compare(recipe)
    assert len(timed) == ROUNDS * len(recipe.rows)  # they are there
    compare(recipe, time_again=True)
    assert len(timed) == 2 * ROUNDS * len(recipe.rows)
    other = dataclasses.replace(recipe, report=ReportRecipe(latency=["1x16"], threads=2))
    assert "(pytorch)" not in compare(other, only_table=True)[1]
    file = Path(recipe.folder) / "times.json"
    taken = json.loads(file.read_text())
    taken["rows"]["veps"]["digest"] = "of another model"
    file.write_text(json.dumps(taken))
    compare(recipe, only_table=True)
    assert [row["name"] for row in rows_in(recipe) if not row["latency_ms"]] == ["veps"]
    compare(recipe)
    assert len(timed) == 3 * ROUNDS * len(recipe.rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"of": "vepss", "compress": "compress/int8"}, r"rows\.x\.of: no row 'vepss' above this one; did you mean"),
        ({"of": "veps-int4", "compress": "compress/int8"}, r"rows\.x\.of: name a row without the steps trim, quantise"),
        ({"of": "veps", "compress": "compress/int9"}, r"rows\.x: compress/int9: no such recipe"),
        ({"of": "veps", "compress": "compress/smallest"}, r"rows\.x\.teacher: the step distil learns from a teacher"),
        ({"compress": "compress/int8"}, r"rows\.x\.of: goes together with compress"),
        ({"train": "demo", "compress": "compress/int8"}, r"rows\.x: give either train, or compress and of"),
        ({"train": "demo", "keys": {"stepz": 3}}, r"stepz: unknown key; did you mean 'steps'"),
        ({"train": "demo", "teacher": "nobody"}, r"rows\.x\.teacher: no row 'nobody' above"),
        ({"of": "veps", "compress": "compress/int8", "finetune": {"epochz": 1}}, r"rows\.x\.finetune: .*epochz"),
        ({"train": "BASE", "keys": {"distill.logits": 1.0}}, r"rows\.x: distill\.logits: .*teacher is not given"),
        ({"train": "BASE", "teacher": "bert"}, r"rows\.x: distill\.teacher: no loss with it has a weight"),
        (
            {"train": "BASE", "teacher": "bert", "keys": {"distill.hidden": 1.0, "distill.layers": [[1, 7]]}},
            r"rows\.x: distill\.layers: the teacher has layers .*, and no 7",
        ),
        (
            {"of": "veps", "compress": "compress/prune-distil", "teacher": "bert"},
            r"rows\.x: from the first of .* on, steps are for classifiers: distil: takes a model with a masked",
        ),
        (
            {
                "of": "veps",
                "compress": "compress/smallest",
                "teacher": "bert",
                "keys": {"steps": [{"distil": {"losses": {"mlm": 1.0}}}]},
            },
            r"rows\.x: distil\.losses: no loss with the teacher has a weight; give one of logits",
        ),
        (
            {
                "of": "veps",
                "compress": "compress/smallest",
                "teacher": "bert",
                "keys": {"steps": [{"distil": {"losses": {"hidden": 1.0, "layers": [[1, 7]]}}}]},
            },
            r"rows\.x: distill\.layers: the teacher has layers .*, and no 7",
        ),
        (
            {
                "of": "veps",
                "compress": "compress/onnx-int8",
                "keys": {"steps": ["onnx", {"onnx_int8": {"max_loss_increase": 0.5}}]},
            },
            r"rows\.x: .*steps are for classifiers: validation\.dataset: onnx_int8 looks at the loss",
        ),
        (
            {"of": "veps", "compress": "compress/pc-lora", "keys": {"steps": [{"pc_lora": {"rank": 999}}]}},
            r"rows\.x: pc_lora",
        ),
        (
            {"of": "veps", "compress": "compress/int8", "keys": {"report.repeats": 3}},
            r"keys: report\.repeats is the same",
        ),
        ({"train": "BASE", "keys": {"seed": 1}}, r"rows\.x\.keys: seed is set by the comparison for each training"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(
    recipe: CompareRecipe, dataset: Path, tmp_path: Path, trainings: Trainings, row: dict[str, Any], message: str
) -> None:
    content = json.loads((tmp_path / "table.yaml").read_text())
    base = {"train": str(tmp_path / "train.yaml")} if row.get("train") == "BASE" else {}
    content["rows"]["x"] = row | base
    (tmp_path / "wrong.yaml").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        compare(load(CompareRecipe, tmp_path / "wrong.yaml"))
    assert trainings.begun == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks": {"sst2": {"path": "nowhere"}}}, r"tasks\.sst2: data\.path: nowhere: no such file or folder"),
        ({"tasks": {"sst3": {"path": "nowhere"}}}, r"tasks\.sst3: "),
        ({"tasks": {"blimp": {"path": "nowhere"}}}, r"tasks\.blimp: takes models as they are"),
        ({"tasks": {"sst3": {}}}, r"tasks\.sst3: "),
        ({"tasks": {"sst2": {"path": "PATH", "augment": {"model": "nowhere"}}}}, r"nowhere: no model there"),
        ({"seeds": [1, 1]}, "seeds: one of them stands there twice"),
        ({"common": {"run": "elsewhere"}}, "common: run is set by the comparison"),
    ],
)
def test_wrong_tasks_are_said_before_anything_is_made(
    recipe: CompareRecipe, tmp_path: Path, trainings: Trainings, keys: dict[str, Any], message: str
) -> None:
    content = json.loads((tmp_path / "table.yaml").read_text())
    path = content["tasks"]["sst2"]["path"]
    (tmp_path / "wrong.yaml").write_text(json.dumps(content | keys).replace("PATH", path))
    with pytest.raises(BadInput, match=message):
        compare(load(CompareRecipe, tmp_path / "wrong.yaml"))
    assert trainings.begun == []
