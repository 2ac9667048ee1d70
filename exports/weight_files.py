"""The weights of a model on disk: `model.safetensors`, or several files and an index where they are large.

The metadata of each file carries a CRC-32 of every tensor's bytes, under `crc32`, so that damage is found and named.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exports.tensor_file import Spec, lay_out
from exports.weight_source import WeightSource, pieces
from sharebert_common.errors import BadInput
from sharebert_common.progress import progress

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000
"""Above this, the tensors of a model are spread over several files."""


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes as they lie in a safetensors file, 8 hexadecimal digits."""
    return f"{zlib.crc32(_bytes(tensor)):08x}"


def plan_files(sizes_bytes: Mapping[str, int], max_file_bytes: int = MAX_FILE_BYTES) -> dict[str, list[str]]:
    """Which tensors lie in which file. They keep their order; a new file begins where one would pass the maximum."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes_bytes.items():
        if groups[-1] and size + nbytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def write_index(folder: Path, files: Mapping[str, Sequence[str]], total_bytes: int) -> None:
    """Write the index of a model in several files. A model in one file needs none."""
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_weights(
    folder: Path,
    source: WeightSource,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write all tensors of `source` into `folder`, wide dtypes first, so that every tensor is aligned.

    Args:
        folder: where the files go.
        source: where the values come from; they are read in pieces.
        metadata: what the files say about where the tensors come from.
        dtype: floating values are rounded to it; None keeps the dtypes of the source.
        max_file_bytes: above this, the tensors are spread over several files.
    """
    given = {
        name: Spec(dtype, spec.shape) if dtype is not None and spec.dtype.is_floating_point else spec
        for name, spec in source.specs.items()
    }
    specs = dict(sorted(given.items(), key=lambda item: -item[1].dtype.itemsize))
    stream_weights(folder, specs, pieces(source, list(specs)), metadata, max_file_bytes)


def stream_weights(
    folder: Path,
    specs: Mapping[str, Spec],
    pieces: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write tensors that need not be in memory, with checksums and `metadata` in each file.

    Args:
        folder: where the files go.
        specs: dtype and shape of every tensor, in the order in which they lie in the files.
        pieces: (name, values), in that order: a tensor whole or as consecutive parts, of any shape and dtype;
            values are rounded to the dtype of the spec. The next piece is taken after the last one is written.
        metadata: what the files say about where the tensors come from.
        max_file_bytes: above this, the tensors are spread over several files.
    """
    sizes = {name: math.prod(spec.shape) * spec.dtype.itemsize for name, spec in specs.items()}
    files = plan_files(sizes, max_file_bytes)
    coming = iter(pieces)
    for file, names in files.items():
        _write_file(folder / file, {name: specs[name] for name in names}, coming, metadata or {})
    write_index(folder, files, sum(sizes.values()))


def _write_file(
    path: Path, specs: Mapping[str, Spec], pieces: Iterator[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    sums = dict.fromkeys(specs, 0)

    def header() -> bytes:
        crc32 = json.dumps({name: f"{value:08x}" for name, value in sums.items()})
        return lay_out(specs, {"format": "pt", **metadata, "crc32": crc32}).header

    with path.open("wb") as out:
        out.write(header())
        for name, (dtype, shape) in progress(specs.items(), f"writing {path.name}", len(specs)):
            left = math.prod(shape)
            while left:
                given, piece = next(pieces)
                if given != name or piece.numel() > left:
                    raise ValueError(
                        f"{path}: '{name}' needs {left} more values, but the next piece is "
                        f"{piece.numel()} values of '{given}'"
                    )
                data = _bytes(piece.detach().to("cpu", dtype))
                sums[name] = zlib.crc32(data, sums[name])
                out.write(data)
                left -= piece.numel()
        out.seek(0)
        out.write(header())  # as long as before, because a checksum always has eight digits


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the model in `folder`, mapped from its files, on the CPU, in the dtypes of the files.

    Raises BadInput, naming the file: missing, not safetensors, cut short, or with a wrong checksum.
    """
    tensors: dict[str, Tensor] = {}
    for path in safetensors_files(folder):
        tensors |= read_safetensors(path)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the CPU. The checksums that it carries are verified.

    Raises BadInput, naming the file.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        sums = json.loads((file.metadata() or {}).get("crc32", "{}"))
    for name in _damaged(tensors, sums):
        raise BadInput(f"{path}: damaged (the checksum of '{name}' is not the one in its header)")
    return tensors


def read_metadata(folder: Path) -> dict[str, str]:
    """What the files of the model in `folder` say about where it comes from. Raises BadInput, naming the file."""
    with _opened(safetensors_files(folder)[0]) as file:
        found = file.metadata() or {}  # in another order each time
        return {key: found[key] for key in sorted(found) if key not in ("format", "crc32")}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise BadInput(f"{path}: missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as safetensors ({error}): damaged, or cut short") from error


def _damaged(tensors: Mapping[str, Tensor], sums: Mapping[str, str]) -> Iterable[str]:
    return (name for name, tensor in tensors.items() if name in sums and checksum(tensor) != sums[name])


def safetensors_files(folder: Path) -> list[Path]:
    """The files with the tensors of the model in `folder`. Raises BadInput where their index is wrong."""
    index = folder / INDEX
    if not index.exists():
        return [folder / FILE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise BadInput(f"{index}: not readable as the index of a model ({error})") from error
    for name in names:
        if Path(name).name != name:
            raise BadInput(f"{index}: '{name}' is not the name of a file beside the index")
    return [folder / name for name in names]
