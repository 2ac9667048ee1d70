"""The ONNX file, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from sharebert import to_onnx
from sharebert.to_onnx import write_onnx

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def test_onnx_runtime_agrees_at_any_batch_and_length(tmp_path: Path) -> None:
    model = tiny_model().eval()
    write_onnx(tmp_path / "model.onnx", model)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
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


def test_large_models_keep_their_weights_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "ONE_FILE_BYTES", 0)
    write_onnx(tmp_path / "model.onnx", tiny_model(mlm_head="none"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state", "pooler_output"]
