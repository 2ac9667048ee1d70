"""A teacher's outputs on disk, for the positions 0 to N - 1 of a run: what is kept, and which runs may use it.

Which row stands at a position, and which of its words are masked, are pure functions of the seed and the position
(`pretrain.data.loader`). So outputs that were computed once serve every student that has the same data, seed and masks,
on any number of ranks and with any global batch.

    CACHE/manifest.json   CACHE/shard-000000.tar …          whole
    CACHE/unfinished.json   CACHE/shard-000000.tar …        while it is made
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from data_prep.shards.reader import Dataset
from pretrain.data.datasets import DataRecipe
from pretrain.data.loader import order_fingerprint
from pretrain.distill.cache_shards import Array, ShardEntry, map_shard
from pretrain.distill.recipe import DistillPlan
from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256

FORMAT = 1
MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
OPEN_SHARDS = 4
"""Shards that a reader keeps mapped. Positions come in order, so two would do."""

CHECKSUMS = {
    "data": "of other rows: of another dataset, or with another data.window_shards",
    "tokenizer": "with another tokenizer",
    "teacher": "with another distill.teacher",
}
"""Key of a cache's identity whose value is a checksum → how the cache was made, where it differs."""

WHAT = {
    "seed": "seed",
    "mask_rate": "data.mask_rate",
    "masked": "data.mask_schedule.masked",
    "random": "data.mask_schedule.random",
    "whole_word": "data.whole_word",
    "within_documents": "data.within_documents",
}
"""Key of a cache's identity → the key of the recipe that it comes from."""


@checked_dataclass(config=ConfigDict(strict=True))
class _Shard:
    name: str
    bytes: int
    sha256: str
    rows: int


@checked_dataclass(config=ConfigDict(strict=True))
class _Manifest:
    """What a manifest must have; `shards` has None for those that are not made yet."""

    format: int
    identity: dict[str, Any]
    arrays: dict[str, Any]
    rows: PositiveInt
    shard_rows: PositiveInt
    shards: list[_Shard | None]
    temperature: float
    score_scale: float
    precision: str


def cache_identity(plan: DistillPlan, datasets: Sequence[Dataset], data: DataRecipe, seed: int) -> dict[str, Any]:
    """What a cache and a run must have in common.

    Raises BadInput: masks that change over the steps, so that they depend on the length of a run.
    """
    schedule = data.mask_schedule
    lasts = {name: getattr(schedule, f"last_{name}") for name in ("rate", "masked", "random")}
    for name, last in lasts.items():
        if last is not None:
            raise BadInput(
                f"distill.cache: not with data.mask_schedule.last_{name}: masks that change over the steps depend on "
                "the length of the run; leave it out, or distil without a cache"
            )
    return {
        "data": order_fingerprint(datasets, data),
        "seed": seed,
        "tokenizer": datasets[0].manifest["tokenizer_sha256"],
        "teacher": _teacher_sha256(plan.teacher),
        "mask_rate": data.mask_rate,
        "masked": schedule.masked,
        "random": schedule.random,
        "whole_word": data.whole_word,
        "within_documents": data.within_documents,
    }


def needed_arrays(plan: DistillPlan) -> list[str]:
    """The names of the arrays that the losses of a plan need; the numbers are layers of the teacher."""
    names = ["logits"] if plan.recipe.logits else []
    names += [f"hidden-{layer}" for layer in plan.state_layers]
    names += [f"{kind}-{layer}" for layer in plan.projection_layers for kind in ("query", "key")]
    return names + ([f"value-{plan.layers[-1][1]}"] if plan.recipe.relations else [])


@dataclass(frozen=True)
class TeacherCache:
    """A whole cache. It is what `pretrain.data.loader.Beside` says."""

    folder: Path
    manifest: dict[str, Any]
    wanted: tuple[str, ...] = ()
    """The arrays to read; all where empty."""
    _open: OrderedDict[int, dict[str, Array]] = field(default_factory=OrderedDict, compare=False)

    @property
    def rows(self) -> int:
        """Positions that it holds."""
        return int(self.manifest["rows"])

    @property
    def score_scale(self) -> float:
        """The teacher's factor on the products of queries and keys."""
        return float(self.manifest["score_scale"])

    def read(self, positions: NDArray[np.int64]) -> dict[str, Array]:
        """Name → [n, …], for positions [n] below `rows`.

        Raises BadInput, naming the shard, where it is missing or damaged: each is checked when it is first read.
        """
        number, within = np.divmod(positions, self.manifest["shard_rows"])
        found: dict[str, Array] = {}
        for shard in np.unique(number):
            here = number == shard
            for name, array in self._shard(int(shard)).items():
                if self.wanted and name not in self.wanted:
                    continue
                if name not in found:
                    found[name] = np.empty((len(positions), *array.shape[1:]), array.dtype)
                found[name][here] = array[within[here]]
        return found

    def _shard(self, number: int) -> dict[str, Array]:
        if number not in self._open:
            entries: list[ShardEntry] = self.manifest["shards"]
            self._open[number] = map_shard(self.folder, entries[number])
        self._open.move_to_end(number)
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]


def open_cache(
    folder: Path, plan: DistillPlan, identity: Mapping[str, Any], *, run_rows: int, repeat: bool
) -> TeacherCache:
    """The cache in `folder`, for a run with this plan and identity.

    Args:
        folder: of the cache.
        plan: of the run.
        identity: from `cache_identity`.
        run_rows: rows that the run trains on, over all epochs.
        repeat: the run may have more rows than the cache.

    Raises BadInput: none is there, it is not whole, or it was made for something else.
    """
    if not (folder / MANIFEST).is_file():
        state = "is not whole yet" if (folder / UNFINISHED).is_file() else "there is no cache"
        raise BadInput(f"distill.cache: {folder}: {state}; make it with sharebert cache-teacher and the same recipe")
    manifest = read_manifest(folder / MANIFEST)
    if manifest["format"] != FORMAT:
        raise BadInput(f"distill.cache: {folder}: format {manifest['format']}, not {FORMAT}; make the cache anew")
    refuse_other(folder, manifest["identity"], identity)
    needed = needed_arrays(plan)
    if missing := [name for name in needed if name not in manifest["arrays"]]:
        raise BadInput(
            f"distill.cache: {folder} does not hold {missing[0]} of the teacher, which a loss with a weight needs (it "
            f"holds {', '.join(manifest['arrays'])}); make another cache with this recipe"
        )
    of_one_temperature = plan.recipe.logits and "rest" in manifest["arrays"]
    if of_one_temperature and manifest["temperature"] != plan.recipe.temperature:
        raise BadInput(
            f"distill.temperature: {plan.recipe.temperature:g}, and {folder} was made with "
            f"{manifest['temperature']:g}; use that, or make another cache"
        )
    if run_rows > manifest["rows"] and not repeat:
        raise BadInput(
            f"distill.cache: {folder} holds {manifest['rows']:,} rows, and the run trains on {run_rows:,}: make it "
            f"with --rows {run_rows}, or train on the cached rows again with distill.repeat_cache=true"
        )
    wanted = [*needed, *(name for name in ("words", "rest") if plan.recipe.logits and name in manifest["arrays"])]
    return TeacherCache(folder, manifest, tuple(wanted))


def refuse_other(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise BadInput where a cache has another identity, naming the first difference."""
    for name, value in wanted.items():
        if found.get(name) != value:
            of_keys = f"with another {WHAT.get(name)} ({found.get(name)}, this run has {value})"
            how = CHECKSUMS.get(name, of_keys)
            raise BadInput(f"distill.cache: {folder} was made {how}; make a cache for this run in another folder")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a cache. Raises BadInput, naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
        manifest = TypeAdapter(_Manifest).validate_json(text)
        if len(manifest.shards) != -(-manifest.rows // manifest.shard_rows):
            raise ValueError(f"it names {len(manifest.shards)} shards for {manifest.rows} rows")
        if path.name == MANIFEST and None in manifest.shards:
            raise ValueError("a shard is missing")
    except (OSError, ValueError) as error:
        why = _first(error) if isinstance(error, ValidationError) else error
        raise BadInput(f"distill.cache: {path}: no manifest of a cache ({why}); remove the folder") from error
    return dict(json.loads(text))


def _first(error: ValidationError) -> str:
    """The first of the errors, in one line."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    return f"it has no {key}" if first["type"] == "missing" else f"{key}: {first['msg']}".removeprefix(": ")


def _teacher_sha256(folder: Path) -> str:
    """Of the names and contents of the files that decide a teacher's outputs."""
    files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin") or file.name == "config.json"]
    named = [(file.name, file_sha256(file)) for file in sorted(files)]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()
