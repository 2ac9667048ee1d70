"""The stages of `sharebert prep`. Each is a function from (job, number of a part) to files in a folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.disk import save_array
from data_prep.filter import dedup
from data_prep.filter.clean import CleanRecipe, drop
from data_prep.job import Job
from data_prep.parts import Stage, part_folder, part_stats
from data_prep.read.documents import Batch, utf8_bytes
from data_prep.report import count_sizes
from data_prep.shards.format import SPLITS, shard_name
from data_prep.shards.shard_file import write_shard
from data_prep.tokens import shuffle
from data_prep.tokens.encode import CheckedEncoder
from data_prep.tokens.pack import pack
from sharebert_common.files import write_atomically


def stage_names(clean: CleanRecipe) -> list[str]:
    """The stages of a recipe, in order. Every part of a stage needs all parts of the stage before it."""
    return [*(("scan", "dedup") if dedup.rules(clean) else ()), "encode", "pack"]


def stages(job: Job) -> Iterator[Stage]:
    """The stages in order. Take the next one only when all parts of those before it are done."""
    for name in stage_names(job.recipe.clean):
        match name:
            case "scan":
                yield Stage(name, len(job.parts), scan)
            case "dedup":
                yield Stage(name, key_ranges(job), find_duplicates)
            case "encode":
                yield Stage(name, len(job.parts), encode)
            case "pack":
                yield Stage(name, len(shards_of(layout(job))), pack_shard)


def scan(job: Job, number: int, folder: Path) -> dict[str, Any]:
    """Read and clean a part, and write the keys that find duplicates."""
    keys = dedup.KeyWriter(folder, job.recipe.clean)
    counts: Counter[str] = Counter()
    kept = [np.zeros(0, np.int64)]
    for batch in job.documents(number, counts):
        keys.add(batch)
        kept.append(batch.numbers)
    keys.flush()
    save_array(folder / "kept.npy", np.concatenate(kept))
    return {**counts, "keys": keys.keys, "bytes": counts["bytes_in"]}


def key_ranges(job: Job) -> int:
    """Number of ranges into which the keys of all parts are divided."""
    keys = sum(part_stats(job.work, "scan", number)["keys"] for number in range(len(job.parts)))
    return 1 + keys // dedup.RANGE_KEYS


def find_duplicates(job: Job, number: int, folder: Path) -> dict[str, Any]:
    """Find, in one range of keys, the documents that repeat an earlier one."""
    scanned = [part_folder(job.work, "scan", part) for part in range(len(job.parts))]
    for rule in dedup.rules(job.recipe.clean):
        places = dedup.repeated(scanned, rule, number, key_ranges(job))
        save_array(folder / f"{rule}.npy", places)
    return {}


def encode(job: Job, number: int, folder: Path) -> dict[str, Any]:
    """Read, clean, encode and sort the documents of one part."""
    counts: Counter[str] = Counter()
    encoder = _encoder(job.vocab.json, job.recipe.tokenizer.encoder)
    special = job.vocab.special_ids
    runs = shuffle.RunWriter(folder, number, job.recipe.seed, special["sep"], job.vocab.dtype)
    for batch in _kept(job, number, counts) if dedup.rules(job.recipe.clean) else job.documents(number, counts):
        ids, offsets = encoder(batch.texts)
        counts["documents_kept"] += len(batch.texts)
        counts["bytes_kept"] += utf8_bytes(batch.texts)
        count_sizes(counts, "tokens", np.diff(offsets))
        counts["tokens"] += len(ids)
        counts["unknown"] += int(np.count_nonzero(ids == special["unk"]))
        runs.add(batch.numbers, batch.texts, ids, offsets)
    runs.close()
    return {**counts, "bytes": counts["bytes_kept"]}


def pack_shard(job: Job, number: int, folder: Path) -> dict[str, Any]:
    """Gather, pack and write one shard. The shards of validation are numbered after those of train."""
    plan = layout(job)
    split, index = shards_of(plan)[number]
    text = shuffle.gather(_runs(job), split, plan.shards[split][index], plan.validation_below, job.vocab.dtype)
    blocks = pack(
        text, job.recipe.seq_len, job.vocab.special_ids, plan.segments_dtype, job.recipe.shards.rows_per_block
    )
    entry = write_shard(folder, shard_name(split, index), blocks)
    documents = len(text.lengths)
    tokens = int(text.lengths.sum())
    # Everything else is padding: `tokens` counts each [SEP], a row has one [CLS], and the last [SEP] may be cut off.
    padding = max(0, entry["rows"] * (job.recipe.seq_len - 1) - tokens)
    return {
        "split": split,
        "documents": documents,
        "tokens": tokens - documents,
        "padding": padding,
        "shard": entry,
        "bytes": entry["bytes"],
    }


def shards_of(plan: shuffle.Layout) -> list[tuple[str, int]]:
    """(split, number in it) of every shard, in the order of the parts of the stage `pack`."""
    return [(split, index) for split in SPLITS for index in range(len(plan.shards[split]))]


def layout(job: Job) -> shuffle.Layout:
    """Which documents go to which shard. It is computed when every part is encoded, and kept in the work folder."""
    file = job.work / "layout.json"
    if not file.exists():
        recipe = job.recipe
        token_bytes = job.vocab.dtype.itemsize
        plan = shuffle.plan_shards(
            _runs(job), recipe.validation, recipe.seq_len, token_bytes, recipe.shards.bytes_per_shard
        )
        write_atomically(file, json.dumps(asdict(plan)))
    return _read_layout(file)


@lru_cache(maxsize=1)
def _read_layout(file: Path) -> shuffle.Layout:
    return shuffle.Layout(**json.loads(file.read_bytes()))


def _kept(job: Job, part: int, counts: Counter[str]) -> Iterator[Batch]:
    """The documents that the scan kept, without duplicates. The scan has counted all but the duplicates."""
    kept = np.load(part_folder(job.work, "scan", part) / "kept.npy")
    found = [part_folder(job.work, "dedup", number) for number in range(key_ranges(job))]
    repeats = {
        rule: dedup.dropped([folder / f"{rule}.npy" for folder in found], part)
        for rule in dedup.rules(job.recipe.clean)
    }
    for batch in job.normalised(part, Counter()):
        batch = drop(batch, ~np.isin(batch.numbers, kept), "", Counter())
        for rule, numbers in repeats.items():
            batch = drop(batch, np.isin(batch.numbers, numbers), f"{rule} duplicate", counts)
        yield batch


def _runs(job: Job) -> list[Path]:
    return shuffle.list_runs([part_folder(job.work, "encode", number) for number in range(len(job.parts))])


@lru_cache(maxsize=1)
def _encoder(tokenizer_json: str, kind: Any) -> CheckedEncoder:
    return CheckedEncoder(tokenizer_json, kind)
