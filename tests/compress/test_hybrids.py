"""The recipes that join several kinds of steps, and the step `distil`."""

from __future__ import annotations

import dataclasses
import json
import os
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
from safetensors.torch import load_file
from tiny_models import tiny_model

import compress.distil
import compress.prune.hidden_step
import pretrain.sweep.runner
from compress.distil import Distil
from compress.recipe import CompressRecipe
from compress.report import read_report
from compress.run import compress as run
from compress.source import open_source
from data_prep.shards.reader import open_dataset
from exports.export import Export
from exports.forms import write_export
from exports.read import load_model, read_config
from pretrain.sweep.runner import Stopped
from sharebert.packed import ROTATED
from sharebert_common.errors import FAILED, FINISHED, STOPPED, BadInput, CommandError
from sharebert_common.recipe import load
from sharebert_common.run_files import peek_state


def export_of(folder: Path, dataset: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny export for the words and rows of a dataset."""
    opened = open_dataset(dataset)
    sizes = {"vocab_size": opened.vocab_size, "max_position_embeddings": opened.seq_len, "num_attention_heads": 4}
    head = {"mlm_head": "tied", "attention_scale": "standard"}
    model = tiny_model(seed, "variance", **{**sizes, **head, **changes})
    write_export(Export.of_model(model, tokenizer=opened.tokenizer_path), folder)
    return folder


def shrunk(name: str, dataset: Path, teacher: Path | None, **keys: dict[str, Any]) -> CompressRecipe:
    """A recipe that ships, on few rows, with other keys for some of its steps, untimed."""
    given = [f"calibration.dataset={dataset}", "calibration.rows=32", f"validation.dataset={dataset}"]
    given += ["validation.rows=8", "report.latency=[]"] + ([] if teacher is None else [f"teacher={teacher}"])
    recipe = load(CompressRecipe, name, given)
    steps: list[Any] = []
    for step in recipe.steps:
        ((word, own),) = (step if isinstance(step, dict) else {step: {}}).items()
        steps.append({word: {**own, **keys.get(word, {})}})
    return dataclasses.replace(recipe, steps=steps)


def test_pc_lora_on_a_pruned_model(dataset: Path, tmp_path: Path) -> None:
    source = export_of(tmp_path / "source", dataset, sharing="layers")
    recipe = shrunk("compress/pruned-pc-lora", dataset, None, pc_lora={"rank": 4, "steps": 3, "batch": 8})
    run(source, recipe, tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert (config.num_hidden_layers, config.sharing, config.rank) == (1, "low_rank", 4)
    _, _, rows = read_report(tmp_path / "out")
    assert [row.name for row in rows] == ["source", "1 prune_structure", "2 pc_lora"]
    assert rows[2].notes["tokens"] == 3 * 8 * 32
    assert rows[2].parameters < rows[0].parameters  # type: ignore[operator]


def interrupted(*given: Any) -> None:
    raise KeyboardInterrupt


def test_half_of_everything(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the last step, it goes on, and the result is that of an undisturbed run, byte by byte."""
    source = export_of(tmp_path / "source", dataset)
    recipe = shrunk("compress/half", dataset, None)
    run(source, recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(compress.prune.hidden_step, "reconstruct", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(source, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(source, recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size")] == [12, 2, 20]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
    _, _, rows = read_report(tmp_path / "out")
    assert [row.name for row in rows] == ["source", "1 dense", "2 prune_hidden"]
    assert rows[2].notes["hidden"] == 12
    assert rows[2].loss is not None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sharing"), [("fastest", "veps"), ("smallest", "veps"), ("smallest", "eps")])
def test_a_distilled_hybrid(name: str, sharing: str, dataset: Path, tmp_path: Path) -> None:
    source = export_of(tmp_path / "source", dataset, sharing=sharing)
    teacher = export_of(tmp_path / "teacher", dataset, seed=1, sharing="none")
    recipe = shrunk(f"compress/{name}", dataset, teacher, distil={"steps": 20, "rows": 16, "lr": 3e-3})
    run(source, recipe, tmp_path / "out")
    _, _, rows = read_report(tmp_path / "out")
    assert rows[1].name == "1 distil"
    assert rows[1].loss < rows[0].loss  # type: ignore[operator]
    assert rows[1].notes["tokens"] == 20 * 16 * 32
    assert rows[-1].gzip_bytes < rows[-2].gzip_bytes  # type: ignore[operator]  # headers are most of so small a file
    assert open_source(tmp_path / "out").form == ("onnx" if name == "fastest" else "compact")


@pytest.mark.slow
def test_a_distillation_that_was_killed_resumes(dataset: Path, tmp_path: Path) -> None:
    """Its model is that of an undisturbed one, bit by bit."""
    source, teacher = export_of(tmp_path / "source", dataset), export_of(tmp_path / "teacher", dataset, seed=1)
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: [{distil: {steps: 400, rows: 8}}]\nreport: {latency: []}\n")
    command = [sys.executable, "-m", "sharebert_cli", "compress", str(source), str(file)]
    keys = [f"calibration={dataset}", f"teacher={teacher}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole"), *keys], env=environment, check=True, timeout=200)
    out = tmp_path / "out"
    first = subprocess.Popen([*command, str(out), *keys], env=environment, start_new_session=True)
    place = tmp_path / "out.steps" / "1-distil.work" / "runs" / "distil"
    while not list((place / "checkpoints").glob("step-*")):
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not out.exists()
    again, first_step = subprocess.Popen([*command, str(out), *keys], env=environment), 0
    while again.poll() is None:
        first_step = peek_state(place).get("resumed_from") or first_step
        time.sleep(0.02)
    assert again.returncode == 0
    assert first_step >= 20
    resumed, undisturbed = load_file(out / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert resumed.keys() == undisturbed.keys()
    assert all(resumed[name].equal(undisturbed[name]) for name in resumed)


def tools(scratch: Path, dataset: Path, teacher: Path) -> Any:
    return SimpleNamespace(
        calibration_dataset=lambda: dataset, teacher=lambda: teacher, scratch=scratch, seed=3, say=lambda line: None
    )


@pytest.mark.parametrize(("code", "error", "exit_code"), [(STOPPED, Stopped, STOPPED), (FAILED, CommandError, FAILED)])
def test_a_training_that_does_not_finish_leaves_no_model(
    code: int, error: type[CommandError], exit_code: int, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, teacher = export_of(tmp_path / "source", dataset), export_of(tmp_path / "teacher", dataset, seed=1)
    asked = []
    monkeypatch.setattr(pretrain.sweep.runner, "run_all", lambda trials, say: asked.extend(trials) or code)
    with pytest.raises(error) as raised:
        Distil().apply(open_source(source), tools(tmp_path / "work", dataset, teacher), tmp_path / "out")
    assert raised.value.exit_code == exit_code
    assert not (tmp_path / "out").exists()
    (trial,) = asked
    assert trial.recipe.distill.teacher == str(teacher)
    assert trial.recipe.model.init_from == str(source)
    assert trial.recipe.seed == 3
    assert trial.recipe.distill.logits == 1.0


@pytest.mark.parametrize(
    ("steps", "keys", "message"),
    [
        ("[distil]", [], "teacher: distil learns from a teacher; name its folder"),
        ("[{distil: {losses: {logit: 1}}}]", ["teacher=SOURCE"], r"distil\.losses: logit: unknown key; did you mean"),
        ("[distil]", ["teacher=nowhere"], "nowhere: no such folder"),
        ("[onnx, distil]", ["teacher=SOURCE"], "distil: takes a compact export, this one is onnx"),
    ],
)
def test_what_is_wrong_is_one_line(steps: str, keys: list[str], message: str, dataset: Path, tmp_path: Path) -> None:
    source = export_of(tmp_path / "source", dataset)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"steps: {steps}\n")
    given = [key.replace("SOURCE", str(source)) for key in keys]
    with pytest.raises(BadInput, match=message):
        run(source, load(CompressRecipe, file, [f"calibration={dataset}", *given]), tmp_path / "out")
    assert not (tmp_path / "out.steps").exists()


def test_a_classifier_cannot_be_distilled(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="none")
    with pytest.raises(BadInput, match="distil: takes a model with a masked-language-model head"):
        Distil().check(open_source(source))


@pytest.mark.slow
def test_what_was_removed_stays_so(dataset: Path, tmp_path: Path) -> None:
    """Zeros of W_all and the means that fill columns of E, in a training whose decay moves the means."""
    source = export_of(tmp_path / "source", dataset)
    file = tmp_path / "recipe.yaml"
    prune = "prune_weights: {method: magnitude, scope: matrix, sparsity: 0.7, centre: true}"
    file.write_text(f"steps: [{{{prune}}}, {{distil: {{steps: 20, rows: 16, lr: 3e-3}}}}]\n")
    keys = [f"calibration={dataset}", f"teacher={source}", "report.latency=[]", "keep_steps=true"]
    run(source, load(CompressRecipe, file, keys), tmp_path / "out")
    before, after = tmp_path / "out.steps" / "1-prune_weights", tmp_path / "out"
    files = [load_file(folder / "model.safetensors") for folder in (before, after)]
    for name in ROTATED:
        masks, values = ([stored[f"{name}.{part}"] for stored in files] for part in ("mask", "values"))
        assert masks[0].equal(masks[1])
        assert not values[0].equal(values[1])
    means = [stored[f"{ROTATED[0]}.fill"] for stored in files]
    torch.testing.assert_close(means[1], means[0], rtol=1e-2, atol=0)
    assert not means[1].equal(means[0])
    sizes = [sum(tensor.nbytes for tensor in stored.values()) for stored in files]
    assert sizes[0] == sizes[1]


def test_another_teacher_is_another_result(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is left out: it hands back the model that it started from."""
    source, teacher = export_of(tmp_path / "source", dataset), export_of(tmp_path / "teacher", dataset, seed=1)
    asked = []
    monkeypatch.setattr(pretrain.sweep.runner, "run_all", lambda trials, say: asked.extend(trials) or FINISHED)
    monkeypatch.setattr(
        compress.distil, "consolidate", lambda run, out: write_export(Export.of_model(load_model(source)), out)
    )
    keys = [f"calibration={dataset}", f"teacher={teacher}", "report.latency=[]", "keep_steps=true"]
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: [distil]\n")
    for _ in range(2):
        run(source, load(CompressRecipe, file, keys), tmp_path / "out")
    assert len(asked) == 1
    export_of(teacher, dataset, seed=2, sharing="none")
    run(source, load(CompressRecipe, file, keys), tmp_path / "out")
    assert len(asked) == 2
