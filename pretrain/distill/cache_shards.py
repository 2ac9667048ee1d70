"""One shard of a teacher's outputs: a plain tar of arrays, which any webdataset reader can read.

A shard is one sample: `000007.NAME.npy` [rows, …] for each array, and `000007.json` with its first position and its
number of rows. Headers hold no time, owner or host.
"""

from __future__ import annotations

import io
import json
import secrets
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256, flush

Array = NDArray[Any]


class ShardEntry(TypedDict):
    """What the manifest says of a shard."""

    name: str
    bytes: int
    sha256: str
    rows: int


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.tar"


def write_shard(folder: Path, number: int, first_position: int, arrays: Mapping[str, Array]) -> ShardEntry:
    """Write one shard and flush it to the disk. It is complete under its name, or absent.

    Args:
        folder: of the cache.
        number: of the shard, from 0.
        first_position: of its first row.
        arrays: name → [rows, …].
    """
    path = folder / shard_name(number)
    rows = len(next(iter(arrays.values())))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with tarfile.open(temporary, "x", format=tarfile.USTAR_FORMAT) as tar:
            for name, array in arrays.items():
                file = io.BytesIO()
                np.save(file, np.ascontiguousarray(array), allow_pickle=False)
                _add(tar, f"{number:06d}.{name}.npy", file.getvalue())
            about = {"first_position": first_position, "rows": rows}
            _add(tar, f"{number:06d}.json", json.dumps(about).encode())
        flush(temporary)
        entry = ShardEntry(name=path.name, bytes=temporary.stat().st_size, sha256=file_sha256(temporary), rows=rows)
        temporary.replace(path)
        flush(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return entry


def is_whole(folder: Path, entry: ShardEntry) -> bool:
    """Whether a shard is there, with the bytes that the manifest says."""
    path = folder / entry["name"]
    return path.is_file() and path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]


def map_shard(folder: Path, entry: ShardEntry) -> dict[str, Array]:
    """The arrays of a shard, mapped into memory, after its checksum was checked.

    Raises BadInput, naming the file, where it is missing or damaged.
    """
    path = folder / entry["name"]
    if not is_whole(folder, entry):
        raise BadInput(
            f"distill.cache: {path}: missing or damaged; start sharebert cache-teacher again: it makes this shard anew"
        )
    arrays: dict[str, Array] = {}
    with tarfile.open(path) as tar, path.open("rb") as file:
        for member in tar:
            if not member.name.endswith(".npy"):
                continue
            file.seek(member.offset_data)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            name = member.name.split(".")[1]
            arrays[name] = np.memmap(path, dtype, "r", file.tell(), shape)
    return arrays


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults: no owner, no time
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
