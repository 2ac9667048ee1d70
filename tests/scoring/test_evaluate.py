"""`sharebert evaluate` from end to end on tiny models: results, table, curves, saved classifiers, bad input."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_tasks import rows, sst2, tiny_export, write_tsv
from remote_code import remote_code_cache

from exports.dense import Dense
from exports.forms import write_export
from exports.read import read_export
from scoring.recipe import EvaluateRecipe
from sharebert_cli import main
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

FAST = ["finetune.epochs=8", "finetune.batch=16", "finetune.lr=1e-2"]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sst2(tmp_path_factory.mktemp("task") / "SST-2")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("evaluate") / "export")


@pytest.fixture(scope="module")
def bert(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BERT with the export's words."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=250, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast.from_pretrained(export).save_pretrained(folder)
    return folder


def test_a_seed_that_stands_there_twice_is_refused() -> None:
    with pytest.raises(BadInput, match="seeds: one of them stands there twice; a spread needs different ones"):
        load(EvaluateRecipe, None, ["task=sst2", "seeds=[1,2,1]"])
    assert load(EvaluateRecipe, None, ["task=sst2", "seeds=7"]).seeds == [7]


@pytest.fixture(scope="module")
def scored(task: Path, export: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results of all kinds of models."""
    output = tmp_path_factory.mktemp("scores")
    models = [str(export), f"random:{export}", str(bert), "majority", "tfidf"]
    arguments = [*models, *FAST, "seeds=[1,2]", f"output={output}", "--task", "sst2", "--data", str(task)]
    assert main(["evaluate", *arguments]) == 0
    return output / "sst2"


def results(folder: Path) -> dict[str, Any]:
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {result["model"]: result for result in found}


def test_every_kind_of_model_learns(scored: Path, export: Path, bert: Path) -> None:
    found = results(scored)
    assert set(found) == {str(export), f"random:{export}", str(bert), "majority", "tfidf"}
    assert found["majority"]["scores"]["dev"]["accuracy"][0] < 0.6
    for model in found.keys() - {"majority"}:
        assert min(found[model]["scores"]["dev"]["accuracy"]) > 0.8, model


def test_what_a_result_says(scored: Path, export: Path, bert: Path) -> None:
    ours, theirs = results(scored)[str(export)], results(scored)[str(bert)]
    model = transformers.BertForSequenceClassification(transformers.BertConfig.from_pretrained(bert))
    assert theirs["parameters"] == sum(p.numel() for p in model.parameters())
    assert ours["bytes"] == 4 * ours["parameters"]
    assert ours["latency_ms"] > 0
    assert ours["seeds"] == [1, 2]
    assert len(ours["fit_s"]) == len(ours["scores"]["dev"]["accuracy"]) == 2
    assert ours["lr"] == 1e-2
    assert ours["sweep"] == {}
    assert ours["train_rows"] == 320
    assert ours["settings"]["epochs"] == theirs["settings"]["epochs"] == 8
    assert ours["settings"]["pooling"] == "pooler"
    assert "pooling" not in theirs["settings"]  # it has no effect there


def test_table_and_curves(scored: Path, export: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = (scored / "results.md").read_text().splitlines()
    assert len(lines) == 2 + 5
    assert lines[-1].split("|")[1].strip() == "majority"  # the best are first
    assert "±" in next(line for line in lines if f"random:{export}" in line)
    ours = results(scored)[str(export)]
    folder = (
        next(path for path in (scored / "tensorboard").glob("*export") if "random" not in path.name) / "lr-0.01-seed-2"
    )
    board = EventAccumulator(str(folder))
    board.Reload()
    curve = [event.value for event in board.Scalars("dev/accuracy")]
    assert len(curve) == 8
    assert curve[-1] == pytest.approx(ours["scores"]["dev"]["accuracy"][1])
    assert {"train/loss", "train/lr"} <= set(board.Tags()["scalars"])


@pytest.fixture
def code_cache(tmp_path: Path) -> Iterator[None]:
    with remote_code_cache(tmp_path / "modules"):
        yield


@pytest.mark.usefixtures("code_cache")
def test_a_saved_classifier_is_an_export_and_can_be_fine_tuned(task: Path, export: Path, tmp_path: Path) -> None:
    """It loads as any classifier does, has the reported score, and can be fine-tuned again."""
    saved = tmp_path / "classifier"
    fast = [*FAST, "finetune.pooling=mean", "seeds=3", f"output={tmp_path}", "--task", "sst2", "--data", str(task)]
    assert main(["evaluate", str(export), *fast, "--save", str(saved)]) == 0
    reported = results(tmp_path / "sst2")[str(export)]["scores"]["dev"]["accuracy"][0]

    classify = transformers.pipeline("text-classification", model=str(saved), trust_remote_code=True)
    words = {"negative": 0, "positive": 1}
    made = rows(80, seed=1)
    right = [
        words[found["label"]] == label for (_, label), found in zip(made, classify([t for t, _ in made]), strict=True)
    ]
    assert sum(right) / 80 == pytest.approx(reported)
    assert "| dev accuracy |" in (saved / "README.md").read_text()

    again = ["finetune.epochs=1", "seeds=1", f"output={tmp_path}", "--task", "sst2", "--data", str(task)]
    assert main(["evaluate", str(saved), *again]) == 0


def test_a_dense_export_is_scored_as_any_encoder(task: Path, export: Path, tmp_path: Path) -> None:
    write_export(read_export(export), tmp_path / "dense", Dense())
    arguments = [*FAST, "seeds=1", f"output={tmp_path}", "--task", "sst2", "--data", str(task)]
    assert main(["evaluate", str(tmp_path / "dense"), *arguments]) == 0
    (found,) = results(tmp_path / "sst2").values()
    assert found["scores"]["dev"]["accuracy"][0] > 0.8


def test_a_saved_hugging_face_classifier(task: Path, bert: Path, tmp_path: Path) -> None:
    saved = tmp_path / "classifier"
    arguments = ["finetune.epochs=1", "seeds=1", f"output={tmp_path}", "--task", "sst2", "--data", str(task)]
    assert main(["evaluate", str(bert), *arguments, "--save", str(saved)]) == 0
    assert transformers.AutoModelForSequenceClassification.from_pretrained(saved).config.id2label[1] == "positive"


def test_a_sweep_takes_the_best_rate_and_survives_a_bad_one(task: Path, export: Path, tmp_path: Path) -> None:
    fast = ["finetune.epochs=3", "finetune.batch=16", "finetune.lr=[1e-7,1e-2,1e30]", "finetune.clip=0", "seeds=[1,2]"]
    assert main(["evaluate", str(export), *fast, f"output={tmp_path}", "--task", "sst2", "--data", str(task)]) == 0
    (found,) = results(tmp_path / "sst2").values()
    assert found["sweep"]["1e+30"] is None
    assert found["sweep"]["0.01"] == found["scores"]["dev"]["accuracy"][0] > found["sweep"]["1e-07"]
    assert found["lr"] == 1e-2


def test_pairs_regression_and_two_dev_sets(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [(text, f"w{i % 7}", label) for i, (text, label) in enumerate(rows(60, 5))]
    for split in ("train", "dev"):
        write_tsv(tmp_path / "stsb" / f"{split}.tsv", ("sentence1", "sentence2", "score"), pairs)
    for split in ("train", "dev_matched", "dev_mismatched"):
        write_tsv(tmp_path / "mnli" / f"{split}.tsv", ("premise", "hypothesis", "label"), pairs)
    for name in ("stsb", "mnli"):
        fast = ["finetune.epochs=1", "seeds=1", f"output={tmp_path / 'out'}"]
        models = [str(export), "tfidf", "majority"]
        assert main(["evaluate", *models, *fast, "--task", name, "--data", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert "| dev pearson | dev spearman |" in " ".join(out.split()).replace(" |", " |")
    mnli = results(tmp_path / "out" / "mnli")
    assert all(set(result["scores"]) == {"dev_matched", "dev_mismatched"} for result in mnli.values())
    stsb = results(tmp_path / "out" / "stsb")
    assert stsb["majority"]["scores"]["dev"] == {"pearson": [0.0], "spearman": [0.0]}
    assert stsb["tfidf"]["scores"]["dev"]["pearson"][0] > 0.5


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a user sees when the command ends with exit code 2."""
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sharebert: ")]
    assert len(lines) == 1
    return lines[0]


def test_bad_tasks_and_recipes(task: Path, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"output={tmp_path}"
    sst = ("--task", "sst2", "--data", str(task))
    assert "finetune.eopchs: unknown key; did you mean 'epochs'?" in refusal(
        capsys, str(export), "finetune.eopchs=1", *sst
    )
    assert "task: required" in refusal(capsys, str(export))
    assert "no model was given" in refusal(capsys, output, *sst)
    assert "no such file or folder" in refusal(
        capsys, str(export), output, "--task", "sst2", "--data", str(tmp_path / "x")
    )
    assert "needs exactly one encoder, and 0 were given" in refusal(
        capsys, "majority", output, *sst, "--save", str(tmp_path / "c")
    )
    assert "exists; choose another folder" in refusal(capsys, str(export), output, *sst, "--save", str(export))
    write_tsv(task.parent / "bad" / "train.tsv", ("sentence", "label"), [("w1", 0), ("w2", "1.5")])
    write_tsv(task.parent / "bad" / "dev.tsv", ("sentence", "label"), [("w1", 0)])
    bad = refusal(capsys, str(export), output, "--task", "sst2", "--data", str(task.parent / "bad"))
    assert "train.tsv, line 3: label '1.5' is not one of negative, positive" in bad
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "old.json").write_text("{}")
    assert "old.json: not a result of evaluate" in refusal(capsys, str(export), output, *sst)


def test_a_row_over_the_models_length(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = sst2(tmp_path / "data", train=20, dev=10)
    write_tsv(data / "dev.tsv", ("sentence", "label"), [("w1", 0), ("w1 " * 30, 1)])
    arguments = [
        str(export),
        f"output={tmp_path}",
        "finetune.epochs=1",
        "seeds=1",
        "--task",
        "sst2",
        "--data",
        str(data),
    ]
    found = refusal(capsys, *arguments)
    assert "dev.tsv: example 2 has 32 tokens, and" in found
    assert "has 16 positions; finetune.max_length=16 cuts longer texts" in found
    assert main(["evaluate", *arguments[:2], "finetune.max_length=16", *arguments[2:]]) == 0


def test_missing_and_damaged_exports(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (f"output={tmp_path / 'out'}", "--task", "sst2", "--data", str(task))
    assert "config.json: missing; is" in refusal(capsys, str(tmp_path / "nowhere"), *arguments)
    export = tiny_export(tmp_path / "export")

    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        kept = (export / name).read_bytes()
        (export / name).unlink()
        assert f"{name}" in (found := refusal(capsys, str(export), *arguments))
        assert "missing" in found
        (export / name).write_bytes(kept[: len(kept) // 2])
        assert name in refusal(capsys, str(export), *arguments)
        (export / name).write_bytes(kept)

    weights = bytearray((export / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (export / "model.safetensors").write_bytes(weights)
    assert "model.safetensors" in refusal(capsys, str(export), *arguments)


def test_missing_and_damaged_folders_of_hugging_face(
    task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "bert"
    shutil.copytree(bert, copy)
    arguments = (f"output={tmp_path / 'out'}", "seeds=1", "--task", "sst2", "--data", str(task))
    assert "pooling: mean is for ShareBERT exports" in refusal(capsys, str(copy), "finetune.pooling=mean", *arguments)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cannot be loaded as a Hugging Face encoder" in refusal(capsys, str(copy), *arguments)
    (copy / "model.safetensors").unlink()
    assert "cannot be loaded as a Hugging Face encoder" in refusal(capsys, str(copy), *arguments)
    (copy / "config.json").write_text('{"model_type": "no-such-model"}')
    assert "cannot be loaded as a Hugging Face encoder" in refusal(capsys, str(copy), *arguments)
