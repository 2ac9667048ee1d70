"""The ONNX file, in ONNX Runtime."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from compress.dense.onnx_int8 import OnnxInt8
from exports import onnx_graph
from exports.dense_model import DenseBert, dense_tensors
from exports.export import Export
from exports.forms import write_export
from exports.kinds import Classifier
from exports.onnx import Onnx, write_onnx
from exports.weight_source import TensorWeights
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
    assert len(content) < learned_bytes(written[1]) + 40_000


def learned_bytes(model: ShareBertForMaskedLM) -> int:
    """Bytes in fp32 of the parameters, of one set of generated matrices, and of E as the tied head's decoder."""
    weights = model.sharebert.layer_weights()
    matrices = [*weights.of_layer(0), weights.pooler, model.sharebert.word_embeddings.weight]
    return 4 * sum(tensor.numel() for tensor in (*model.parameters(), *matrices) if tensor is not None)


@pytest.mark.parametrize("mlm_head", ["tied", pytest.param("none", marks=pytest.mark.slow)])
def test_layers_share_one_copy_also_after_quantisation(tmp_path: Path, mlm_head: str) -> None:
    """One more layer adds its biases and norms, and no matrix."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    onnx = pytest.importorskip("onnx")
    sizes = []
    for layers in (1, 4):
        model = tiny_model(
            mlm_head=mlm_head, num_hidden_layers=layers, hidden_size=48, intermediate_size=96, vocab_size=800
        ).eval()
        write_onnx(tmp_path / "model.onnx", model)
        small = tmp_path / "int8.onnx"
        quantization.quantize_dynamic(tmp_path / "model.onnx", small, per_channel=True)
        sizes.append([sum_of_initializers(onnx.load(path)) for path in (tmp_path / "model.onnx", small)])
    assert sizes[0][0][0] == sizes[1][0][0]  # matrices of fp32
    assert sizes[0][1][0] == sizes[1][1][0]  # and of int8
    assert 0.2 < sizes[1][1][0] / sizes[1][0][0] < 0.3
    nodes = onnx.load(tmp_path / "int8.onnx").graph.node
    assert sum(node.op_type == "MatMulInteger" for node in nodes) == 6 * 4 + 2 + (2 if mlm_head != "none" else 0)
    given = session_inputs()
    full, int8 = (onnxruntime.InferenceSession(tmp_path / name).run(None, given)[0] for name in ("model.onnx", small))
    expected = model.sharebert(torch.from_numpy(given["input_ids"])).hidden
    assert ((torch.from_numpy(full) - expected).abs().max() / expected.abs().max()).item() < 1e-5
    assert 0 < abs(int8 - full).max() / abs(full).max() < 0.1


@pytest.mark.slow
def test_gains_and_pairs_are_written_out(tmp_path: Path) -> None:
    """Two pairs are two copies; what learned gains multiply is a copy for each layer."""
    onnx = pytest.importorskip("onnx")
    shape = {"vocab_size": 500, "num_hidden_layers": 4, "ffn_pairs": 2, "mlm_head": "none"}
    square, wide = 24 * 24, 24 * 40
    sizes = []
    for gains, copies in (
        ({"branch_gain": 0.4}, 5 * square + 4 * wide),
        ({"branch_gain": 0.4, "learned_branch_gains": True}, (4 + 4) * square + (2 + 4) * wide),
    ):
        model = tiny_model(**shape, **gains).eval()
        write_onnx(tmp_path / "model.onnx", model)
        given = session_inputs()
        found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, given)[0]
        expected = model.sharebert(torch.from_numpy(given["input_ids"])).hidden
        assert ((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()).item() < 1e-5
        sizes.append(sum_of_initializers(onnx.load(tmp_path / "model.onnx"))[0] - 4 * copies)
    assert sizes[0] == sizes[1]  # what is left is the embedding


def sum_of_initializers(model: Any) -> tuple[int, int]:
    """Bytes of the matrices and of all other initializers."""
    onnx = pytest.importorskip("onnx")
    arrays = [(len(tensor.dims), onnx.numpy_helper.to_array(tensor).nbytes) for tensor in model.graph.initializer]
    return sum(n for dims, n in arrays if dims == 2), sum(n for dims, n in arrays if dims != 2)


def test_a_large_tied_head_reads_the_embedding_transposed(tmp_path: Path) -> None:
    """The exporter folds only small transpositions: E is then in the file once."""
    onnx = pytest.importorskip("onnx")
    model = tiny_model(mlm_head="tied", vocab_size=9000, hidden_size=48, num_hidden_layers=1, factor_size=32).eval()
    write_onnx(tmp_path / "model.onnx", model)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert sum(tensor.dims[0] * tensor.dims[-1] == 9000 * 32 for tensor in graph.initializer if tensor.dims) == 1
    assert {node.name for node in graph.node} >= {"mlm_head.dense", "mlm_head.decoder"}
    OnnxInt8().write(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    quantised = [tensor for tensor in onnx.load(tmp_path / "int8.onnx").graph.initializer if 9000 in tensor.dims]
    assert sorted(tensor.data_type for tensor in quantised if len(tensor.dims) == 2) == [
        onnx.TensorProto.UINT8,  # what is looked up
        onnx.TensorProto.INT8,  # what is multiplied
    ]
    given = session_inputs()
    sessions = [onnxruntime.InferenceSession(tmp_path / name) for name in ("model.onnx", "int8.onnx")]
    full, small = (session.run(["logits"], given)[0] for session in sessions)
    expected = model.logits(torch.from_numpy(given["input_ids"]))
    torch.testing.assert_close(torch.from_numpy(full), expected, rtol=1e-4, atol=1e-5)
    assert abs(small - full).max() < 0.1 * abs(full).max()


def test_products_have_the_names_of_their_modules(written: tuple[Path, ShareBertForMaskedLM]) -> None:
    """Each name stands at the product with that matrix."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(written[0] / "model.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = {node.name: stored[node.input[1]] for node in graph.node if node.input[1:] and node.input[1] in stored}
    dense = dict(dense_tensors(written[1]))
    names = [name.removesuffix(".weight") for name in dense if "layer." in name and dense[name].dim() == 2]
    assert len(names) == 12
    for name in names:
        matrix = dense[f"{name}.weight"].detach().T
        torch.testing.assert_close(torch.tensor(products[name]), matrix, msg=name)


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_a_classifier(tmp_path: Path, pooling: str) -> None:
    transformers = pytest.importorskip("transformers")
    from exports.compact import Compact

    base = tiny_model(mlm_head="none").eval()
    torch.manual_seed(0)
    head = {"classifier.weight": torch.randn(3, base.config.hidden_size), "classifier.bias": torch.randn(3)}
    export = Export(base.config, Classifier(("a", "b", "c"), pooling=pooling), TensorWeights(base.state_dict() | head))
    write_export(export, tmp_path / "compact", Compact())
    write_export(export, tmp_path / "onnx", Onnx())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "compact", trust_remote_code=True
    ).eval()
    given = session_inputs()
    given["attention_mask"][1, 3:] = 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    assert [output.name for output in session.get_outputs()] == ["logits"]
    (scores,) = session.run(None, given)
    expected = model(**{name: torch.from_numpy(array) for name, array in given.items()}).logits
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "onnx/config.json").read_text())["id2label"] == {"0": "a", "1": "b", "2": "c"}


@pytest.mark.parametrize("opset", [18, pytest.param(22, marks=pytest.mark.slow)])
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
    monkeypatch.setattr(onnx_graph, "ONE_FILE_BYTES", 0)
    write_onnx(tmp_path / "model.onnx", tiny_model(mlm_head="none"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state", "pooler_output"]
