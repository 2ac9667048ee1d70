"""The ONNX file, in ONNX Runtime."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from exports import onnx as to_onnx
from exports.dense_model import DenseBert, dense_tensors
from exports.export import Export
from exports.forms import write_export
from exports.onnx import Onnx, write_onnx
from sharebert import ShareBertForMaskedLM
from sharebert_common.errors import BadInput

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


def session_inputs(rows: int = 2, length: int = 5) -> dict[str, Any]:
    tokens = torch.randint(250, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens.numpy(), "attention_mask": torch.ones_like(tokens).numpy()}


def test_token_types_may_be_left_away(written: tuple[Path, ShareBertForMaskedLM]) -> None:
    session = onnxruntime.InferenceSession(written[0] / "model.onnx")
    given = session_inputs()
    zeros, ones = (torch.full((2, 5), value).numpy() for value in (0, 1))
    alone = session.run(None, given)
    for ours, theirs in zip(alone, session.run(None, given | {"token_type_ids": zeros}), strict=True):
        assert (ours == theirs).all()
    assert (alone[0] != session.run(None, given | {"token_type_ids": ones})[0]).any()


def test_a_longer_input_is_refused_with_the_limit(written: tuple[Path, ShareBertForMaskedLM]) -> None:
    folder, model = written
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for length in (17, 40):
        with pytest.raises(Exception, match="longest_input_is_16_tokens"):
            session.run(None, session_inputs(length=length))
    dense = DenseBert(model.config)
    with pytest.raises(BadInput, match="rows of 17 tokens, but the model has 16 positions"):
        dense(torch.zeros(1, 17, dtype=torch.int64))


def test_the_file_is_valid_and_is_quantised(written: tuple[Path, ShareBertForMaskedLM], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    quantization = pytest.importorskip("onnxruntime.quantization")
    path = written[0] / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    quantization.quantize_dynamic(str(path), str(tmp_path / "int8.onnx"))
    given = session_inputs()
    small, full = (onnxruntime.InferenceSession(file).run(None, given)[0] for file in (tmp_path / "int8.onnx", path))
    assert 0 < abs(small - full).max() / abs(full).max() < 0.1


def test_the_file_says_nothing_of_the_machine_that_made_it(written: tuple[Path, ShareBertForMaskedLM]) -> None:
    content = (written[0] / "model.onnx").read_bytes()
    for trace in (b"stack_trace", b".py", str(Path(torch.__file__).parent).encode(), b"site-packages", b"fx_node"):
        assert trace not in content, trace
    weights = sum(tensor.nbytes for _, tensor in dense_tensors(written[1]))
    assert len(content) < weights + 40_000


@pytest.mark.parametrize("opset", [18, 22])
def test_another_opset(tmp_path: Path, opset: int) -> None:
    model = tiny_model(mlm_head="tied", num_hidden_layers=1).eval()
    write_export(Export.of_model(model), tmp_path / "onnx", Onnx(opset))
    onnx = pytest.importorskip("onnx")
    assert onnx.load(tmp_path / "onnx/model.onnx").opset_import[0].version == opset
    given = session_inputs()
    hidden = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx").run(None, given)[0]
    expected = model.sharebert(torch.from_numpy(given["input_ids"])).hidden
    assert ((torch.from_numpy(hidden) - expected).abs().max() / expected.abs().max()).item() < 1e-4


def test_an_unknown_opset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="opset: 3 is not one of 18 to 22"):
        write_export(Export.of_model(tiny_model()), tmp_path / "onnx", Onnx(3))


@pytest.mark.slow
def test_large_models_keep_their_weights_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "ONE_FILE_BYTES", 0)
    write_onnx(tmp_path / "model.onnx", tiny_model(mlm_head="none"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state", "pooler_output"]
