"""The step `prune_hidden`: oracles are the model itself at full rank, and the whole model with projected matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_models import tiny_export
from hidden_models import dense_folder, lively, masked, pruned, rows_of, tools
from hub_folders import hub_folder
from torch import nn

from compress.calibrate import batches, losses_of
from compress.prune.dense_parts import Kept, channel_magnitudes, gradients, survey
from compress.prune.dense_slices import head_channels, sliced
from compress.prune.directions import along, components, largest
from compress.prune.hidden_step import PruneHidden, sizes_of
from compress.prune.reconstruct import DAMPING, fit
from compress.prune.structure import fisher, least_important
from compress.source import open_source
from exports.dense import Dense, read_dense
from exports.forms import write_export
from exports.read import load_model, read_export
from exports.weight_files import read_weights
from sharebert_common.errors import BadInput

TIGHT = {"rtol": 0.0, "atol": 1e-10}


@pytest.mark.parametrize(("method", "chosen"), [("sp3", "variance"), ("sp3", "fisher"), ("magnitude", "variance")])
@pytest.mark.parametrize("least_squares", [True, False])
def test_at_full_rank_outputs_are_those_of_the_model(
    tmp_path: Path, method: str, chosen: str, least_squares: bool
) -> None:
    folder = dense_folder(tmp_path / "dense")
    model = lively(folder)
    small = pruned(folder, model, hidden=24, method=method, components=chosen, least_squares=least_squares)
    tokens, mask = masked()
    with torch.no_grad():
        expected, found = model(tokens, mask), small(tokens, mask)
    assert expected.logits is not None
    assert found.logits is not None
    torch.testing.assert_close(found.logits, expected.logits, **TIGHT)
    torch.testing.assert_close(found.pooled, expected.pooled, **TIGHT)
    if method == "sp3":
        assert (found.hidden - expected.hidden).abs().max() > 0.1  # it is a rotation, not the model itself
        torch.testing.assert_close(found.hidden.mean(-1), torch.zeros(3, 9, dtype=torch.float64), **TIGHT)


def test_the_sliced_model_is_the_masked_dense_model(tmp_path: Path) -> None:
    """The masked model has the sizes of the whole one: its stream is projected, removed parts are zero."""
    folder = dense_folder(tmp_path / "dense")
    model, config = lively(folder), sizes_of(folder)
    directions = along(components(survey(model, rows_of(folder)).moments)[:, :15])
    kept = [
        Kept(torch.tensor([0, 2]), torch.arange(0, 40, 2)),
        Kept(torch.tensor([1, 2]), torch.arange(20)),
        Kept(torch.tensor([0, 1]), torch.arange(13, 33)),
    ][: config.num_hidden_layers]
    small = sliced(model, config, directions, kept, torch.arange(16))
    tokens, mask = masked()
    with torch.no_grad():
        last = model.bert.encoder.ln
        found = small.encode(tokens, mask) @ directions.up * last.weight + last.bias
        project = directions.down @ directions.up
        for part in model.bert.embeddings.children():
            part.weight.copy_(part.weight @ project)
        for layer, stays in zip(model.bert.encoder.layer, kept, strict=True):
            for linear in (layer.attention.output.dense, layer.output.dense):
                linear.weight.copy_(project.t() @ linear.weight)
                linear.bias.copy_(linear.bias @ project)
            gone = torch.ones(24, dtype=torch.bool)
            gone[head_channels(stays.heads, 8)] = False
            layer.attention.output.dense.weight[:, gone] = 0
            gone = torch.ones(40, dtype=torch.bool)
            gone[stays.columns] = False
            layer.output.dense.weight[:, gone] = 0
        expected = model.encode(tokens, mask)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.testing.assert_close(project, project @ project)


def test_magnitude_takes_channels_out(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense")
    model, config = lively(folder), sizes_of(folder)
    every = [Kept(torch.tensor([0, 1]), torch.arange(40))] * config.num_hidden_layers
    scores = torch.arange(24.0, dtype=torch.float64)
    scores[3] = 100
    channels = torch.tensor([3, *range(9, 24)])
    small = sliced(model, config, largest(scores, 16), every, torch.arange(16))
    layer, own = model.bert.encoder.layer[0], small.bert.encoder.layer[0]
    words = small.bert.embeddings.word_embeddings.weight
    assert words.equal(model.bert.embeddings.word_embeddings.weight[:, channels])
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        normed = nn.functional.layer_norm(x, (16,)) * layer.ln.weight[channels] + layer.ln.bias[channels]
        rest = layer.ln.bias.clone()
        rest[channels] = 0
        inner = layer.intermediate.dense
        expected = normed @ inner.weight[:, channels].t() + inner.bias + inner.weight @ rest
        torch.testing.assert_close(own.intermediate.dense(own.ln(x)), expected, **TIGHT)
        assert own.output.dense.weight.equal(layer.output.dense.weight[channels])


def test_a_matrix_of_zeros_counts_nothing(tmp_path: Path) -> None:
    model = read_dense(folder := dense_folder(tmp_path / "dense"), sizes_of(folder)).requires_grad_(False)
    types = model.bert.embeddings.token_type_embeddings.weight
    whole, share = channel_magnitudes(model), types.double().square().sum(0) / types.double().square().sum(0).mean()
    types.zero_()
    torch.testing.assert_close(channel_magnitudes(model), whole - share)


def test_channels_of_the_head_by_numpy(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense")
    model = lively(folder)
    assert model.cls is not None
    head, rows = model.cls.predictions, rows_of(folder)
    read = np.concatenate([head.transformed(model.encode(b.tokens, b.visible)[b.labels >= 0]).numpy() for b in rows])
    expected = read.std(0) * np.linalg.norm(head.decoder.weight.numpy(), axis=0)
    np.testing.assert_allclose(survey(model, rows).head_channels.numpy(), expected, rtol=1e-9)  # type: ignore[union-attr]
    one = [batch._replace(labels=torch.full_like(batch.labels, -100)) for batch in rows]
    one[0].labels[0, 1] = 7
    assert survey(model, one).head_channels.abs().max() < 1e-6  # type: ignore[union-attr]


def test_directions_are_principal_components_of_what_is_centred() -> None:
    """By numpy's SVD: what they hold of norm(x) is all that 7 directions can hold, and the new stream has mean zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    x = nn.functional.layer_norm(x @ torch.randn(12, 12, generator=generator, dtype=torch.float64), (12,), eps=1e-5)
    found = along(components(x.t() @ x)[:, :7])
    projected = x @ found.down @ found.up
    singular = np.linalg.svd(x.numpy(), compute_uv=False)
    np.testing.assert_allclose((projected - x).square().sum().item(), (singular[7:] ** 2).sum(), rtol=1e-9)
    torch.testing.assert_close((x @ found.down).mean(1), torch.zeros(200, dtype=torch.float64), **TIGHT)
    # the same epsilon serves both sizes
    expected = nn.functional.layer_norm(projected, (12,), eps=1e-2)
    torch.testing.assert_close(nn.functional.layer_norm(x @ found.down, (8,), eps=1e-2) @ found.up, expected, **TIGHT)


def test_importance_of_layers_together_is_that_of_the_compact_form(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense", mlm_head="tied", hidden_size=24, factor_size=8)
    rows = rows_of(folder)
    dense = gradients(read_dense(folder, sizes_of(folder)), rows, 0, torch.eye(24))
    compact = fisher(load_model(tmp_path / "dense-compact"), rows, 0)
    for by_rows, together in ((dense.heads, compact.heads), (dense.columns, compact.columns)):
        summed = by_rows.sum(1).double()
        torch.testing.assert_close(summed.t() @ summed, together, rtol=1e-3, atol=1e-6)


def test_heads_and_columns_that_add_nothing_are_those_that_go(tmp_path: Path) -> None:
    """Others in each layer; without the columns the model is the same."""
    folder = dense_folder(tmp_path / "dense")
    model = lively(folder)
    heads, columns = (2, 0), ([0, 7, 39], [8, 9, 20])
    for layer, gone in zip(model.bert.encoder.layer, columns, strict=True):
        layer.output.dense.weight[:, gone] = 0
    tokens, mask = masked()
    small = pruned(folder, model, hidden=24, columns=37, least_squares=False)
    torch.testing.assert_close(small(tokens, mask).logits, model(tokens, mask).logits, **TIGHT)
    for layer, head in zip(model.bert.encoder.layer, heads, strict=True):
        layer.attention.output.dense.weight[:, head_channels(torch.tensor([head]), 8)] = 0
    found = gradients(model, rows_of(folder), 0, torch.eye(24)).kept(2, 37)
    for kept, head, gone in zip(found, heads, columns, strict=True):
        assert kept.heads.tolist() == [number for number in range(3) if number != head]
        assert kept.columns.tolist() == [number for number in range(40) if number not in gone]


@pytest.mark.parametrize("number", [0, 5, 22])
def test_gradients_by_components_are_those_of_a_changed_stream(tmp_path: Path, number: int) -> None:
    """All that writes to the stream writes a little more of one component."""
    folder = dense_folder(tmp_path / "dense", mlm_head="tied")
    model, rows = lively(folder), rows_of(folder, 8)
    axes = components(survey(model, rows).moments)
    found = gradients(model, rows, 0, axes).components[:, number].sum()
    losses, step = [], 1e-4
    for change in (step, -step):
        other = lively(folder)
        more = torch.eye(24, dtype=torch.float64) + change * torch.outer(axes[:, number], axes[:, number])
        for part in other.bert.embeddings.children():
            part.weight.copy_(part.weight @ more)
        for layer in other.bert.encoder.layer:
            for linear in (layer.attention.output.dense, layer.output.dense):
                linear.weight.copy_(more @ linear.weight)
                linear.bias.copy_(linear.bias @ more)
        logits = [other.cls.predictions(other.encode(b.tokens, b.visible)[b.labels >= 0]) for b in rows]
        losses.append(sum(losses_of(scores, batch) for scores, batch in zip(logits, rows, strict=True)))
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), found.double(), rtol=1e-4, atol=1e-5)


def test_components_that_stay_are_those_that_matter(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense", mlm_head="tied")
    model, rows = lively(folder), rows_of(folder)
    axes = components(survey(model, rows).moments)
    by_rows = gradients(model, rows, 0, axes).components
    gone = least_important(by_rows.t() @ by_rows, 8)
    kept = [number for number in range(23) if number not in gone]
    assert kept != list(range(15))
    words = model.bert.embeddings.word_embeddings.weight
    for chosen, stays in (("fisher", kept), ("variance", list(range(15)))):
        small = pruned(folder, model, hidden=16, components=chosen)
        expected = words @ along(axes[:, stays]).down
        torch.testing.assert_close(small.bert.embeddings.word_embeddings.weight, expected, **TIGHT)


def test_least_squares_are_numpys() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    target = torch.randn(300, 3, generator=generator, dtype=torch.float64) + x[:, :3] + 2
    linear = nn.Linear(5, 3, dtype=torch.float64).requires_grad_(False)
    before = linear.weight.clone()
    fit(linear, [(x[:100], target[:100]), (x[100:], target[100:])])
    covariance = np.cov(x.numpy().T, bias=True)
    damping = DAMPING * np.trace(covariance) / 5
    # damping is like further rows, which must map as before
    extra = np.sqrt(300 * damping) * np.eye(5)
    left = np.concatenate([x.numpy() - x.numpy().mean(0), extra])
    right = np.concatenate([target.numpy() - target.numpy().mean(0), extra @ before.numpy().T])
    expected = np.linalg.lstsq(left, right, rcond=None)[0]
    np.testing.assert_allclose(linear.weight.numpy(), expected.T, atol=1e-9)
    np.testing.assert_allclose(linear(x).mean(0).numpy(), target.mean(0).numpy(), atol=1e-9)


def test_least_squares_bring_outputs_nearer(tmp_path: Path) -> None:
    """At masked words of other rows: the head is fitted there."""
    folder = dense_folder(tmp_path / "dense", mlm_head="tied")
    model = lively(folder)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    errors = {}
    for least_squares in (True, False):
        small = pruned(folder, model, hidden=16, columns=0.5, least_squares=least_squares, rows=600)
        (batch, *_) = batches(tools(32, seed=7).calibration(), folder / "tokenizer.json", 7)
        found, expected = (each(batch.tokens, batch.visible).logits for each in (small, model))
        errors[least_squares] = (found - expected)[batch.labels >= 0].square().mean().item()
    assert errors[True] < 0.7 * errors[False], errors
    assert all(tensor.equal(before[name]) for name, tensor in model.named_parameters())


def test_tensors_keep_their_dtype(tmp_path: Path) -> None:
    compact, folder = tiny_export(tmp_path / "compact"), tmp_path / "dense"
    write_export(read_export(compact), folder, Dense(torch.bfloat16))
    PruneHidden(hidden=16).apply(open_source(folder), tools(), tmp_path / "out")
    assert {tensor.dtype for tensor in read_weights(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize("head", ["tied", pytest.param("none", marks=pytest.mark.slow)])
def test_stock_transformers_and_onnx_load_the_result(tmp_path: Path, head: str) -> None:
    from transformers import MegatronBertForMaskedLM, MegatronBertModel

    from compress.dense.to_onnx import ToOnnx

    folder, out = dense_folder(tmp_path / "dense", mlm_head=head), tmp_path / "out"
    step = PruneHidden(hidden=16, columns=0.5)
    step.check(open_source(folder))
    notes = step.apply(open_source(folder), tools(), out)
    assert (notes["hidden"], notes["heads"], notes["columns"]) == (16, 2, 20)
    written = json.loads((out / "config.json").read_text())
    assert (written["hidden_size"], written["num_attention_heads"], written["intermediate_size"]) == (16, 2, 20)
    tokens, mask = masked()
    own = read_dense(out, sizes_of(out))
    hidden = own.encode(tokens, mask)
    loader: Any = MegatronBertForMaskedLM if head == "tied" else MegatronBertModel
    stock, said = loader.from_pretrained(out, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["mismatched_keys"]
    given = {"input_ids": tokens, "attention_mask": mask}
    output = stock.eval()(**given, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states[-1], hidden, rtol=1e-4, atol=1e-5)
    if head == "none":
        return
    torch.testing.assert_close(output.logits, own(tokens, mask).logits, rtol=1e-4, atol=1e-4)
    ToOnnx().apply(open_source(out), tools(), tmp_path / "onnx")
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["last_hidden_state"], {name: value.numpy() for name, value in given.items()})
    np.testing.assert_allclose(found[1:], hidden[1:].detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "nothing to remove; give hidden, heads or columns"),
        ({"hidden": 32}, r"prune_hidden.hidden: 32 are to stay, but the model has 24"),
        ({"hidden": 12}, "prune_hidden.hidden: 12 is no multiple of the head size, 8"),
        ({"heads": 4}, "prune_hidden.heads: 4 are to stay, but the model has 3"),
        ({"heads": 2, "hidden": 8}, "heads: 2 heads of size 8 make 16, and hidden is 8; megatron_bert needs"),
        ({"heads": 2, "hidden": 24}, "heads: 2 heads of size 8 make 16, and hidden is 24"),
        ({"hidden": 16, "method": "magnitude", "components": "fisher"}, "components: fisher is for method: sp3"),
        ({"columns": 41}, "prune_hidden.columns: 41 are to stay, but the model has 40"),
    ],
)
def test_wrong_sizes_are_one_line(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        PruneHidden(**keys).check(open_source(dense_folder(tmp_path / "dense")))


def test_heads_alone_say_the_hidden_size(tmp_path: Path) -> None:
    config = sizes_of(dense_folder(tmp_path / "dense"))
    assert PruneHidden(heads=2).sizes(config) == (16, 2, 40)
    assert PruneHidden(columns=0.5).sizes(config) == (24, 3, 20)


def test_other_forms_are_refused(tmp_path: Path) -> None:
    compact = tiny_export(tmp_path / "compact")
    with pytest.raises(BadInput, match="this one is compact; put the step dense before it"):
        PruneHidden(hidden=16).check(open_source(compact))
    bert = hub_folder(tmp_path / "bert", "MaskedLM")
    with pytest.raises(BadInput, match=r"LayerNorms stand before the blocks; .*bert is of the model type bert"):
        PruneHidden(hidden=16).check(open_source(bert))
    with pytest.raises(BadInput, match="this one is hub"):
        PruneHidden(hidden=16).result_form("hub")
    dense = dense_folder(tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    for key, value, message in (
        ("quantization_config", {"bits": 4}, "is quantised; prune it before"),
        ("hidden_act", "relu", "hidden_act: gelu, .* has relu"),
        ("architectures", ["MegatronBertForTokenClassification"], "is MegatronBertForTokenClassification"),
    ):
        (dense / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(BadInput, match=message):
            PruneHidden(hidden=16).check(open_source(dense))
