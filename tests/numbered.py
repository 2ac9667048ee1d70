"""Datasets whose rows say which row they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards.format import shard_name, write_manifest
from data_prep.shards.reader import Dataset, open_dataset
from data_prep.shards.shard_file import write_shard
from pretrain.data.batches import MicroBatch
from sharebert_common.files import file_sha256

SPECIAL_IDS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
DIGIT = 5
BASE = 64
VOCAB_SIZE = 100
SEQ_LEN = 12


def rows_saying(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[CLS], the row's number in three digits, words, [SEP]; every fifth row ends in three tokens of padding."""
    tokens = DIGIT + (numbers[:, None] * 31 + np.arange(SEQ_LEN) * 17) % (VOCAB_SIZE - DIGIT)
    tokens[:, 1:4] = DIGIT + numbers[:, None] // [BASE**2, BASE, 1] % BASE
    tokens[:, 0], tokens[:, -1] = SPECIAL_IDS["cls"], SPECIAL_IDS["sep"]
    document_ids = np.ones(tokens.shape, np.uint8)
    short = numbers % 5 == 0
    tokens[short, -4] = SPECIAL_IDS["sep"]
    tokens[short, -3:], document_ids[short, -3:] = SPECIAL_IDS["pad"], 0
    return tokens.astype(np.uint16), document_ids


def numbers_of(original: np.ndarray) -> np.ndarray:
    """The numbers that rows [n, seq_len] say."""
    return (original[:, 1:4].astype(np.int64) - DIGIT) @ [BASE**2, BASE, 1]


def numbered_dataset(
    folder: Path,
    train: Sequence[int],
    validation: Sequence[int] = (7,),
    first: int = 0,
    prefix: str = "##",
    **manifest: Any,
) -> Dataset:
    """A dataset with shards of so many rows; training rows say `first`, `first` + 1, …, validation rows 0, 1, ….

    `prefix` is what the tokenizer writes before a piece that continues a word. Other entries of the manifest may be
    given.
    """
    folder.mkdir(parents=True)
    pieces = {f"w{i}": i for i in range(80)} | {f"{prefix}c{i}": i for i in range(80, VOCAB_SIZE)}
    model = {"type": "WordPiece", "continuing_subword_prefix": prefix, "vocab": pieces}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    splits: dict[str, Any] = {}
    for split, shard_rows, start in (("train", train, first), ("validation", validation, 0)):
        shards = []
        for number, count in enumerate(shard_rows):
            numbers = np.arange(start, start + count)
            blocks = [rows_saying(numbers[i : i + 100]) for i in range(0, count, 100)]
            shards.append(write_shard(folder, shard_name(split, number), blocks))
            start += count
        splits[split] = {"rows": sum(shard_rows), "shards": shards}
    whole = {
        "seq_len": SEQ_LEN,
        "dtype": "uint16",
        "segments_dtype": "uint8",
        "vocab_size": VOCAB_SIZE,
        "tokenizer_sha256": file_sha256(folder / "tokenizer.json"),
        "special_ids": SPECIAL_IDS,
        "splits": splits,
    }
    write_manifest(folder, whole | manifest)
    return open_dataset(folder)


def originals(batch: MicroBatch) -> np.ndarray:
    """The tokens [rows, seq_len] before they were masked, from the labels; filling rows stay masked."""
    tokens = batch.tokens.numpy().copy()
    used = batch.loss_weights.numpy() > 0
    tokens.ravel()[batch.positions.numpy()[used]] = batch.labels.numpy()[used]
    return tokens


def real_rows(batch: MicroBatch) -> np.ndarray:
    """[rows] whether a row counts."""
    return batch.loss_weights.numpy().reshape(len(batch.tokens), -1).any(axis=1)
