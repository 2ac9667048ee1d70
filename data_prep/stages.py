"""The stages of `sharebert prep`, each a function from (job, number of a part) to files in a folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.filter import dedup
from data_prep.filter.clean import drop
from data_prep.job import Job
from data_prep.parts import Stage, part_folder, part_stats, save_array
from data_prep.read.documents import Batch, utf8_bytes
from data_prep.report import count_sizes
from data_prep.shards import reader as shards
from data_prep.tokens import shuffle
from data_prep.tokens.encode import CheckedEncoder
from data_prep.tokens.pack import pack
from sharebert_common.files import write_atomically


def stages(job: Job) -> Iterator[Stage]:
    """The stages in order; each is asked for when those before it are complete."""
    if dedup.rules(job.recipe.clean):
        yield Stage("scan", len(job.parts), scan)
        yield Stage("dedup", key_ranges(job), find_duplicates)
    yield Stage("encode", len(job.parts), encode)
    yield Stage("pack", len(shards_of(layout(job))), pack_shard, durable=True)


def scan(job: Job, number: int, folder: Path) -> dict[str, Any]:
    """Read and clean a part, and write the keys by which duplicates are found."""
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
    """In how many ranges the keys of all parts are brought together."""
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
    """Gather, pack and write one shard; those of both splits are numbered one after the other."""
    plan = layout(job)
    split, index = shards_of(plan)[number]
    text = shuffle.gather(_runs(job), split, plan.shards[split][index], plan.validation_below, job.vocab.dtype)
    blocks = pack(
        text, job.recipe.seq_len, job.vocab.special_ids, plan.segments_dtype, job.recipe.shards.rows_per_block
    )
    entry = shards.write_shard(folder, shards.shard_name(split, index), blocks)
    documents = len(text.lengths)
    tokens = int(text.lengths.sum())
    # All but padding: the tokens, their [SEP]s, a [CLS] a row; one [SEP] may have been left off the end.
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
    """(split, number within it) of every shard, as the parts of the stage `pack` are numbered."""
    return [(split, index) for split in shards.SPLITS for index in range(len(plan.shards[split]))]


def layout(job: Job) -> shuffle.Layout:
    """Which documents go where: worked out once every part is encoded, and kept in the work folder."""
    file = job.work / "layout.json"
    if not file.exists():
        recipe = job.recipe
        token_bytes = job.vocab.dtype.itemsize
        plan = shuffle.plan_shards(
            _runs(job), recipe.validation, recipe.seq_len, token_bytes, recipe.shards.bytes_per_shard
        )
        write_atomically(file, json.dumps(asdict(plan)), durable=False)
    return _read_layout(file)


@lru_cache(maxsize=1)
def _read_layout(file: Path) -> shuffle.Layout:
    return shuffle.Layout(**json.loads(file.read_bytes()))


def _kept(job: Job, part: int, counts: Counter[str]) -> Iterator[Batch]:
    """The documents that the scan kept, without duplicates. What the scan has counted is not counted again."""
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
