"""Checkpoint format 1: whole or absent, without a pickle, and the same for any number of ranks and ZeRO stage.

    checkpoints/step-00001000/rank-00000.safetensors …   what each rank owns: fp32 slices of weights and moments
    checkpoints/step-00001000/manifest.json              written last: sizes, checksums, slices, training state
    checkpoints/latest                                   a hint; what counts is the newest folder that verifies

A checkpoint is found, verified and read here; `writer` writes it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from pretrain.engine.fragments import Fragment
from sharebert_common.errors import BadInput

FORMAT = 1
RNG_STATE = "generator/"
"""Prefix of the tensors that hold the states of random generators."""


READ_TRIES, FIRST_PAUSE_S = 7, 0.5
"""How often a checkpoint is read where the file system fails (for half a minute), and the first pause; each pause is
twice the one before."""


class Damaged(BadInput):
    """The files of a checkpoint are not what was written."""


class Unreadable(BadInput):
    """The files of a checkpoint cannot be read now, or not by this program. They may be whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """The optimizer step after which it was made."""
        return int(self.manifest["step"])

    @property
    def training(self) -> dict[str, Any]:
        """What was given to `CheckpointWriter.save` as `training`: JSON values."""
        return dict(self.manifest["training"])

    @property
    def world_size(self) -> int:
        """The number of ranks that wrote it."""
        return len(self.manifest["files"])

    def pieces(self) -> dict[str, list[tuple[str, int, int]]]:
        """For each parameter, (file, start, length) of each fragment, in order of start."""
        found: dict[str, list[tuple[str, int, int]]] = {}
        for file, entry in self.manifest["files"].items():
            for name, (start, length) in entry["slices"].items():
                found.setdefault(name, []).append((file, start, length))
        return {name: sorted(parts, key=lambda part: part[1]) for name, parts in found.items()}


def folder_name(step: int) -> str:
    """`step-00001000`."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder, by its name."""
    return int(folder.name.removeprefix("step-"))


def found(checkpoints: Path) -> list[Path]:
    """The folders that claim to be checkpoints, newest first. Raises Unreadable where they cannot be listed."""
    try:
        with os.scandir(checkpoints) as entries:
            names = [entry.name for entry in entries if re.fullmatch(r"step-\d{8}", entry.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Unreadable(f"{checkpoints}: cannot be listed now ({error.strerror or error})") from error
    return [checkpoints / name for name in sorted(names, reverse=True)]


def read_manifest(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder`; sizes are checked, checksums are not.

    Raises Damaged or Unreadable, both BadInput, naming the file.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise Unreadable(f"{path}: checkpoint format {manifest['format']}, this program reads {FORMAT}")
        if manifest.pop("checksum") != manifest_checksum(manifest):
            raise Damaged(f"{path}: damaged (its checksum is not its own)")
        for name, entry in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise Damaged(f"{folder / name}: {size} bytes, {entry['bytes']} were written")
    except FileNotFoundError as error:
        raise Damaged(f"{error.filename}: missing") from error
    except OSError as error:
        raise Unreadable(f"{error.filename or path}: cannot be read now ({error.strerror or error})") from error
    except BadInput:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: not a checkpoint manifest ({error})") from error
    return Checkpoint(folder, manifest)


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Of a manifest without its key `checksum`."""
    return xxhash.xxh3_128(json.dumps(manifest).encode()).hexdigest()


def verify(checkpoint: Checkpoint, files: Sequence[str] | None = None) -> None:
    """Compare the checksums of `files` (default: all).

    Raises Damaged, naming the first file that differs, or Unreadable.
    """
    names = list(checkpoint.manifest["files"] if files is None else files)
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as threads:  # hashing frees the GIL
        sums = threads.map(lambda name: _checksum(checkpoint.folder / name), names)
        for name, found_sum in zip(names, sums, strict=True):
            if found_sum != checkpoint.manifest["files"][name]["xxh3_128"]:
                raise Damaged(f"{checkpoint.folder / name}: damaged (its checksum is not the one in the manifest)")


def read_whole_checkpoint(folder: Path, *, verified: bool = True, tries: int | None = None) -> Checkpoint:
    """Open and verify the checkpoint in `folder`. Where the file system fails, it is tried again.

    Args:
        folder: of the checkpoint.
        verified: compare all checksums.
        tries: how often it is read at most; READ_TRIES where None.

    Raises Damaged or Unreadable, both BadInput, naming the file.
    """
    pause_s = FIRST_PAUSE_S
    for left in reversed(range(tries or READ_TRIES)):
        try:
            checkpoint = read_manifest(folder)
            if verified:
                verify(checkpoint)
            break
        except Unreadable as error:
            may_pass = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, PermissionError)
            if not left or not may_pass:
                raise
            time.sleep(pause_s)
            pause_s *= 2
    return checkpoint


def newest_whole(checkpoints: Path, report: Callable[[str], None], *, or_none: bool = False) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where there is no checkpoint at all.

    Args:
        checkpoints: the folder of a run's checkpoints.
        report: takes a line for each checkpoint that is damaged or cannot be read.
        or_none: None also where there are checkpoints and none of them verifies.

    Raises BadInput where there are checkpoints and none of them verifies: a run that started anew would lose them.
    """
    reasons: list[str] = []

    def note(reason: str) -> None:
        reasons.append(reason)
        report(reason)

    newest = next(all_whole(checkpoints, note), None)
    if newest is None and reasons and not or_none:
        raise BadInput(
            f"{checkpoints}: no checkpoint can be read ({'; '.join(reasons)}); mend that, or move them away to start "
            "at step 0, or set checkpoint.restart_if_unreadable=true"
        )
    return newest


def all_whole(checkpoints: Path, report: Callable[[str], None]) -> Iterator[Checkpoint]:
    """The checkpoints that verify, newest first, each read when it is asked for. The others are named to `report`."""
    for folder in found(checkpoints):
        try:
            checkpoint = read_whole_checkpoint(folder)
        except BadInput as error:
            report(str(error))
            continue
        yield checkpoint


def load_fragments(checkpoint: Checkpoint, fragments: Sequence[Fragment]) -> dict[str, set[str]]:
    """Fill the tensors of `fragments` from a checkpoint of any world size.

    Returns the names of parameters for each state of the optimizer that the checkpoint lacks; these tensors are set to
    0. Raises BadInput where it lacks weights.
    """
    from safetensors import safe_open

    pieces = checkpoint.pieces()
    lacking: dict[str, set[str]] = {}
    with contextlib.ExitStack() as stack:
        opened: dict[str, Any] = {}
        keys: dict[str, set[str]] = {}
        for part in fragments:
            if part.name not in pieces and "weight" not in part.tensors:  # a generated matrix
                for state, tensor in part.tensors.items():
                    tensor.zero_()
                    lacking.setdefault(state, set()).add(part.name)
                continue
            filled = 0
            for file, start, length in pieces.get(part.name, []):
                shared = part.overlap(start, length)
                if not shared:
                    continue
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(checkpoint.folder / file, framework="pt"))
                    keys[file] = set(opened[file].keys())
                for state, tensor in part.tensors.items():
                    here, key = tensor.narrow(0, shared.start - part.start, len(shared)), f"{state}/{part.name}"
                    if key in keys[file] or state == "weight":
                        here.copy_(opened[file].get_slice(key)[shared.start - start : shared.stop - start])
                    else:
                        here.zero_()
                        lacking.setdefault(state, set()).add(part.name)
                filled += len(shared)
            if filled != part.length:
                raise BadInput(
                    f"{checkpoint.folder}: holds {filled} of the {part.length} elements of '{part.name}' "
                    f"from {part.start} on; was it made with another model?"
                )
    return lacking


def read_whole(checkpoint: Checkpoint, name: str, state: str = "weight") -> torch.Tensor:
    """One parameter's weight or moment, joined from the fragments of all ranks: fp32, in its full shape."""
    shape = checkpoint.manifest["shapes"][name]
    flat = torch.empty(math.prod(shape), dtype=torch.float32)
    if load_fragments(checkpoint, [Fragment(name, 0, flat.numel(), {state: flat})]):
        raise BadInput(f"{checkpoint.folder}: holds no {state} of '{name}'")
    return flat.view(shape)


def load_rng_state(checkpoint: Checkpoint, rank: int) -> dict[str, torch.Tensor]:
    """The states of `rank`'s random generators, as given to `CheckpointWriter.save`."""
    from safetensors import safe_open

    with safe_open(checkpoint.folder / rank_file(rank), framework="pt") as file:
        return {key.removeprefix(RNG_STATE): file.get_tensor(key) for key in file.keys() if key.startswith(RNG_STATE)}  # noqa: SIM118


def rank_file(rank: int) -> str:
    """`rank-00000.safetensors`."""
    return f"rank-{rank:05d}.safetensors"


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise Damaged(f"{path}: missing") from error
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read now ({error.strerror or error})") from error
    return digest.hexdigest()
