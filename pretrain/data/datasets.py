"""What a run reads: its datasets and how a global batch is cut, checked before anything is built."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from data_prep.shards.cache import CacheRecipe
from data_prep.shards.dataset_files import LocalFiles
from data_prep.shards.reader import Dataset, open_dataset
from pretrain.data.mask_schedule import MaskScheduleRecipe
from pretrain.data.row_length import RowLengthRecipe
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

MOST_WINDOW_SHARDS = LocalFiles.open_shards // 2
"""Where one window ends and the next begins, both are read. More shards than a reader keeps open would be slow."""

OTHER_OPEN_FILES = 512
"""What the rest of a training process may need: sockets, checkpoints, logs."""


@dataclass(config=STRICT, kw_only=True)
class WeightedDataset:
    """A dataset of a mixture."""

    path: str
    """Folder of a dataset made by `sharebert prep`; with `cache`, also a URL that fsspec can open."""
    weight: PositiveFloat = 1.0
    """Its share of the rows, relative to the other weights; exact to 1/65,536 of all rows."""


def _rows_or_auto(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and value > 0):
        return value
    raise ValueError(f"give a number of rows above 0, or auto (got {value!r})")


def _as_list(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str) else value


@dataclass(config=STRICT, kw_only=True)
class DataRecipe:
    """What a run reads."""

    dataset: Annotated[list[WeightedDataset], BeforeValidator(_as_list), Field(min_length=1, max_length=1024)]
    """A dataset's folder, or a list of {path, weight} to mix. Each dataset has epochs of its own."""
    global_batch: PositiveInt
    """Rows of an optimizer step, over all ranks; at least the world size."""
    micro_batch: Annotated[int | Literal["auto"], BeforeValidator(_rows_or_auto)]
    """Most rows that a rank computes at once; the share of a rank is cut into equal parts no larger than this. `auto`
    tries at each start of a run how many fit into the GPU's memory (on a CPU, into half of what is free)."""
    mask_rate: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    """Share of a row's tokens that are masked and predicted; with `mask_schedule.last_rate`, that of the first step."""
    mask_schedule: MaskScheduleRecipe = field(default_factory=MaskScheduleRecipe)
    """How the masks change over the steps, and what takes the place of a chosen token."""
    row_length: RowLengthRecipe = field(default_factory=RowLengthRecipe)
    """Short rows first. Not with `compile` or `distill.cache`."""
    whole_word: bool = False
    """Mask whole words. The tokenizer must mark the pieces that continue a word, as WordPiece does."""
    within_documents: bool = False
    """A token attends to its own document only, not to the other documents of its row. On CUDA, rows of 257
    tokens or more need `model.attention_probs_dropout_prob: 0` for this."""
    window_shards: Annotated[int, Field(ge=1, le=MOST_WINDOW_SHARDS)] = 16
    """Rows are shuffled inside windows of this many shards, which are read at the same time."""
    cache: CacheRecipe | None = None
    """Read through copies on this node's own disk. A dataset at a URL needs it; a slow shared disk gains by it."""
    prefetch: PositiveInt = 8
    """Least number of steps that are prepared ahead of the one that trains."""
    may_change: bool = False
    """Resume also where datasets, weights or `window_shards` differ from those of the checkpoint (after shards were
    added, for instance): the run follows the new order from the position that it has reached."""

    @property
    def highest_mask_rate(self) -> float:
        """The largest mask rate of the run. It fixes the shape of micro-batches."""
        return max(self.mask_rate, self.last_mask_rate)

    @property
    def last_mask_rate(self) -> float:
        """The mask rate at the end of the run."""
        return self.mask_schedule.rate(self.mask_rate, 1.0)


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
    few rows only fill up the shape. With `micro_batch: auto`, before it is a number, the share is one part.

    Raises:
        BadInput: more ranks than rows in a global batch.
    """
    if recipe.global_batch < world_size:
        raise BadInput(
            f"data.global_batch: {recipe.global_batch} rows cannot be shared by {world_size} ranks; "
            "raise it to at least the number of ranks, or start fewer"
        )
    largest_share = -(-recipe.global_batch // world_size)
    count = 1 if recipe.micro_batch == "auto" else -(-largest_share // recipe.micro_batch)
    return count, -(-largest_share // count)
