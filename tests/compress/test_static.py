"""The reference of static vectors: its parts by hand, and its row."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compress_models import tiny_export
from hub_folders import hub_folder

from compress.recipe import CompressRecipe
from compress.report import read_report
from compress.run import compress as run
from compress.source import open_hub_model
from compress.static import STRENGTHS, components, features, in_int8, weighted, word_vectors
from exports.read import load_model
from scoring.baselines import fit_strength
from scoring.data import Split
from scoring.encoders import open_encoder
from scoring.recipe import FineTuneRecipe
from sharebert_common.recipe import load


def test_vectors_are_mean_outputs_of_one_word(tmp_path: Path) -> None:
    for folder in (tiny_export(tmp_path / "compact"), hub_folder(tmp_path / "bert", "")):
        vectors = word_vectors(folder, open_encoder(str(folder), FineTuneRecipe(max_length=8)))
        ids = torch.tensor([[2, 77, 3]])
        with torch.no_grad():
            if folder.name == "compact":
                expected = load_model(folder).sharebert(ids).hidden.mean(1)
            else:
                expected = open_hub_model(folder)(input_ids=ids).last_hidden_state.mean(1)
        np.testing.assert_allclose(vectors[77], expected[0], rtol=1e-4, atol=1e-5)


def test_components_are_those_of_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    vectors = np.random.default_rng(0).normal(size=(200, 12)).astype(np.float32) * np.arange(1, 13)
    vectors = vectors.astype(np.float32)
    expected = PCA(5).fit_transform(vectors)
    np.testing.assert_allclose(np.abs(components(vectors, 5)), np.abs(expected), rtol=1e-3, atol=1e-2)


def test_frequent_words_count_less_and_codes_are_near() -> None:
    vectors = weighted(np.ones((1000, 3), np.float32))
    zipf = 1 / np.arange(2, 1002)
    np.testing.assert_allclose(vectors[7, 0], 1e-4 / (1e-4 + zipf[7] / zipf.sum()), rtol=1e-6)
    codes, scale = in_int8(vectors)
    assert np.abs(codes * scale - vectors).max() <= scale / 2 * 1.001


def test_a_text_is_the_mean_of_its_words(tmp_path: Path) -> None:
    folder = tiny_export(tmp_path / "compact")
    encoder = open_encoder(str(folder), FineTuneRecipe(max_length=8))
    vectors = np.random.default_rng(0).normal(size=(encoder.words, 4)).astype(np.float32)
    one, two = (encoder.tokenizer.convert_tokens_to_ids(word) for word in ("w17", "w20"))
    u, v = (vectors[one] + vectors[two]) / 2, vectors[two]
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    np.testing.assert_allclose(features([("w17 w20",)], vectors, encoder)[0], u, rtol=1e-5)
    found = features([("w17 w20", "w20")], vectors, encoder)[0]
    np.testing.assert_allclose(found, np.concatenate([u, v, np.abs(u - v), u * v]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "strength"), [(2, 1.0), (3, 0.1)])
def test_few_rows_of_a_label_have_the_default_strength(rows: int, strength: float) -> None:
    """Cross-validation with three folds needs three; it chooses a strength, where all are alike the first."""
    from sklearn.linear_model import LogisticRegression

    labels = np.array([0] * 6 + [1] * rows)
    split = Split("train", [("x",)] * len(labels), labels)
    data: Any = SimpleNamespace(train=split, task=SimpleNamespace(regression=False))
    features = labels[:, None] * 100.0
    assert strength == fit_strength(LogisticRegression(), {"C": STRENGTHS}, features, data).C


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_rows_of_a_report(tmp_path: Path) -> None:
    source, data = tiny_export(tmp_path / "source"), tmp_path / "task"
    data.mkdir()
    for split in ("train", "dev"):
        (data / f"{split}.tsv").write_text("text\tlabel\n" + "w17 w18\tgood\nw19 w20\tbad\n" * 6)
    task = {"task": "mine", "data": {"path": str(data), "text": "text", "label": "label"}, "seeds": [1]}
    task["finetune"] = {"epochs": 1, "max_length": 8}
    names = [f"static:{source}", f"static-int8:{source}"]
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"steps: [{{trim: {{keep_pooler: true}}}}]\ntask: {json.dumps(task)}\n"
        f"report: {{latency: [], references: {json.dumps(names)}}}\n"
    )
    run(source, load(CompressRecipe, file), tmp_path / "out")
    _, _, rows = read_report(tmp_path / "out")
    config = load_model(source).config
    assert [row.name for row in rows[-2:]] == names
    assert rows[-1].headline == rows[-2].headline == (1.0, 0.0)
    words = config.vocab_size * config.hidden_size
    assert rows[-1].bytes == words + 4 + 4 * (config.hidden_size + 1)
    assert rows[-2].bytes == 4 * words + 4 * (config.hidden_size + 1)
