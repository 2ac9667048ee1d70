"""The step `pc_lora` on encoders of Hugging Face and dense exports: what it ends in, and in which file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress_models import killed, tiny_export
from hub_folders import hub_folder

from compress import training
from compress.calibrate import Batch
from compress.dense.hub_onnx import head_of, open_for_onnx
from compress.dense.onnx_int8 import OnnxInt8
from compress.dense.runtime import OnnxModel
from compress.encoder_loss import encoder_loss, outputs, rows_of
from compress.low_rank import pc_lora_step
from compress.low_rank.fading_linears import FadingLinear, fade, linears_of, put, ranks_of, second_moments
from compress.low_rank.pc_lora_step import PcLora
from compress.recipe import CompressRecipe
from compress.report import read_report
from compress.run import compress as run
from compress.source import open_source
from compress.tools import masked_lm
from data_prep.shards.reader import open_dataset
from exports.dense import Dense
from exports.forms import write_export
from exports.read import read_export
from sharebert_common.errors import BadInput

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

WORDS = torch.randint(5, 250, (3, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(WORDS)
MASK[0, 6:] = 0
MATRICES = 12
"""Of two layers."""


def tools(scratch: Path, length: int = 12) -> Any:
    tokens = torch.randint(5, 250, (24, length), generator=torch.Generator().manual_seed(2))
    tokens[::3, length - 3 :] = 0
    return SimpleNamespace(calibration=lambda: tokens, seed=0, scratch=scratch / "scratch", say=lambda line: None)


def written(folder: Path, source: Path, **keys: Any) -> Path:
    step, out = PcLora(rank=5, batch=8, steps=2, **keys), folder / "out"
    step.check(open_source(source))
    step.apply(open_source(source), tools(folder), out)
    return out


def trained(folder: Path, source: Path, **keys: Any) -> Any:
    return PcLora(rank=4, batch=8, **keys).low_rank_encoder(source, tools(folder))[0]


def faded(folder: Path, ranks: dict[str, int], *, from_zero: bool) -> tuple[Any, dict[str, Any]]:
    """The model in `folder` with fading layers, in float32 and evaluation mode."""
    model = open_for_onnx(folder).requires_grad_(False)
    rows = rows_of(tools(folder).calibration(), folder, head_of(folder), 0, 8)
    moments = second_moments(model, linears_of(model), rows, outputs)
    return model, fade(model, ranks, moments, from_zero=from_zero)


def hidden_states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=WORDS, attention_mask=MASK).last_hidden_state
    return found[MASK.bool()]  # type: ignore[no-any-return]


@pytest.mark.parametrize("from_zero", [True, False])
def test_at_share_1_it_is_the_model_and_at_0_nothing_of_the_matrices_is_left(tmp_path: Path, from_zero: bool) -> None:
    source = hub_folder(tmp_path / "bert", "")
    original = open_for_onnx(source)
    model, fading = faded(source, ranks_of(linears_of(original), 5, {}, source), from_zero=from_zero)
    assert len(fading) == MATRICES
    torch.testing.assert_close(hidden_states(model), hidden_states(original), rtol=1e-4, atol=1e-5)
    found = []
    for share in (0.5, 0.0):
        for module in fading.values():
            module.share = share
        found.append(hidden_states(model))
    for module in fading.values():
        module.base.copy_(torch.randn(module.base.shape))
    assert hidden_states(model).equal(found[1])
    put(model, {name: module.pair() for name, module in fading.items()})
    torch.testing.assert_close(hidden_states(model), found[1], rtol=1e-4, atol=1e-5)
    assert not found[0].equal(found[1])


def test_all_matrices_fade_in_the_steps_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []

    def watched(student: Any, *given: Any) -> torch.Tensor:
        seen.append([module.share for module in student.modules() if isinstance(module, FadingLinear)])
        return encoder_loss(student, *given)

    monkeypatch.setattr(pc_lora_step, "encoder_loss", watched)
    source = hub_folder(tmp_path / "bert", "")
    trained(tmp_path, source, steps=10, fade=0.5, schedule="linear", task_weight=0.0)
    expected = [0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0, 0]
    assert seen == [pytest.approx([share] * MATRICES) for share in expected]


@pytest.mark.parametrize(("kind", "matrices"), [("Bert", 12), ("DistilBert", 12), ("Electra", 12), ("Albert", 6)])
def test_it_finds_the_matrices_of_the_layers_alone(kind: str, matrices: int) -> None:
    """No pooler and no projection of embeddings; a matrix that layers share comes once."""
    import transformers

    sizes = {"vocab_size": 50, "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50}
    given = names if kind == "DistilBert" else {**sizes, "intermediate_size": 32}
    model = (
        getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**given))
        .requires_grad_(False)
        .eval()
    )
    found = linears_of(model)
    assert len(found) == matrices
    assert not [name for name in found if "pooler" in name or "embedding" in name]
    words = torch.randint(5, 50, (2, 6))
    batch = Batch(words, torch.ones_like(words), torch.full_like(words, -100))
    fade(model, dict.fromkeys(found, 3), second_moments(model, found, [batch], outputs), from_zero=False)
    assert encoder_loss(model, model, batch, "", 0.0) == 0


def test_second_moments_are_those_of_the_real_tokens(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "bert", "")
    model = open_for_onnx(source)
    rows = rows_of(tools(tmp_path).calibration(), source, "", 0, 8)
    found = second_moments(model, linears_of(model), rows, outputs)
    with torch.no_grad():
        states = [outputs(model, batch).hidden_states[1][batch.visible.bool()].double() for batch in rows]
    x = torch.cat(states)
    torch.testing.assert_close(found["encoder.layer.1.attention.self.key"], x.t() @ x, rtol=1e-4, atol=1e-4)


def test_the_file_holds_the_products_alone(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "bert", "")
    out = written(tmp_path, source, task_weight=0.0, ranks={"*.intermediate.dense": 3})
    model = open_for_onnx(source)
    expected = sum(p.numel() for p in model.parameters())
    for name, linear in linears_of(model).items():
        rank = 3 if name.endswith("intermediate.dense") else 5
        expected += rank * (linear.in_features + linear.out_features) - linear.weight.numel()
    stored = [tensor for tensor in onnx.load(out / "model.onnx").graph.initializer if tensor.data_type == 1]
    found = sum(int(torch.Size(tensor.dims).numel()) for tensor in stored)
    assert found == pytest.approx(expected, rel=0.002)
    assert (out / "model.onnx").stat().st_size < 1.5 * 4 * expected  # a small model's graph is a large part
    assert open_source(out).form == "onnx"
    OnnxInt8().apply(open_source(out), None, tmp_path / "int8")  # type: ignore[arg-type]
    ours, theirs = (OnnxModel(folder)(WORDS, MASK)["last_hidden_state"] for folder in (tmp_path / "int8", out))
    assert (ours - theirs).abs().max() < 0.1 * theirs.abs().max()


@pytest.mark.parametrize("head", ["", "SequenceClassification"])
def test_it_learns(tmp_path: Path, head: str) -> None:
    """More steps bring the outputs nearer to those of the model."""
    source = hub_folder(tmp_path / "bert", head)

    def outcome(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found = model(input_ids=WORDS, attention_mask=MASK)
        return found.logits if head else found.last_hidden_state[MASK.bool()]

    expected, errors = outcome(open_for_onnx(source)), []
    for steps, lr in ((1, 1e-6), (80, 1e-2)):
        model = trained(tmp_path / str(steps), source, steps=steps, lr=lr, task_weight=0.5 if head else 0.0)
        errors.append((outcome(model) - expected).square().mean().item())
    assert errors[1] < 0.8 * errors[0]


def test_the_loss_of_a_masked_language_model_by_hand(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "bert", "MaskedLM")
    teacher, student = (
        open_for_onnx(folder) for folder in (source, hub_folder(tmp_path / "other", "MaskedLM", seed=1))
    )
    batch = rows_of(tools(tmp_path).calibration(), source, "MaskedLM", 0, 8)[0]
    ours, theirs = outputs(student, batch), outputs(teacher, batch)
    task = torch.zeros(())
    for row in range(8):
        chosen = [place for place in range(12) if batch.labels[row, place] >= 0]
        scores = ours.logits[row].log_softmax(-1)
        task -= sum(scores[place, batch.labels[row, place]] for place in chosen) / len(chosen) / 8
    features = []
    for number in (1, 2):
        x, y = (found.hidden_states[number][batch.tokens != 0] for found in (ours, theirs))
        features.append((x - y).square().sum() / y.square().sum())
    expected = 0.3 * task + 0.7 * sum(features) / 2
    torch.testing.assert_close(encoder_loss(student, teacher, batch, "MaskedLM", 0.3), expected)


def test_a_killed_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hub_folder(tmp_path / "bert", "")
    monkeypatch.setattr(training, "SAVE_EVERY", 4)
    whole = trained(tmp_path / "whole", source, steps=10, task_weight=0.0)
    with killed(training, 8):
        trained(tmp_path / "killed", source, steps=10, task_weight=0.0)
    again = trained(tmp_path / "killed", source, steps=10, task_weight=0.0)
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert ours.equal(theirs)


@pytest.mark.slow
def test_a_dense_export(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    write_export(read_export(tiny_export(tmp_path / "compact", mlm_head="tied")), source, Dense())
    out = written(tmp_path, source)
    assert masked_lm(out) is not None
    assert OnnxModel(out).logits(WORDS, MASK).shape == (3, 11, 256)


def test_in_a_recipe(dataset: Path, tmp_path: Path) -> None:
    opened = open_dataset(dataset)
    sizes = {"vocab_size": opened.vocab_size, "max_position_embeddings": opened.seq_len}
    source = hub_folder(tmp_path / "bert", "MaskedLM", **sizes)
    (source / "tokenizer.json").write_bytes(opened.tokenizer_path.read_bytes())
    step = {"pc_lora": {"rank": 5, "steps": 3, "batch": 8, "ranks": {"*.value": 4}}}
    rows = {"dataset": str(dataset), "rows": 16}
    recipe = CompressRecipe(
        steps=[step, "onnx_int8"],
        calibration=rows,  # type: ignore[arg-type]
        validation=rows,  # type: ignore[arg-type]
        report={"latency": []},  # type: ignore[arg-type]
    )
    run(source, recipe, tmp_path / "out")
    _, _, found = read_report(tmp_path / "out")
    assert [row.form for row in found] == ["hub", "onnx", "onnx"]
    assert [row.loss is not None for row in found] == [True] * 3
    assert found[1].notes["ranks"] == {"*.value": 4}
    assert found[1].notes["tokens"] == 3 * 8 * opened.seq_len
    assert found[1].parameters < found[0].parameters  # type: ignore[operator]


def test_wrong_keys_are_one_line(tmp_path: Path) -> None:
    source = open_source(hub_folder(tmp_path / "bert", ""))
    without = {"task_weight": 0.0}
    with pytest.raises(BadInput, match=r"pc_lora\.task_weight: .*bert has no head; set it to 0"):
        PcLora(rank=4).check(source)
    with pytest.raises(BadInput, match=r"pc_lora\.rank: 32 is not below the width of encoder\.layer\.0\..*query, 32"):
        PcLora(rank=32, **without).check(source)
    with pytest.raises(BadInput, match=r"pc_lora\.ranks: \*\.key: 40 is not below the width of encoder\.layer\.0"):
        PcLora(rank=4, ranks={"*.key": 40}, **without).check(source)
    with pytest.raises(BadInput, match=r"pc_lora\.ranks: no matrix of .*bert has a name like 'keys'; one is encoder\."):
        PcLora(rank=4, ranks={"keys": 3}, **without).check(source)
    with pytest.raises(BadInput, match="pc_lora: x has no linear layers inside a list of layers"):
        ranks_of(linears_of(torch.nn.Linear(3, 3)), 2, {}, "x")
    with pytest.raises(BadInput, match="pc_lora: takes a compact export, a dense one or an encoder of Hugging Face"):
        PcLora(rank=4).result_form("onnx")
