"""The loader of training: global batches in an order that no number of ranks changes.

Position p of the run takes its row from a dataset (`mixture`), at a place of that dataset's epoch
(`order`), and hides some of its tokens (`masks`); each is a pure function of the seed and the
position, so a run is resumed from the number of rows consumed, at once and on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from data_prep.shards.cache import CacheConfig
from data_prep.shards.dataset_files import LocalFiles
from data_prep.shards.reader import Dataset, open_dataset
from pretrain.data.batches import Batcher, MicroBatch
from pretrain.data.mixture import Mixture
from pretrain.data.order import Order
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

TOKENS_AT_ONCE = 131_072
"""Steps are made together up to about this many tokens a rank: the fixed costs of NumPy calls are shared."""

MOST_WINDOW_SHARDS = LocalFiles.open_shards // 2
"""Two windows are read where one ends and the next begins; more shards than a reader keeps open would be slow."""

OTHER_OPEN_FILES = 512
"""What the rest of a training process may need: sockets, checkpoints, logs."""


@dataclass(config=STRICT, kw_only=True)
class WeightedDataset:
    """A dataset of a mixture."""

    path: str
    """Folder of a dataset made by `sharebert prep`; with `cache`, also a URL that fsspec knows."""
    weight: PositiveFloat = 1.0
    """Its share of the rows, in any unit; kept to 1/65,536 of the whole."""


def _as_list(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str) else value


@dataclass(config=STRICT, kw_only=True)
class DataRecipe:
    """What a run reads."""

    dataset: Annotated[list[WeightedDataset], BeforeValidator(_as_list), Field(min_length=1, max_length=1024)]
    """A dataset's folder, or a list of {path, weight} to mix. Each goes through epochs of its own."""
    global_batch: PositiveInt
    """Rows of an optimizer step, over all ranks; any number that is at least the number of ranks."""
    micro_batch: PositiveInt
    """Most rows that a rank computes at once; what a rank has is cut into equal parts no larger than this."""
    mask_rate: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    """Share of a row's tokens to predict."""
    whole_word: bool = False
    """Choose whole words. The tokenizer must mark the pieces that continue a word, as WordPiece does."""
    within_documents: bool = False
    """Let a token attend to its own document alone, and not to the others of its row. On CUDA this needs
    `model.attention_probs_dropout_prob: 0`."""
    window_shards: Annotated[int, Field(ge=1, le=MOST_WINDOW_SHARDS)] = 16
    """Rows are shuffled inside windows of this many shards, which are read at the same time."""
    cache: CacheConfig | None = None
    """Read through copies on this node's own disk. A dataset at a URL needs it; a slow shared disk gains by it."""
    prefetch: PositiveInt = 8
    """Steps made ready ahead of the one that trains, at least."""
    may_change: bool = False
    """Go on also where datasets, weights or `window_shards` are not those of the checkpoint (shards were added, say):
    the run takes up the new order at the position that it has reached."""


@dataclasses.dataclass
class StepBatch:
    """A rank's share of one optimizer step."""

    micro_batches: list[MicroBatch]
    """As many on every rank, all of one shape."""
    masked: int
    """Masked tokens in this rank's share."""
    rows_consumed: int
    """Rows that the run has consumed after this step, over all ranks."""
    epoch: float
    """Passes over the data after this step; over the most repeated dataset of a mixture."""
    wait_s: float = 0.0
    """How long the training loop waited for this step."""


def open_datasets(recipe: DataRecipe) -> list[Dataset]:
    """Open the datasets of a recipe.

    Raises:
        BadInput: a dataset is damaged or missing, two differ in seq_len or tokenizer, the cache is too small, or
            more files would be open than the system allows.
    """
    datasets = [open_dataset(entry.path, recipe.cache) for entry in recipe.dataset]
    for entry, dataset in zip(recipe.dataset, datasets, strict=True):
        for key in ("seq_len", "tokenizer_sha256"):
            ours, first = dataset.manifest[key], datasets[0].manifest[key]
            if ours != first:
                raise BadInput(
                    f"data.dataset: {entry.path} has {key} {ours}, {recipe.dataset[0].path} has {first}: "
                    "datasets of a mixture are prepared with one seq_len and one tokenizer"
                )
    _refuse_too_small_a_cache(datasets, recipe)
    _allow_open_files(datasets)
    return datasets


def _allow_open_files(datasets: Sequence[Dataset]) -> None:
    """A mixture may hold more shards open than a process may have files by default."""
    shards = [len(dataset.split("train").shard_rows) for dataset in datasets]
    needed = OTHER_OPEN_FILES + sum(min(count, LocalFiles.open_shards) for count in shards)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BadInput(
            f"data.dataset: {len(datasets)} datasets are read with {needed} open files, and this process may have "
            f"{hard}; raise the limit (ulimit -Hn), or mix fewer"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _refuse_too_small_a_cache(datasets: Sequence[Dataset], recipe: DataRecipe) -> None:
    """Where one window ends and the next begins, rows of both are read: less room would fetch shards twice."""
    if recipe.cache is None or recipe.cache.max_bytes is None:
        return
    needed = 0
    for dataset in datasets:
        sizes = sorted((shard["bytes"] for shard in dataset.manifest["splits"]["train"]["shards"]), reverse=True)
        needed += sum(sizes[: 2 * recipe.window_shards])
    if recipe.cache.max_bytes < needed:
        raise BadInput(
            f"data.cache.max_bytes: {recipe.cache.max_bytes} is less than the {needed} bytes of two windows of "
            f"{recipe.window_shards} shards, which are read at the same time; raise it or lower data.window_shards"
        )


def micro_shape(recipe: DataRecipe, world_size: int) -> tuple[int, int]:
    """How many micro-batches each rank runs in a step, and how many rows each has.

    The largest share of a rank is cut into the fewest equal parts that `micro_batch` allows, so that
    few rows only fill up the shape.

    Raises:
        BadInput: more ranks than rows in a global batch.
    """
    if recipe.global_batch < world_size:
        raise BadInput(
            f"data.global_batch: {recipe.global_batch} rows cannot be shared by {world_size} ranks; "
            "raise it to at least the number of ranks, or start fewer"
        )
    largest_share = -(-recipe.global_batch // world_size)
    count = -(-largest_share // recipe.micro_batch)
    return count, -(-largest_share // count)


class Loader:
    """Iterates over the optimizer steps of one rank, without end, made ready by a thread of its own.

    Rank r of n takes positions [r·G/n, (r+1)·G/n) of each G: shares differ by at most one row.

    Args:
        datasets: as `open_datasets` gives them.
        recipe: key `data` of the train recipe.
        seed: of order and masks, 0 ≤ seed < 2^64.
        rank: of this process.
        world_size: how many processes share a global batch.

    Raises:
        BadInput: more ranks than rows in a global batch, a seed out of range, an empty train split;
            while iterating: a dataset is found damaged.
    """

    def __init__(self, datasets: Sequence[Dataset], recipe: DataRecipe, seed: int, rank: int, world_size: int) -> None:
        if not 0 <= seed < 2**64:
            raise BadInput(f"seed: {seed} is not in 0 … 2^64-1")
        self._count, self._micro_rows = micro_shape(recipe, world_size)
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._global_batch, self._may_change = recipe.global_batch, recipe.may_change
        self._batcher = Batcher(datasets, "train", mask_rate=recipe.mask_rate, whole_word=recipe.whole_word, seed=seed)
        for entry, split in zip(recipe.dataset, self._batcher.splits, strict=True):
            if split.rows == 0:
                raise BadInput(f"data.dataset: {entry.path}: the train split is empty")
        self._mixture = Mixture([entry.weight for entry in recipe.dataset])
        self._orders = [Order(split.shard_rows, seed, recipe.window_shards) for split in self._batcher.splits]
        self._dataset_rows = np.array([order.rows for order in self._orders])
        self._fingerprint = _order_fingerprint(datasets, self._mixture, recipe.window_shards)
        self._consumed = self._submitted = 0
        self._prefetch = recipe.prefetch
        step_tokens = self._count * self._micro_rows * datasets[0].seq_len
        self._steps_at_once = max(1, min(recipe.prefetch, TOKENS_AT_ONCE // step_tokens))
        self._pending: deque[Future[list[StepBatch]]] = deque()
        self._ready: deque[StepBatch] = deque()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBatch:
        started = time.perf_counter()
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

    def state(self) -> dict[str, str | int]:
        """What `load_state` needs to go on after the last step handed out, on any number of ranks."""
        return {"fingerprint": self._fingerprint, "seed": self._seed, "rows_consumed": self._consumed}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            BadInput: it was taken with another seed, or over other data or in another order, and that may not change.
        """
        if state["seed"] != self._seed:
            raise BadInput(
                f"the checkpoint was written with data seed {state['seed']}, this run has {self._seed}: "
                "restore the setting, or start a new run"
            )
        if state["fingerprint"] != self._fingerprint and not self._may_change:
            raise BadInput(
                f"the checkpoint was written with data fingerprint {state['fingerprint']}, this run has "
                f"{self._fingerprint}: restore the setting, or start a new run; data.may_change=true goes on with "
                "the changed data"
            )
        self._pending.clear()
        self._ready.clear()
        self._consumed = self._submitted = int(state["rows_consumed"])

    def close(self) -> None:
        """Stop the thread."""
        self._worker.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        while len(self._pending) * self._steps_at_once < self._prefetch + self._steps_at_once:
            self._pending.append(self._worker.submit(self._make, self._submitted))
            self._submitted += self._steps_at_once * self._global_batch

    def _make(self, start: int) -> list[StepBatch]:
        """Steps `start`, `start` + G, …: small steps are made several at once, which spares calls."""
        starts = start + np.arange(self._steps_at_once) * self._global_batch
        first, last = (starts + r * self._global_batch // self._world_size for r in (self._rank, self._rank + 1))
        positions = first[:, None] + np.arange(self._count * self._micro_rows)
        counts = positions < last[:, None]
        # Filling rows repeat the last one: ordinary input, so nothing downstream meets a row of padding.
        positions = np.minimum(positions, last[:, None] - 1)
        dataset, places = self._mixture.at(positions.ravel())
        epochs, rows = np.empty_like(places), np.empty_like(places)
        for number in np.unique(dataset):
            here = dataset == number
            epochs[here], rows[here] = self._orders[number].at(places[here])
        micro_batches = self._batcher.make(
            dataset, epochs, rows, counts=counts.ravel(), micro_rows=self._micro_rows, hide="mixed"
        )
        return [
            self._step(int(end), micro_batches[number * self._count : (number + 1) * self._count])
            for number, end in enumerate(starts + self._global_batch)
        ]

    def _step(self, end: int, micro_batches: list[MicroBatch]) -> StepBatch:
        return StepBatch(
            micro_batches=micro_batches,
            masked=sum(int(micro.loss_weights.sum()) for micro in micro_batches),
            rows_consumed=end,
            epoch=float((self._mixture.before(end) / self._dataset_rows).max()),
        )


def _order_fingerprint(datasets: Sequence[Dataset], mixture: Mixture, window_shards: int) -> str:
    """All that the order depends on beside the seed: the datasets, their slots in a mixture, and W."""
    parts = [
        f"{dataset.fingerprint} x {slots}" if len(datasets) > 1 else dataset.fingerprint
        for dataset, slots in zip(datasets, mixture.slots, strict=True)
    ]
    return f"{' + '.join(parts)} (window_shards {window_shards})"
