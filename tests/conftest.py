"""What several packages' tests share: a tiny dataset of made-up sentences."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.failing_calls import NoCompiler, compile_shim
from sharebert_common.processes import STOP_SIGNALS

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it at its import, whoever imports it first

SEQ_LEN = 32
WORDS = 296


def make_dataset(
    folder: Path, *, train_rows: int = 192, validation_rows: int = 24, seed: int = 0, unknown: bool = False
) -> Path:
    """A dataset in format 1 whose words follow each other in a fixed order most of the time: it can be learnt.

    With `unknown`, all of its words are [UNK].
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from data_prep.shards.format import write_manifest
    from data_prep.shards.shard_file import write_shard
    from sharebert_common.files import file_sha256

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"word{i}" for i in range(WORDS)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))

    rng = np.random.default_rng(seed)

    def rows_of(count: int) -> tuple[np.ndarray, np.ndarray]:
        steps = np.where(rng.random((count, SEQ_LEN)) < 0.9, 1, rng.integers(1, WORDS, (count, SEQ_LEN)))
        tokens = (len(special) + np.cumsum(steps, axis=1) % WORDS).astype(np.uint16)
        if unknown:
            tokens[:] = special.index("[UNK]")
        document_ids = np.ones_like(tokens, dtype=np.uint8)
        tokens[:, 0], tokens[:, -1] = 2, 3
        tokens[0, -5:], document_ids[0, -5:] = 0, 0  # one row has padding
        return tokens, document_ids

    splits: dict[str, Any] = {}
    for split, count in (("train", train_rows), ("validation", validation_rows)):
        tokens, document_ids = rows_of(count)
        blocks = [(tokens[i : i + 16], document_ids[i : i + 16]) for i in range(0, count, 16)]
        shards = [
            write_shard(folder, f"{split}/shard-{n:06d}.tar", blocks[i : i + 3])
            for n, i in enumerate(range(0, len(blocks), 3))
        ]
        splits[split] = {"rows": count, "tokens": int((document_ids > 0).sum()), "documents": count, "shards": shards}
    write_manifest(
        folder,
        {
            "seq_len": SEQ_LEN,
            "dtype": "uint16",
            "segments_dtype": "uint8",
            "vocab_size": len(words),
            "tokenizer_sha256": file_sha256(folder / "tokenizer.json"),
            "special_ids": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
            "config": {},
            "sources": [],
            "splits": splits,
            "versions": {},
        },
    )
    return folder


def retokenize(dataset: Path) -> Path:
    """The same rows, with a tokenizer that has other words."""
    from data_prep.shards.format import write_manifest
    from sharebert_common.files import file_sha256

    tokenizer, manifest = dataset / "tokenizer.json", dataset / "manifest.json"
    tokenizer.write_text(tokenizer.read_text().replace("word7", "term7"))
    content = json.loads(manifest.read_text()) | {"tokenizer_sha256": file_sha256(tokenizer)}
    write_manifest(dataset, {key: value for key, value in content.items() if key != "fingerprint"})
    return dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dataset: 101 words, rows of 32 tokens."""
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture
def signals_restored() -> Iterator[None]:
    """Signals are handled after the test as before it. In it, Ctrl-C is handled as Python does: where tests run in the
    background of a script, it is ignored."""
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes calls fail below Python, see `benchmarks/failing_calls.py`."""
    try:
        return compile_shim(tmp_path_factory.mktemp("shim"))
    except NoCompiler as error:
        pytest.skip(str(error))
