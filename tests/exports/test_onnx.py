"""The ONNX file, in ONNX Runtime."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from exports import onnx as to_onnx
from exports.export import Export
from exports.forms import write_export
from exports.onnx import Onnx, write_onnx
from sharebert import ShareBertForMaskedLM

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShareBertForMaskedLM]:
    """An ONNX export, and its model."""
    folder = tmp_path_factory.mktemp("onnx")
    model = tiny_model(mlm_head="tied").eval()
    export = Export.of_model(model, tokenizer=tiny_tokenizer(folder), card_sections={"Data": "Made-up words."})
    write_export(export, folder / "onnx", Onnx())
    return folder / "onnx", model


def test_onnx_runtime_agrees_at_any_batch_and_length(written: tuple[Path, ShareBertForMaskedLM]) -> None:
    folder, model = written
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for rows, length in ((1, 1), (3, 11), (5, 16)):
        tokens, types = torch.randint(250, (rows, length)), torch.randint(2, (rows, length))
        mask = torch.ones_like(tokens)
        mask[-1, (length + 1) // 2 :] = 0
        names = ("input_ids", "attention_mask", "token_type_ids")
        given = dict(zip(names, (tokens.numpy(), mask.numpy(), types.numpy()), strict=True))
        encoded = model.sharebert(tokens, mask, types)
        assert encoded.pooled is not None
        expected = (encoded.hidden, encoded.pooled.tanh(), model.logits(tokens, mask, types))
        for ours, theirs in zip(session.run(None, given), expected, strict=True):
            assert ((torch.from_numpy(ours) - theirs).abs().max() / theirs.abs().max()).item() < 1e-4


def test_the_folder_is_what_its_card_says(written: tuple[Path, ShareBertForMaskedLM]) -> None:
    """Its tokenizer and the snippet of its card."""
    pytest.importorskip("transformers")
    folder, model = written
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
    card = (folder / "README.md").read_text()
    assert "## Data\n\nMade-up words.\n" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)).replace("Some text.", "w1 w2"), found)
    logits = model.logits(torch.tensor([[2, 6, 7, 3]]))
    assert ((torch.from_numpy(found["outputs"][2]) - logits).abs().max() / logits.abs().max()).item() < 1e-4


@pytest.mark.slow
def test_large_models_keep_their_weights_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "ONE_FILE_BYTES", 0)
    write_onnx(tmp_path / "model.onnx", tiny_model(mlm_head="none"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state", "pooler_output"]
