"""The number of masked tokens is exact, which ones they are depends on the row alone, and 80/10/10 holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import format_by_hand as by_hand
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.mask_schedule import MaskScheduleRecipe, masks_of_steps
from pretrain.data.masks import MaskedRows, Masks, continuation_ids
from sharebert_common.errors import BadInput

SPECIAL_IDS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
VOCAB_SIZE = 1000
CONTINUES = np.arange(VOCAB_SIZE) >= 700


def masks(rate: float = 0.15, seq_len: int = 128, vocab_size: int = VOCAB_SIZE, **other: Any) -> Masks:
    settings = {"seed": 11, "continues": None} | other
    return Masks(rate=rate, seq_len=seq_len, vocab_size=vocab_size, special_ids=SPECIAL_IDS, **settings)


def made_rows(count: int, seq_len: int = 128, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """[CLS], words with a few [UNK], [SEP], padding of 0 to seq_len - 3 tokens in one row of four."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, VOCAB_SIZE, (count, seq_len))
    tokens[rng.random(tokens.shape) < 0.02] = SPECIAL_IDS["unk"]
    length = np.where(np.arange(count) % 4 == 3, rng.integers(3, seq_len + 1, count), seq_len)
    tokens[:, 0] = SPECIAL_IDS["cls"]
    tokens[np.arange(count), length - 1] = SPECIAL_IDS["sep"]
    padding = np.arange(seq_len) >= length[:, None]
    tokens[padding] = SPECIAL_IDS["pad"]
    return tokens.astype(np.uint16), (~padding).astype(np.uint8)


def masked(made: Masks, tokens: np.ndarray, document_ids: np.ndarray, epoch: int = 0, **other: Any) -> MaskedRows:
    rows = np.arange(len(tokens))
    return made.apply(tokens, document_ids, np.full_like(rows, epoch), rows, **other)


@pytest.mark.parametrize("vector", by_hand.vectors("masks"))
def test_vectors_of_the_document(vector: dict) -> None:
    tokens, document_ids = np.array([vector["tokens"]], np.uint16), np.array([vector["segments"]], np.uint8)
    continues = np.arange(40) >= 30 if vector["whole_word"] else None
    made = masks(rate=0.5, seq_len=12, vocab_size=40, seed=7, continues=continues)
    result = made.apply(tokens, document_ids, np.array([vector["epoch"]]), np.array([vector["row"]]))
    assert result.columns[result.chosen].tolist() == vector["columns"]
    assert result.tokens[0].tolist() == vector["seen"]


@pytest.mark.parametrize("vector", by_hand.vectors("mask-shares"))
def test_vectors_of_rates_and_shares(vector: dict) -> None:
    row = by_hand.vectors("masks")[0]
    result = masks(rate=0.5, seq_len=12, vocab_size=40, seed=7).apply(
        np.array([row["tokens"]], np.uint16),
        np.array([row["segments"]], np.uint8),
        np.array([0]),
        np.array([0]),
        rates=np.array([vector["rate"]]),
        shares=np.array([[vector["masked"], vector["random"]]]),
    )
    assert result.columns[result.chosen].tolist() == vector["columns"]
    assert result.tokens[0].tolist() == vector["seen"]


@pytest.mark.parametrize("vector", by_hand.vectors("mask-schedules"))
def test_vectors_of_schedules(vector: dict[str, Any]) -> None:
    keys = ("shape", "last_rate", "masked", "last_masked", "random", "last_random")
    recipe = MaskScheduleRecipe(**{key: vector[key] for key in keys})
    steps = len(vector["rates"])
    found = masks_of_steps(recipe, vector["rate"], 8 * np.arange(steps), 8 * steps)
    assert found["rates"] == pytest.approx(np.array(vector["rates"]), abs=1e-6)
    assert found["shares"][:, 0] == pytest.approx(np.array(vector["masked_shares"]), abs=1e-6)
    assert found["shares"][:, 1] == pytest.approx(np.array(vector["random_shares"]), abs=1e-6)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10**9),
    row=st.integers(0, 10**12),
    rate=st.floats(0.01, 0.5),
    seq_len=st.integers(3, 70),
    whole_word=st.booleans(),
)
def test_equals_the_transcription(seed: int, epoch: int, row: int, rate: float, seq_len: int, whole_word: bool) -> None:
    tokens, document_ids = made_rows(4, seq_len, seed=seed % 2**32)
    made = masks(rate=rate, seq_len=seq_len, seed=seed, continues=CONTINUES if whole_word else None)
    result = made.apply(tokens, document_ids, np.full(4, epoch), np.arange(row, row + 4))
    for i in range(4):
        columns, seen = by_hand.mask(
            tokens[i].tolist(),
            document_ids[i].tolist(),
            seed=seed,
            epoch=epoch,
            row=row + i,
            rate=rate,
            vocab_size=VOCAB_SIZE,
            special_ids=list(SPECIAL_IDS.values()),
            mask_id=SPECIAL_IDS["mask"],
            continues=CONTINUES.tolist() if whole_word else None,
        )
        assert result.columns[i][result.chosen[i]].tolist() == columns
        assert result.tokens[i].tolist() == seen


@pytest.mark.parametrize("rate", [0.15, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("whole_word", [False, True])
def test_counts_are_exact_and_nothing_special_is_touched(rate: float, whole_word: bool) -> None:
    tokens, document_ids = made_rows(1000)
    result = masked(masks(rate, continues=CONTINUES if whole_word else None), tokens, document_ids)
    ordinary = (document_ids != 0) & ~np.isin(tokens, list(SPECIAL_IDS.values()))
    length = (document_ids != 0).sum(axis=1)
    expected = [max(1, round(rate * int(n))) for n in length]
    expected = np.minimum(expected, ordinary.sum(axis=1))
    np.testing.assert_array_equal(result.chosen.sum(axis=1), expected)
    assert result.chosen.shape == (1000, max(1, round(rate * 128)))

    row, slot = np.nonzero(result.chosen)
    column = result.columns[row, slot]
    assert ordinary[row, column].all()
    assert len(set(zip(row.tolist(), column.tolist(), strict=True))) == len(row)
    np.testing.assert_array_equal(result.labels[row, slot], tokens[row, column])
    elsewhere = np.ones(tokens.shape, bool)
    elsewhere[row, column] = False
    np.testing.assert_array_equal(result.tokens[elsewhere], tokens[elsewhere])
    assert not result.labels[~result.chosen].any()
    assert not result.columns[~result.chosen].any()


def test_a_row_without_candidates_has_none_chosen_and_one_with_few_all_of_them() -> None:
    tokens = np.array([[2, 3] + [0] * 10, [2, 1, 1, 1, 1, 1, 1, 50, 1, 1, 1, 3]])
    document_ids = np.array([[1, 1] + [0] * 10, [1] * 12])
    result = masked(masks(0.5, seq_len=12), tokens, document_ids)
    assert result.chosen.sum(axis=1).tolist() == [0, 1]
    assert result.columns[1, 0] == 7


def test_replacements_are_80_10_10_and_random_words_are_uniform() -> None:
    tokens, document_ids = made_rows(20_000)
    result = masked(masks(), tokens, document_ids)
    row, slot = np.nonzero(result.chosen)
    seen, label = result.tokens[row, result.columns[row, slot]], result.labels[row, slot]
    n, words = len(seen), VOCAB_SIZE - len(SPECIAL_IDS)
    random = (seen != SPECIAL_IDS["mask"]) & (seen != label)
    for share, expected in (
        ((seen == SPECIAL_IDS["mask"]).mean(), 0.8),
        (random.mean(), 0.1 * (1 - 1 / words)),
        ((seen == label).mean(), 0.1 * (1 + 1 / words)),
    ):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
    counts = np.bincount(seen[random], minlength=VOCAB_SIZE)
    assert not counts[:5].any()
    expected_count = random.sum() / words
    assert abs(((counts[5:] - expected_count) ** 2 / expected_count).sum() - words) < 4 * np.sqrt(2 * words)


def test_every_place_is_chosen_as_often_and_independently_of_its_neighbours() -> None:
    tokens = np.full((20_000, 128), 50)
    tokens[:, 0], tokens[:, -1] = 2, 3
    result = masked(masks(), tokens, np.ones_like(tokens))
    hit = np.zeros(tokens.shape, bool)
    np.put_along_axis(hit, result.columns, True, axis=1)
    counts = hit[:, 1:-1].sum(axis=0)
    share = 19 / 126
    assert abs(counts - 20_000 * share).max() < 5 * np.sqrt(20_000 * share)
    pairs = (hit[:, 1:-2] & hit[:, 2:-1]).sum() / (20_000 * 125)
    assert pairs == pytest.approx(19 * 18 / (126 * 125), rel=0.02)


def test_masks_are_the_same_in_any_company_and_differ_by_epoch_row_and_seed() -> None:
    tokens, document_ids = made_rows(600)
    whole = masked(masks(), tokens, document_ids)
    rows = np.array([599, 3, 411, 3])
    few = masks().apply(tokens[rows], document_ids[rows], np.zeros(4, np.int64), rows)
    for name in ("tokens", "columns", "labels", "chosen"):
        np.testing.assert_array_equal(getattr(few, name), getattr(whole, name)[rows])

    def overlap(other: MaskedRows) -> float:
        return float((other.columns == whole.columns).mean())

    assert overlap(masked(masks(), tokens, document_ids)) == 1
    assert overlap(masked(masks(), tokens, document_ids, epoch=1)) < 0.2
    assert overlap(masked(masks(seed=12), tokens, document_ids)) < 0.2
    assert overlap(masks().apply(tokens, document_ids, np.zeros(600, np.int64), np.arange(600) + 1)) < 0.2


def test_padding_is_what_the_segments_say() -> None:
    tokens, document_ids = made_rows(200)
    padded = np.where(document_ids == 0, 50, tokens)
    for name in ("columns", "labels", "chosen"):
        expected = getattr(masked(masks(), tokens, document_ids), name)
        np.testing.assert_array_equal(getattr(masked(masks(), padded, document_ids), name), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_type_of_the_tokens_does_not_matter(dtype: type) -> None:
    tokens, document_ids = made_rows(20)
    np.testing.assert_array_equal(
        masked(masks(), tokens.astype(dtype), document_ids.astype(np.uint16)).tokens,
        masked(masks(), tokens, document_ids).tokens,
    )


def test_hiding_chosen_or_all_keeps_what_is_to_be_predicted() -> None:
    tokens, document_ids = made_rows(300)
    mixed = masked(masks(), tokens, document_ids)
    chosen = masked(masks(), tokens, document_ids, hide="chosen")
    everything = masked(masks(), tokens, document_ids, hide="all")
    for other in (chosen, everything):
        for name in ("columns", "labels", "chosen"):
            np.testing.assert_array_equal(getattr(other, name), getattr(mixed, name))
    expected = tokens.astype(np.int64)
    row, slot = np.nonzero(mixed.chosen)
    expected[row, mixed.columns[row, slot]] = SPECIAL_IDS["mask"]
    np.testing.assert_array_equal(chosen.tokens, expected)
    special = np.isin(tokens, list(SPECIAL_IDS.values()))
    np.testing.assert_array_equal(everything.tokens, np.where(special, tokens, SPECIAL_IDS["mask"]))


def test_whole_words_are_chosen_whole_but_for_one_a_row() -> None:
    tokens, document_ids = made_rows(2000)
    tokens[:, 1] = 900  # a word that began in the row before
    result = masked(masks(0.3, continues=CONTINUES), tokens, document_ids)
    hit = np.zeros(tokens.shape, bool)
    row, slot = np.nonzero(result.chosen)
    hit[row, result.columns[row, slot]] = True
    cut_rows = 0
    for i in range(len(tokens)):
        words: list[list[int]] = []
        for column in np.flatnonzero(document_ids[i] != 0):
            if tokens[i, column] in SPECIAL_IDS.values():
                words.append([])
            elif CONTINUES[tokens[i, column]] and words:
                words[-1].append(column)
            else:
                words.append([column])
        cut = [word for word in words if 0 < hit[i, word].sum() < len(word)]
        assert len(cut) <= 1
        for word in cut:
            assert hit[i, word].tolist() == sorted(hit[i, word].tolist(), reverse=True)
        cut_rows += len(cut)
    assert 0 < cut_rows < len(tokens) / 2


def test_continuations_come_from_the_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    model = {"type": "WordPiece", "continuing_subword_prefix": "##", "vocab": {"a": 5, "##b": 6, "#": 7, "##": 8}}
    file.write_text(json.dumps({"model": model}))
    assert np.flatnonzero(continuation_ids(file, 10)).tolist() == [6, 8]

    file.write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 5}}}))
    with pytest.raises(BadInput, match=r"whole_word.*tokenizer\.json.*BPE"):
        continuation_ids(file, 10)
