"""The steps `onnx` and `onnx_int8`, and SmoothQuant through the norms."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from compress.dense.onnx_int8 import OnnxInt8, kind_of
from compress.dense.runtime import OnnxModel, batches
from compress.dense.smooth import scales, smooth
from compress.dense.to_onnx import ToOnnx
from compress.measure import counts
from compress.step import Source
from exports.compact import Compact
from exports.export import Export
from exports.forms import write_export
from sharebert_common.errors import BadInput

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

ROWS = torch.randint(5, 250, (6, 12), generator=torch.Generator().manual_seed(0))
ROWS[3:, 8:] = 0


class FewTools:
    """What the frame gives to a step; the loss is the distance from the fp32 model's hidden states."""

    seed = 0

    def __init__(self, scratch: Path, reference: Path) -> None:
        self.scratch, self.reference = scratch, reference
        self.said: list[str] = []

    def calibration(self) -> Tensor:
        return ROWS

    def masked_lm_loss(self, folder: Path) -> float:
        given = ROWS, (ROWS != 0).long()
        ours, theirs = (OnnxModel(path)(*given)["last_hidden_state"] for path in (folder, self.reference))
        return 1 + (ours - theirs).abs().mean().item()

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An ONNX folder that the step `onnx` wrote, and the tools."""
    folder = tmp_path_factory.mktemp("int8")
    model = tiny_model(mlm_head="tied", hidden_size=48, intermediate_size=96, vocab_size=800).eval()
    with torch.no_grad():  # norms with values of their own, and one loud channel, as trained models have
        for layer in model.sharebert.layers:
            for norm in (layer.attention_norm, layer.ffn_norm):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
                norm.weight[3] *= 40
    write_export(Export.of_model(model), folder / "compact", Compact())
    source = Source(folder / "compact", "compact")
    tools = FewTools(folder, folder / "onnx")
    ToOnnx().check(source)
    said = ToOnnx().apply(source, tools, folder / "onnx")
    assert said["bytes"] == (folder / "onnx/model.onnx").stat().st_size
    expected = model.sharebert(ROWS, (ROWS != 0).long()).hidden
    found = OnnxModel(folder / "onnx")(ROWS, (ROWS != 0).long())["last_hidden_state"]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    return folder / "onnx", tools


def matrices(file: Path) -> dict[str, np.ndarray]:
    stored = onnx.load(file).graph.initializer
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in stored}


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_each_shared_matrix_is_there_once_and_is_the_rounded_one(
    made: tuple[Path, Any], tmp_path: Path, mode: str
) -> None:
    """Codes times scales are within half a step of the fp32 matrix, a scale for each output channel."""
    folder, tools = made
    step = OnnxInt8(mode=mode)  # type: ignore[arg-type]
    step.check(Source(folder, "onnx"))
    said = step.apply(Source(folder, "onnx"), tools, tmp_path / "out")
    full, small = matrices(folder / "model.onnx"), matrices(tmp_path / "out/model.onnx")
    names = [name for name in full if name.startswith("bert.encoder.layer.0.") and full[name].ndim == 2]
    assert len(names) == 6
    assert not [name for name in small if ".layer.1." in name and small[name].ndim == 2]
    for name in names:
        codes, step_sizes = small[f"{name}_quantized"], small[f"{name}_scale"]
        assert codes.dtype == np.int8
        assert step_sizes.shape == (full[name].shape[1],)
        assert (abs(codes * step_sizes - full[name]) <= step_sizes * 0.5001).all()
    assert said["kept_fp32"] == []
    assert tools.masked_lm_loss(tmp_path / "out") < 1.5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in folder.iterdir())


def test_calibration_sees_no_padding() -> None:
    """A range of activations would be that of padding as well. Rows without padding stay in their order."""
    given = list(batches(ROWS, 0, size=2))
    assert [part["input_ids"].shape for part in given] == [(2, 8), (1, 8), (2, 12), (1, 12)]
    assert all(part["attention_mask"].all() for part in given)
    assert sorted(map(tuple, [row for part in given for row in part["input_ids"].tolist()])) == sorted(
        tuple(word for word in row if word) for row in ROWS.tolist()
    )
    whole = torch.cat([torch.from_numpy(part["input_ids"]) for part in batches(ROWS[:3], 0, size=2)])
    assert whole.equal(ROWS[:3])
    assert list(batches(torch.zeros(2, 4, dtype=torch.int64), 0)) == []


def test_products_that_stay_in_fp32(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = made
    pattern = "bert.encoder.layer.*.output.dense"
    OnnxInt8().write(folder / "model.onnx", tmp_path / "int8.onnx", [pattern])
    nodes = {node.name: node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert nodes["bert.encoder.layer.1.output.dense"] == "MatMul"
    assert nodes["bert.encoder.layer.1.intermediate.dense_quant"] == "MatMulInteger"
    with pytest.raises(BadInput, match="keep_fp32: no product or lookup of the model has a name like 'nothing'"):
        OnnxInt8().write(folder / "model.onnx", tmp_path / "int8.onnx", ["nothing"])


def test_the_search_keeps_what_does_most_harm(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, tools = made
    before = OnnxInt8().apply(Source(folder, "onnx"), tools, tmp_path / "all")
    loss = tools.masked_lm_loss(tmp_path / "all")
    budget = (loss - 1) / 2
    said = OnnxInt8(max_loss_increase=budget).apply(Source(folder, "onnx"), tools, tmp_path / "searched")
    assert said["kept_fp32"]
    assert tools.masked_lm_loss(tmp_path / "searched") <= 1 + budget
    best = min(said["search"], key=lambda row: row["loss"])
    assert said["kept_fp32"][0] == best["fp32"]
    assert before["bytes"] < said["bytes"]
    generous = OnnxInt8(max_loss_increase=2 * loss).apply(Source(folder, "onnx"), tools, tmp_path / "generous")
    assert generous["kept_fp32"] == generous["search"] == []


def test_smoothing_changes_nothing_in_fp32_and_helps_in_int8(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, tools = made
    changed = smooth(folder / "model.onnx", tmp_path / "model.onnx", batches(ROWS, 0), 0.5)
    assert changed == 6  # two in each of two layers, that of the factors, and that of the head
    assert tools.masked_lm_loss(tmp_path) - 1 < 1e-5
    full, smoothed = matrices(folder / "model.onnx"), matrices(tmp_path / "model.onnx")
    assert smoothed.keys() - full.keys() == {key for key in smoothed if ".smoothed." in key}
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not np.allclose(full[query], smoothed[query])
    plain = OnnxInt8().apply(Source(folder, "onnx"), tools, tmp_path / "plain")
    with_it = OnnxInt8(smooth=0.5).apply(Source(folder, "onnx"), tools, tmp_path / "smooth")
    assert with_it["smoothed_norms"] == 6
    assert "smoothed_norms" not in plain
    assert tools.masked_lm_loss(tmp_path / "smooth") < tools.masked_lm_loss(tmp_path / "plain")


def test_the_scales_are_those_of_the_paper() -> None:
    """Equation 4 for one channel with max|X| = 16 and max|W| = 4: √16 / √4."""
    assert scales(np.array([16.0]), np.array([4.0]), 0.5).tolist() == [2.0]
    assert scales(np.array([16.0]), np.array([4.0]), 1.0).tolist() == [16.0]
    assert scales(np.array([16.0]), np.array([4.0]), 0.0).tolist() == [0.25]


def test_wrong_sources_and_files(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = made
    with pytest.raises(BadInput, match="put the step `onnx` before it"):
        OnnxInt8().check(Source(folder, "compact"))
    with pytest.raises(BadInput, match="onnx: this folder holds an ONNX file already"):
        ToOnnx().check(Source(folder, "onnx"))
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="ONNX Runtime cannot read it"):
        OnnxModel(tmp_path)
    assert kind_of("bert.encoder.layer.11.output.dense") == "bert.encoder.layer.*.output.dense"


def test_counts_of_int8_are_those_of_fp32_and_a_report_stays_behind(made: tuple[Path, Any], tmp_path: Path) -> None:
    """Scales are no parameters, and E, which a tied head reads transposed, counts once."""
    whole, tools = made
    folder = tmp_path
    source = Source(folder / "onnx", "onnx")
    shutil.copytree(whole, source.folder)
    (source.folder / "REPORT.md").write_text("old")
    (source.folder / "tensorboard").mkdir(exist_ok=True)
    (source.folder / "tensorboard" / "events").write_text("old")
    for mode in ("dynamic", "static"):
        out = folder / f"counted-{mode}"
        OnnxInt8(mode=mode, calibration_rows=4).apply(source, tools, out)
        assert counts(out)[0] == counts(source.folder)[0]
        assert not (out / "REPORT.md").exists()
        assert not (out / "tensorboard").exists()
    graph = onnx.load(folder / "counted-dynamic" / "model.onnx").graph
    assert sum(tensor.name.endswith("_scale") for tensor in graph.initializer) > 5
