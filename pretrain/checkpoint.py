"""Checkpoint format 1: whole or absent, without a pickle, and the same for any number of ranks and ZeRO stage.

    checkpoints/step-00001000/rank-00000.safetensors …   what each rank owns: fp32 slices of weights and moments
    checkpoints/step-00001000/manifest.json              written last: sizes, checksums, slices, training state
    checkpoints/latest                                   a hint; the truth is the newest folder that verifies

A save copies the state into one buffer that already has the layout of the file, and a thread writes it
while training goes on. Rank 0's thread waits for the files of the other ranks, writes the manifest, and
renames the folder into place. Nobody waits for a collective: the shared folder is the meeting point, and
the name of the unfinished folder carries a token of this launch, so that leftovers of a dead one never count.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import xxhash
from pydantic import Field
from pydantic.dataclasses import dataclass as recipe_dataclass

from pretrain.slices import STATES, Slice
from sharebert.tensor_file import Layout, lay_out
from sharebert_recipe import STRICT, BadInput, write_atomically

FORMAT = 1
WRITE_ATTEMPTS = 3
GENERATOR = "generator/"

CHECKSUMS: dict[str, Callable[[], Any]] = {"xxh3": xxhash.xxh3_128, "sha256": hashlib.sha256}
"""Of a rank's file, by their key in the manifest. XXH3 is what is written; the first checkpoints have SHA-256,
which takes longer than reading the file."""


@recipe_dataclass(config=STRICT, kw_only=True)
class CheckpointRecipe:
    """When checkpoints are made and which stay."""

    every: Annotated[int, Field(gt=0)] = 1000
    """Optimizer steps between checkpoints; one is made at the end, too."""
    keep: Annotated[int, Field(gt=0)] = 3
    """How many of the newest stay."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints at multiples of so many steps stay for good; 0 keeps none for good."""
    write_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """How long rank 0 waits for the files of all ranks before it gives a checkpoint up."""


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
        """What was given to `Checkpointer.save` as `training`: JSON values."""
        return dict(self.manifest["training"])

    @property
    def ranks(self) -> int:
        """The number of ranks that wrote it."""
        return len(self.manifest["files"])

    def pieces(self) -> dict[str, list[tuple[str, int, int]]]:
        """For each parameter, (file, start, length) of each slice, in order of start."""
        found: dict[str, list[tuple[str, int, int]]] = {}
        for file, entry in self.manifest["files"].items():
            for name, (start, length) in entry["slices"].items():
                found.setdefault(name, []).append((file, start, length))
        return {name: sorted(parts, key=lambda part: part[1]) for name, parts in found.items()}


def folder_name(step: int) -> str:
    """`step-00001000`."""
    return f"step-{step:08d}"


def found(checkpoints: Path) -> list[Path]:
    """The folders that claim to be checkpoints, newest first."""
    return sorted(checkpoints.glob("step-????????"), reverse=True)


def read_manifest(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder`; sizes are checked, checksums are not. Raises BadInput, naming the file."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise BadInput(f"{path}: checkpoint format {manifest['format']}, this program reads {FORMAT}")
        for name, entry in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise BadInput(f"{folder / name}: {size} bytes, {entry['bytes']} were written")
    except FileNotFoundError as error:
        raise BadInput(f"{error.filename}: missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise (
            error if isinstance(error, BadInput) else BadInput(f"{path}: not a checkpoint manifest ({error})")
        ) from error
    return Checkpoint(folder, manifest)


def verify(checkpoint: Checkpoint, files: Sequence[str] | None = None) -> None:
    """Compare the checksums of `files` (default: all). Raises BadInput, naming the first that differs."""

    def is_whole(name: str) -> bool:
        entry = checkpoint.manifest["files"][name]
        kind = next((kind for kind in CHECKSUMS if kind in entry), None)
        return kind is not None and _checksum_of_file(checkpoint.folder / name, kind) == entry[kind]

    names = list(checkpoint.manifest["files"] if files is None else files)
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as threads:  # hashing frees the GIL
        for name, whole in zip(names, threads.map(is_whole, names), strict=True):
            if not whole:
                raise BadInput(f"{checkpoint.folder / name}: damaged (its checksum is not the one in the manifest)")


def newest_whole(checkpoints: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies. Each damaged one on the way is named to `report`."""
    return next(all_whole(checkpoints, report), None)


def all_whole(checkpoints: Path, report: Callable[[str], None]) -> Iterator[Checkpoint]:
    """The checkpoints that verify, newest first, each when it is asked for; damaged ones are named to `report`."""
    for folder in found(checkpoints):
        try:
            checkpoint = read_manifest(folder)
            verify(checkpoint)
        except (BadInput, OSError) as error:
            report(f"{error}; taking the checkpoint before it")
            continue
        yield checkpoint


def load(checkpoint: Checkpoint, slices: Sequence[Slice]) -> None:
    """Fill the tensors of `slices` from a checkpoint of any number of ranks. Raises BadInput where it lacks some."""
    from safetensors import safe_open

    pieces = checkpoint.pieces()
    with contextlib.ExitStack() as stack:
        opened: dict[str, Any] = {}
        for part in slices:
            filled = 0
            for file, start, length in pieces.get(part.name, []):
                begin, end = max(start, part.start), min(start + length, part.start + part.length)
                if begin >= end:
                    continue
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(checkpoint.folder / file, framework="pt"))
                for state in part.tensors:
                    stored = opened[file].get_slice(f"{state}/{part.name}")[begin - start : end - start]
                    part.tensors[state].narrow(0, begin - part.start, end - begin).copy_(stored)
                filled += end - begin
            if filled != part.length:
                raise BadInput(
                    f"{checkpoint.folder}: holds {filled} of the {part.length} elements of '{part.name}' "
                    f"from {part.start} on; was it made with another model?"
                )


def read_whole(checkpoint: Checkpoint, name: str, state: str = "weight") -> torch.Tensor:
    """One parameter's weight or moment, put together from the slices of all ranks: fp32, in its full shape."""
    shape = checkpoint.manifest["shapes"][name]
    flat = torch.empty(math.prod(shape), dtype=torch.float32)
    load(checkpoint, [Slice(name, 0, flat.numel(), {state: flat})])
    return flat.view(shape)


def load_generators(checkpoint: Checkpoint, rank: int) -> dict[str, torch.Tensor]:
    """The states of `rank`'s random generators, as given to `Checkpointer.save`."""
    from safetensors import safe_open

    with safe_open(checkpoint.folder / _rank_file(rank), framework="pt") as file:
        return {key.removeprefix(GENERATOR): file.get_tensor(key) for key in file.keys() if key.startswith(GENERATOR)}  # noqa: SIM118


@dataclass
class Checkpointer:
    """Saves checkpoints of one launch in the background and deletes old ones. Every rank has one."""

    checkpoints: Path
    recipe: CheckpointRecipe
    rank: int
    ranks: int
    token: str
    """The same on all ranks, and another one in each launch."""
    report: Callable[[str], None]
    """Takes what the log should say."""
    _buffer: torch.Tensor | None = field(default=None, init=False)
    _layout: Layout | None = field(default=None, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            for leftover in self.checkpoints.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(
        self,
        step: int,
        slices: Sequence[Slice],
        shapes: dict[str, list[int]],
        generators: dict[str, torch.Tensor],
        training: dict[str, Any],
    ) -> None:
        """Copy the state now and write it in the background. Waits for the save before it, if that still runs.

        Args:
            step: optimizer steps done.
            slices: what this rank owns.
            shapes: the shape of every parameter.
            generators: states of this rank's random generators, uint8.
            training: JSON values, the same on every rank, that `Checkpoint.training` gives back.
        """
        self.finish()
        entry = {"slices": {s.name: [s.start, s.length] for s in slices}}
        layout = self._copy(slices, generators, entry)
        manifest = {"format": FORMAT, "step": step, "training": training, "shapes": shapes}
        self._thread = threading.Thread(
            target=self._write, args=(step, layout, entry, manifest), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait until the last save is on disk (on rank 0: of all ranks) or was given up."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, slices: Sequence[Slice], generators: dict[str, torch.Tensor], entry: dict[str, Any]) -> Layout:
        specs: dict[str, tuple[torch.dtype, Sequence[int]]] = {
            f"{state}/{s.name}": (torch.float32, (s.length,)) for state in STATES for s in slices
        }
        specs |= {GENERATOR + name: (torch.uint8, tuple(value.shape)) for name, value in generators.items()}
        layout = lay_out(specs, {"format": "sharebert-checkpoint", "slices": json.dumps(entry["slices"])})
        if self._layout is None or layout.header != self._layout.header:
            self._layout = layout
            # Filling it touches its pages, once: the copies of later saves then run at memory speed.
            self._buffer = torch.zeros(layout.total_bytes, dtype=torch.uint8)
            self._buffer[: len(layout.header)] = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        assert self._buffer is not None
        views = layout.views(self._buffer)
        for s in slices:
            for state in STATES:
                views[f"{state}/{s.name}"].copy_(s.tensors[state])
        for name, value in generators.items():
            views[GENERATOR + name].copy_(value)
        return layout

    def _write(self, step: int, layout: Layout, entry: dict[str, Any], manifest: dict[str, Any]) -> None:
        partial = self.checkpoints / f".{folder_name(step)}.{self.token}"
        for attempt in range(1, WRITE_ATTEMPTS + 1):
            try:
                partial.mkdir(exist_ok=True)
                self._write_rank_file(partial, entry)
                if self.rank == 0:
                    self._complete(partial, step, manifest)
                return
            except Exception as error:  # a failing disk must not end the training
                self.report(f"checkpoint of step {step}, attempt {attempt} of {WRITE_ATTEMPTS}: {error}")
                time.sleep(0.5 * attempt)
        self.report(f"checkpoint of step {step} given up; older checkpoints are untouched")
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)

    def _write_rank_file(self, partial: Path, entry: dict[str, Any]) -> None:
        assert self._buffer is not None
        data = self._buffer.numpy().data
        path = partial / _rank_file(self.rank)
        with path.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        note = entry | {"bytes": len(data), "xxh3": xxhash.xxh3_128(data).hexdigest()}
        write_atomically(_note(partial, self.rank), json.dumps(note))

    def _complete(self, partial: Path, step: int, manifest: dict[str, Any]) -> None:
        deadline = time.monotonic() + self.recipe.write_timeout_s
        waiting = list(range(self.ranks))
        while waiting := [rank for rank in waiting if not _note(partial, rank).exists()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks {waiting[:8]} wrote no file within {self.recipe.write_timeout_s:g} s")
            time.sleep(0.02)
        files = {_rank_file(rank): json.loads(_note(partial, rank).read_text()) for rank in range(self.ranks)}
        write_atomically(partial / "manifest.json", json.dumps(manifest | {"files": files}))
        for rank in range(self.ranks):
            _note(partial, rank).unlink()
        _fsync_folder(partial)
        final = self.checkpoints / folder_name(step)
        if final.exists():  # made by an earlier launch and found damaged, or made again after going back
            shutil.rmtree(final)
        partial.rename(final)
        _fsync_folder(self.checkpoints)
        write_atomically(self.checkpoints / "latest", final.name + "\n")
        self._delete_old(step)

    def _delete_old(self, newest: int) -> None:
        older = [folder for folder in found(self.checkpoints) if folder.name != folder_name(newest)]
        for folder in older[self.recipe.keep - 1 :]:
            step = int(folder.name.removeprefix("step-"))
            if not (self.recipe.keep_every and step % self.recipe.keep_every == 0):
                shutil.rmtree(folder, ignore_errors=True)


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _note(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.written.json"


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum_of_file(path: Path, kind: str) -> str:
    digest, buffer = CHECKSUMS[kind](), bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(memoryview(buffer)[:read])
    return str(digest.hexdigest())
