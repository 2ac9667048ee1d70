"""The step `prune_weights` on dense exports and encoders of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from compress_models import tiny_export
from hub_folders import hub_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.prune.prunable_encoder import PrunableEncoder
from compress.prune.surgeon import InverseFisher, blocked, saliency, unblocked, without
from compress.prune.weights_step import PruneWeights
from compress.source import open_source
from exports.dense import Dense
from exports.files import write_json
from exports.forms import write_export
from exports.read import read_export
from scoring.architecture import read_model_type
from sharebert_common.errors import BadInput

WORDS = "bert.embeddings.word_embeddings.weight"
MATRICES = 12
"""Of two layers."""


def tools(scratch: Path, length: int = 12) -> Any:
    tokens = torch.randint(5, 250, (48, length), generator=torch.Generator().manual_seed(2))
    tokens[::3, length - 3 :] = 0
    return SimpleNamespace(calibration=lambda: tokens, seed=0, scratch=scratch / "scratch", say=lambda line: None)


def pruned(folder: Path, source: Path, **keys: Any) -> tuple[Path, dict[str, Any]]:
    step, out = PruneWeights(**keys), folder / "out"
    step.check(open_source(source))
    return out, step.apply(open_source(source), tools(folder), out)


def source_of(folder: Path, kind: str) -> Path:
    """A dense export, or a tiny BERT with the head `kind`."""
    if kind != "dense":
        return hub_folder(folder / "source", kind)
    write_export(read_export(tiny_export(folder / "compact")), folder / "source", Dense())
    return folder / "source"


def stock(folder: Path, kind: str = "") -> Any:
    """The model as transformers loads it."""
    head = "MaskedLM" if kind == "dense" else kind
    return getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel").from_pretrained(folder).eval()


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """What is pruned, by the names of the parameters."""
    found = {name: p.detach() for name, p in model.named_parameters() if ".layer." in name and p.dim() == 2}
    assert len(found) == MATRICES
    return found | {n: p.detach() for n, p in model.named_parameters() if n.endswith("word_embeddings.weight")}


@pytest.mark.parametrize("kind", ["", "MaskedLM", "SequenceClassification", "dense"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "surgeon"])
def test_transformers_loads_what_was_pruned_and_the_rest_as_it_was(tmp_path: Path, kind: str, method: str) -> None:
    source = source_of(tmp_path, kind)
    out, notes = pruned(tmp_path, source, method=method, sparsity=0.7, gradients=8, block=4, recomputations=2)
    assert read_model_type(out) == read_model_type(source)
    before, after = (stock(folder, kind) for folder in (source, out))
    ours = matrices(after)
    total = sum(matrix.numel() for matrix in ours.values())
    assert sum(int((matrix == 0).sum()) for matrix in ours.values()) == round(0.7 * total)
    assert notes["removed of the layers' matrices"] > 0
    for name, tensor in before.state_dict().items():
        found = after.state_dict()[name]
        if name not in ours and not (kind == "MaskedLM" and name.endswith("decoder.weight")):
            assert found.equal(tensor), name
        elif method != "surgeon":
            assert found.equal(torch.where(found == 0, 0.0, tensor)), name
    if kind == "MaskedLM":
        assert after.cls.predictions.decoder.weight.equal(ours[WORDS])


def test_magnitude_removes_the_smallest_of_all(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "source", "")
    before = matrices(stock(source))
    limit = torch.cat([m.abs().flatten() for m in before.values()]).sort().values
    out, _ = pruned(tmp_path, source, method="magnitude", sparsity=0.6)
    for name, matrix in matrices(stock(out)).items():
        assert matrix.equal(torch.where(before[name].abs() >= limit[round(0.6 * len(limit))], before[name], 0.0))


def test_wanda_scores_are_magnitudes_times_norms_of_inputs(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "source", "MaskedLM")
    tokens, model, inputs = tools(tmp_path).calibration(), stock(source, "MaskedLM"), {}
    layer, head = model.bert.encoder.layer[1], model.cls.predictions
    watched = {"output": layer.output.dense, "key": layer.attention.self.key, "head": head.decoder}
    norm = watched["norm"] = model.bert.embeddings.LayerNorm
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=(tokens != 0).long())
    real = {name: x[tokens != 0] for name, x in inputs.items()}
    prunable = PrunableEncoder(source)
    costs = prunable.costs(prunable.weights, tools(tmp_path))
    for name, short in (("output.dense", "output"), ("attention.self.key", "key")):
        norms = real[short].square().mean(0)
        torch.testing.assert_close(costs[f"bert.encoder.layer.1.{name}.weight"][3], norms, rtol=1e-4, atol=1e-5)
    of_head, words = real["head"].square().mean(0), tokens[tokens != 0]
    precisions = 1 / (real["norm"].var(1, correction=0) + norm.eps)
    for word in (7, 300):  # 300 never occurs
        here = words == word
        often = precisions[here].sum() if here.any() else precisions.mean()
        expected = (often * norm.weight.detach() ** 2 + max(1, int(here.sum())) * of_head) / len(words)
        torch.testing.assert_close(costs[WORDS][word], expected, rtol=1e-4, atol=1e-6)
    out, _ = pruned(tmp_path, source, sparsity=0.5, scope="matrix")
    name = "bert.encoder.layer.1.output.dense.weight"
    weight = model.get_parameter(name).detach()
    scores = weight.square() * real["output"].square().mean(0)
    kept = scores >= scores.flatten().sort().values[scores.numel() // 2]
    assert (stock(out, "MaskedLM").get_parameter(name).detach() != 0).equal(kept)


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_surgeon_is_that_of_explicit_gradients(tmp_path: Path, head: str) -> None:
    """Of the loss at masked words; of a classifier's scores times random numbers."""
    source = hub_folder(tmp_path / "source", head)
    model, name = stock(source, head), "bert.encoder.layer.0.intermediate.dense.weight"
    rows = PrunableEncoder(source).batches(tools(tmp_path), 4)
    weight, found = model.get_parameter(name), []
    generator = torch.Generator().manual_seed(tools(tmp_path).seed)
    for batch in rows:
        logits = model(input_ids=batch.tokens, attention_mask=batch.visible).logits
        if head == "MaskedLM":
            pairs = zip(logits, batch.labels, strict=True)
            by_row = torch.stack([nn.functional.cross_entropy(row, labels) for row, labels in pairs])
        else:
            by_row = (logits * torch.randn(logits.shape, generator=generator)).sum(1)
        found.append(torch.autograd.grad(by_row.mean(), weight)[0])
    gradients = torch.stack([blocked(gradient, 8) for gradient in found])
    inverse = InverseFisher(gradients.shape[1], 8, len(rows), 0.1 * float((gradients**2).mean()))
    inverse.add(gradients)
    weight = weight.detach()
    worth = unblocked(saliency(blocked(weight, 8), inverse), weight.shape)
    gone = worth < worth.flatten().sort().values[worth.numel() // 2]
    expected = unblocked(without(blocked(weight, 8), blocked(gone, 8), inverse), weight.shape)
    keys: dict[str, Any] = {"gradients": len(rows), "block": 8, "recomputations": 1}
    out, _ = pruned(tmp_path, source, method="surgeon", scope="matrix", **keys)
    torch.testing.assert_close(stock(out, head).get_parameter(name).detach(), expected, rtol=1e-3, atol=1e-4)


def test_two_of_four(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "source", "SequenceClassification")
    for method in ("magnitude", "wanda", "surgeon"):
        out, _ = pruned(tmp_path / method, source, method=method, scope="2:4", gradients=8, block=8)
        for matrix in matrices(stock(out, "SequenceClassification")).values():
            assert ((matrix.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_with_centre_words_become_the_mean_of_their_column(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "source", "")
    before, name = matrices(stock(source)), WORDS.removeprefix("bert.")
    out, _ = pruned(tmp_path, source, method="magnitude", scope="matrix", centre=True)
    after = matrices(stock(out))
    for matrix, words in ((key, key == name) for key in before):
        removed = after[matrix] == (before[name].mean(0) if words else 0)
        assert removed.float().mean() == pytest.approx(0.5, abs=0.01)
        torch.testing.assert_close(after[matrix][~removed], before[matrix][~removed], rtol=1e-5, atol=1e-7)


def test_dtypes_and_other_tensors_stay_and_a_stored_copy_of_the_words_is_pruned_too(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "source", "MaskedLM")
    file = source / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()} | {"other": torch.ones(2)}
    tensors["cls.predictions.decoder.weight"] = tensors[WORDS].clone()
    save_file(tensors, file, {"format": "pt"})
    out, _ = pruned(tmp_path, source, method="magnitude")
    after = load_file(out / "model.safetensors")
    assert after["cls.predictions.decoder.weight"].equal(after[WORDS])
    assert (after[WORDS] == 0).any()
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in tensors.items()}


def test_weights_of_further_modules_stay(tmp_path: Path) -> None:
    """As in folders of sentence-transformers; an ONNX file of the model before does not."""
    source = source_of(tmp_path, "")
    for name in ("2_Dense/model.safetensors", "onnx/model.onnx"):
        (source / name).parent.mkdir()
        (source / name).write_bytes(b"weights")
    out, _ = pruned(tmp_path, source, method="magnitude", sparsity=0.5)
    assert (out / "2_Dense/model.safetensors").read_bytes() == b"weights"
    assert not (out / "onnx/model.onnx").exists()


@pytest.mark.parametrize("kind", ["MaskedLM", "SequenceClassification", "dense"])
def test_movement_trains_what_stays(tmp_path: Path, kind: str) -> None:
    source = source_of(tmp_path, kind)
    model = PrunableEncoder(source)
    rows = model.batches(tools(tmp_path), 8)

    def loss(method: str, **keys: Any) -> float:
        out, _ = pruned(tmp_path / method, source, method=method, sparsity=0.7, **keys)
        found = matrices(stock(out, kind))
        zeros = sum(int((matrix == 0).sum()) for matrix in found.values())
        assert zeros == round(0.7 * sum(matrix.numel() for matrix in found.values()))
        with torch.no_grad():
            return sum(model.training_loss(stock(out, kind), batch).item() for batch in rows)

    assert loss("movement", steps=40, batch=8, lr=1e-2) < loss("magnitude") - 0.1


def test_movement_trains_a_classifier_on_the_labels_before(tmp_path: Path) -> None:
    source = source_of(tmp_path, "SequenceClassification")
    model, other = PrunableEncoder(source), stock(source, "SequenceClassification")
    (batch, *_) = model.batches(tools(tmp_path), 8)
    with torch.no_grad():
        other.classifier.bias += 0.3 * torch.arange(other.config.num_labels)
        before = model.before(batch.tokens, batch.visible, output_hidden_states=True)
        after = other(batch.tokens, batch.visible, output_hidden_states=True)
        found = model.training_loss(other, batch)
    by_hand = 0.0
    for row, logits in enumerate(after.logits):
        by_hand -= float(logits.log_softmax(0)[int(before.logits[row].argmax())]) / len(batch.tokens)
    torch.testing.assert_close(float(found), by_hand, rtol=1e-6, atol=0)
    assert model.training_loss(model.before, batch) > 0.1  # a gradient from the first step on


def test_a_source_that_cannot_be_taken_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.source import config_of

    source = hub_folder(tmp_path / "source", "")
    with pytest.raises(BadInput, match=r"movement trains on masked words or on one label for each row, and .* neither"):
        pruned(tmp_path, source, method="movement")
    classifier = hub_folder(tmp_path / "classifier", "SequenceClassification")
    write_json(classifier / "config.json", config_of(classifier) | {"problem_type": "multi_label_classification"})
    with pytest.raises(BadInput, match=r"on one label for each row, and .*classifier predicts neither"):
        pruned(tmp_path, classifier, method="movement")
    with pytest.raises(BadInput, match=r"sparsity: 0 makes a compact export store the zeros"):
        pruned(tmp_path, source, sparsity=0)
    with pytest.raises(BadInput, match="not an ONNX file"):
        PruneWeights().result_form("onnx")
    other = PrunableEncoder(source)
    other.model.embeddings.LayerNorm = nn.Identity()
    other.model.encoder.layer[0].attention.output.LayerNorm = nn.LayerNorm(7)
    with pytest.raises(BadInput, match="wanda needs a LayerNorm after the embeddings"):
        other.first_norm()
    tensors = load_file(source / "model.safetensors")
    tensors["word_embeddings"] = tensors.pop("embeddings.word_embeddings.weight")
    with monkeypatch.context() as patch:  # transformers may load a tensor under another name than the file has
        patch.setattr("compress.prune.prunable_encoder.read_weights", lambda _: tensors)
        with pytest.raises(BadInput, match=r"no tensor of its file has the name of embeddings.word_embeddings.weight"):
            pruned(tmp_path, source)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"source: 'embeddings.word_embeddings.weight' is not among its weights"):
        pruned(tmp_path, source)
    write_json(source / "config.json", config_of(source) | {"quantization_config": {}})
    with pytest.raises(BadInput, match="is quantised; prune the model before"):
        pruned(tmp_path, source)
