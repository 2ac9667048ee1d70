"""Exports in the hands of transformers: Auto classes with remote code, pipelines, padding, Trainer, copies."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bare_environment import try_exports
from remote_code import remote_code_cache
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor

from exports.dense import Dense
from exports.export import Export
from exports.forms import write_export
from exports.kinds import Classifier
from exports.read import load_model
from exports.weight_source import TensorWeights
from sharebert import ShareBertForMaskedLM

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

TEXTS = ["w1 w2 [MASK] w4", "w5"]
REMOTE: dict[str, Any] = {"trust_remote_code": True}


def export(out: Path, **changes: Any) -> tuple[Path, ShareBertForMaskedLM]:
    model = tiny_model(**changes).eval()
    write_export(Export.of_model(model, tokenizer=tiny_tokenizer(out.parent)), out)
    return out, model


@pytest.fixture(scope="module", autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with remote_code_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShareBertForMaskedLM]:
    return export(tmp_path_factory.mktemp("hub") / "export")


def batch(folder: Path) -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **REMOTE)
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


def test_tokenizer(exported: tuple[Path, ShareBertForMaskedLM]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[0], **REMOTE)
    assert tokenizer.model_max_length == 16
    assert batch(exported[0])["input_ids"].tolist() == [[2, 6, 7, 4, 9, 3], [2, 10, 3, 0, 0, 0]]
    assert batch(exported[0])["attention_mask"].tolist() == [[1] * 6, [1] * 3 + [0] * 3]
    assert tokenizer.mask_token_id == 4
    assert len(tokenizer("w1 " * 30, truncation=True)["input_ids"]) == 16


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_auto_models_give_what_the_model_gives(tmp_path: Path, head: str) -> None:
    folder, model = export(tmp_path / "export", mlm_head=head, sharing="eps" if head == "tied" else "veps")
    inputs = batch(folder)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = model.sharebert(ids, mask)
    masked_lm = transformers.AutoModelForMaskedLM.from_pretrained(folder, **REMOTE)
    assert not masked_lm.training
    torch.testing.assert_close(masked_lm(**inputs).logits, model.logits(ids, mask))

    encoder = transformers.AutoModel.from_pretrained(folder, **REMOTE)
    output = encoder(**inputs, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, expected.hidden)
    torch.testing.assert_close(output.pooler_output, expected.pooled)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(output.hidden_states[-1], expected.hidden)
    as_tuple = encoder(**inputs, return_dict=False)
    torch.testing.assert_close(as_tuple[0], expected.hidden)


def test_gains_and_pairs_travel_with_the_code(tmp_path: Path) -> None:
    options = {"intermediate_size": 20, "ffn_pairs": 2, "branch_gain": 0.4, "learned_branch_gains": True}
    folder, model = export(tmp_path / "export", **options)
    tokens = torch.randint(5, 250, (2, 9))
    found = transformers.AutoModelForMaskedLM.from_pretrained(folder, **REMOTE)
    torch.testing.assert_close(found(tokens).logits, model.logits(tokens))
    found.save_pretrained(tmp_path / "copy")
    copy = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "copy", **REMOTE)
    torch.testing.assert_close(copy(tokens).logits, model.logits(tokens))


def test_masked_lm_loss_is_the_mean_over_labels(exported: tuple[Path, ShareBertForMaskedLM]) -> None:
    folder, model = exported
    inputs = batch(folder)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, 3], labels[1, 1] = 8, 10
    masked_lm = transformers.AutoModelForMaskedLM.from_pretrained(folder, **REMOTE)
    logits = model.logits(inputs["input_ids"], inputs["attention_mask"])
    expected = F.cross_entropy(torch.stack([logits[0, 3], logits[1, 1]]), torch.tensor([8, 10]))
    torch.testing.assert_close(masked_lm(**inputs, labels=labels).loss, expected)


def test_padding_changes_nothing(exported: tuple[Path, ShareBertForMaskedLM]) -> None:
    inputs = batch(exported[0])
    encoder = transformers.AutoModel.from_pretrained(exported[0], **REMOTE)
    alone = encoder(input_ids=inputs["input_ids"][1:, :3])
    padded = encoder(**inputs)
    torch.testing.assert_close(padded.last_hidden_state[1:, :3], alone.last_hidden_state)


def test_fill_mask_pipeline(exported: tuple[Path, ShareBertForMaskedLM]) -> None:
    folder, model = exported
    fill = transformers.pipeline("fill-mask", model=str(folder), **REMOTE)
    inputs = batch(folder)
    best = model.logits(inputs["input_ids"][:1])[0, 3].softmax(-1).max(-1)
    first = fill(TEXTS[0])[0]
    assert first["token"] == best.indices.item()
    assert first["score"] == pytest.approx(best.values.item(), rel=1e-4)


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
@pytest.mark.parametrize("labels", [1, 3])
def test_classification(exported: tuple[Path, ShareBertForMaskedLM], pooling: str, labels: int) -> None:
    folder, model = exported
    inputs = batch(folder)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, classifier_pooling=pooling, **REMOTE
    )
    assert not classifier.classifier.bias.any()
    encoded = model.sharebert(inputs["input_ids"], inputs["attention_mask"])
    hidden = encoded.hidden
    pooled = encoded.pooled if pooling == "pooler" else torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0)])
    expected = F.linear(pooled, classifier.classifier.weight)
    given = torch.tensor([0.5, 2.0]) if labels == 1 else torch.tensor([0, 2])
    output = classifier(**inputs, labels=given)
    torch.testing.assert_close(output.logits, expected)
    loss = F.mse_loss(expected[:, 0], given) if labels == 1 else F.cross_entropy(expected, given)
    torch.testing.assert_close(output.loss, loss)


def test_export_of_a_fine_tuned_classifier(tmp_path: Path) -> None:
    model = tiny_model(mlm_head="none").eval()
    classifier = {"classifier.weight": torch.randn(2, 24), "classifier.bias": torch.randn(2)}
    value = Export(
        model.config,
        Classifier(("bad", "good"), pooling="mean"),
        TensorWeights(model.state_dict() | classifier),
        tokenizer=tiny_tokenizer(tmp_path),
    )
    write_export(value, tmp_path / "export")
    loaded, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "export", output_loading_info=True, **REMOTE
    )
    assert not report["missing_keys"]
    ids = torch.tensor([[2, 7, 9, 3]])
    pooled = model.sharebert(ids).hidden.mean(1)
    expected = F.linear(pooled, classifier["classifier.weight"], classifier["classifier.bias"])
    torch.testing.assert_close(loaded(ids).logits, expected)
    judge = transformers.pipeline("text-classification", model=str(tmp_path / "export"), **REMOTE)
    assert judge("w2 w4")[0]["label"] == ["bad", "good"][int(expected.argmax())]


def test_copy_by_save_pretrained_is_as_good(exported: tuple[Path, ShareBertForMaskedLM], tmp_path: Path) -> None:
    folder, model = exported
    copy = tmp_path / "copy"
    transformers.AutoModelForMaskedLM.from_pretrained(folder, **REMOTE).save_pretrained(copy)
    transformers.AutoTokenizer.from_pretrained(folder, **REMOTE).save_pretrained(copy)
    inputs = batch(copy)
    again = transformers.AutoModelForMaskedLM.from_pretrained(copy, **REMOTE)
    expected = model.logits(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(again(**inputs).logits, expected)
    ours = load_model(copy)
    assert ours.config == model.config
    torch.testing.assert_close(ours.logits(inputs["input_ids"], inputs["attention_mask"]), expected)


def test_new_model_from_config_starts_as_initialize_does(exported: tuple[Path, ShareBertForMaskedLM]) -> None:
    config = transformers.AutoConfig.from_pretrained(exported[0], num_hidden_layers=1, **REMOTE)
    model = transformers.AutoModelForMaskedLM.from_config(config, **REMOTE)
    p = dict(model.named_parameters())
    assert not any("layers.1" in name for name in p)
    assert all(torch.isfinite(value).all() for value in p.values())
    assert p["sharebert.factor_linear_all.weight"].std().item() == pytest.approx(8**-0.5, rel=0.25)
    assert p["sharebert.word_embeddings.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert (p["sharebert.layers.0.ffn_norm.weight"] == 1).all()
    assert not p["sharebert.layers.0.query_bias"].any()


def test_what_the_model_cannot_do_is_said(exported: tuple[Path, ShareBertForMaskedLM], tmp_path: Path) -> None:
    model = transformers.AutoModelForMaskedLM.from_pretrained(exported[0], **REMOTE)
    ids = torch.tensor([[2, 5, 3]])
    with pytest.raises(ValueError, match="output_attentions: not supported"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="its size is fixed"):
        model.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="input_ids: required"):
        model()
    headless, _ = export(tmp_path / "headless", mlm_head="none")
    with pytest.raises(ValueError, match="no MLM head"):
        transformers.AutoModelForMaskedLM.from_pretrained(headless, **REMOTE)
    assert transformers.AutoModel.from_pretrained(headless, **REMOTE)(ids).pooler_output.shape == (1, 24)


def test_trainer_fine_tunes(exported: tuple[Path, ShareBertForMaskedLM], tmp_path: Path) -> None:
    """A task for which the embeddings must learn: rows of words of the lower half, and of the upper half."""
    pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, 120, (64, 8), generator=generator)
    rows = [{"input_ids": ids + 120 * label, "labels": label} for ids in words for label in (0, 1)]
    transformers.set_seed(0)  # the classifier starts at random
    model = transformers.AutoModelForSequenceClassification.from_pretrained(exported[0], num_labels=2, **REMOTE)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=100,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3


@pytest.mark.parametrize("form", ["compact", "dense", "headless"])
def test_what_the_model_card_shows_runs(tmp_path: Path, form: str) -> None:
    folder, model = export(tmp_path / "export", mlm_head="none" if form == "headless" else "untied")
    if form == "dense":
        folder = tmp_path / "dense"
        write_export(Export.of_model(model, tokenizer=tmp_path / "tokenizer.json"), folder, Dense())
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = "\n".join(blocks).replace("path/to/this/folder", str(folder))
    found: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), found)
    assert found["outputs"][0].shape[-1] == (24 if form == "headless" else 256)
    assert ("fill" in found) == (form != "headless")


@pytest.mark.slow
def test_exports_load_with_torch_transformers_and_safetensors_alone(
    exported: tuple[Path, ShareBertForMaskedLM], tmp_path: Path
) -> None:
    """In an environment of its own; what runs there stands in `bare_environment.py`."""
    folder, model = exported
    write_export(Export.of_model(model, tokenizer=folder.parent / "tokenizer.json"), tmp_path / "dense", Dense())
    try_exports(folder, tmp_path / "dense", tmp_path)


def test_remote_code_needs_no_other_package(exported: tuple[Path, ShareBertForMaskedLM]) -> None:
    """What transformers' own check finds missing, where nothing but torch and safetensors is installed."""
    utils = transformers.dynamic_module_utils
    files = [exported[0] / "hub.py", *map(Path, utils.get_relative_import_files(exported[0] / "hub.py"))]
    assert {path.name for path in files} >= {"hub.py", "encoder.py", "virtual.py", "kernels.py"}
    for path in files:
        needed = {name.partition(".")[0] for name in utils.get_imports(path)}
        assert needed - set(sys.stdlib_module_names) <= {"torch", "safetensors", "tokenizers", "transformers"}, path
