"""A classifier is scored as it is, in every form, and the report's scores are computed again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

import compress.run
from compress.recipe import CompressRecipe
from compress.report import check, read_report
from compress.run import compress as run
from exports.export import Export
from exports.forms import write_export
from exports.kinds import Classifier
from exports.weight_source import TensorWeights
from sharebert.hub import ShareBertForSequenceClassification
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier with random weights, and rows that are labelled with what it says, every tenth one wrongly."""
    folder = tmp_path_factory.mktemp("classifier")
    model = tiny_model(mlm_head="none")
    generator = torch.Generator().manual_seed(0)
    head = {"classifier.weight": torch.randn(2, 24, generator=generator), "classifier.bias": torch.zeros(2)}
    kind = Classifier(("negative", "positive"), "single_label_classification", "mean")
    export = Export(model.config, kind, TensorWeights(model.state_dict() | head), tokenizer=tiny_tokenizer(folder))
    write_export(export, folder / "export")
    words = torch.randint(0, 240, (60, 6), generator=generator).tolist()
    texts = [" ".join(f"w{word}" for word in row) for row in words]
    hub = ShareBertForSequenceClassification.from_pretrained(folder / "export").eval()
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(folder / "export", trust_remote_code=True)(texts, return_tensors="pt")
    said = hub(**batch).logits.argmax(1).tolist()
    labels = [1 - label if number % 10 == 0 else label for number, label in enumerate(said)]
    task = folder / "task"
    task.mkdir()
    for split, rows in (("train", slice(0, 20)), ("dev", slice(20, 60))):
        lines = [f"{text}\t{label}" for text, label in zip(texts[rows], labels[rows], strict=True)]
        (task / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return folder / "export", task


def recipe_of(tmp_path: Path, task: Path, steps: str) -> CompressRecipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"steps: {steps}\ntask: {{task: sst2, data: {task}}}\nreport: {{latency: []}}\n")
    return load(CompressRecipe, file)


def test_every_form_has_the_score_of_its_predictions(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, task = made
    steps = "[trim, {quantise: {bits: 8, vectors: 8}}, onnx, onnx_int8]"
    text = run(source, recipe_of(tmp_path, task, steps), tmp_path / "out")
    _, _, rows = read_report(tmp_path / "out")
    scores = [row.scores["dev accuracy"] for row in rows]
    assert scores[0] == scores[1] == [0.9]
    assert all(score[0] >= 0.8 for score in scores[2:])
    assert "90.0 ± 0.0" in text
    assert "4 onnx_int8: parameters" in check(tmp_path / "out")


def test_a_wrong_score_in_a_report_is_found(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, task = made
    run(source, recipe_of(tmp_path, task, "[trim]"), tmp_path / "out")
    report: dict[str, Any] = json.loads((tmp_path / "out" / "report.json").read_text())
    report["rows"][1]["scores"]["dev accuracy"] = [0.999]
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    with pytest.raises(BadInput, match="1 trim: its scores are"):
        check(tmp_path / "out")


def test_a_row_is_kept_for_the_same_task_version_and_files_alone(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the task lies. `check` agrees with what is kept."""
    source, task = made
    place, out = tmp_path / "task", tmp_path / "out"
    shutil.copytree(task, place)
    measured: list[str] = []
    measure = compress.run.measure
    monkeypatch.setattr(compress.run, "measure", lambda name, *rest: measured.append(name) or measure(name, *rest))

    def again(place: Path) -> list[str]:
        measured.clear()
        recipe = recipe_of(tmp_path, place, "[trim]")
        recipe.keep_steps = True
        run(source, recipe, out)
        assert "1 trim: parameters" in check(out)
        return list(measured)

    assert again(place) == ["source", "1 trim"]
    moved = place.rename(tmp_path / "moved")
    assert again(moved) == []
    lines = (moved / "dev.tsv").read_text().splitlines()
    flipped = [f"{line[:-1]}{1 - int(line[-1])}" for line in lines[1:]]
    (moved / "dev.tsv").write_text("\n".join([lines[0], *flipped]) + "\n")
    assert again(moved) == ["source", "1 trim"]
    assert [row.scores["dev accuracy"] for row in read_report(out)[2]] == [[pytest.approx(0.1)]] * 2
    monkeypatch.setattr(compress.run, "version", lambda _: "9.9")
    assert again(moved) == ["source", "1 trim"]


def test_other_labels_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, task = made
    file = tmp_path / "recipe.yaml"
    rows = f"{{path: {task}, text: sentence, label: label, labels: ['1', '0']}}"
    file.write_text(f"steps: [trim]\ntask: {{task: mine, data: {rows}}}\nreport: {{latency: []}}\n")
    with pytest.raises(BadInput, match="its labels are negative, positive; those of mine are 1, 0"):
        run(source, load(CompressRecipe, file), tmp_path / "out")
