"""`sharebert prep`: plan parts → run those that are missing → merge.

    find inputs ─▶ parts ─▶ encode (a part: read, clean, encode, sort by random key)
                         ─▶ pack   (a shard: gather its range of keys from all parts, pack rows, write)
                         ─▶ merge  (manifest and report)

Every stage's parts are a pure function of inputs and config; who runs them does not show in the result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, field
from dataclasses import dataclass as plain_dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass
from tokenizers import Tokenizer

from data_prep import shards, shuffle
from data_prep.documents import Batch, read_part
from data_prep.encode import CheckedEncoder
from data_prep.pack import pack
from data_prep.parts import Stage, missing_parts, part_folder, part_stats, run_parts
from data_prep.sources import Input, Part, SourceConfig, find_inputs, plan_parts
from data_prep.tokenizer import TokenizerConfig, load, special_ids, train, vocab_size
from sharebert_recipe import STRICT, BadInput, plain, write_atomically


@dataclass(config=STRICT, kw_only=True)
class ShardConfig:
    """How rows lie on disk."""

    rows_per_block: int = Field(default=4096, ge=1)
    """Rows of one tar member."""
    bytes_per_shard: int = Field(default=256 << 20, ge=1 << 16)
    """About the size of a shard; a worker holds one in memory."""


@dataclass(config=STRICT, kw_only=True)
class PrepRecipe:
    """Text → a dataset to pretrain on."""

    SHORTHAND: ClassVar[dict[str, str]] = {"source": "paths", "tokenizer": "path"}

    output: str
    """Folder of the dataset."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the order of documents and the choice of those that validate."""
    source: SourceConfig
    """Where documents come from; a plain value means source.paths."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The vocabulary; a plain value means tokenizer.path."""
    seq_len: int = Field(default=128, ge=8, le=65_536)
    """Tokens of a row, [CLS] and [SEP] included."""
    validation: float = Field(default=0.01, ge=0)
    """Held-out documents: rows if 1 or more, else the fraction of all tokens. Whole documents, so at least that."""
    shards: ShardConfig = field(default_factory=ShardConfig)
    """How rows lie on disk."""
    workers: int | None = Field(default=None, ge=1)
    """Processes on this machine; none: one a core. Never changes the result."""


@plain_dataclass(frozen=True)
class Job:
    """A planned run of a recipe."""

    recipe: PrepRecipe
    work: Path
    inputs: list[Input]
    parts: list[Part]

    @property
    def tokenizer_file(self) -> Path:
        return self.work / shards.TOKENIZER

    @property
    def workers(self) -> int:
        return self.recipe.workers or len(os.sched_getaffinity(0))


def prepare(recipe: PrepRecipe, task: tuple[int, int] | None = None) -> Path:
    """Make the dataset of a recipe, or what is missing of it.

    Args:
        recipe: what to make.
        task: (i, n): run only parts i, i + n, … of each stage, as far as earlier stages are complete, and do not
            merge. So an array of n jobs does one stage after the other each time that it is run; a last call
            without `task` does what is left and merges.

    Returns: the folder of the dataset.

    Raises BadInput for anything wrong with the input or the config; what is done by then is kept.
    """
    output = Path(recipe.output)
    inputs = find_inputs(recipe.source)
    if (output / shards.MANIFEST).exists():
        _check_same(output, recipe, inputs)
        return output
    job = _plan(recipe, inputs)
    for stage in _stages(job):
        missing = missing_parts(job.work, stage)
        mine = [number for number in missing if task is None or number % task[1] == task[0]]
        if mine:
            run_parts(stage, job, job.work, mine, job.workers)
        if missing_parts(job.work, stage):
            return output
    if task is None:
        _merge(job, output)
    return output


def _stages(job: Job) -> Iterator[Stage]:
    """The stages; each is asked for when those before it are complete."""
    yield Stage("encode", len(job.parts), sum(i.bytes for i in job.inputs), encode_part)
    layout = _layout(job)
    yield Stage("pack", sum(map(len, layout.shards.values())), 0, pack_shard)


def encode_part(job: Job, number: int, folder: Path) -> dict[str, Any]:
    """Read, encode and sort the documents of one part."""
    counts: Counter[str] = Counter()
    words, encoder = _tokenizer(job.tokenizer_file, job.recipe.tokenizer.encoder)
    special = special_ids(words)
    runs = shuffle.RunWriter(folder, number, job.recipe.seed, special["sep"], _tokens_dtype(words))
    for batch in _documents(job, number, counts):
        ids, offsets = encoder(batch.texts)
        counts["tokens"] += len(ids)
        counts["unknown"] += int(np.count_nonzero(ids == special["unk"]))
        runs.add(batch.first + np.arange(len(batch.texts)), batch.texts, ids, offsets)
    runs.close()
    return {**counts, "bytes": counts["bytes_in"]}


def pack_shard(job: Job, number: int, folder: Path) -> dict[str, Any]:
    """Write one shard; the shards of the splits are numbered one after the other."""
    layout = _layout(job)
    split, index = [(split, i) for split in shards.SPLITS for i in range(len(layout.shards[split]))][number]
    runs = shuffle.list_runs([part_folder(job.work, "encode", n) for n in range(len(job.parts))])
    text = shuffle.gather(runs, split, layout.shards[split][index], layout.validation_below)
    words, _ = _tokenizer(job.tokenizer_file, job.recipe.tokenizer.encoder)
    blocks = pack(text, job.recipe.seq_len, special_ids(words), layout.segments_dtype, job.recipe.shards.rows_per_block)
    entry = shards.write_shard(folder, shards.shard_name(split, index), blocks)
    documents = len(text.lengths)
    return {"split": split, "documents": documents, "tokens": int(text.lengths.sum()) - documents, "shard": entry}


def _plan(recipe: PrepRecipe, inputs: list[Input]) -> Job:
    """Find or make the work folder of this recipe and these inputs, and its tokenizer."""
    identity = json.dumps([_config(recipe), [asdict(i) for i in inputs]], sort_keys=True)
    work = Path(recipe.output) / ".work" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"output: {recipe.output}: {error.strerror}") from error
    job = Job(recipe, work, inputs, plan_parts(inputs, recipe.source))
    if not job.tokenizer_file.exists():
        config = recipe.tokenizer
        words = load(config.path, config.lowercase) if config.path else _train_tokenizer(job)
        write_atomically(job.tokenizer_file, words.to_str())
    return job


def _train_tokenizer(job: Job) -> Tokenizer:
    share = job.recipe.tokenizer.train.sample_bytes // len(job.parts)

    def sample() -> Iterable[str]:
        for number in range(len(job.parts)):
            counts: Counter[str] = Counter()
            for batch in _documents(job, number, counts):
                yield from batch.texts
                if counts["bytes_in"] >= share:
                    break

    return train(sample, job.recipe.tokenizer)


def _documents(job: Job, number: int, counts: Counter[str]) -> Iterator[Batch]:
    yield from read_part(job.parts[number], job.inputs, job.recipe.source, counts)


@lru_cache(maxsize=1)
def _tokenizer(file: Path, encoder: Any) -> tuple[Tokenizer, CheckedEncoder]:
    text = file.read_text(encoding="utf-8")
    return Tokenizer.from_str(text), CheckedEncoder(text, encoder)


def _tokens_dtype(words: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size(words) <= 1 << 16 else "<u4")


def _layout(job: Job) -> shuffle.Layout:
    """Which documents go where, worked out once the last part is encoded and kept in the work folder."""
    file = job.work / "layout.json"
    if not file.exists():
        recipe = job.recipe
        runs = shuffle.list_runs([part_folder(job.work, "encode", n) for n in range(len(job.parts))])
        dtype = _tokens_dtype(Tokenizer.from_file(str(job.tokenizer_file)))
        layout = shuffle.plan_shards(
            runs, recipe.validation, recipe.seq_len, dtype.itemsize, recipe.shards.bytes_per_shard
        )
        write_atomically(file, json.dumps(asdict(layout)))
    return shuffle.Layout(**json.loads(file.read_bytes()))


def _merge(job: Job, output: Path) -> None:
    """Move the shards to their place and write the manifest, last."""
    layout, words = _layout(job), Tokenizer.from_file(str(job.tokenizer_file))
    splits: dict[str, Any] = {split: {"rows": 0, "tokens": 0, "documents": 0, "shards": []} for split in shards.SPLITS}
    for split in shards.SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
    for number in range(sum(map(len, layout.shards.values()))):
        stats = part_stats(job.work, "pack", number)
        split, shard = splits[stats["split"]], stats["shard"]
        split["rows"] += shard["rows"]
        split["tokens"] += stats["tokens"]
        split["documents"] += stats["documents"]
        split["shards"].append(shard)
        (output / shard["name"]).parent.mkdir(exist_ok=True)
        # Linked, not moved: a merge that is killed halfway can be run again.
        os.link(part_folder(job.work, "pack", number) / shard["name"], output / shard["name"])
    write_atomically(output / shards.TOKENIZER, job.tokenizer_file.read_text(encoding="utf-8"))
    manifest = {
        "seq_len": job.recipe.seq_len,
        "dtype": _tokens_dtype(words).name,
        "segments_dtype": layout.segments_dtype,
        "vocab_size": vocab_size(words),
        "tokenizer_sha256": shards.file_sha256(output / shards.TOKENIZER),
        "special_ids": special_ids(words),
        "config": _config(job.recipe),
        "sources": _sources(job.inputs),
        "splits": splits,
        "versions": {name: version(name) for name in ("sharebert", "tokenizers")},
    }
    shards.write_manifest(output, manifest)
    shutil.rmtree(output / ".work", ignore_errors=True)


def _config(recipe: PrepRecipe) -> dict[str, Any]:
    """The recipe without what must not show in the dataset: places on this machine and the number of workers."""
    config = plain(recipe)
    for key in ("output", "workers"):
        del config[key]
    for key in ("paths", "hub"):
        del config["source"][key]
    del config["tokenizer"]["path"]
    return config


def _sources(inputs: list[Input]) -> list[dict[str, Any]]:
    return [{"name": item.name, "bytes": item.bytes} for item in inputs]


def _check_same(output: Path, recipe: PrepRecipe, inputs: list[Input]) -> None:
    """A finished dataset is left as it is; raises BadInput where it was made from another config or input."""
    manifest = shards.open_dataset(output).manifest
    for key, ours in (("config", _config(recipe)), ("sources", _sources(inputs))):
        if manifest[key] != ours:
            raise BadInput(
                f"output: {output} holds a dataset of another {key} ({_difference(manifest[key], ours)}); "
                "choose another folder, or delete this one"
            )


def _difference(theirs: Any, ours: Any, where: str = "") -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                return _difference(theirs.get(key), ours.get(key), f"{where}.{key}".lstrip("."))
    return f"{where}: {theirs!r} there, {ours!r} here".removeprefix(": ") if where else "other files, or other sizes"
