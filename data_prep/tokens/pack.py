"""Pack token ids into rows: `[CLS] document [SEP] document [SEP] …`, filled to seq_len.

The documents, each with a [SEP] at its end, form one stream. A row is [CLS] and the next seq_len - 1 tokens of the
stream. So a document that does not fit continues in the next row, and only the last row of a shard has padding.

Document ids number the documents of a row from 1, and are 0 on padding. [CLS] belongs to the first document of its row,
[SEP] to the document that it ends. A document that continues from the row before counts as a document of this row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.tokens.shuffle import ShardText, slices


def pack(
    text: ShardText, seq_len: int, special_ids: Mapping[str, int], segments_dtype: str, rows_per_block: int
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Blocks of rows: (tokens, document ids), both [rows, seq_len]; the last block may have fewer rows."""
    width = seq_len - 1
    ends = np.cumsum(text.lengths)
    total = int(ends[-1])
    if total % width == 1:
        total -= 1  # no last row that holds nothing but a [SEP]
    rows = -(-total // width)
    for row in range(0, rows, rows_per_block):
        count = min(rows_per_block, rows - row)
        start, stop = row * width, min((row + count) * width, total)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        stops = np.minimum(ends[first : last + 1], stop)
        lengths = np.diff(stops, prepend=start)
        # Numbers of the block's documents. They may wrap around, but their differences within a row stay right.
        document = np.repeat(np.arange(1, len(lengths) + 1).astype(segments_dtype), lengths)
        shift = text.starts[first : last + 1] - (ends[first : last + 1] - text.lengths[first : last + 1])
        stream = np.concatenate(list(slices(text.tokens, shift + stops - lengths, lengths)))
        tokens = np.full((count, seq_len), special_ids["pad"], text.tokens.dtype)
        document_ids = np.zeros((count, seq_len), segments_dtype)
        tokens[:, 0] = special_ids["cls"]
        document_ids[:, 0] = 1
        for out, values in ((tokens, stream), (document_ids, document)):
            full = len(values) // width
            whole = values[: full * width].reshape(full, width)
            rest = values[full * width :]
            if out is document_ids:
                whole = whole - (whole[:, :1] - 1)
                rest = rest - (rest[:1] - 1)
            out[:full, 1:] = whole
            out[full:, 1 : 1 + len(rest)] = rest
        yield tokens, document_ids
