"""Format 1 of a dataset: its file names, its manifest and its fingerprint.

    DATASET/manifest.json  DATASET/tokenizer.json
    DATASET/train/shard-000000.tar …  DATASET/validation/shard-000000.tar …

The manifest says at which byte of a shard each array starts, so rows are read through memory maps, in any order. It
holds no time, owner, host or path: the same input gives the same manifest. docs/format.md defines the format.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256, write_atomically

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")

_OWN_NAME = re.compile(r"shard-[0-9]{6,}\.tar")
_SHARD_NAME = re.compile(r"(train|validation)/[\w-][\w.-]*")


def shard_name(split: str, number: int) -> str:
    """Path of a shard inside its dataset."""
    return f"{split}/shard-{number:06d}.tar"


def is_shard(path: Path) -> bool:
    """Whether a file in the folder of a split has a name that `shard_name` gives."""
    return path.is_file() and _OWN_NAME.fullmatch(path.name) is not None


def all_shards(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries of all shards of a manifest, in order."""
    for split in SPLITS:
        yield from manifest["splits"][split]["shards"]


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over all that decides which rows a training run sees: equal fingerprints, equal rows."""
    content = {key: manifest[key] for key in ("seq_len", "vocab_size", "tokenizer_sha256", "special_ids")}
    content["format"] = FORMAT
    content["shards"] = [[shard["name"], shard["rows"], shard["sha256"]] for shard in all_shards(manifest)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest with its format number and fingerprint. It marks a complete dataset, so write it last."""
    whole = {"format": FORMAT, "fingerprint": fingerprint(manifest), **manifest}
    write_atomically(folder / MANIFEST, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def check_manifest(manifest: Any, file: str) -> None:
    """Raise BadInput, naming `file`, unless this is an undamaged manifest of this format."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise BadInput(f"{file}: format {found!r}; this version reads format {FORMAT}")
    try:
        for shard in all_shards(manifest):
            if not _SHARD_NAME.fullmatch(shard["name"]):  # it becomes a path, of a copy in the cache too
                raise BadInput(
                    f"{file}: a shard has the name {shard['name']!r}, which is no file of train/ or validation/"
                )
        expected = fingerprint(manifest)
    except (KeyError, TypeError) as error:
        raise damaged(file, error) from error
    if manifest.get("fingerprint") != expected:
        raise BadInput(f"{file}: damaged (its fingerprint does not match its shards); make the dataset again")


def damaged(file: str, error: Exception) -> BadInput:
    """The error for a manifest in which a key is missing or has the wrong type."""
    return BadInput(f"{file}: damaged ({type(error).__name__}: {error}); make the dataset again")


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise BadInput, naming the file: a missing file, a shard of another size, another tokenizer."""
    for shard in all_shards(manifest):
        file = folder / shard["name"]
        try:
            size = file.stat().st_size
        except FileNotFoundError as error:
            raise BadInput(f"{file}: missing; copy it again or make the dataset again") from error
        if size != shard["bytes"]:
            raise BadInput(f"{file}: {size} bytes where the manifest says {shard['bytes']}; copy it again")
    tokenizer = folder / TOKENIZER
    if not tokenizer.is_file():
        raise BadInput(f"{tokenizer}: missing; copy it again or make the dataset again")
    if file_sha256(tokenizer) != manifest["tokenizer_sha256"]:
        raise BadInput(
            f"{tokenizer}: damaged, or not the tokenizer of this dataset (its checksum is not the manifest's); "
            "copy it again or make the dataset again"
        )
