"""Folders of Hugging Face encoders, and dense exports, through `onnx` and `onnx_int8`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hub_folders import hub_folder
from tiny_models import tiny_model, tiny_tokenizer

from compress.dense.onnx_int8 import OnnxInt8, nodes_with_weights
from compress.dense.runtime import OnnxModel
from compress.dense.smooth import smooth
from compress.dense.to_onnx import ToOnnx
from compress.measure import counts
from compress.quantise.step import Quantise
from compress.recipe import CompressRecipe
from compress.report import check, read_report
from compress.run import compress as run
from compress.source import open_hub_model, open_source
from compress.tools import masked_lm
from compress.trim import Trim
from exports.dense import Dense
from exports.export import Export
from exports.forms import write_export
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

TOKENS = torch.randint(5, 250, (3, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
MASK[0, 6:] = 0


def made(source: Path, out: Path) -> Path:
    step = ToOnnx()
    step.check(open_source(source))
    step.apply(open_source(source), None, out)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("head", ["", "MaskedLM", pytest.param("SequenceClassification", marks=pytest.mark.slow)])
def test_the_outputs_are_those_of_transformers(tmp_path: Path, head: str) -> None:
    source = hub_folder(tmp_path / "bert", head)
    out = made(source, tmp_path / "onnx")
    with torch.no_grad():
        expected = open_hub_model(source, head)(input_ids=TOKENS, attention_mask=MASK, output_hidden_states=True)
    found = OnnxModel(out)(TOKENS, MASK)
    wanted = {"": ["last_hidden_state", "pooler_output"], "MaskedLM": ["last_hidden_state", "logits"]}
    assert list(found) == wanted.get(head, ["logits"])
    for name, value in found.items():
        if name == "last_hidden_state":
            value, other = value[MASK.bool()], expected.hidden_states[-1][MASK.bool()]
        else:
            other = expected[name]
            value, other = (value[MASK.bool()], other[MASK.bool()]) if head == "MaskedLM" else (value, other)
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
    assert open_source(out).form == "onnx"
    nodes = nodes_with_weights(out / "model.onnx")
    assert any(name.endswith("encoder.layer.1.attention.self.query") for name in nodes)
    assert len(nodes) == len(set(nodes))
    longer = torch.full((1, 33), 5)  # one more than it has positions
    with pytest.raises(Exception, match="longest_input_is_32_tokens"):
        OnnxModel(out)(longer, torch.ones_like(longer))


def test_a_tied_decoder_is_stored_once_and_quantised(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "bert", "MaskedLM")
    out = made(source, tmp_path / "onnx")
    parameters = sum(p.numel() for p in open_hub_model(source, "MaskedLM").parameters())
    stored = [tensor for tensor in onnx.load(out / "model.onnx").graph.initializer if tensor.data_type == 1]
    assert sum(int(torch.Size(tensor.dims).numel()) for tensor in stored) == pytest.approx(parameters, rel=0.01)
    OnnxInt8().apply(open_source(out), None, tmp_path / "int8")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"int8 is quantised already$"):
        OnnxInt8().check(open_source(tmp_path / "int8"))
    OnnxInt8().check(open_source(out))
    with pytest.raises(BadInput, match=r"onnx_int8\.smooth: no LayerNorm of this model is read by products alone"):
        smooth(out / "model.onnx", tmp_path / "smooth.onnx", [], 0.5)
    ours, theirs = (OnnxModel(folder).logits(TOKENS, MASK) for folder in (tmp_path / "int8", out))
    assert (ours - theirs).abs().max() < 0.1 * theirs.abs().max()
    left = [tensor for tensor in onnx.load(tmp_path / "int8/model.onnx").graph.initializer if tensor.data_type == 1]
    assert max(torch.Size(tensor.dims).numel() for tensor in left) < 32 * 33  # vectors and position embeddings
    assert counts(tmp_path / "int8")[0] == counts(out)[0]


@pytest.mark.slow
def test_a_dense_export(tmp_path: Path) -> None:
    model = tiny_model(mlm_head="tied").eval()
    source = tmp_path / "dense"
    write_export(Export.of_model(model, tokenizer=tiny_tokenizer(tmp_path)), source, Dense())
    out = made(source, tmp_path / "onnx")
    expected = model.logits(TOKENS, MASK)
    torch.testing.assert_close(
        OnnxModel(out).logits(TOKENS, MASK)[MASK.bool()], expected[MASK.bool()], rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_a_recipe_with_latency_and_score(tmp_path: Path) -> None:
    """A classifier of Hugging Face goes through both steps, with its scores as it is and its loss where it has one."""
    source = hub_folder(tmp_path / "bert", "SequenceClassification")
    data = tmp_path / "task"
    data.mkdir()
    for split in ("train", "dev"):
        (data / f"{split}.tsv").write_text("text\tlabel\n" + "w17 w18\tgood\nw19 w20\tbad\n" * 4)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "steps: [onnx, onnx_int8]\n"
        f"task: {{task: mine, data: {{path: {data}, text: text, label: label}}, finetune: {{max_length: 8}}}}\n"
        "report: {latency: [1x8], repeats: 1}\n"
    )
    run(source, load(CompressRecipe, file), tmp_path / "out")
    _, _, rows = read_report(tmp_path / "out")
    assert [next(iter(row.latency_ms)) for row in rows] == ["transformers", "onnxruntime", "onnxruntime"]
    assert rows[0].scores == rows[1].scores != {}
    assert rows[1].parameters == rows[2].parameters == rows[0].parameters
    assert "2 onnx_int8: parameters" in check(tmp_path / "out")


@pytest.mark.parametrize("step", [Trim(), Quantise()])
def test_other_steps_refuse_it_in_one_line(tmp_path: Path, step: Any) -> None:
    with pytest.raises(BadInput, match="takes a compact export, this one is hub"):
        step.check(open_source(hub_folder(tmp_path / "bert", "")))


def test_the_loss_of_a_masked_language_model(tmp_path: Path) -> None:
    assert masked_lm(hub_folder(tmp_path / "with", "MaskedLM")) is not None
    assert masked_lm(hub_folder(tmp_path / "without", "")) is None
