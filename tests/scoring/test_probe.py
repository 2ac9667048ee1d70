"""Probes: labels of a sentence by hand, logistic regression beside scikit-learn, word vectors, and `evaluate`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_folders import hub_folder
from made_tasks import tiny_export

from compress.measure import measure
from compress.recipe import CompressRecipe, ReportRecipe
from compress.run import compress
from scoring.encoders import open_encoder
from scoring.probe.regression import predict
from scoring.probe.vectors import word_vectors
from scoring.probe.words import SHUFFLE_SEED, Row, label_text, read_rows
from scoring.recipe import EvaluateRecipe, FineTuneRecipe, ProbeRecipe, TaskDataRecipe
from scoring.tasks import Task
from sharebert_cli import main
from sharebert_common.errors import BadInput


def test_the_labels_of_a_sentence() -> None:
    """By hand: a stop wins over a bracket, numbers have no case, and the last row may be shorter."""
    first, second = label_text('Yes, Mr O\'Neill (of IBM) paid 3.50 euros;  then he left. "Why?"', 8)
    assert first.words == ["yes", "mr", "o'neill", "of", "ibm", "paid", "3.50", "euros"]
    assert first.labels == {"case": [1, 1, 1, 0, 1, 0, -1, 0], "punctuation": [1, 0, 0, 0, 0, 0, 0, 1]}
    assert second.words == ["then", "he", "left", "why"]
    assert second.labels == {"case": [0, 0, 0, 1], "punctuation": [0, 0, 2, 2]}
    assert label_text("One", 8) == label_text(" ... ", 8) == []


def test_vectors_that_hold_the_label_and_vectors_that_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=generator)
    noise = torch.randn(2, 600, 10, generator=generator)
    told = noise.clone()
    told[1, :, :3] += 20 * torch.nn.functional.one_hot(labels, 3)
    for layers in (told[1:], told):  # alone, and mixed with a layer that tells nothing
        found = predict(layers[:, :400], labels[:400], 3, layers[:, 400:])
        assert torch.equal(found, labels[400:])
        assert torch.equal(found, predict(layers[:, :400], labels[:400], 3, layers[:, 400:]))
    rare = (torch.rand(600, generator=generator) < 0.2).long()
    found = predict(noise[:1, :400], rare[:400], 2, noise[:1, 400:])
    majority = (rare[400:] == 0).float().mean()
    assert (found == rare[400:]).float().mean() == pytest.approx(float(majority), abs=0.03)


def test_it_is_scikit_learns_regression() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    draw = np.random.default_rng(0)
    x = (draw.normal(size=(500, 6)) * [1, 5, 0.1, 1, 2, 3] + 4).astype("float32")
    y = ((x - 4) @ draw.normal(size=(6, 3)) + 3 * draw.normal(size=(500, 3))).argmax(1)
    scale = StandardScaler().fit(x[:300])
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(scale.transform(x[:300]), y[:300])
    expected = theirs.predict(scale.transform(x[300:]))
    given = torch.from_numpy(x)[None]
    assert (predict(given[:, :300], torch.from_numpy(y[:300]), 3, given[:, 300:]).numpy() == expected).mean() >= 0.99


TASK = Task("probe", text=(("text",),), labels=("no", "yes"))


@pytest.mark.parametrize("kind", ["sharebert", "bert"])
def test_word_vectors(tmp_path: Path, kind: str) -> None:
    """They are the hidden states of the row alone, without padding and special tokens."""
    folder = tiny_export(tmp_path / "m") if kind == "sharebert" else hub_folder(tmp_path / "m", "")
    encoder = open_encoder(str(folder), FineTuneRecipe())
    model = encoder.build(TASK, 0).eval()
    rows = [Row(["w3", "w7", "w9"], {}), Row(["w1", "w3"], {}), Row(["w2"] * 6, {})]
    found = word_vectors(encoder, model, rows, torch.device("cpu"))
    with torch.no_grad():
        states: Any = [
            torch.cat(model(**encoder.tokenizer(" ".join(row.words), return_tensors="pt"),
                            output_hidden_states=True).hidden_states)[:, 1:-1]
            for row in rows
        ]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(states, dim=1), rtol=1e-4, atol=1e-5)


def test_a_word_of_several_tokens(tmp_path: Path) -> None:
    """Its vector is the mean over its tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from transformers import PreTrainedTokenizerFast

    encoder = open_encoder(str(hub_folder(tmp_path / "m", "")), FineTuneRecipe())
    words = {"[UNK]": 0, "[PAD]": 1, "play": 2, "##ing": 3, "##s": 4, "'": 5, "he": 6}
    tokenizer = Tokenizer(WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    encoder.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    model = encoder.build(TASK, 0).eval()
    found = word_vectors(encoder, model, [Row(["he", "playing's"], {})], torch.device("cpu"))
    with torch.no_grad():
        states = torch.stack(model(input_ids=torch.tensor([[6, 2, 3, 5, 0]]), output_hidden_states=True).hidden_states)[
            :, 0
        ]
    torch.testing.assert_close(found[:, 0], states[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 1], states[:, 1:].mean(1), rtol=1e-4, atol=1e-5)


def text_file(path: Path, texts: int = 120) -> Path:
    """Texts in which w0 … w2 begin with a capital, and a stop stands behind w3 … w5; there are nine words."""
    draw = random.Random(0)
    lines = []
    for _ in range(texts):
        words = [draw.randint(0, 8) for _ in range(12)]
        lines.append(" ".join(("W" if w < 3 else "w") + str(w) + ("." if 3 <= w < 6 else "") for w in words))
    path.write_text("\n".join(lines))
    return path


def test_no_text_is_in_train_and_dev(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    texts = [" ".join([f"A{n}. b{n}"] * 30) for n in range(20)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = read_rows(TaskDataRecipe(path=str(path)), ProbeRecipe(rows=60, words=7))
    assert len(found.train) + len(found.dev) == 60
    assert 6 <= len(found.dev) <= 14
    numbers = [{row.words[0][1:] for row in part} for part in found]
    assert not numbers[0] & numbers[1]
    assert found == read_rows(TaskDataRecipe(path=str(path)), ProbeRecipe(rows=60, words=7))


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The words alone tell the labels, so that the embeddings do; the words of the majority do not."""
    export, text = tiny_export(tmp_path / "export", factor_size=16), text_file(tmp_path / "text.txt")
    words = [str(export), f"random:{export}", f"output={tmp_path}", "--task", "probe", "--data", str(text)]
    assert main(["evaluate", *words, "probe.words=12"]) == 0
    out = capsys.readouterr().out
    found = {r["model"]: r for r in (json.loads(path.read_text()) for path in (tmp_path / "probe").glob("*.json"))}
    assert set(found) == {str(export), f"random:{export}"}
    details = found[str(export)]["details"]
    assert set(details) == {"case, accuracy", "case, F1", "punctuation, accuracy", "punctuation, F1"}
    assert set(details["case, F1"]) == {"layer 00", "layer 01", "layer 02", "majority", "mix"}
    assert details["case, accuracy"]["layer 00"] > 0.95
    assert details["case, accuracy"]["majority"] == pytest.approx(2 / 3, abs=0.1)
    assert found[str(export)]["scores"]["dev"]["case F1"] == [details["case, F1"]["mix"]]
    assert found[str(export)]["train_rows"] + 12 == found[str(export)]["settings"]["rows"] == 120
    assert "| layer 01" in out
    assert out.strip() == (tmp_path / "probe" / "results.md").read_text().strip()


def test_before_and_after_a_compression_step(tmp_path: Path) -> None:
    """The step `trim` loses nothing, so that its row has the scores of the source."""
    export, text = tiny_export(tmp_path / "export"), text_file(tmp_path / "text.txt")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"steps: [{{trim: {{}}}}]\ntask: {{task: probe, data: {text}, probe: {{words: 12}}}}\nreport: {{latency: []}}\n"
    )
    assert main(["compress", str(export), str(recipe), str(tmp_path / "out")]) == 0
    source, trimmed = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert set(source["scores"]) == {"dev case F1", "dev punctuation F1"}
    for name, values in source["scores"].items():
        assert values[0] > 0.95
        assert trimmed["scores"][name] == pytest.approx(values, abs=0.02)


def test_a_fine_tuned_classifier_is_probed_in_a_report(tmp_path: Path) -> None:
    export, text = tiny_export(tmp_path / "export"), text_file(tmp_path / "text.txt")
    task = Task("mine", text=(("text",),), labels=("no", "yes"))
    encoder = open_encoder(str(export), FineTuneRecipe())
    encoder.save(encoder.build(task, 0), task, "", tmp_path / "classifier")
    recipe = EvaluateRecipe(task="probe", data=TaskDataRecipe(path=str(text)), probe=ProbeRecipe(words=12))
    asked = CompressRecipe(steps=["trim"], task=recipe, report=ReportRecipe(latency=[]))
    row = measure("source", tmp_path / "classifier", asked, tmp_path / "scores", {})
    assert set(row.scores) == {"dev case F1", "dev punctuation F1"}


@pytest.mark.parametrize("reference", ["majority", "tfidf", "static:x"])
def test_references_of_a_report_that_need_labels_are_refused_first(tmp_path: Path, reference: str) -> None:
    task = EvaluateRecipe(task="probe", data=TaskDataRecipe(path=str(text_file(tmp_path / "text.txt"))))
    recipe = CompressRecipe(steps=["trim"], task=task, report=ReportRecipe(references=[reference]))
    with pytest.raises(BadInput, match=f"report.references: {reference} needs a task with labels, probe has none"):
        compress(tiny_export(tmp_path / "export"), recipe, tmp_path / "out")
    assert not (tmp_path / "out.steps").exists()


def test_a_property_that_no_held_out_word_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    lines = np.array(["Word w1. w2, w3"] * 20, dtype=object)
    lines[np.random.default_rng(SHUFFLE_SEED).permutation(20)[:3]] = "1 2. 3, 4"  # those that come first
    path.write_text("\n".join(lines))
    with pytest.raises(BadInput, match="no word of the texts that are held out has a case; give more lines"):
        read_rows(TaskDataRecipe(path=str(path)), ProbeRecipe())


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export, text = tiny_export(tmp_path / "export"), text_file(tmp_path / "text.txt", texts=20)
    small = tmp_path / "small.txt"
    small.write_text("no capitals here.\n" * 20)
    words = ["evaluate", str(export), f"output={tmp_path}", "--task", "probe"]
    for keys, message in (
        ([], "data.path: probe needs a file of text"),
        (["--data", str(tmp_path)], "give a file whose name ends in .txt"),
        (["--data", str(text), "finetune.epochs=1"], "finetune: probe takes a model as it is"),
        (["--data", str(text), "seeds=[1, 2]"], "seeds: probe takes a model as it is"),
        (["--data", str(text), "data.train_rows=5"], "data: probe takes data.path, text"),
        (["--data", str(text), "majority"], "majority: probe takes encoders"),
        (["--data", str(text), "--save", str(tmp_path / "x")], "--save: probe fine-tunes nothing"),
        (["--data", str(small)], "small.txt: its words do not differ in case"),
        (["--data", str(text), "probe.words=30", "probe.rows=9"], "has 16 positions; lower it"),
    ):
        if "16 positions" in message:
            text.write_text("\n".join(" ".join(["W1. w2"] * 15) for _ in range(20)))
        assert main([*words, *keys]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "one.txt").write_text("One text. And no other")
    with pytest.raises(BadInput, match="too little text"):
        read_rows(TaskDataRecipe(path=str(tmp_path / "one.txt")), ProbeRecipe())
