"""Folders that transformers saved from a compact export: every command takes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_code import remote_code_cache
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_tokenizer

from exports.dense import Dense
from exports.export import Export
from exports.fill import fill
from exports.forms import write_export
from exports.kinds import Classifier, HeadlessEncoder, MaskedLM
from exports.read import load_model, read_config, read_export
from scoring.encoders import open_encoder
from scoring.recipe import FineTuneRecipe
from sharebert_cli import main
from sharebert_common.errors import BadInput

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
REMOTE: dict[str, Any] = {"trust_remote_code": True}


@pytest.fixture(scope="module", autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with remote_code_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    write_export(Export.of_model(tiny_model(), tokenizer=tiny_tokenizer(folder)), folder / "export")
    return folder / "export"


def saved(export: Path, out: Path, auto_class: str, **settings: Any) -> Path:
    """A copy by `save_pretrained`, with a key of its user's in the config."""
    model = getattr(transformers, auto_class).from_pretrained(export, **REMOTE, **settings)
    model.config.my_note = {"a": 1}
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(export, **REMOTE).save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("auto_class", "settings", "kind"),
    [
        ("AutoModel", {}, HeadlessEncoder()),
        ("AutoModelForMaskedLM", {}, MaskedLM()),
        ("AutoModelForSequenceClassification", {}, Classifier(("LABEL_0", "LABEL_1"))),
        ("AutoModelForSequenceClassification", {"num_labels": 1}, Classifier(("LABEL_0",))),
        (
            "AutoModelForSequenceClassification",
            {"id2label": {0: "bad", 1: "so so", 2: "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}},
            Classifier(("bad", "so so", "good")),
        ),
    ],
)
def test_every_class_is_read_and_written_again(
    export: Path, tmp_path: Path, auto_class: str, settings: dict[str, Any], kind: object
) -> None:
    folder = saved(export, tmp_path / "saved", auto_class, **settings)
    read = read_export(folder)
    assert read.kind == kind
    assert read_config(folder) == read.config
    assert (read.config.mlm_head == "none") == (auto_class != "AutoModelForMaskedLM")
    assert read.other_keys == {"my_note": {"a": 1}}
    ids = torch.tensor([[2, 7, 9, 3]])
    expected = load_model(export).sharebert(ids).hidden
    torch.testing.assert_close(load_model(folder).sharebert(ids).hidden, expected)

    assert main(["consolidate", str(folder), str(tmp_path / "compact")]) == 0
    config = json.loads((tmp_path / "compact" / "config.json").read_text())
    assert config["my_note"] == {"a": 1}
    assert config["mlm_head"] == read.config.mlm_head
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "compact"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = getattr(transformers, auto_class).from_pretrained(tmp_path / "compact", **REMOTE)
    torch.testing.assert_close(again.sharebert(ids).hidden, expected)
    assert main(["consolidate", str(folder), str(tmp_path / "dense"), "--form", "dense", "--no-head"]) == 0

    encoder = open_encoder(str(folder), FineTuneRecipe())
    assert len(encoder.encode([("w1 w2",)], "rows")) == 1


def test_fill_takes_a_copy_and_refuses_a_model_without_a_head(export: Path, tmp_path: Path) -> None:
    copy = saved(export, tmp_path / "copy", "AutoModelForMaskedLM")
    words, expected = ([word for word, _ in fill(folder, "w1 [MASK]")[0]] for folder in (copy, export))
    assert words == expected
    with pytest.raises(BadInput, match="has no MLM head, which fills"):
        fill(saved(export, tmp_path / "encoder", "AutoModel"), "w1 [MASK]")


def test_several_files_and_half_precision(export: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForMaskedLM.from_pretrained(export, **REMOTE)
    model.save_pretrained(tmp_path / "files", max_shard_size="4KB")
    assert (tmp_path / "files" / "model.safetensors.index.json").is_file()
    model.half().save_pretrained(tmp_path / "half")
    for folder, tolerance in (("files", 0.0), ("half", 1e-3)):
        for (name, read), (_, expected) in zip(
            load_model(tmp_path / folder).named_parameters(), tiny_model().named_parameters(), strict=True
        ):
            torch.testing.assert_close(read, expected, atol=tolerance, rtol=tolerance, msg=name)


def test_a_folder_of_trainer(export: Path, tmp_path: Path) -> None:
    """With the state of an optimizer beside the model, and a tokenizer that was last used with truncation."""
    pytest.importorskip("accelerate")
    tokenizer = transformers.AutoTokenizer.from_pretrained(export, **REMOTE)
    rows = [{**tokenizer(f"w{i} w{i + 1}", truncation=True, max_length=3), "labels": i % 2} for i in range(4)]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(export, num_labels=2, **REMOTE)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], save_strategy="steps", save_steps=1, disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer).train()
    folder = tmp_path / "checkpoint-1"
    assert (folder / "optimizer.pt").is_file()
    read = read_export(folder)
    assert isinstance(read.kind, Classifier)
    assert read.kind.labels == ("LABEL_0", "LABEL_1")
    write_export(read.without_head(), tmp_path / "dense", Dense())
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert loaded("w1 w2 w3 w4")["input_ids"] == [2, 6, 7, 8, 9, 3]


def test_a_class_with_a_head_that_an_export_cannot_hold_gives_its_encoder(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(export, tmp_path / "saved", "AutoModelForSequenceClassification")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["ShareBertForTokenClassification"]}))
    assert read_export(folder).kind == HeadlessEncoder()
    assert "ShareBertForTokenClassification: the head is left out" in capsys.readouterr().err


def test_a_typing_error_is_refused_and_other_unknown_keys_are_kept(export: Path, tmp_path: Path) -> None:
    folder = saved(export, tmp_path / "saved", "AutoModelForMaskedLM")
    config = json.loads((folder / "config.json").read_text())
    for wrong, right in (("hidden_sise", "hidden_size"), ("factor_sizes", "factor_size"), ("mlm_heads", "mlm_head")):
        (folder / "config.json").write_text(json.dumps(config | {wrong: 1}))
        with pytest.raises(BadInput, match=rf"config.json: {wrong}: unknown key; did you mean '{right}'\?"):
            read_config(folder)
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": True, "_name_or_path": "/home/x"}))
    assert read_export(folder).other_keys == {"my_note": {"a": 1}, "use_cache": True}
