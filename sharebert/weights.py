"""The tensors of an export: `model.safetensors`, or several files and an index where they are large.

A file's metadata carries a CRC-32 of each tensor's bytes, under `crc32`, so that damage is found and named.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import ShareBertError

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000
"""Above this, the tensors of a model are spread over several files."""


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes as they lie in a safetensors file, 8 hexadecimal digits."""
    return f"{zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data):08x}"


def plan_files(sizes_bytes: Mapping[str, int], max_file_bytes: int = MAX_FILE_BYTES) -> dict[str, list[str]]:
    """Which tensors lie in which file: tensors in their order, a new file where one would pass `max_file_bytes`."""
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
    """Write the index of a model in several files; nothing for a model in one."""
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write `tensors` into `folder`, with checksums and `metadata` (provenance, for instance) in each file."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    files = plan_files({name: tensor.nbytes for name, tensor in whole.items()}, max_file_bytes)
    for file, names in files.items():
        sums = json.dumps({name: checksum(whole[name]) for name in names})
        save_file(
            {name: whole[name] for name in names}, folder / file, {"format": "pt", **(metadata or {}), "crc32": sums}
        )
    write_index(folder, files, sum(tensor.nbytes for tensor in whole.values()))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the model in `folder`, on the CPU, in the dtypes of the files.

    Raises ShareBertError, naming the file: missing, not safetensors, cut short, or not what its checksums say.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        tensors |= read_safetensors(path)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the CPU; checksums that it carries are verified.

    Raises ShareBertError, naming the file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            sums = json.loads((file.metadata() or {}).get("crc32", "{}"))
    except FileNotFoundError:
        raise ShareBertError(f"{path}: missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ShareBertError(f"{path}: not readable as safetensors ({error}): damaged, or cut short") from error
    for name in _damaged(tensors, sums):
        raise ShareBertError(f"{path}: damaged (the checksum of '{name}' is not the one in its header)")
    return tensors


def _damaged(tensors: Mapping[str, Tensor], sums: Mapping[str, str]) -> Iterable[str]:
    return (name for name, tensor in tensors.items() if name in sums and checksum(tensor) != sums[name])


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        return [folder / FILE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise ShareBertError(f"{index}: not readable as the index of a model ({error})") from error
    for name in names:
        if Path(name).name != name:
            raise ShareBertError(f"{index}: '{name}' is no name of a file beside the index")
    return [folder / name for name in names]
