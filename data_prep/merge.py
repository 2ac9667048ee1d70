"""The last step of `sharebert prep`: move the shards to their place, write the report and the manifest."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.filter.decontaminate import evaluation_ngrams
from data_prep.job import EVALUATION, WORK, Job, content_config, given_vocabulary
from data_prep.parts import part_folder, part_stats
from data_prep.progress import say
from data_prep.read.sources import Input, content_digest, find_inputs
from data_prep.recipe import PrepRecipe
from data_prep.report import MARKDOWN, PAGE, Report
from data_prep.shards.format import MANIFEST, SPLITS, TOKENIZER, is_shard, write_manifest
from data_prep.shards.reader import open_dataset
from data_prep.stages import layout, shards_of, stage_names
from sharebert_common.errors import BadInput
from sharebert_common.files import flush, write_atomically

_MANY_UNKNOWN = 0.1  # share of the tokens; in text that a vocabulary fits, it is under 0.01


def merge(job: Job, output: Path) -> None:
    """Make a dataset of the finished parts. It can be run again after a kill, because the manifest is written last."""
    plan = layout(job)
    splits: dict[str, Any] = {split: {"rows": 0, "tokens": 0, "documents": 0, "shards": []} for split in SPLITS}
    padding = 0
    for number, (name, _) in enumerate(shards_of(plan)):
        stats = part_stats(job.work, "pack", number)
        padding += stats["padding"]
        shard, split = stats["shard"], splits[name]
        split["rows"] += shard["rows"]
        split["tokens"] += stats["tokens"]
        split["documents"] += stats["documents"]
        split["shards"].append(shard)
        _place(part_folder(job.work, "pack", number) / shard["name"], output / shard["name"])
    for name, split in splits.items():  # an earlier recipe that was killed in its merge may have left some
        ours = {shard["name"] for shard in split["shards"]}
        for path in (output / name).glob("*"):
            if is_shard(path) and f"{name}/{path.name}" not in ours:
                path.unlink()
    staged = job.work / "merge"  # written here and then moved, so a kill leaves no temporary file in the dataset
    staged.mkdir(exist_ok=True)
    manifest = {
        "seq_len": job.recipe.seq_len,
        "dtype": job.vocab.dtype.name,
        "segments_dtype": plan.segments_dtype,
        "vocab_size": job.vocab.size,
        "tokenizer_sha256": hashlib.sha256(job.vocab.json.encode()).hexdigest(),
        "special_ids": job.vocab.special_ids,
        "config": content_config(job.recipe),
        "vocabulary": _vocabulary(job.recipe),
        "sources": _with_digests(job.inputs),
        "splits": splits,
        "versions": {name: version(name) for name in ("sharebert", "tokenizers")},
    }
    if job.recipe.clean.evaluation.paths:
        manifest["evaluation_sha256"] = _sha256(np.load(job.work / EVALUATION))
    counts: Counter[str] = Counter()
    for stage in [name for name in stage_names(job.recipe.clean) if name in ("scan", "encode")]:
        for number in range(len(job.parts)):
            counts.update(part_stats(job.work, stage, number))
    if counts["unknown"] > _MANY_UNKNOWN * counts["tokens"]:
        say(
            f"warning: {counts['unknown'] / counts['tokens']:.0%} of the tokens are unknown: the text has "
            "another encoding (source.encoding), or the vocabulary is of another language"
        )
    report = Report(counts, splits, padding, job.recipe.seq_len)
    texts = {TOKENIZER: job.vocab.json, MARKDOWN: report.markdown(), PAGE: report.page()}
    with ThreadPoolExecutor() as threads:  # so that they wait for the disk together
        writes = [threads.submit(write_atomically, staged / name, text) for name, text in texts.items()]
        writes.append(threads.submit(write_manifest, staged, manifest))
    for write in writes:
        write.result()
    for folder in (*map(output.joinpath, splits), output):
        if folder.is_dir():
            flush(folder)
    for name in (*texts, MANIFEST):
        (staged / name).replace(output / name)
    flush(output)
    shutil.rmtree(output / WORK, ignore_errors=True)
    say(f"done\n{report.text()}\n\n  with histograms: {output / PAGE}")


def refuse_strangers(output: Path) -> None:
    """Raise BadInput where the folder of a split holds what no prep has made: it would be taken for the dataset's.

    Hidden files, which a desktop or NFS leaves, may stay there.
    """
    for folder in map(output.joinpath, SPLITS):
        if folder.exists() and not folder.is_dir():
            raise BadInput(
                f"output: {folder} is a file; prep makes a folder there: move it away, or choose another output"
            )
        for path in sorted(folder.glob("*")):
            if not (is_shard(path) or path.name.startswith(".")):
                raise BadInput(
                    f"output: {path} is no shard of a dataset; move it out of {folder}, or choose another output"
                )


def check_same(recipe: PrepRecipe, output: Path) -> None:
    """Raise BadInput if the dataset at `output` was made from another config, input, tokenizer or evaluation set.

    A dataset of an older version does not tell all of this; a line on stderr says so.
    """
    manifest = open_dataset(output).manifest
    manifest["config"]["source"].setdefault("encoding", "auto")  # for datasets that were made before this key
    inputs, given = find_inputs(recipe.source, recipe.output), given_vocabulary(recipe)
    theirs = {"config": manifest["config"], "sources": _without_digests(manifest["sources"])}
    ours: dict[str, Any] = {"config": content_config(recipe), "sources": _sources(inputs)}
    if given is not None:  # it may be the one that was trained
        theirs["tokenizer"] = manifest["tokenizer_sha256"]
        ours["tokenizer"] = hashlib.sha256(given.encode()).hexdigest()
    elif "vocabulary" in manifest:
        theirs["tokenizer"], ours["tokenizer"] = {"vocabulary": manifest["vocabulary"]}, {"vocabulary": "trained"}
    for key, value in ours.items():
        _refuse_difference(output, key, theirs[key], value)
    if "vocabulary" not in manifest:
        say(f"{output} is of an older version; whether files changed without a change of size, it cannot tell")
        return
    if recipe.clean.evaluation.paths:
        found = {"evaluation_sha256": manifest.get("evaluation_sha256")}
        grams = evaluation_ngrams(recipe.clean.evaluation)
        _refuse_difference(output, "evaluation set", found, {"evaluation_sha256": _sha256(grams)})
    for entry, source in zip(manifest["sources"], _with_digests(inputs), strict=True):  # names may be there twice
        there, here = ({entry["name"]: {"digest": one.get("digest")}} for one in (entry, source))
        _refuse_difference(output, "sources", there, here)


def _refuse_difference(output: Path, what: str, theirs: Any, ours: Any) -> None:
    if theirs != ours:
        raise BadInput(
            f"output: {output} holds a dataset of another {what} ({_difference(theirs, ours)}); choose another folder, "
            "or delete this one"
        )


def _sources(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    return [{"name": item.name, "bytes": item.bytes} for item in inputs]


def _with_digests(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """What the manifest says of the inputs."""
    with ThreadPoolExecutor(32) as threads:  # those at a URL wait for their server
        digests = list(threads.map(content_digest, inputs))
    found = zip(_sources(inputs), digests, strict=True)
    return [source | ({} if digest is None else {"digest": digest}) for source, digest in found]


def _without_digests(sources: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in source.items() if key != "digest"} for source in sources]


def _vocabulary(recipe: PrepRecipe) -> str:
    """Where the vocabulary came from; the path itself is of this machine."""
    return "given" if recipe.tokenizer.path else "trained"


def _sha256(array: NDArray[np.uint64]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _place(source: Path, target: Path) -> None:
    """Give a shard its place in the dataset. Its part keeps it too, so a merge that was killed packs nothing again."""
    target.parent.mkdir(exist_ok=True)
    link = source.with_name(f".{source.name}")
    try:
        link.unlink(missing_ok=True)
        link.hardlink_to(source)
        link.replace(target)
    except OSError:  # a file system without hard links
        source.replace(target)
    link.unlink(missing_ok=True)  # `rename` of two links to one file does nothing


def _difference(theirs: Any, ours: Any, where: str = "") -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                return _difference(theirs.get(key), ours.get(key), f"{where}.{key}".lstrip("."))
    return f"{where} is {theirs!r} there and {ours!r} here" if where else "not the same"
