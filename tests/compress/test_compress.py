"""`sharebert compress`: it resumes after a kill, OUT is whole or absent, and the report can be checked."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress_models import tiny_export
from hub_folders import hub_folder
from tiny_models import tiny_model

import compress.run
from compress.measure import sizes
from compress.recipe import CompressRecipe
from compress.report import check, model_files, read_report, table
from compress.run import compress as run
from compress.step_folders import StepFolder, checksums
from compress.steps import step_of
from compress.trim import Trim
from data_prep.shards.reader import open_dataset
from exports.export import Export
from exports.forms import write_export
from exports.read import load_model, read_config
from pretrain.objective import MaskedLanguageModelling
from pretrain.validate import ValidateRecipe, validate
from sharebert import ShareBertConfig
from sharebert_cli import main
from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256
from sharebert_common.recipe import load

QUICK = ["report.latency=[]"]


def recipe_of(tmp_path: Path, text: str, *overrides: str) -> CompressRecipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return load(CompressRecipe, file, [*QUICK, *overrides])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_export(tmp_path / "source")


def test_steps_one_after_the_other(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = run(source, recipe_of(tmp_path, "steps: [trim, {quantise: {bits: 8}}]"), out)
    _, _, rows = read_report(out)
    assert [row.name for row in rows] == ["source", "1 trim", "2 quantise"]
    parameters, sizes = [row.parameters for row in rows], [row.bytes for row in rows]
    assert parameters[0] > parameters[1] == parameters[2]
    assert sizes[0] > sizes[1] > 2 * sizes[2]
    assert rows[2].bytes == (out / "model.safetensors").stat().st_size
    assert table(rows) == text
    assert text in (out / "REPORT.md").read_text()
    assert not (tmp_path / "out.steps").exists()
    assert "2 quantise: parameters, nonzeros, bytes, gzip_bytes are right" in check(out)


def test_a_wrong_number_in_a_report_is_found(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, recipe_of(tmp_path, "steps: [trim]"), out)
    report = json.loads((out / "report.json").read_text())
    report["rows"][1]["nonzeros"] += 1
    (out / "report.json").write_text(json.dumps(report))
    with pytest.raises(BadInput, match="1 trim: nonzeros is"):
        check(out)
    (out / "config.json").write_text((out / "config.json").read_text() + "\n")
    with pytest.raises(BadInput, match="are not those of the report"):
        check(out)


def test_curves_are_those_of_the_report(source: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    run(source, recipe_of(tmp_path, "steps: [trim]"), out)
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    _, _, rows = read_report(out)
    assert [(e.step, e.value) for e in board.Scalars("compress/bytes")] == [
        (n, row.bytes) for n, row in enumerate(rows)
    ]


def test_a_command_may_go_on_by_another_path(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were measured before say where their models are now, so that `--check` finds them."""
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(tmp_path, "steps: [trim]")
    with monkeypatch.context() as patch:
        patch.setattr(compress.run, "write_report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(Path("source"), recipe, Path("out"))
    with monkeypatch.context() as patch:
        patch.setattr(compress.run, "measure", lambda *_: pytest.fail("the rows are there"))
        run(source, recipe, tmp_path / "out")
    assert check(tmp_path / "out").count("are right") == 2


def test_weights_are_counted_once(tmp_path: Path) -> None:
    """A second copy in another format is not read, and no part of the size."""
    folder = hub_folder(tmp_path / "hub", "MaskedLM")
    size = (folder / "model.safetensors").stat().st_size
    for name in ("pytorch_model.bin", "training_args.bin", "model.fp16.safetensors"):
        (folder / name).write_bytes(b"x" * 1000)
    assert sizes(folder)[0] == size
    (folder / "model.onnx").write_bytes(b"x" * 10)
    (folder / "model.onnx.data").write_bytes(b"x" * 100)
    assert sizes(folder)[0] == 110


def test_a_killed_command_goes_on_after_the_last_whole_step(source: Path, tmp_path: Path) -> None:
    """The second step stands still; the process is killed there; the next call does not run the first step again."""
    out = tmp_path / "out"
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: [trim, {quantise: {bits: 8}}]\nreport: {latency: []}\nkeep_steps: true\n")
    slow = (
        "import sys, time; from compress.quantise.step import Quantise; from sharebert_cli import main\n"
        "Quantise.apply = lambda *_: (print('in step 2', flush=True), time.sleep(60))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, "compress", str(source), str(file), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    assert process.stdout.readline() == "in step 2\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    first = tmp_path / "out.steps" / "1-trim" / "model.safetensors"
    written = first.stat().st_mtime_ns
    time.sleep(0.01)
    assert main(["compress", str(source), str(file), str(out)]) == 0
    assert first.stat().st_mtime_ns == written
    assert (out / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_command_that_was_killed_in_a_long_step_goes_on_inside_it(dataset: Path, tmp_path: Path) -> None:
    """The surgeon's recomputations that were done are not done again, and the model is that of an undisturbed run."""
    own, file = own_export(tmp_path / "own", dataset), tmp_path / "recipe.yaml"
    file.write_text(
        "steps: [{prune_weights: {method: surgeon, recomputations: 6, gradients: 64}}]\nreport: {latency: []}\n"
    )

    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sharebert_cli", "compress", str(own), str(file), str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, f"calibration={dataset}"], stderr=subprocess.PIPE, text=True, env=environment
        )

    def recomputations(process: subprocess.Popen[str], last: int) -> list[int]:
        """The numbers that it prints, until `last`."""
        assert process.stderr is not None
        found: list[int] = []
        for line in process.stderr:
            if match := re.search(r"removed after recomputation (\d) of 6", line):
                found.append(int(match[1]))
                if found[-1] == last:
                    break
        return found

    def finished(process: subprocess.Popen[str]) -> None:
        process.communicate(timeout=100)
        assert process.returncode == 0

    whole, out = tmp_path / "undisturbed" / "out", tmp_path / "killed" / "out"
    undisturbed = start(whole)
    assert recomputations(undisturbed, 6) == [1, 2, 3, 4, 5, 6]
    finished(undisturbed)
    first = start(out)
    assert recomputations(first, 2) == [1, 2]
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert not out.exists()
    again = start(out)
    done = recomputations(again, 6)
    assert done == list(range(done[0], 7))
    assert done[0] >= 3
    finished(again)
    files = [model_files(checksums(folder)) for folder in (whole, out)]
    assert files[0] == files[1]


@pytest.mark.parametrize("damage", ["cut", "removed", "record", "other source", "other keys"])
def test_a_step_that_does_not_verify_is_run_again(
    source: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, steps = tmp_path / "out", tmp_path / "out.steps"
    text = "steps: [{quantise: {bits: 4}}]\nkeep_steps: true"
    run(source, recipe_of(tmp_path, text), out)
    expected = (out / "model.safetensors").read_bytes()
    model, record = steps / "1-quantise" / "model.safetensors", steps / "1-quantise.json"
    if damage == "cut":
        model.write_bytes(model.read_bytes()[:-7])
    elif damage == "removed":
        model.unlink()
    elif damage == "record":
        record.write_text(record.read_text()[:40])
    elif damage == "other source":
        shutil.rmtree(source)
        tiny_export(source, seed=1)
    else:
        text = text.replace("4", "5")
    capsys.readouterr()
    run(source, recipe_of(tmp_path, text), out)
    assert "the step is run again" in capsys.readouterr().err
    assert ((out / "model.safetensors").read_bytes() == expected) == (damage in ("cut", "removed", "record"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [trimm]", r"steps\.0: no step 'trimm'; did you mean 'trim'\?"),
        ("steps: [{quantise: {bit: 4}}]", r"steps\.0\.quantise: bit: unknown key; did you mean 'bits'\?"),
        ("steps: [{quantise: {bits: 1}}]", r"quantise: bits: .*greater than or equal to 2"),
        ("steps: [{quantise: {bits: 9}}]", r"quantise: bits: .*less than or equal to 8"),
        ("steps: [{trim: {}, quantise: {}}]", r"steps\.0: a step is a name, or one name with its keys"),
        ("steps: []", "steps: "),
        ("steps: [{quantise: {frequent: 5}}]", r"calibration\.dataset: quantise looks at rows of text"),
        ("steps: [trim]\nreport: {latency: [16]}", "latency"),
        ("steps: [onnx, {onnx_int8: {max_loss_increase: 0.01}}]", r"validation\.dataset: onnx_int8 looks at the loss"),
        ("steps: [trim]\nreport: {references: ['random:somewhere']}", "random:somewhere needs a task"),
    ],
)
def test_bad_recipes_are_one_line(source: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run(source, recipe_of(tmp_path, text) if "latency" not in text else _load(tmp_path, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _load(tmp_path: Path, text: str) -> CompressRecipe:
    (tmp_path / "r.yaml").write_text(text)
    return load(CompressRecipe, tmp_path / "r.yaml")


def test_calibration_rows_of_another_tokenizer(source: Path, dataset: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "steps: [trim]", f"calibration={dataset}")
    with pytest.raises(BadInput, match=r"calibration\.dataset: .* was made with another tokenizer"):
        run(source, recipe, tmp_path / "out")


def test_too_little_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(compress.run.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BadInput, match="its disk has 0 MB left, and this may need"):
        run(source, recipe_of(tmp_path, "steps: [trim]"), tmp_path / "out")


def test_other_folders_are_never_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("x")
    with pytest.raises(BadInput, match=r"exists and is no result of `compress`"):
        run(source, recipe_of(tmp_path, "steps: [trim]"), out)
    with pytest.raises(BadInput, match="is the source"):
        run(source, recipe_of(tmp_path, "steps: [trim]"), source)


@pytest.mark.parametrize("theirs", ["a thesis", "a result with a file more", "a result that was trained on"])
def test_a_report_alone_makes_no_result(source: Path, tmp_path: Path, theirs: str) -> None:
    """Only what `compress` wrote is replaced, file by file."""
    out, recipe = tmp_path / "out", recipe_of(tmp_path, "steps: [trim]")
    if theirs == "a thesis":
        out.mkdir()
        (out / "report.json").write_text('{"chapters": 7}')
        message = "exists and is no result of `compress`"
    else:
        run(source, recipe, out)
        run(source, recipe, out)
        changed = out / ("notes.txt" if "file more" in theirs else "model.safetensors")
        changed.write_bytes(b"mine")
        message = "its files are not those that `compress` wrote"
    before = model_files(checksums(out))
    with pytest.raises(BadInput, match=message):
        run(source, recipe, out)
    assert model_files(checksums(out)) == before


def test_a_folder_that_no_step_made_is_in_the_way(tmp_path: Path) -> None:
    place = StepFolder(tmp_path, "1-trim")
    place.model.mkdir()
    (place.model / "thesis.tex").write_text("x")
    with pytest.raises(BadInput, match="exists and was not made here; move it away"):
        place.result({"of": 1}, print)
    assert (place.model / "thesis.tex").is_file()
    (place.model / "thesis.tex").unlink()
    place.open({"of": 1})
    assert place.result({"of": 1}, print) is None, "the process died while it made the model"
    assert not place.model.exists()


def test_a_removal_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = StepFolder(tmp_path, "1-trim")
    place.open({"of": 1})
    place.model.mkdir()
    place.finish({"of": 1}, {})

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            place.remove()
    assert place.model.exists()
    assert place.result({"of": 2}, print) is None
    assert not place.model.exists()


def test_a_folder_of_another_model(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadInput, match="trim: takes a compact export, this one is hub"):
        run(folder, recipe_of(tmp_path, "steps: [trim]"), tmp_path / "out")


def test_help_lists_the_steps_with_their_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    said = capsys.readouterr().out
    assert "trim: Leave out parameters that change no output" in said
    assert "bits: Bits of a number of E" in said


def test_loss_and_latency(source: Path, dataset: Path, tmp_path: Path) -> None:
    """With a dataset of its own tokenizer; the loss is that of the trainer's validation."""
    model = tiny_model(vocab_size=301, max_position_embeddings=32)
    own = tmp_path / "own"
    write_export(Export.of_model(model, tokenizer=dataset / "tokenizer.json"), own)
    recipe = recipe_of(tmp_path, "steps: [trim]", f"validation={dataset}", "report.latency=[1x8]", "report.repeats=1")
    run(own, recipe, tmp_path / "out")
    _, _, (before, after) = read_report(tmp_path / "out")
    assert before.loss == pytest.approx(after.loss, rel=1e-6)
    assert before.latency_ms["pytorch"]["1x8"] > 0
    assert before.peak_bytes["pytorch"] > 1e7
    score = validate(
        MaskedLanguageModelling(torch.device("cpu")),
        load_model(own),
        [open_dataset(dataset)],
        ValidateRecipe(rows=1024),
        mask_rate=0.15,
        whole_word=False,
    )
    assert before.loss == score.loss


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            "[{lower_factor: {size: 4}}, {lower_factor: {size: 6}}]",
            "lower_factor.size: 6 is not below .* factor_size, 4",
        ),
        (
            "[{low_rank: {rank: 4}}, {low_rank: {rank: 2}}]",
            "low_rank: takes a model whose layers share .* has low_rank",
        ),
        ("[{pc_lora: {rank: 4}}, {prune_weights: {}}]", "prune_weights.method: wanda takes a model with sharing: veps"),
        ("[{prune_structure: {heads: 2}}, dense]", "2 of 3 heads are left"),
        ("[{prune_structure: {columns: 30}}, {prune_structure: {columns: 31}}]", "31 are to stay, .* has 30"),
        ("[{prune_structure: {layers: 1}}, trim, {prune_structure: {layers: 2}}]", "2 are to stay, .* has 1"),
        ("[{prune_to_latency: {latency: 0.5}}, {prune_structure: {heads: 4}}]", "4 are to stay, .* has 3"),
        ("[dense, {prune_hidden: {hidden: 16}}, {prune_hidden: {hidden: 24}}]", "24 are to stay, .* has 16"),
        ("[{prune_structure: {columns: 20}}, dense, {prune_hidden: {columns: 21}}]", "21 are to stay, .* has 20"),
        ("[dense, {awq: {group: 32}}]", "awq.group: 32 does not divide hidden_size, which is 24"),
        ("[trim, {onnx: {opset: 99}}]", "opset: 99 is not one of"),
        ("[onnx, onnx_int8, {onnx_int8: {mode: static}}]", "steps: onnx_int8 stands there twice"),
        (
            "[{low_rank: {rank: 4, calibrated: false}}, {quantise: {rotate: true}}]",
            "quantise.rotate: needs W_all .* sharing: low_rank has none",
        ),
        (
            "[dense, {prune_hidden: {method: magnitude, components: fisher}}]",
            "prune_hidden.components: fisher is for method: sp3",
        ),
    ],
)
def test_a_later_step_is_refused_before_the_first_one_runs(
    source: Path, tmp_path: Path, dataset: Path, steps: str, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        run(source, recipe_of(tmp_path, f"steps: {steps}", f"calibration={dataset}"), tmp_path / "out")
    assert not (tmp_path / "out.steps").exists()


def test_the_result_has_the_config_that_was_foreseen(dataset: Path, tmp_path: Path) -> None:
    """What later steps are checked on; which heads and columns stay is chosen in the step."""
    own = own_export(tmp_path / "own", dataset)
    text = """steps: [{prune_structure: {columns: 20}}, {lower_factor: {size: 4, gauge: product}}, dense,
        {prune_hidden: {heads: 2}}]"""
    recipe = recipe_of(tmp_path, f"{text}\nkeep_steps: true", f"calibration={dataset}", "calibration.rows=8")
    run(own, recipe, tmp_path / "out")
    config: ShareBertConfig | None = read_config(own)
    for number, given in enumerate(recipe.steps, 1):
        name, step = step_of(given, "steps")
        assert config is not None
        config = step.result_config(config)
        assert config is not None
        written = json.loads((tmp_path / "out.steps" / f"{number}-{name}" / "config.json").read_text())
        foreseen = config.to_dict()
        for key in (foreseen.keys() & written.keys()) - {"model_type", "kept_columns"}:
            assert foreseen[key] == written[key], (name, key)
        assert len(foreseen.get("kept_columns", ())) == len(written.get("kept_columns", ()))
    assert (config.hidden_size, config.intermediate_size) == (16, 20)


def test_what_others_left_and_the_source_itself_are_never_touched(source: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "steps: [trim]")
    foreign = tmp_path / "mine.steps"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("x")
    with pytest.raises(BadInput, match="holds something else than results of steps"):
        run(source, recipe, tmp_path / "mine")
    assert (foreign / "notes.txt").read_text() == "x"
    run(source, recipe_of(tmp_path, "steps: [trim]\nkeep_steps: true"), tmp_path / "kept")
    inside = tmp_path / "kept.steps" / "1-trim"
    with pytest.raises(BadInput, match="would hold the source or lie in it"):
        run(inside, recipe, tmp_path / "kept")
    assert (inside / "model.safetensors").is_file()
    with pytest.raises(BadInput, match="would hold the source or lie in it"):
        run(source, recipe, source / "out")


def own_export(folder: Path, dataset: Path) -> Path:
    """A tiny model with the tokenizer of a dataset."""
    model = tiny_model(vocab_size=301, max_position_embeddings=32)
    write_export(Export.of_model(model, tokenizer=dataset / "tokenizer.json"), folder)
    return folder


def test_datasets_are_told_apart_by_their_content(dataset: Path, tmp_path: Path) -> None:
    """A step that looks at the loss runs again for other validation rows under the same path; a moved dataset is the
    same one, and steps that do not look at rows do not care."""
    own, place = own_export(tmp_path / "own", dataset), tmp_path / "data"
    shutil.copytree(dataset, place)
    recipe = recipe_of(tmp_path, "steps: [trim]\nkeep_steps: true", f"validation={place}")
    ran: list[str] = []

    class Looks(Trim):
        needs_validation = True

        def apply(self, *given: Any) -> dict[str, Any]:
            ran.append("step")
            return super().apply(*given)

    def once(recipe: CompressRecipe) -> int:
        ran.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compress.run, "all_steps", lambda _: [("trim", Looks())])
            run(own, recipe, tmp_path / "out")
        return len(ran)

    assert (once(recipe), once(recipe)) == (1, 0)
    moved = tmp_path / "moved"
    place.rename(moved)
    assert once(recipe_of(tmp_path, "steps: [trim]\nkeep_steps: true", f"validation={moved}")) == 0
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["fingerprint"] = "another"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress.run, "open_dataset", lambda _: SimpleNamespace(manifest=manifest))
        assert once(recipe_of(tmp_path, "steps: [trim]\nkeep_steps: true", f"validation={moved}")) == 1


def test_a_folder_is_hashed_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.step_folders

    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(str(path))
        return file_sha256(path)

    monkeypatch.setattr(compress.step_folders, "file_sha256", counted)
    run(source, recipe_of(tmp_path, "steps: [trim, quantise]"), tmp_path / "out")
    weights = [path for path in hashed if path.endswith("model.safetensors")]
    assert len(weights) == len(set(weights)) == 3


@pytest.mark.parametrize("missing", ["REPORT.md", "report.json", "row"])
def test_a_report_that_is_not_whole_is_one_line(source: Path, tmp_path: Path, missing: str) -> None:
    out = tmp_path / "out"
    run(source, recipe_of(tmp_path, "steps: [trim]"), out)
    if missing == "row":
        report = json.loads((out / "report.json").read_text())
        del report["rows"][1]
        (out / "report.json").write_text(json.dumps(report))
    else:
        (out / missing).unlink()
    wanted = {"REPORT.md": r"REPORT\.md: missing", "report.json": r"report\.json: missing", "row": "no row of a step"}
    with pytest.raises(BadInput, match=wanted[missing]):
        check(out)


def test_a_random_model_as_reference(source: Path, tmp_path: Path) -> None:
    """A model of the source's shape with new weights has a row with a score."""
    data = tmp_path / "task"
    data.mkdir()
    for split in ("train", "dev"):
        (data / f"{split}.tsv").write_text("text\tlabel\n" + "w17 w18\tgood\nw19 w20\tbad\n" * 4)
    task = {
        "task": "mine",
        "data": {"path": str(data), "text": "text", "label": "label"},
        "finetune": {"epochs": 1, "max_length": 8},
        "seeds": [1],
    }
    recipe = recipe_of(
        tmp_path,
        f"steps: [{{trim: {{keep_pooler: true}}}}]\ntask: {json.dumps(task)}\n"
        f"report: {{references: ['random:{source}']}}",
    )
    run(source, recipe, tmp_path / "out")
    _, _, rows = read_report(tmp_path / "out")
    assert rows[-1].name == f"random:{source}"
    assert rows[-1].headline is not None
    assert rows[-1].parameters
    assert f"random:{source}: not checked" in check(tmp_path / "out")
