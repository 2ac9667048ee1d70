"""Writing checkpoints in the background.

A save copies the state into one buffer that has the layout of the file, and a thread writes the buffer while training
continues. Rank 0's thread waits for the files of the other ranks, writes the manifest, and renames the folder into
place: from then on the checkpoint is durable (`CheckpointWriter._complete`). No rank waits for a collective. The
ranks meet in the shared folder, and the name of the unfinished folder carries a token of this attempt, so that
leftovers of a dead attempt never count.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import xxhash
from pydantic import Field
from pydantic.dataclasses import dataclass as recipe_dataclass

from exports.tensor_file import Layout, lay_out
from pretrain.checkpoint.direct_io import BLOCK_BYTES, write_direct
from pretrain.checkpoint.format import FORMAT, RNG_STATE, folder_name, found, manifest_checksum, rank_file, step_of
from pretrain.engine.fragments import STATES, Fragment
from sharebert_common.files import write_atomically
from sharebert_common.recipe import STRICT

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
"""Between tries of a write that fails. Each pause is twice the one before."""


@recipe_dataclass(config=STRICT, kw_only=True)
class CheckpointRecipe:
    """When checkpoints are made, and which are kept."""

    every: Annotated[int, Field(gt=0)] = 1000
    """Optimizer steps between checkpoints. One is always made at the end."""
    keep: Annotated[int, Field(gt=0)] = 3
    """How many of the newest checkpoints are kept."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints at multiples of this number of steps are never deleted; 0 for none."""
    write_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """How long a failing write is tried again, and how long rank 0 waits for the files of all ranks, before the
    checkpoint is given up. A newer checkpoint ends the retries at once."""


class GivenUpElsewhere(RuntimeError):
    """Another rank could not write its part."""


@dataclass
class CheckpointWriter:
    """Saves the checkpoints of one attempt in the background and deletes old ones. Every rank has one."""

    checkpoints: Path
    recipe: CheckpointRecipe
    rank: int
    world_size: int
    report: Callable[[str], None]
    """Takes a line for the log."""
    _token: str = field(default="", init=False)
    _buffer: torch.Tensor | None = field(default=None, init=False)
    _layout: Layout | None = field(default=None, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _saves: int = field(default=0, init=False)
    _whole: bool = field(default=True, init=False)
    _failing: bool = field(default=False, init=False)
    _superseded: threading.Event = field(default_factory=threading.Event, init=False)

    def open(self, token: str) -> None:
        """Make the folder, and remove what dead attempts left there. `token` is the same on all ranks, and another one
        in each attempt.
        """
        self._token = token
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()

    def save(
        self,
        step: int,
        fragments: Sequence[Fragment],
        shapes: dict[str, list[int]],
        rng_state: dict[str, torch.Tensor],
        training: dict[str, Any],
    ) -> None:
        """Copy the state now and write it in the background.

        Waits for an earlier save that is still being written. One that fails and is being retried is given up.

        Args:
            step: optimizer steps done.
            fragments: what this rank owns.
            shapes: the shape of every parameter.
            rng_state: states of this rank's random generators, uint8.
            training: JSON values, the same on every rank, that `Checkpoint.training` gives back.
        """
        while self._thread is not None and self._thread.is_alive():
            if self._failing:
                self._superseded.set()
            self._thread.join(0.05)
        self._superseded.clear()
        self._failing = self._whole = False
        self._saves += 1
        self._copy(fragments, rng_state)
        entry = {"slices": _spans(fragments)}
        manifest = {"format": FORMAT, "step": step, "training": training, "shapes": shapes}
        self._thread = threading.Thread(
            target=self._write, args=(self._saves, step, entry, manifest), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()

    def finish(self) -> bool:
        """Wait until the last save is on disk or given up. Returns whether it is on disk (on rank 0: for all ranks)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._whole

    def allocate(self, fragments: Sequence[Fragment], rng_state: dict[str, torch.Tensor]) -> Layout:
        """Allocate the buffer for such a state and touch its pages, so that saves copy at the speed of memory."""
        specs: dict[str, tuple[torch.dtype, Sequence[int]]] = {
            f"{state}/{part.name}": (torch.float32, (part.length,)) for state in STATES for part in fragments
        }
        specs |= {RNG_STATE + name: (torch.uint8, tuple(value.shape)) for name, value in rng_state.items()}
        layout = lay_out(specs, {"format": "sharebert-checkpoint", "slices": json.dumps(_spans(fragments))})
        if self._layout is None or layout.header != self._layout.header:
            self._layout = layout
            self._buffer = _aligned_zeros(layout.total_bytes)
            self._buffer[: len(layout.header)] = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        return self._layout

    def _copy(self, fragments: Sequence[Fragment], rng_state: dict[str, torch.Tensor]) -> None:
        layout = self.allocate(fragments, rng_state)
        assert self._buffer is not None
        views = layout.views(self._buffer)
        for part in fragments:
            for state in STATES:
                views[f"{state}/{part.name}"].copy_(part.tensors[state], non_blocking=True)
        for name, value in rng_state.items():
            views[RNG_STATE + name].copy_(value)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _write(self, number: int, step: int, entry: dict[str, Any], manifest: dict[str, Any]) -> None:
        partial = self.checkpoints / f".{folder_name(step)}.{self._token}-{number}"
        self._remove_leftovers(before=number)
        deadline, pause_s = time.monotonic() + self.recipe.write_timeout_s, FIRST_PAUSE_S
        while not self._whole:
            try:
                partial.mkdir(exist_ok=True)
                self._write_rank_file(partial, entry)
                if self.rank == 0:
                    self._complete(partial, step, manifest, deadline)
                self._whole = True
            except Exception as error:  # a failing disk must not end the training
                self._failing = True
                left_s = deadline - time.monotonic()
                if isinstance(error, GivenUpElsewhere) or left_s <= 0 or self._superseded.is_set():
                    self._give_up(partial, step, error)
                    return
                self.report(f"checkpoint of step {step}: {error}; it is tried again in {min(pause_s, left_s):.2g} s")
                self._superseded.wait(min(pause_s, left_s))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _give_up(self, partial: Path, step: int, error: Exception) -> None:
        self.report(f"checkpoint of step {step} given up ({error}); older checkpoints are untouched")
        with contextlib.suppress(OSError):
            if self.rank == 0:
                shutil.rmtree(partial)
            else:
                _given_up(partial, self.rank).touch()  # an empty file fits on a full disk

    def _write_rank_file(self, partial: Path, entry: dict[str, Any]) -> None:
        assert self._buffer is not None
        data = self._buffer.numpy().data
        write_direct(partial / rank_file(self.rank), data)
        note = entry | {"bytes": len(data), "xxh3_128": xxhash.xxh3_128(data).hexdigest()}
        write_atomically(_note(partial, self.rank), json.dumps(note))

    def _complete(self, partial: Path, step: int, manifest: dict[str, Any], deadline: float) -> None:
        waiting = list(range(self.world_size))
        while waiting := [rank for rank in waiting if not _note(partial, rank).exists()]:
            if any(_given_up(partial, rank).exists() for rank in waiting):
                raise GivenUpElsewhere(f"ranks {waiting[:8]} could not write")
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks {waiting[:8]} wrote no file within {self.recipe.write_timeout_s:g} s")
            time.sleep(0.02)
        files = {rank_file(rank): json.loads(_note(partial, rank).read_text()) for rank in range(self.world_size)}
        whole = json.loads(json.dumps(manifest | {"files": files}))  # as it will be read
        write_atomically(partial / "manifest.json", json.dumps(whole | {"checksum": manifest_checksum(whole)}))
        for rank in range(self.world_size):
            _note(partial, rank).unlink()
        _fsync_folder(partial)
        final = self.checkpoints / folder_name(step)
        if final.exists():  # damaged, or of the steps that this run returned from
            final.rename(self.checkpoints / f".{final.name}.{self._token}-0")
        partial.rename(final)
        _fsync_folder(self.checkpoints)
        with contextlib.suppress(OSError):  # the checkpoint is whole, whatever happens to the hint and to old ones
            write_atomically(self.checkpoints / "latest", final.name + "\n")
        self._delete_old(step)
        self._remove_leftovers(before=1)

    def _delete_old(self, newest: int) -> None:
        """Delete what `keep` and `keep_every` do not keep, now that the checkpoint of step `newest` is whole.

        A later one goes too: this run could not resume from it, or it would have.
        """
        others = [(step_of(folder), folder) for folder in found(self.checkpoints)]
        older = [(step, folder) for step, folder in others if step < newest][self.recipe.keep - 1 :]
        later = [(step, folder) for step, folder in others if step > newest]
        for step, folder in older:
            if not (self.recipe.keep_every and step % self.recipe.keep_every == 0):
                shutil.rmtree(folder, ignore_errors=True)
        for _, folder in later:
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_leftovers(self, before: int = 0) -> None:
        """Rank 0 deletes the unfinished folders of dead attempts, and of this one's saves before number `before`.

        Later ones stay: other ranks may be ahead, and have begun to write the next.
        """
        for leftover in self.checkpoints.glob(".step-*") if self.rank == 0 else ():
            token, _, number = leftover.name.rpartition(".")[2].rpartition("-")
            if token != self._token or int(number) < before:
                shutil.rmtree(leftover, ignore_errors=True)


def _spans(fragments: Sequence[Fragment]) -> dict[str, list[int]]:
    return {part.name: [part.start, part.length] for part in fragments}


def _aligned_zeros(size: int) -> torch.Tensor:
    """Bytes [size] whose address is a multiple of BLOCK_BYTES, as direct writes want; pinned where CUDA is."""
    memory = torch.zeros(size + BLOCK_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return memory[-memory.data_ptr() % BLOCK_BYTES :][:size]


def _note(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.written.json"


def _given_up(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.given-up"


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
