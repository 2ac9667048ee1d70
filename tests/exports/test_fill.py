"""Filling the masks of a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from exports.export import Export
from exports.fill import fill
from exports.forms import write_export
from sharebert import ShareBertError
from sharebert_common.errors import BadInput


@pytest.fixture
def export(tmp_path: Path) -> Path:
    model = tiny_model()
    write_export(Export.of_model(model, tokenizer=tiny_tokenizer(tmp_path)), tmp_path / "export")
    return tmp_path / "export"


def test_words_and_probabilities_of_each_mask(export: Path) -> None:
    filled = fill(export, "w7 [MASK] w9 [MASK]", top=3)
    logits = tiny_model().eval().logits(torch.tensor([[2, 12, 4, 14, 4, 3]]))[0, [2, 4], :250]
    expected = logits.softmax(-1).topk(3)
    assert [[word for word, _ in words] for words in filled] == [
        [f"w{i - 5}" if i >= 5 else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"][i] for i in row]
        for row in expected.indices.tolist()
    ]
    torch.testing.assert_close(torch.tensor([[p for _, p in words] for words in filled]), expected.values.detach())


def test_top_may_ask_for_every_word(export: Path) -> None:
    (words,) = fill(export, "[MASK]", top=1000)
    assert len(words) == 250
    assert sum(probability for _, probability in words) == pytest.approx(1, abs=1e-4)


def test_bad_input(export: Path) -> None:
    with pytest.raises(BadInput, match=r"'w1 w2': no \[MASK\] to fill"):
        fill(export, "w1 w2")
    with pytest.raises(ShareBertError, match="rows of 18 tokens, but the model has 16 positions"):
        fill(export, "[MASK] " * 16)
    (export / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match=r"tokenizer.json: not readable"):
        fill(export, "[MASK]")
    (export / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"tokenizer.json: missing"):
        fill(export, "[MASK]")
