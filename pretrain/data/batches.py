"""From rows to micro-batches: read, mask, and lay out at a fixed shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.shards.reader import Dataset
from pretrain.data.masks import Hide, Masks, continuation_ids
from sharebert_common.errors import BadInput

I64 = NDArray[np.int64]
Array = NDArray[Any]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes. `capacity` = rows × max(1, round(highest mask rate × seq_len)) is fixed."""

    tokens: torch.Tensor
    """[rows, seq_len] int64, with masks applied; after `cut`, [pieces, tokens of a piece]."""
    document_ids: torch.Tensor
    """As `tokens`, uint8 (int32 for datasets with more than 255 documents a row); 0 is padding."""
    positions: torch.Tensor
    """[capacity] int64, row · seq_len + column of the chosen tokens; 0 in unused slots."""
    labels: torch.Tensor
    """[capacity] int64, the tokens that stood there; 0 in unused slots."""
    loss_weights: torch.Tensor
    """[capacity] float32, 1, or 0 in unused slots and in rows that only fill up the shape."""
    padded: bool
    """Whether any row has padding."""
    beside: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Name → [rows, …], what is kept on disk for these rows, such as a teacher's outputs."""
    pieces: int = 1
    """Into how many pieces each row of the dataset is cut."""
    mask_rate: float = 0.15
    """Share of a row's tokens that are chosen in this step."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`; from pinned memory the copies do not wait."""

        def there(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            tokens=there(self.tokens),
            document_ids=there(self.document_ids),
            positions=there(self.positions),
            labels=there(self.labels),
            loss_weights=there(self.loss_weights),
            beside={name: there(tensor) for name, tensor in self.beside.items()},
        )

    def cut(self, length: int) -> MicroBatch:
        """The same with each row cut into pieces of `length` tokens, which are rows of their own. Nothing moves in
        memory, so `positions` stay what they are. A piece may be padding alone."""
        tokens, document_ids = self.tokens.view(-1, length), self.document_ids.view(-1, length)
        pieces = self.pieces * self.tokens.shape[1] // length
        return replace(self, tokens=tokens, document_ids=document_ids, pieces=pieces)


class Batcher:
    """Makes micro-batches from the rows of one split ("train" or "validation") of some datasets.

    Args:
        datasets: with the same seq_len and tokenizer.
        split: the split's name.
        mask_rate: share of a row's tokens to choose, the largest one where it varies.
        whole_word: whether whole words are chosen.
        seed: of the masks.

    Raises:
        BadInput: whole words are asked for and the tokenizer marks none.
    """

    def __init__(
        self, datasets: Sequence[Dataset], split: str, *, mask_rate: float, whole_word: bool, seed: int
    ) -> None:
        first = datasets[0]
        self._datasets = datasets
        self._split, self._mask_rate = split, mask_rate
        self._vocab_size = first.vocab_size
        self.splits = [dataset.split(split) for dataset in datasets]
        self._masks = Masks(
            rate=mask_rate,
            seed=seed,
            seq_len=first.seq_len,
            vocab_size=first.vocab_size,
            special_ids=first.special_ids,
            continues=continuation_ids(first.tokenizer_path, first.vocab_size) if whole_word else None,
        )

    def make(
        self,
        dataset: I64,
        epochs: I64,
        rows: I64,
        *,
        counts: NDArray[np.bool_],
        micro_rows: int,
        hide: Hide,
        rates: NDArray[np.float64] | None = None,
        shares: NDArray[np.float64] | None = None,
        beside: Mapping[str, Array] | None = None,
    ) -> list[MicroBatch]:
        """Read and mask rows, in micro-batches of `micro_rows`.

        Args:
            dataset: [n] which dataset each row is from; n is a multiple of `micro_rows`.
            epochs: [n] each row's epoch of its dataset.
            rows: [n] the rows' numbers in their datasets' splits.
            counts: [n] false for rows that only fill up the shape, with weight 0.
            micro_rows: rows of a micro-batch.
            hide: what to put in place of the tokens.
            rates: [n] of tokens to choose, equal in a micro-batch, and
            shares: [n, 2] of [MASK] and random words among them, both as in `Masks.apply`.
            beside: name → [n, …], what `MicroBatch.beside` holds.
        """
        tokens, document_ids = self._read(dataset, rows)
        masked = self._masks.apply(tokens, document_ids, epochs, rows, hide, rates, shares)
        used = masked.chosen & counts[:, None]
        row_start = np.arange(len(rows)) % micro_rows * tokens.shape[1]
        positions = np.where(used, masked.columns + row_start[:, None], 0)
        labels = np.where(used, masked.labels, 0)
        padded = (document_ids == 0).reshape(-1, micro_rows * document_ids.shape[1]).any(axis=1)
        whole = (
            _tensor(array, micro_rows)
            for array in (masked.tokens, document_ids, positions, labels, used.astype(np.float32))
        )
        kept = {name: _tensor(array, micro_rows) for name, array in (beside or {}).items()}
        rates_of = np.full(len(padded), self._mask_rate) if rates is None else rates[::micro_rows]
        return [
            MicroBatch(
                tokens,
                document_ids,
                positions.view(-1),
                labels.view(-1),
                loss_weights.view(-1),
                any_padding,
                beside={name: tensor[number] for name, tensor in kept.items()},
                mask_rate=float(rates_of[number]),
            )
            for number, (tokens, document_ids, positions, labels, loss_weights, any_padding) in enumerate(
                zip(*whole, padded.tolist(), strict=True)
            )
        ]

    def _read(self, dataset: I64, rows: I64) -> tuple[Array, Array]:
        """Tokens and document ids [n, seq_len] of rows of several datasets, in the order asked for."""
        present = np.unique(dataset)
        if len(present) == 1:
            return self._read_one(int(present[0]), rows)
        tokens, document_ids = zip(
            *(self._read_one(number, rows[dataset == number]) for number in present), strict=True
        )
        back = np.argsort(np.argsort(dataset, kind="stable"))
        return np.concatenate(tokens)[back], np.concatenate(document_ids)[back]

    def _read_one(self, number: int, rows: I64) -> tuple[Array, Array]:
        tokens, document_ids = self.splits[number].read(rows)
        if tokens.max() >= self._vocab_size:
            raise BadInput(
                f"{self._datasets[number].path}: a row of its {self._split} split has token {tokens.max()}, of a "
                f"vocabulary of {self._vocab_size}: a shard is damaged; copy the dataset again"
            )
        return tokens, document_ids


def _tensor(array: Array, micro_rows: int) -> torch.Tensor:
    """[micro-batches, micro_rows, …] over the array's memory; pinned where CUDA is, for copies beside computing."""
    if array.dtype == np.uint16:  # torch has few operations on uint16
        array = array.astype(np.int32)
    tensor = torch.from_numpy(array).view(-1, micro_rows, *array.shape[1:])
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
