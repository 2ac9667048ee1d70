"""Copies of train rows: those of a slow transcription, the same every time, and within the bound."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_folders import hub_folder
from made_tasks import tiny_export

from scoring.blimp.masked_lm import open_masked_lm
from scoring.data import Split, TaskData
from scoring.distill.augment import augmented, copies_of
from scoring.recipe import AugmentRecipe
from scoring.tasks import TASKS
from sharebert_common.errors import BadInput

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")
CPU = torch.device("cpu")
TEXTS = [("a b c",), ("d e a c b",), ("b 7 a",), ("c a b d e a b",)]
PAIRS = [("a b", "c d a"), ("e", "b b c")]


def words_of(folder: Path) -> Path:
    """Give the model in `folder` a tokenizer whose words w0, w1, … are letters: a, b, …, aa, ab, …"""
    file = folder / "tokenizer.json"
    text = file.read_text()
    for number in range(245):
        letters = (chr(97 + number // 26 - 1) if number >= 26 else "") + chr(97 + number % 26)
        text = text.replace(f'"w{number}":', f'"{letters}":')
    file.write_text(text)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    bert = hub_folder(folder / "bert", "MaskedLM")
    return {"export": words_of(tiny_export(folder / "export")), "bert": words_of(bert)}


@pytest.mark.parametrize("kind", ["export", "bert"])
@pytest.mark.parametrize("texts", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_copies_are_those_of_the_transcription(
    models: dict[str, Path], kind: str, texts: list[tuple[str, ...]]
) -> None:
    recipe = AugmentRecipe(model=str(models[kind]), copies=6, probability=0.5, candidates=4, seed=3)
    lm = open_masked_lm(str(models[kind]), CPU)
    vocabulary = lm.tokenizer.get_vocab()
    word_of = {number: word for word, number in vocabulary.items()}
    found = list(copies_of(lm, texts, recipe, 16))
    for row, texts_of_row in enumerate(texts):
        split = [text.split() for text in texts_of_row]
        places = [(t, w) for t, words in enumerate(split) for w, word in enumerate(words) if word.isalpha()]
        draw = np.random.default_rng([3, row])
        chosen = draw.random((6, len(places))) < 0.5
        picks = draw.integers(0, 4, (6, len(places)))
        copies = []
        for copy in range(6):
            new = [list(words) for words in split]
            for number, (t, w) in enumerate(places):
                if not chosen[copy, number]:
                    continue
                masked = [list(words) for words in split]
                masked[t][w] = "[MASK]"
                ids = torch.tensor([lm.tokenizer(*(" ".join(words) for words in masked))["input_ids"]])
                place = int((ids[0] == vocabulary["[MASK]"]).nonzero()[0])
                with torch.no_grad():
                    order = lm.logits(ids, torch.tensor([place]))[0].argsort(descending=True).tolist()
                likely = [word_of[n] for n in order if n in word_of and word_of[n].isalpha()]
                new[t][w] = [word for word in likely if word != split[t][w]][:4][picks[copy, number]]
            made = tuple(" ".join(words) for words in new)
            if made != texts_of_row and made not in copies:
                copies.append(made)
        assert found[row] == copies
        assert copies


def test_copies_keep_labels_and_the_bound_is_kept(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = TaskData(TASKS["sst2"], Split("made", TEXTS, np.array([0, 1, 1, 0])), {})
    recipe = AugmentRecipe(model=str(models["export"]), copies=5)
    made = augmented(data, recipe, CPU, tmp_path / "kept")
    assert made.train.texts[:4] == TEXTS
    assert len(made.train) > 4
    lengths = {len(text.split()): label for (text,), label in zip(TEXTS, [0, 1, 1, 0], strict=True)}
    for (text,), label in list(zip(made.train.texts, made.train.labels, strict=True))[4:]:
        count = len(text.split())
        assert label == (1 if count == 3 and " 7 " in text else lengths[count] if count != 3 else 0)
    again = augmented(data, recipe, CPU, tmp_path / "kept")
    assert again.train.texts == made.train.texts
    (file,) = (tmp_path / "kept").iterdir()
    whole = file.read_bytes()
    assert "damaged" not in capsys.readouterr().err
    first = whole[: whole.index(b"\n") + 1]
    for damaged in (whole[: len(whole) // 2], first, whole[:-1], b"", b"null\n" * 4, whole + first, whole + b"[["):
        file.write_bytes(damaged)
        assert augmented(data, recipe, CPU, tmp_path / "kept").train.texts == made.train.texts
        assert file.read_bytes() == whole
        assert f"{file}: damaged; the copies are made again\n" in capsys.readouterr().err
    other = augmented(data, AugmentRecipe(model=str(models["export"]), copies=5, seed=1), CPU, tmp_path / "kept")
    assert other.train.texts != made.train.texts
    assert len(list((tmp_path / "kept").iterdir())) == 2
    small = AugmentRecipe(model=str(models["export"]), copies=5, most_rows=20)
    with pytest.raises(BadInput, match=r"data\.augment\.copies: 4 rows with 5 copies each are 24, and at most 20"):
        augmented(data, small, CPU, tmp_path / "kept")


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    headless = tiny_export(tmp_path / "export", mlm_head="none")
    data = TaskData(TASKS["sst2"], Split("made", TEXTS, np.array([0, 1, 1, 0])), {})
    with pytest.raises(BadInput, match=r"has no MLM head, which data\.augment\.model needs"):
        augmented(data, AugmentRecipe(model=str(headless)), CPU, tmp_path / "kept")
