"""A dataset of random words: what is measured does not depend on the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from data_prep.shards.format import TOKENIZER, shard_name, write_manifest
from data_prep.shards.shard_file import write_shard
from sharebert_common.files import file_sha256
from sharebert_common.inference_tokenizer import SPECIAL_TOKENS

BLOCK = 1024


def random_dataset(folder: Path, rows: int, seq_len: int, words: int, documents: int = 1) -> Path:
    """Rows of `seq_len` tokens, each of `documents` documents of equal length; 64 rows more for validation.

    Returns the folder; it is left as it is where it exists.
    """
    if (folder / "manifest.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    special = {key: number for number, key in enumerate(SPECIAL_TOKENS)}
    vocabulary = {word: special[key] for key, word in SPECIAL_TOKENS.items()}
    vocabulary |= {f"w{number}": number for number in range(len(special), words)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=SPECIAL_TOKENS["unk"]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.save(str(folder / TOKENIZER))
    generator = np.random.default_rng(0)
    document_ids = (1 + np.arange(seq_len) * documents // seq_len).astype(np.uint8)

    def block(count: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = generator.integers(len(special), words, (count, seq_len)).astype(np.uint16)
        tokens[:, 0], tokens[:, -1] = special["cls"], special["sep"]
        return tokens, np.tile(document_ids, (count, 1))

    splits = {}
    for split, count in (("train", rows), ("validation", 64)):
        blocks = [block(min(BLOCK, count - first)) for first in range(0, count, BLOCK)]
        splits[split] = {"rows": count, "shards": [write_shard(folder, shard_name(split, 0), blocks)]}
    write_manifest(
        folder,
        {
            "seq_len": seq_len,
            "dtype": "uint16",
            "segments_dtype": "uint8",
            "vocab_size": words,
            "tokenizer_sha256": file_sha256(folder / TOKENIZER),
            "special_ids": special,
            "splits": splits,
        },
    )
    return folder
