"""A dataset whose rows are no rows for a model is refused in one line, before the first step, whatever its form."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from compress_models import tiny_export
from hub_folders import hub_folder
from tiny_models import tiny_model

from compress.recipe import CompressRecipe, ReportRecipe, RowsRecipe
from compress.report import check, read_report
from compress.run import compress
from compress.source import positions_of
from compress.tools import UnfitRows, open_rows
from exports.dense import Dense
from exports.export import Export
from exports.forms import write_export
from sharebert_common.errors import BadInput

STEPS = {
    "compact": ["trim", {"prune_to_latency": {"latency": 0.5, "timed": "1x8"}}],
    "dense": ["onnx", {"onnx_int8": {"mode": "static"}}],
    "hub": [{"prune_weights": {"method": "wanda"}}],
}


def model(folder: Path, form: str, dataset: Path, positions: int) -> Path:
    """A masked language model with the tokenizer of a dataset."""
    if form == "hub":
        hub_folder(folder, "MaskedLM", max_position_embeddings=positions)
        shutil.copy(dataset / "tokenizer.json", folder)
        return folder
    made = tiny_model(vocab_size=304, max_position_embeddings=positions, mlm_head="tied")
    export = Export.of_model(made, tokenizer=dataset / "tokenizer.json")
    write_export(export, folder, Dense() if form == "dense" else None)
    return folder


@pytest.mark.parametrize("key", ["calibration", "validation"])
@pytest.mark.parametrize("form", STEPS)
def test_rows_longer_than_the_positions(dataset: Path, tmp_path: Path, form: str, key: str) -> None:
    source = model(tmp_path / "source", form, dataset, 16)
    recipe = CompressRecipe(steps=STEPS[form], calibration=RowsRecipe(dataset=str(dataset)))
    setattr(recipe, key, RowsRecipe(dataset=str(dataset)))
    with pytest.raises(BadInput, match=r"\.dataset: .* has rows of 32 tokens, and .*source has 16 positions; name a"):
        compress(source, recipe, tmp_path / "out")
    assert not (tmp_path / "out.steps").exists()
    rows = RowsRecipe(dataset=str(dataset))
    with pytest.raises(UnfitRows, match=rf"^{key}\.dataset: .*has 16 positions"):
        open_rows(key, rows, source)
    assert open_rows(key, rows, model(tmp_path / "fits", form, dataset, 32)).seq_len == 32


def test_the_positions_of_an_onnx_folder_are_those_of_its_config(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", "")
    (folder / "model.safetensors").unlink()
    (folder / "model.onnx").write_bytes(b"")
    assert positions_of(folder) == 32


def test_a_reference_that_the_rows_do_not_fit_has_no_loss(dataset: Path, tmp_path: Path) -> None:
    """And a note that says why; all other numbers are there."""
    source = model(tmp_path / "source", "compact", dataset, 32)
    others = [hub_folder(tmp_path / "words", "MaskedLM"), model(tmp_path / "short", "hub", dataset, 16)]
    recipe = CompressRecipe(
        steps=["trim"],
        validation=RowsRecipe(dataset=str(dataset), rows=8),
        report=ReportRecipe(latency=[], references=[str(other) for other in others]),
    )
    compress(source, recipe, tmp_path / "out")
    _, _, rows = read_report(tmp_path / "out")
    assert [row.loss is None for row in rows] == [False, False, True, True]
    assert "was made with another tokenizer than that of" in rows[2].notes["no loss"]
    assert "has 16 positions" in rows[3].notes["no loss"]
    assert rows[2].bytes
    assert "reference words: parameters, nonzeros, bytes, gzip_bytes are right" in check(tmp_path / "out")


def test_a_reference_with_other_labels_is_refused_before_the_first_step(tmp_path: Path) -> None:
    task = tmp_path / "task"
    task.mkdir()
    for split in ("train", "dev"):
        (task / f"{split}.tsv").write_text("text\tlabel\n" + "w17\tyes\nw19\tno\n" * 4)
    data = {"path": str(task), "text": "text", "label": "label"}
    recipe = CompressRecipe(
        steps=["trim"],
        task={"task": "mine", "data": data},  # type: ignore[arg-type]
        report=ReportRecipe(latency=[], references=[str(hub_folder(tmp_path / "other", "SequenceClassification"))]),
    )
    with pytest.raises(BadInput, match="other: its labels are bad, good; those of mine are no, yes"):
        compress(tiny_export(tmp_path / "source"), recipe, tmp_path / "out")
    assert not (tmp_path / "out.steps").exists()
