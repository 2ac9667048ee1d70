"""An export as a value: what is written is read back, whatever its kind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor

from exports.compact import Compact
from exports.dense import Dense
from exports.export import Export
from exports.forms import FORMS, Form, write_export
from exports.kinds import Classifier, HeadlessEncoder, MaskedLM
from exports.read import load_model, read_export
from exports.tensor_file import Spec
from exports.weight_source import TensorWeights, WeightSource
from sharebert_common.errors import BadInput


def classifier(folder: Path) -> Export:
    model = tiny_model(mlm_head="none")
    tensors = {"classifier.weight": torch.randn(3, 24), "classifier.bias": torch.randn(3)}
    return Export(
        model.config,
        Classifier(("bad", "so so", "good"), "single_label_classification", "mean"),
        TensorWeights(model.state_dict() | tensors),
        tokenizer=tiny_tokenizer(folder),
    )


def export_of(kind: str, folder: Path) -> Export:
    if kind == "classifier":
        return classifier(folder)
    model = tiny_model(mlm_head="tied" if kind == "masked" else "none")
    return Export.of_model(model, tokenizer=tiny_tokenizer(folder))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["masked", "headless", "classifier"])
def test_the_value_comes_back_and_is_written_again_byte_for_byte(tmp_path: Path, kind: str) -> None:
    given = dataclasses.replace(
        export_of(kind, tmp_path),
        card_sections={"Data": "Made-up words.", "Training": "None."},
        provenance={"run": "none", "step": "7"},
    )
    write_export(given, tmp_path / "export")
    read = read_export(tmp_path / "export")
    assert (read.config, read.kind) == (given.config, given.kind)
    assert (read.card_sections, read.provenance) == (given.card_sections, given.provenance)
    assert read.weights.specs == given.weights.specs
    for name, (_, shape) in given.weights.specs.items():
        count = torch.Size(shape).numel()
        assert torch.equal(read.weights.read(name, 0, count), given.weights.read(name, 0, count))
    write_export(read, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "export")


def test_a_classifier_keeps_its_labels_and_has_no_dense_form(tmp_path: Path) -> None:
    write_export(classifier(tmp_path), tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config["architectures"] == ["ShareBertForSequenceClassification"]
    assert config["id2label"] == {"0": "bad", "1": "so so", "2": "good"}
    card = (tmp_path / "export/README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    read = read_export(tmp_path / "export")
    with pytest.raises(BadInput, match="a classifier has no dense form"):
        write_export(read, tmp_path / "dense", Dense())
    write_export(read.without_head(), tmp_path / "dense", Dense())
    config["id2label"] = {"0": "bad"}
    (tmp_path / "export/config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"config.json: id2label: names 1 labels, but the classifier has 3"):
        read_export(tmp_path / "export")


def test_an_encoder_alone(tmp_path: Path) -> None:
    model = tiny_model()
    export = Export.of_model(model).without_head()
    assert export.kind == HeadlessEncoder()
    assert Export.of_model(model).kind == MaskedLM()
    write_export(export, tmp_path / "export")
    loaded = load_model(tmp_path / "export")
    assert loaded.mlm_head is None
    assert torch.equal(loaded.sharebert.pooler_bias, model.sharebert.pooler_bias)


@pytest.mark.parametrize("name", FORMS)
def test_an_export_of_any_form_is_replaced(tmp_path: Path, name: str) -> None:
    """What may be replaced follows from the forms."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export/config.json").write_text(json.dumps({"model_type": FORMS[name].model_type}))
    write_export(Export.of_model(tiny_model()), tmp_path / "export")
    load_model(tmp_path / "export")


class Rounded:
    """Matrices rounded to 8 bits a row: a quantised source by the protocol as it is."""

    def __init__(self, source: WeightSource) -> None:
        self.source = source
        self.specs = source.specs
        self.scales: dict[str, Tensor] = {}
        for name, (_, shape) in source.specs.items():
            if len(shape) == 2:
                rows = source.read(name, 0, shape[0] * shape[1]).view(shape)
                self.scales[name] = rows.abs().amax(1) / 127

    def read(self, name: str, first: int, count: int) -> Tensor:
        values = self.source.read(name, first, count)
        if name not in self.scales:
            return values
        scales = self.scales[name][torch.arange(first, first + count) // self.specs[name].shape[1]]
        return (values / scales).round() * scales


@pytest.mark.parametrize("form", [Compact(), Dense()])
def test_a_step_gives_an_export_with_another_weight_source(tmp_path: Path, form: Form) -> None:
    export = Export.of_model(tiny_model())
    rounded = dataclasses.replace(export, weights=Rounded(export.weights))
    write_export(rounded, tmp_path / "export", form)
    if isinstance(form, Compact):
        weight = load_model(tmp_path / "export").sharebert.word_embeddings.weight
        whole = weight.detach() / rounded.weights.scales["sharebert.word_embeddings.weight"][:, None]  # type: ignore[attr-defined]
        torch.testing.assert_close(whole, whole.round(), atol=1e-3, rtol=0)
        assert rounded.weights.specs["sharebert.word_embeddings.weight"] == Spec(torch.float32, (256, 8))
