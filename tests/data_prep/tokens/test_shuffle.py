"""The two-pass shuffle: nothing is lost, copies are in one split, shards are about equal, seed and text decide all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.tokens import shuffle
from sharebert_common.errors import BadInput

SEP = 3
Documents = list[list[int]]


def write(folder: Path, parts: list[Documents], seed: int = 0) -> list[Path]:
    """Write the runs of some parts; the text of a document is its ids as words."""
    folders = []
    for number, documents in enumerate(parts):
        part = folder / f"part-{number}"
        part.mkdir(parents=True)
        writer = shuffle.RunWriter(part, number, seed, SEP, np.dtype("uint16"))
        for start in range(0, len(documents), 7):
            batch = documents[start : start + 7]
            ids = np.array([i for document in batch for i in document], np.uint32)
            offsets = np.cumsum([0] + [len(document) for document in batch])
            numbers = np.arange(start, start + len(batch))
            writer.add(numbers, [" ".join(map(str, document)) for document in batch], ids, offsets)
        writer.close()
        folders.append(part)
    return shuffle.list_runs(folders)


def gathered(runs: list[Path], layout: shuffle.Layout, split: str) -> list[Documents]:
    shards = []
    for bins in layout.shards[split]:
        text = shuffle.gather(runs, split, bins, layout.validation_below, np.dtype("uint16"))
        documents = [text.tokens[s : s + n].tolist() for s, n in zip(text.starts, text.lengths, strict=True)]
        assert all(document[-1] == SEP for document in documents)
        shards.append([document[:-1] for document in documents])
    return shards


def made(parts: int, seed: int = 0, longest: int = 60) -> list[Documents]:
    rng = np.random.default_rng(seed)
    return [[rng.integers(5, 60_000, rng.integers(1, longest)).tolist() for _ in range(80)] for _ in range(parts)]


@pytest.mark.parametrize("run_tokens", [1 << 20, 500])
@pytest.mark.parametrize("validation", [0, 0.1, 12])
def test_every_document_once_and_validation_as_asked(
    tmp_path: Path, run_tokens: int, validation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "RUN_TOKENS", run_tokens)
    monkeypatch.setattr(shuffle, "_SMALL_SHARD_BYTES", 3000)
    parts = made(5)
    parts[2][3] = []  # a document without tokens is left out
    runs = write(tmp_path, parts)
    layout = shuffle.plan_shards(runs, validation, 32, 2, 1 << 20)
    shards = {split: gathered(runs, layout, split) for split in layout.shards}
    everything = [document for part in parts for document in part if document]
    found = [document for split in shards.values() for shard in split for document in shard]
    assert sorted(found) == sorted(everything)
    total = sum(len(document) + 1 for document in everything)
    held_out = sum(len(document) + 1 for shard in shards["validation"] for document in shard)
    wanted = validation * 31 if validation >= 1 else validation * total
    assert wanted <= held_out < wanted + 60
    sizes = [sum(map(len, shard)) for shard in shards["train"]]
    assert len(sizes) > 5
    assert min(sizes) > 0.5 * max(sizes)
    order = [document for shard in shards["train"] for document in shard]
    assert order[:40] != [d for d in everything if d in order][:40]


def test_copies_of_a_text_fall_on_the_same_side(tmp_path: Path) -> None:
    parts = made(2)
    runs = write(tmp_path, [*parts, *parts, parts[0]])
    layout = shuffle.plan_shards(runs, 0.3, 32, 2, 1 << 20)
    train, validation = (
        {tuple(d) for shard in gathered(runs, layout, s) for d in shard} for s in ("train", "validation")
    )
    assert train
    assert validation
    assert not train & validation


def test_order_is_a_function_of_the_seed(tmp_path: Path) -> None:
    parts, orders = made(2), []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        runs = write(tmp_path / folder, parts, seed)
        orders.append(gathered(runs, shuffle.plan_shards(runs, 0, 32, 2, 1 << 20), "train"))
    assert orders[0] == orders[1] != orders[2]


def test_few_huge_documents_make_no_empty_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "_SMALL_SHARD_BYTES", 100)
    runs = write(tmp_path, [[[7] * 5000], [[8] * 3, [9] * 7000]])
    layout = shuffle.plan_shards(runs, 0, 32, 2, 1000)
    assert all(shard for shard in gathered(runs, layout, "train"))
    assert len(layout.shards["train"]) <= 3


@pytest.mark.parametrize(
    ("documents", "seq_len", "dtype"),
    [
        ([[5]] * 254, 508, "uint8"),  # 507 tokens of documents of 2: at most 255 in a row
        ([[5]] * 255, 508, "uint8"),
        ([[5]] * 300, 512, "uint16"),
        ([[5]] * 200 + [[6, 7]] * 200, 512, "uint8"),
        ([[5]] * 200 + [[6, 7]] * 200, 640, "uint16"),
    ],
)
def test_segments_are_wider_only_where_a_row_may_hold_over_255_documents(
    tmp_path: Path, documents: Documents, seq_len: int, dtype: str
) -> None:
    runs = write(tmp_path, [documents])
    assert shuffle.plan_shards(runs, 0, seq_len, 2, 1 << 20).segments_dtype == dtype


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no document is left for a dataset"):
        shuffle.plan_shards(write(tmp_path / "a", [[[]]]), 0, 32, 2, 1 << 20)
    runs = write(tmp_path / "b", [[[5, 6]]])
    for validation in (0.1, 1, 8):  # 8 rows are more than there is
        with pytest.raises(BadInput, match=rf"validation: {validation} takes all of the 1 documents"):
            shuffle.plan_shards(runs, validation, 32, 2, 1 << 20)
