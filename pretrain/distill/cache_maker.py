"""`sharebert cache-teacher`: run the teacher of a train recipe once over the rows of the run, and keep what it says.

It is one process. Stopped and started again, it goes on at the first shard that is not there, and it makes damaged
shards anew.
"""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pretrain.data.batches import MicroBatch
from pretrain.data.loader import Loader
from pretrain.distill.cache import (
    FORMAT,
    MANIFEST,
    UNFINISHED,
    cache_identity,
    needed_arrays,
    read_manifest,
    refuse_other,
)
from pretrain.distill.cache_shards import Array, ShardEntry, is_whole, write_shard
from pretrain.distill.recipe import DistillPlan
from pretrain.distill.teacher import Teacher, TeacherOutput, load_teacher
from pretrain.recipe import TrainRecipe
from sharebert_common.errors import BadInput
from sharebert_common.files import flush, mkdir_durably, write_atomically
from sharebert_common.progress import progress

SHARD_BYTES = 64 << 20
"""A shard is about this large; one is in memory at a time."""
SHARD_TOKENS = 1 << 20
"""A shard has at most about this many tokens, so that rows that are read ahead take little memory."""

Dtype = Literal["fp16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class CacheSettings:
    """What is kept."""

    rows: int | None = None
    """Rows of the run, from its first; None: all that the run trains on."""
    top_words: int = 64
    """Words whose logits are kept at a masked position, the likeliest; of the others their sum."""
    dtype: Dtype = "fp16"
    """Of logits, hidden states, queries, keys and values."""


def make_cache(recipe: TrainRecipe, settings: CacheSettings) -> str:
    """Make the cache that `distill.cache` names, or the rest of it. Returns what was made, in one line.

    Raises BadInput: no teacher or folder in the recipe, a folder that holds something else, a full disk.
    """
    if recipe.distill.cache is None:
        raise BadInput("distill.cache: not given; name the folder for the teacher's outputs")
    recipe.check_engine()
    folder = Path(recipe.distill.cache)
    training = replace(recipe, distill=replace(recipe.distill, cache=None)).resolve()
    plan = training.distill
    if plan is None:
        raise BadInput("distill.teacher: not given; name the teacher whose outputs are kept")
    datasets, data = training.datasets, recipe.data
    identity = cache_identity(plan, datasets, data, recipe.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(plan, device, within_documents=data.within_documents, precision=recipe.precision)
    outputs = _Outputs(plan, teacher, device, settings)

    def rows_of(step: int) -> Loader:
        return Loader(datasets, replace(data, global_batch=step, prefetch=1), recipe.seed, 0, 1)

    with closing(rows_of(1)) as loader:
        first = outputs(next(loader).micro_batches[0])
    row_bytes = sum(array.nbytes for array in first.values())
    rows = settings.rows or recipe.steps * data.global_batch
    shard_rows = max(1, min(SHARD_BYTES // row_bytes, SHARD_TOKENS // training.seq_len, rows))
    manifest = {
        "format": FORMAT,
        "identity": identity,
        "arrays": {name: {"shape": list(array.shape[1:]), "dtype": str(array.dtype)} for name, array in first.items()},
        "rows": rows,
        "shard_rows": shard_rows,
        "bytes_per_token": row_bytes / training.seq_len,
        "temperature": plan.recipe.temperature,
        "score_scale": outputs.score_scale,
        "precision": recipe.precision,
    }
    try:
        mkdir_durably(folder)
        with closing(rows_of(shard_rows)) as loader:
            shards = _fill(folder, manifest, row_bytes, loader, outputs)
    except OSError as error:
        raise BadInput(f"distill.cache: {folder}: not written ({error.strerror}); start again to go on") from error
    total = sum(entry["bytes"] for entry in shards if entry is not None)
    return (
        f"{folder}: {rows:,} rows of {training.seq_len} tokens, {row_bytes / training.seq_len:,.1f} bytes a token, "
        f"{total:,} bytes in {len(shards)} shards"
    )


def _fill(
    folder: Path, manifest: dict[str, Any], row_bytes: int, loader: Loader, outputs: _Outputs
) -> list[ShardEntry | None]:
    """Make the shards that are missing, each from one step of `loader`, and then the manifest. Returns all shards."""
    shards, shard_rows = _begin(folder, manifest), manifest["shard_rows"]
    missing = [number for number, entry in enumerate(shards) if entry is None]
    _refuse_full_disk(folder, row_bytes * sum(_rows(manifest, number) for number in missing))
    for number in progress(missing, str(folder), len(missing)):
        if loader.state()["rows_consumed"] != number * shard_rows:
            loader.load_state({**loader.state(), "rows_consumed": number * shard_rows})
        parts = [outputs(micro) for micro in next(loader).micro_batches]
        count = _rows(manifest, number)
        kept = {name: np.concatenate([part[name] for part in parts])[:count] for name in manifest["arrays"]}
        shards[number] = write_shard(folder, number, number * shard_rows, kept)
        write_atomically(folder / UNFINISHED, json.dumps({**manifest, "shards": shards}) + "\n")
    if (folder / UNFINISHED).is_file():
        (folder / UNFINISHED).replace(folder / MANIFEST)
        flush(folder)
    return shards


def _begin(folder: Path, manifest: dict[str, Any]) -> list[ShardEntry | None]:
    """The shards that are there already, None for each that is missing or damaged; the folder is marked unfinished."""
    count = -(-manifest["rows"] // manifest["shard_rows"])
    shards: list[ShardEntry | None] = [None] * count
    found = next((folder / name for name in (MANIFEST, UNFINISHED) if (folder / name).is_file()), None)
    if found is None:
        if any(folder.iterdir()):
            raise BadInput(f"distill.cache: {folder}: holds other files; choose another folder")
    else:
        there = read_manifest(found)
        refuse_other(folder, there["identity"], manifest["identity"])
        for name in ("format", "precision", "rows", "arrays", "temperature", "shard_rows"):
            if there[name] != manifest[name]:
                raise BadInput(
                    f"distill.cache: {folder} holds a cache with {name} {there[name]}, and this one would have "
                    f"{manifest[name]}; remove it, or choose another folder"
                )
        shards = [entry if entry is not None and is_whole(folder, entry) else None for entry in there["shards"]]
    for leftover in folder.glob(".shard-*"):
        leftover.unlink(missing_ok=True)
    if None in shards or found != folder / MANIFEST:
        write_atomically(folder / UNFINISHED, json.dumps({**manifest, "shards": shards}) + "\n")
        (folder / MANIFEST).unlink(missing_ok=True)
    return shards


def _rows(manifest: dict[str, Any], number: int) -> int:
    """Rows of a shard; the last one may be smaller."""
    start = number * manifest["shard_rows"]
    return int(min(manifest["shard_rows"], manifest["rows"] - start))


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BadInput(
            f"distill.cache: {folder}: needs {needed:,} bytes and {free:,} are free; lower --rows or --top-words, or "
            "leave out the losses that need the most"
        )


class _Outputs:
    """What is kept of a micro-batch: name → [rows, …], on the CPU."""

    def __init__(self, plan: DistillPlan, teacher: Teacher, device: torch.device, settings: CacheSettings) -> None:
        self.plan, self.teacher, self.device = plan, teacher, device
        self.words = min(settings.top_words, plan.words)
        self.settings = settings
        self.score_scale = 1.0
        """Of the teacher, once it was called."""

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> dict[str, Array]:
        batch = batch.to(self.device)
        taught = self.teacher(batch)
        self.score_scale = taught.score_scale
        made = self._logits(taught, batch) | {f"hidden-{layer}": state for layer, state in taught.states.items()}
        for layer, projections in taught.projections.items():
            made |= {f"{kind}-{layer}": x for kind, x in zip(("query", "key", "value"), projections, strict=True)}
        kept = {}
        for name in (*needed_arrays(self.plan), *(name for name in ("words", "rest") if name in made)):
            kept[name] = self._numbers(name, made[name])
        return kept

    def _logits(self, taught: TeacherOutput, batch: MicroBatch) -> dict[str, Tensor]:
        """Logits less the largest, which softmax does not see: small numbers keep more digits in 16 bits."""
        if taught.logits is None:
            return {}
        logits = taught.logits[:, : self.plan.words].float()
        logits = logits - logits.amax(-1, keepdim=True)
        made = {}
        if self.words < self.plan.words:
            top = logits.topk(self.words, dim=-1)
            others = (logits / self.plan.recipe.temperature).scatter(1, top.indices, -torch.inf)
            logits = top.values
            made = {"words": top.indices, "rest": others.logsumexp(-1)}
        made["logits"] = logits
        unused = batch.loss_weights == 0
        rows = len(batch.tokens)
        return {
            name: values.masked_fill(unused.view(-1, *[1] * (values.dim() - 1)), 0).unflatten(0, (rows, -1))
            for name, values in made.items()
        }

    def _numbers(self, name: str, values: Tensor) -> Array:
        if name == "words":
            found: Array = values.cpu().numpy().astype(np.uint16 if self.plan.words <= 1 << 16 else np.int32)
            return found
        dtype = torch.float32 if name == "rest" else DTYPES[self.settings.dtype]
        numbers = values.to(dtype).cpu()
        if not bool(torch.isfinite(numbers).all()):
            raise BadInput(
                f"distill.cache: the teacher's {name} has values that {self.settings.dtype} does not hold; "
                "use --dtype fp32"
            )
        return numbers.numpy()
