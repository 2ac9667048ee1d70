"""Which tokens of a row are masked, and what stands in their place: a pure function of (seed, epoch, row, position) and
of the rate and the shares that a step asks for.

The masked-language-model objective of Devlin et al., "BERT", NAACL 2019, section 3.1, with an exact
number of masked tokens a row, so that shapes never change. docs/format.md carries the definition and
test vectors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sharebert_common.counter_rng import Stream, draw, key
from sharebert_common.errors import BadInput

Hide = Literal["mixed", "chosen", "all"]
"""What is put in place of tokens.

`mixed`: a chosen token becomes [MASK] (80 %), a random ordinary word (10 %), or stays (10 %).
`chosen`: every chosen token becomes [MASK]. `all`: every ordinary token of the row becomes [MASK].
"""

DEFAULT_SHARES = (0.8, 0.1)
"""Of the chosen tokens, how many become [MASK] and how many a random word; the rest stays (Devlin et al.)."""

REPLACEMENTS = 2**32
"""Counter in a row's stream from which replacements are drawn. Choices are drawn from 0 on."""

HALF = np.uint64(32)
NEVER = np.uint32(2**32 - 1)

CHUNK_TOKENS = 32_768
"""Tokens that are ranked at once, so that the arrays of a chunk stay in a core's second-level cache."""


@dataclass(frozen=True)
class MaskedRows:
    """Rows with their masks applied; `slots` is the capacity of a row."""

    tokens: NDArray[np.int64]
    """[rows, seq_len], as the model sees them."""
    columns: NDArray[np.int64]
    """[rows, slots], where the chosen tokens stand, ascending; 0 in unused slots."""
    labels: NDArray[np.int64]
    """[rows, slots], the tokens that stood there; 0 in unused slots."""
    chosen: NDArray[np.bool_]
    """[rows, slots], whether a slot is used; the used ones come first."""


class Masks:
    """Chooses tokens and masks them.

    A row of n non-padding tokens has exactly max(1, round(rate · n)) chosen ones (rounded as IEEE 754
    and Python do: halves to even), or all of its ordinary tokens where it has fewer. Special tokens,
    [UNK] among them, and padding are never chosen.

    Args:
        rate: share of a row's non-padding tokens to choose, 0 < rate ≤ 0.5; the largest one, where rates vary.
        seed: of the run, 0 ≤ seed < 2^64.
        seq_len: tokens of a row.
        vocab_size: of the tokenizer (not of a padded embedding); random words are drawn from it.
        special_ids: ids of the special tokens; `mask` must be among the names.
        continues: [vocab_size] whether a token continues the word before it. Given, whole words are
            chosen: words in random order, the last one cut short where it would exceed the number.
    """

    def __init__(
        self,
        *,
        rate: float,
        seed: int,
        seq_len: int,
        vocab_size: int,
        special_ids: Mapping[str, int],
        continues: NDArray[np.bool_] | None = None,
    ) -> None:
        self.slots = max(1, round(rate * seq_len))
        self._rate = rate
        self._seed = seed
        self._chunk_rows = max(1, CHUNK_TOKENS // seq_len)
        self._columns = np.arange(seq_len, dtype=np.uint32)
        self._column_bits = np.uint32(2 ** (seq_len - 1).bit_length() - 1)
        self._pairs = np.arange((seq_len + 1) // 2)
        self._mask_id = special_ids["mask"]
        self._ordinary = np.ones(vocab_size, bool)
        self._ordinary[list(special_ids.values())] = False
        self._words = np.flatnonzero(self._ordinary)
        self._continues = continues

    def apply(
        self,
        tokens: NDArray[Any],
        document_ids: NDArray[Any],
        epochs: NDArray[np.int64],
        rows: NDArray[np.int64],
        hide: Hide = "mixed",
        rates: NDArray[np.float64] | None = None,
        shares: NDArray[np.float64] | None = None,
    ) -> MaskedRows:
        """Choose and mask tokens.

        Args:
            tokens: [n, seq_len] ids.
            document_ids: [n, seq_len], 0 at padding.
            epochs: [n] of each row.
            rows: [n] the rows' numbers in their dataset.
            hide: what to put in place of the tokens.
            rates: [n] of each row, none above the `rate` of these masks; that one for all rows where None.
            shares: [n, 2] for `mixed`: of the chosen tokens, those that become [MASK] and those that become a random
                word; 0.8 and 0.1 where None.
        """
        rates = np.full(len(tokens), self._rate) if rates is None else rates
        shares = np.broadcast_to(DEFAULT_SHARES, (len(tokens), 2)) if shares is None else shares
        mask_below, random_below = (shares.cumsum(axis=1) * 2**32).astype(np.uint64).T[:, :, None]
        seen = tokens.astype(np.int64)
        columns = np.empty((len(tokens), self.slots), np.int64)
        labels = np.empty_like(columns)
        chosen = np.empty(columns.shape, bool)
        keys = key(self._seed, Stream.MASKS, epochs, rows)[:, None]
        for start in range(0, len(tokens), self._chunk_rows):
            here = slice(start, start + self._chunk_rows)
            ordinary, chosen[here] = self._candidates(tokens[here], document_ids[here], rates[here])
            columns[here] = self._choose(tokens[here], ordinary, chosen[here], keys[here])
            original = np.take_along_axis(seen[here], columns[here], axis=1)
            labels[here] = np.where(chosen[here], original, 0)
            hidden = np.full_like(original, self._mask_id)
            if hide == "mixed":
                below = mask_below[here], random_below[here]
                hidden = self._replacements(original, columns[here], keys[here], *below)
            row, slot = np.nonzero(chosen[here])
            seen[here][row, columns[here][row, slot]] = hidden[row, slot]
            if hide == "all":
                seen[here][ordinary] = self._mask_id
        return MaskedRows(seen, columns, labels, chosen)

    def _candidates(
        self, tokens: NDArray[Any], document_ids: NDArray[Any], rates: NDArray[np.float64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which tokens may be chosen [n, seq_len], and which slots will be used [n, slots]."""
        real = document_ids != 0
        ordinary = self._ordinary.take(tokens) & real
        wanted = np.maximum(1, np.rint(rates * real.sum(axis=1, dtype=np.int32)))
        count = np.minimum(wanted, ordinary.sum(axis=1, dtype=np.int32))
        return ordinary, np.arange(self.slots) < count[:, None]

    def _choose(
        self, tokens: NDArray[Any], ordinary: NDArray[np.bool_], chosen: NDArray[np.bool_], keys: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """The columns [n, slots] of the candidates of lowest hash, ascending; 0 in unused slots.

        What is sorted is a hash with its low bits replaced by the column: the columns come along, which
        costs a fraction of an argpartition, and ties are settled.
        """
        ranked = draw(keys, self._pairs).view(np.uint32)[:, : len(self._columns)]
        if self._continues is not None:
            starts = np.where(self._continues.take(tokens), 0, np.arange(tokens.shape[1]))
            ranked = np.take_along_axis(ranked, np.maximum.accumulate(starts, axis=1), axis=1)
        ranked &= ~self._column_bits
        ranked |= self._columns
        ranked[~ordinary] = NEVER
        ranked.partition(self.slots - 1, axis=1)
        columns = np.sort(ranked[:, : self.slots], axis=1) & self._column_bits
        columns[~chosen] = NEVER
        columns.sort(axis=1)
        columns[~chosen] = 0
        return columns.astype(np.int64)

    def _replacements(
        self,
        original: NDArray[np.int64],
        columns: NDArray[np.int64],
        keys: NDArray[np.uint64],
        mask_below: NDArray[np.uint64],
        random_below: NDArray[np.uint64],
    ) -> NDArray[np.int64]:
        """[MASK], random or kept [n, slots] by the high half of a hash, compared with bounds [n, 1].

        The low half, scaled, picks the random word.
        """
        luck = draw(keys, REPLACEMENTS + columns)
        share = luck >> HALF
        result = np.where(share < mask_below, self._mask_id, original)
        random = (share >= mask_below) & (share < random_below)
        low = luck[random] & np.uint64(2**32 - 1)
        result[random] = self._words[low * np.uint64(len(self._words)) >> HALF]
        return result


def continuation_ids(tokenizer_path: Path, vocab_size: int) -> NDArray[np.bool_]:
    """[vocab_size] whether a token continues a word, from the `##` (or like) prefix of a tokenizer.json.

    Raises:
        BadInput: the tokenizer marks no continuations.
    """
    model = json.loads(Path(tokenizer_path).read_text(encoding="utf-8"))["model"]
    prefix = model.get("continuing_subword_prefix")
    if not prefix:
        raise BadInput(
            f"data.whole_word: {tokenizer_path}: this {model.get('type')} tokenizer does not mark the pieces that "
            "continue a word; set whole_word: false, or use a WordPiece tokenizer"
        )
    continues = np.zeros(vocab_size, bool)
    continues[[number for piece, number in model["vocab"].items() if piece.startswith(prefix)]] = True
    return continues
