"""The step `prune_structure`: the oracle is a dense model in which removed parts are zero."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress_models import export_with_dead_parts, tiny_export, tokens_of
from tiny_models import tiny_model, tiny_tokenizer

from compress.calibrate import Batch, batches, calibration_batches, hidden_states, objective
from compress.prune.structure import fisher, least_important, rescaled
from compress.prune.structure_step import PruneStructure, without_layers
from compress.source import open_source
from compress.steps import step_of
from exports.dense_model import DenseBert, dense_tensors
from exports.export import Export
from exports.forms import write_export
from exports.kinds import Classifier
from exports.read import load_model, read_export
from exports.weight_source import TensorWeights
from sharebert import ShareBertConfig, ShareBertForMaskedLM
from sharebert_common.errors import BadInput


def tools(rows: int = 40) -> Any:
    tokens = torch.randint(5, 250, (rows, 12), generator=torch.Generator().manual_seed(2))
    tokens[::3, 9:] = 0
    return SimpleNamespace(calibration=lambda: tokens, seed=0)


def pruned(folder: Path, keys: dict[str, Any], **changes: Any) -> tuple[ShareBertForMaskedLM, Path, dict[str, Any]]:
    source = tiny_export(folder / "source", **changes)
    step, out = PruneStructure(**keys), folder / "out"
    step.check(open_source(source))
    notes = step.apply(open_source(source), tools(), out)
    return load_model(source), out, notes


def masked(config: ShareBertConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Words, and 0 where there is padding."""
    tokens = tokens_of(config)
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    return tokens, mask


def masked_dense(model: ShareBertForMaskedLM, small: ShareBertForMaskedLM, gone: Sequence[int] = ()) -> DenseBert:
    """The whole model, written out, with zeros where the pruned one has nothing (as in the layers `gone`), and with its
    factors and biases."""
    config, after = model.config, small.config
    dense = DenseBert(dataclasses.replace(config, mlm_head="none"))
    tensors = dict(dense_tensors(model))
    dense.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("cls.")})
    heads = torch.zeros(config.num_attention_heads)
    heads[list(after.kept_heads or range(len(heads)))] = 1
    rows = heads.repeat_interleave(config.head_size)
    columns = torch.zeros(config.intermediate_size)
    columns[list(after.kept_columns or range(len(columns)))] = 1
    rows_scale, columns_scale = rows.clone(), columns.clone()
    if small.sharebert.kept_attention_scale is not None:
        rows_scale[rows == 1] = small.sharebert.kept_attention_scale.detach()
    if small.sharebert.kept_inner_scale is not None:
        columns_scale[columns == 1] = small.sharebert.kept_inner_scale.detach()
    with torch.no_grad():
        dense.bert.embeddings.token_type_embeddings.weight.copy_(small.sharebert.token_type_embeddings.weight)
        left = [layer for number, layer in enumerate(dense.bert.encoder.layer) if number not in gone]
        for number in gone:
            for linear in (dense.bert.encoder.layer[number].attention.output, dense.bert.encoder.layer[number].output):
                linear.dense.weight.zero_()
                linear.dense.bias.zero_()
        for layer, own in zip(left, small.sharebert.layers, strict=True):
            layer.attention.output.dense.weight *= rows_scale  # [out, in]
            layer.attention.output.dense.bias.copy_(own.attention_output_bias)
            layer.output.dense.weight *= columns_scale
            layer.output.dense.bias.copy_(own.output_bias)
    return dense.eval()


@pytest.mark.parametrize("sharing", ["veps", "eps"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("layers", [3, 1])
def test_the_sliced_model_is_the_masked_dense_model(tmp_path: Path, sharing: str, rescale: bool, layers: int) -> None:
    keys = {"heads": 2, "columns": 0.5, "layers": layers, "rescale": rescale}
    model, out, notes = pruned(tmp_path, keys, sharing=sharing, num_hidden_layers=3)
    small, gone = load_model(out), notes.get("layers removed", ())
    assert len(gone) == 3 - layers
    assert (small.config.heads, small.config.inner_size, notes["columns"]) == (2, 20, 20)
    tokens, mask = masked(model.config)
    with torch.no_grad():
        expected = masked_dense(model, small, gone)(tokens, mask).hidden
        found = small.sharebert(tokens, mask, pool=False).hidden
        kept = small.sharebert(tokens, mask, pool=False).hidden
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found.equal(kept)
    assert small.sharebert.layer_weights(pooler=False).of_layer(0).query.shape == (24, 16)


def test_importance_is_the_squared_gradient_of_each_row(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    model, (batch,) = load_model(source), batches(tools().calibration()[:3], source / "tokenizer.json", 0)
    found = fisher(model, [batch], 0)
    heads, epsilon = model.config.heads, 1e-2
    by_hand = torch.zeros(heads, heads, dtype=torch.float64)
    double = model.double()
    for row in range(3):
        one = type(batch)(*(part[row : row + 1] for part in batch[:3]))
        gradient = torch.zeros(heads, dtype=torch.float64)
        for head in range(heads):
            values = []
            for change in (-epsilon, epsilon):
                factors = torch.ones(1, heads, dtype=torch.float64)
                factors[0, head] += change
                hidden = hidden_states(double, one, heads=factors)
                values.append(objective(double, one, hidden, torch.Generator()).item())
            gradient[head] = (values[1] - values[0]) / (2 * epsilon)
        by_hand += torch.outer(gradient, gradient)
    torch.testing.assert_close(found.heads, by_hand, rtol=2e-2, atol=1e-6)


def test_removal_counts_what_two_parts_do_together() -> None:
    # parts 0 and 1 are copies of each other: either may go, both may not
    matrix = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.1, 0.0], [0.0, 0.0, 2.5]])
    assert least_important(matrix, 2) == [0, 2]


def test_parts_that_add_nothing_are_those_that_go(tmp_path: Path) -> None:
    source = export_with_dead_parts(tmp_path / "source", head=1, columns=[3, 20, 39], layer=1)
    out = tmp_path / "out"
    notes = PruneStructure(heads=2, columns=37, layers=2).apply(open_source(source), tools(), out)
    assert (notes["layers removed"], notes["heads kept"]) == ([1], [0, 2])
    columns = read_export(out).config.kept_columns
    assert columns == tuple(number for number in range(40) if number not in (3, 20, 39))
    tokens = tokens_of(read_export(out).config)
    with torch.no_grad():
        torch.testing.assert_close(load_model(out).logits(tokens), load_model(source).logits(tokens))


def test_factors_are_those_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, 6, generator=generator, dtype=torch.float64
    )
    x -= x.mean(0)
    matrix = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    kept = torch.tensor([0, 2, 3])
    scale = rescaled(x.t() @ x / len(x), matrix, kept)
    design = torch.stack([torch.outer(x[:, k], matrix[k]).flatten() for k in kept], 1)
    by_numpy = torch.linalg.lstsq(design, (x @ matrix).flatten()).solution
    torch.testing.assert_close(scale, by_numpy, rtol=0.05, atol=0.05)
    error = ((design @ scale) - (x @ matrix).flatten()).square().sum()
    assert error < ((design.sum(1)) - (x @ matrix).flatten()).square().sum()


def test_layers_are_removed_and_numbered_anew(tmp_path: Path) -> None:
    model, out, notes = pruned(tmp_path, {"layers": 2, "rescale": False}, num_hidden_layers=3)
    small = load_model(out)
    (gone,) = notes["layers removed"]
    kept = [number for number in range(3) if number != gone]
    for number, layer in zip(kept, small.sharebert.layers, strict=True):
        for name, tensor in layer.named_parameters():
            assert tensor.equal(model.sharebert.layers[number].get_parameter(name))


@pytest.mark.parametrize("gains", [{}, {"branch_gain": 0.4}, {"branch_gain": 0.4, "learned_branch_gains": True}])
def test_what_a_removed_layer_added_on_average_is_added_by_the_layer_before(gains: dict[str, Any]) -> None:
    """Over that layer's gain, so that the stream gets the mean itself."""
    model = tiny_model(num_hidden_layers=3, **gains).eval()
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    mean = torch.randn(24)
    inputs: Any = SimpleNamespace(means={(1, "branches"): mean})
    after = without_layers(tensors, [1], inputs, model.config.branch_gain)
    gain = model.sharebert.layers[0].gain(1) or 1.0
    name = "sharebert.layers.0.output_bias"
    torch.testing.assert_close((after[name] - tensors[name]) * gain, mean)
    batch = Batch(tokens_of(model.config), torch.ones(3, 9), torch.zeros(3, 9))
    hidden = model.sharebert(batch.tokens, pool=False).hidden
    torch.testing.assert_close(hidden_states(model, batch), hidden, rtol=1e-5, atol=1e-5)


def test_transformers_loads_it_and_saves_a_copy(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    _, out, _ = pruned(tmp_path, {"heads": 1, "columns": 7, "layers": 1}, mlm_head="tied")
    expected, tokens = load_model(out), tokens_of(read_export(out).config)
    model = AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=True).eval()
    torch.testing.assert_close(model(tokens).logits, expected.logits(tokens))
    model.save_pretrained(tmp_path / "copy")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "copy", trust_remote_code=True).eval()
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    assert again.config.kept_columns == expected.config.kept_columns


def test_a_second_pruning_counts_from_the_first(tmp_path: Path) -> None:
    _, out, _ = pruned(tmp_path, {"heads": 2, "columns": 30})
    PruneStructure(heads=1, columns=10).apply(open_source(out), tools(), tmp_path / "again")
    first, second = read_export(out).config, read_export(tmp_path / "again").config
    assert set(second.kept_heads or ()) < set(first.kept_heads or ())
    assert set(second.kept_columns or ()) < set(first.kept_columns or ())
    assert math.isfinite(objective_of(tmp_path / "again"))


def objective_of(folder: Path) -> float:
    model, (batch, *_) = load_model(folder), batches(tools().calibration(), folder / "tokenizer.json", 0)
    return objective(model, batch, hidden_states(model, batch), torch.Generator()).item()


def test_training_reaches_every_parameter(tmp_path: Path) -> None:
    _, out, _ = pruned(tmp_path, {"heads": 2, "columns": 20}, mlm_head="tied")
    model, (batch, *_) = load_model(out), batches(tools().calibration(), out / "tokenizer.json", 0)
    model.train()
    objective(model, batch, hidden_states(model, batch), torch.Generator()).backward()
    for name in ("kept_attention_scale", "kept_inner_scale", "word_embeddings.weight", "factor_linear_all.weight"):
        gradient = model.sharebert.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name


def test_stock_transformers_loads_fewer_columns_and_refuses_fewer_heads(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    from exports.dense import Dense

    _, out, _ = pruned(tmp_path, {"columns": 13, "layers": 1})
    write_export(read_export(out), tmp_path / "dense", Dense())
    tokens = tokens_of(read_export(out).config)
    stock = AutoModelForMaskedLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(stock(tokens).logits, load_model(out).logits(tokens), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["intermediate_size"] == 13
    _, few, _ = pruned(tmp_path / "few", {"heads": 1})
    with pytest.raises(BadInput, match="1 of 3 heads are left"):
        write_export(read_export(few), tmp_path / "refused", Dense())


CUT = {"prune_structure": {"heads": 2, "columns": 13, "layers": 1}}
SHAPES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "tied": ([CUT], {"mlm_head": "tied"}),
    "untied": ([CUT], {}),
    "eps": ([CUT], {"sharing": "eps", "mlm_head": "tied"}),
    "headless": ([CUT], {"mlm_head": "none"}),
    "layers share": ([{"prune_structure": {"layers": 1}}], {"sharing": "layers", "mlm_head": "tied"}),
    "low rank": ([{"prune_structure": {"layers": 1}}, {"low_rank": {"rank": 4}}], {"mlm_head": "tied"}),
    "sparse": ([CUT, {"prune_weights": {"method": "magnitude"}}], {"mlm_head": "tied"}),
}
"""Steps and the source that they prune."""


def after_steps(folder: Path, source: Path, steps: Sequence[dict[str, Any]]) -> Path:
    for number, given in enumerate(steps):
        _, step = step_of(given, f"steps.{number}")
        step.check(open_source(source))
        out = folder / f"{number}"
        step.apply(open_source(source), tools(), out)
        source = out
    return source


def by_onnx(source: Path, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of the ONNX file that the step `onnx` makes, by their names."""
    runtime = pytest.importorskip("onnxruntime")
    out = after_steps(source.parent / "onnx", source, [{"onnx": {}}])
    session = runtime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


@pytest.mark.parametrize(
    "name", [next(iter(SHAPES)), *(pytest.param(n, marks=pytest.mark.slow) for n in [*SHAPES][1:])]
)
def test_onnx_holds_every_shape(tmp_path: Path, name: str) -> None:
    steps, changes = SHAPES[name]
    out = after_steps(tmp_path, tiny_export(tmp_path / "source", **changes), steps)
    model = load_model(out)
    tokens, mask = masked(model.config)
    found = by_onnx(out, tokens, mask)
    with torch.no_grad():
        encoded = model.sharebert(tokens, mask)
        expected = {"last_hidden_state": encoded.hidden, "pooler_output": encoded.pooled.tanh()}
        if model.mlm_head is not None:
            expected["logits"] = model.logits(tokens, mask)
    assert found.keys() == expected.keys()
    for output, tensor in expected.items():
        assert (found[output] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), output


def classifier_export(folder: Path, pooling: str) -> Path:
    model, generator = tiny_model(mlm_head="none"), torch.Generator().manual_seed(0)
    head = {"classifier.weight": torch.randn(3, 24, generator=generator), "classifier.bias": torch.ones(3)}
    kind = Classifier(("a", "b", "c"), pooling=pooling)
    weights = TensorWeights(model.state_dict() | head)
    write_export(Export(model.config, kind, weights, tokenizer=tiny_tokenizer(folder.parent)), folder)
    return folder


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_importance_in_a_classifier_is_that_for_what_it_reads(tmp_path: Path, pooling: str) -> None:
    """With a pooler it reads the first position alone."""
    folder = classifier_export(tmp_path / "source", pooling)
    tokens = tokens_of(read_export(folder).config, 4)
    tools: Any = SimpleNamespace(calibration=lambda: tokens, seed=0)
    (batch,) = calibration_batches(open_source(folder), tools)
    model = load_model(folder)
    hidden = hidden_states(model, batch).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(model, batch, hidden, torch.Generator().manual_seed(0)), hidden)
    read = gradient.abs().sum(-1) > 0
    assert read[:, 0].all()
    assert read[:, 1:].any() == (pooling == "mean")


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_onnx_holds_a_pruned_classifier(tmp_path: Path, pooling: str) -> None:
    from sharebert.hub import ShareBertForSequenceClassification

    out = after_steps(tmp_path, classifier_export(tmp_path / "source", pooling), [CUT])
    tokens, mask = masked(read_export(out).config)
    expected = ShareBertForSequenceClassification.from_pretrained(out).eval()(tokens, attention_mask=mask).logits
    torch.testing.assert_close(by_onnx(out, tokens, mask)["logits"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "changes", "message"),
    [
        ({"heads": 4}, {}, "prune_structure.heads: 4 are to stay, but the model has 3"),
        ({}, {}, "nothing to remove"),
        ({"heads": 1}, {"sharing": "layers"}, "this one has layers; give layers alone"),
        ({"layers": 1}, {"sharing": "none"}, "sharing: none"),
        ({"layers": 1}, {"intermediate_size": 20, "ffn_pairs": 2}, "one feed-forward pair, this one has ffn_pairs: 2"),
    ],
)
def test_wrong_keys_are_one_line(tmp_path: Path, keys: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        PruneStructure(**keys).check(open_source(tiny_export(tmp_path / "source", **changes)))


@pytest.mark.parametrize("kept", [[], [1, 1], [3], [True], "01"])
def test_a_config_with_heads_that_do_not_exist_is_refused(kept: Any) -> None:
    from sharebert.config import ShareBertError

    with pytest.raises(ShareBertError, match="kept_heads"):
        ShareBertConfig(vocab_size=250, hidden_size=24, intermediate_size=40, factor_size=8, num_attention_heads=3,
                        kept_heads=kept)  # fmt: skip


def test_an_encoder_without_a_head_is_pruned_by_its_hidden_states(tmp_path: Path) -> None:
    _, out, _ = pruned(tmp_path, {"heads": 2}, mlm_head="none")
    assert isinstance(read_export(out), Export)
    assert load_model(out).config.heads == 2
