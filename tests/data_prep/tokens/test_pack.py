"""Rows against a naive packer: token by token, over random documents and shapes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tokens.pack import pack
from data_prep.tokens.shuffle import ShardText

PAD, CLS, SEP = 0, 2, 3


def naive(documents: list[list[int]], seq_len: int) -> tuple[list[list[int]], list[list[int]]]:
    stream = [(token, number) for number, document in enumerate(documents) for token in [*document, SEP]]
    rows, document_ids = [], []
    for start in range(0, len(stream), seq_len - 1):
        piece = stream[start : start + seq_len - 1]
        if len(piece) == 1:  # nothing but the last document's [SEP]
            break
        fill = seq_len - 1 - len(piece)
        rows.append([CLS] + [token for token, _ in piece] + [PAD] * fill)
        document_ids.append([1] + [number - piece[0][1] + 1 for _, number in piece] + [0] * fill)
    return rows, document_ids


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    seq_len=st.integers(8, 40),
    rows_per_block=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_rows_are_those_of_a_naive_packer(lengths: list[int], seq_len: int, rows_per_block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    documents = [rng.integers(5, 60_000, length).tolist() for length in lengths]
    order = rng.permutation(len(documents))  # as they lie in the shard's array, in another order
    where = np.zeros(len(documents), np.int64)
    flat: list[int] = []
    for number in order:
        where[number] = len(flat)
        flat += [*documents[number], SEP]
    text = ShardText(np.array(flat, np.uint16), where, np.array(lengths) + 1)
    blocks = list(pack(text, seq_len, {"pad": PAD, "cls": CLS, "sep": SEP}, "uint8", rows_per_block))
    rows, document_ids = naive(documents, seq_len)
    assert [len(tokens) for tokens, _ in blocks[:-1]] == [rows_per_block] * (len(blocks) - 1)
    assert np.concatenate([tokens for tokens, _ in blocks]).tolist() == rows
    assert np.concatenate([numbers for _, numbers in blocks]).tolist() == document_ids
