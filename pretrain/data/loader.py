"""The loader of training: global batches in an order that no number of ranks changes.

Position p of the run takes its row from a dataset (`mixture`), at a place of that dataset's epoch (`order`), and masks
some of its tokens (`masks`). Each is a pure function of the seed and the position. So a run resumes from the number of
rows that it consumed, without delay and on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.shards.reader import Dataset
from pretrain.data.batches import Batcher, MicroBatch
from pretrain.data.datasets import DataRecipe, micro_shape
from pretrain.data.mask_schedule import masks_of_steps
from pretrain.data.mixture import Mixture
from pretrain.data.order import Order
from sharebert_common.errors import BadInput

TOKENS_AT_ONCE = 131_072
"""Steps are made together up to about this many tokens a rank, so that they share the fixed costs of NumPy calls."""


@dataclasses.dataclass
class StepBatch:
    """A rank's share of one optimizer step."""

    micro_batches: list[MicroBatch]
    """Equally many on every rank, all of one shape."""
    rows: range
    """Positions of the whole global batch, over all ranks."""
    masked: int
    """Masked tokens in this rank's share."""
    rows_consumed: int
    """Rows that the run has consumed after this step, over all ranks: the end of `rows`."""
    epoch: float
    """Passes over the data after this step; over the most repeated dataset of a mixture."""
    wait_s: float = 0.0
    """How long the training loop waited for this step."""

    @property
    def row_length(self) -> int:
        """Tokens of a row as the model sees it, see `pretrain.data.row_length`."""
        return self.micro_batches[0].tokens.shape[1]


class Beside(Protocol):
    """What is kept on disk for the positions of a run, such as a teacher's outputs. It is read ahead with the rows."""

    @property
    def rows(self) -> int:
        """It is there for the positions 0 to rows - 1. Behind these, the run goes over the same rows again."""

    def read(self, positions: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Name → [n, …], for positions [n] below `rows`. Raises BadInput where it is damaged."""


class Loader:
    """Iterates over the optimizer steps of one rank, without end. A thread prepares them ahead of the training.

    Rank r of n takes positions [r·G/n, (r+1)·G/n) of each G, so shares differ by at most one row. A global batch that
    would hold rows that are to be skipped starts behind them instead.

    Args:
        datasets: from `open_datasets`.
        recipe: key `data` of the train recipe.
        seed: of order and masks, 0 ≤ seed < 2^64.
        rank: of this process.
        world_size: how many processes share a global batch.
        steps: of the whole run, over which the masks and the length of rows change.
        beside: what micro-batches hold beside their rows.

    Raises:
        BadInput: more ranks than rows in a global batch, a seed out of range, an empty train split;
            while iterating: a dataset is found damaged.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        recipe: DataRecipe,
        seed: int,
        rank: int,
        world_size: int,
        steps: int = 1,
        beside: Beside | None = None,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise BadInput(f"seed: {seed} is not in 0 … 2^64-1")
        self._count, self._micro_rows = micro_shape(recipe, world_size)
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._global_batch, self._may_change = recipe.global_batch, recipe.may_change
        self._mask_schedule, self._mask_rate = recipe.mask_schedule, recipe.mask_rate
        self._row_length, self.seq_len = recipe.row_length, datasets[0].seq_len
        self._run_rows = steps * recipe.global_batch
        self._batcher = Batcher(
            datasets, "train", mask_rate=recipe.highest_mask_rate, whole_word=recipe.whole_word, seed=seed
        )
        for entry, split in zip(recipe.dataset, self._batcher.splits, strict=True):
            if split.rows == 0:
                raise BadInput(f"data.dataset: {entry.path}: the train split is empty")
        self._mixture = Mixture([entry.weight for entry in recipe.dataset])
        self._orders = [Order(split.shard_rows, seed, recipe.window_shards) for split in self._batcher.splits]
        self._dataset_rows = np.array([order.rows for order in self._orders])
        self._fingerprint = order_fingerprint(datasets, recipe)
        self._beside = beside
        self._consumed = self._submitted = 0
        self._prefetch = recipe.prefetch
        step_tokens = self._count * self._micro_rows * datasets[0].seq_len
        self._steps_at_once = max(1, min(recipe.prefetch, TOKENS_AT_ONCE // step_tokens))
        self._pending: deque[Future[list[StepBatch]]] = deque()
        self._ready: deque[StepBatch] = deque()
        self._skipped: list[range] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="loader")  # its thread begins with the first step

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBatch:
        started = time.perf_counter()
        self._pass_skipped_rows()
        if not self._ready:
            self._submit()
            try:
                self._ready.extend(self._pending.popleft().result())
            except BaseException:
                self.close()
                raise
            self._submit()
        batch = self._ready.popleft()
        batch.wait_s = time.perf_counter() - started
        self._consumed = batch.rows_consumed
        return batch

    def skip(self, rows: range) -> None:
        """Never hand out the positions `rows`, from the next step on."""
        self._skipped.append(rows)

    @property
    def fingerprint(self) -> str:
        """Of the data and of everything that their order depends on beside the seed."""
        return self._fingerprint

    def state(self) -> dict[str, str | int]:
        """What `load_state` needs to continue after the last step handed out, on any number of ranks."""
        return {"fingerprint": self._fingerprint, "seed": self._seed, "rows_consumed": self._consumed}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise BadInput where `state` is of another seed, or of other data or another order that may not change."""
        if state["seed"] != self._seed:
            raise BadInput(
                f"the checkpoint was written with data seed {state['seed']}, this run has {self._seed}: "
                "restore the setting, or start a new run"
            )
        if state["fingerprint"] != self._fingerprint and not self._may_change:
            raise BadInput(
                f"the checkpoint was written with data fingerprint {state['fingerprint']}, this run has "
                f"{self._fingerprint}: restore the setting, or start a new run; data.may_change=true continues with "
                "the changed data"
            )

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises BadInput as `check_state` does."""
        self.check_state(state)
        self._move_to(int(state["rows_consumed"]))

    def close(self, *, wait: bool = True) -> None:
        """Stop the thread, after the steps that it is preparing; `wait` until it has stopped."""
        self._worker.shutdown(wait, cancel_futures=True)

    def _move_to(self, position: int) -> None:
        self._pending.clear()
        self._ready.clear()
        self._consumed = self._submitted = position

    def _pass_skipped_rows(self) -> None:
        start = self._consumed
        while ends := [r.stop for r in self._skipped if r.start < start + self._global_batch and start < r.stop]:
            start = max(ends)
        if start != self._consumed:
            self._move_to(start)

    def _submit(self) -> None:
        while len(self._pending) * self._steps_at_once < self._prefetch + self._steps_at_once:
            self._pending.append(self._worker.submit(self._make, self._submitted))
            self._submitted += self._steps_at_once * self._global_batch

    def _make(self, start: int) -> list[StepBatch]:
        """Steps `start`, `start` + G, …: several small steps at once, which saves calls."""
        starts = start + np.arange(self._steps_at_once) * self._global_batch
        first, last = (starts + r * self._global_batch // self._world_size for r in (self._rank, self._rank + 1))
        positions = first[:, None] + np.arange(self._count * self._micro_rows)
        counts = positions < last[:, None]
        # Rows that only fill up the shape repeat the last row, so no code after this meets a row of padding alone.
        positions = np.minimum(positions, last[:, None] - 1)
        if self._beside is not None:
            positions %= self._beside.rows
        dataset, places = self._mixture.at(positions.ravel())
        epochs, rows = np.empty_like(places), np.empty_like(places)
        for number in np.unique(dataset):
            here = dataset == number
            epochs[here], rows[here] = self._orders[number].at(places[here])
        masks = masks_of_steps(self._mask_schedule, self._mask_rate, starts, self._run_rows)
        micro_batches = self._batcher.make(
            dataset,
            epochs,
            rows,
            counts=counts.ravel(),
            micro_rows=self._micro_rows,
            hide="mixed",
            beside=None if self._beside is None else self._beside.read(positions.ravel()),
            **{key: values.repeat(positions.shape[1], axis=0) for key, values in masks.items()},
        )
        return [
            self._step(int(end), micro_batches[number * self._count : (number + 1) * self._count])
            for number, end in enumerate(starts + self._global_batch)
        ]

    def _step(self, end: int, micro_batches: list[MicroBatch]) -> StepBatch:
        length = self._row_length.at((end - self._global_batch) / self._run_rows, self.seq_len)
        return StepBatch(
            micro_batches=[micro.cut(length) for micro in micro_batches],
            rows=range(end - self._global_batch, end),
            masked=sum(int(micro.loss_weights.sum()) for micro in micro_batches),
            rows_consumed=end,
            epoch=float((self._mixture.before(end) / self._dataset_rows).max()),
        )


def order_fingerprint(datasets: Sequence[Dataset], recipe: DataRecipe) -> str:
    """Everything that the order depends on beside the seed: the datasets, their slots in a mixture, and W."""
    mixture = Mixture([entry.weight for entry in recipe.dataset])
    parts = [
        f"{dataset.fingerprint} x {slots}" if len(datasets) > 1 else dataset.fingerprint
        for dataset, slots in zip(datasets, mixture.slots, strict=True)
    ]
    return f"{' + '.join(parts)} (window_shards {recipe.window_shards})"
