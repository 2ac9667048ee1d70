"""Writing checkpoints in the background.

A save copies the state into one buffer that has the layout of the file, and a thread writes the buffer while training
continues (`saving.RankSave`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as recipe_dataclass

from exports.tensor_file import Layout, lay_out
from pretrain.checkpoint.direct_io import BLOCK_BYTES
from pretrain.checkpoint.format import FORMAT, RNG_STATE
from pretrain.checkpoint.retention import Retention
from pretrain.checkpoint.saving import GivenUpElsewhere, RankSave
from pretrain.engine.fragments import ALL_STATES, Fragment
from sharebert_common.errors import BadInput
from sharebert_common.files import make_folders, remove_unfinished, write_atomically
from sharebert_common.recipe import MOST_SECONDS, STRICT

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
"""Between tries of a write that fails. Each pause is twice the one before."""


@recipe_dataclass(config=STRICT, kw_only=True)
class CheckpointRecipe:
    """When checkpoints are made, and which are kept."""

    every: Annotated[int, Field(gt=0)] = 1000
    """Optimizer steps between checkpoints. One is always made at the end."""
    keep: Annotated[int, Field(gt=0)] = 3
    """How many of the newest whole checkpoints are kept."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints at multiples of this number of steps are never deleted; 0 for none."""
    write_timeout_s: Annotated[float, Field(gt=0, le=MOST_SECONDS)] = 1800.0
    """How long a failing write is tried again, and how long rank 0 waits for the files of all ranks, before the
    checkpoint is given up. A newer checkpoint ends the retries at once."""
    restart_if_unreadable: bool = False
    """Start at step 0 where there are checkpoints and none can be read. Without it, the run refuses to start."""


@dataclass
class CheckpointWriter:
    """Saves the checkpoints of one attempt in the background and deletes old ones. Every rank has one."""

    checkpoints: Path
    recipe: CheckpointRecipe
    rank: int
    world_size: int
    report: Callable[[str], None]
    """Takes a line for the log."""
    sync_log: Callable[[], None] = lambda: None
    """Makes the run's log durable."""
    _token: str = field(default="", init=False)
    _buffer: torch.Tensor | None = field(default=None, init=False)
    _layout: Layout | None = field(default=None, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _saves: int = field(default=0, init=False)
    _whole: bool = field(default=True, init=False)
    _failing: bool = field(default=False, init=False)
    _superseded: threading.Event = field(default_factory=threading.Event, init=False)
    _retention: Retention = field(init=False)

    def __post_init__(self) -> None:
        self._retention = Retention(self.checkpoints, self.recipe.keep, self.recipe.keep_every, self.report)

    def open(self, token: str) -> None:
        """Make the folder, and remove what dead attempts left there. `token` is the same on all ranks, and another one
        in each attempt.
        """
        self._token = token
        make_folders(self.checkpoints)
        self._remove_leftovers()
        if self.rank == 0:
            remove_unfinished(self.checkpoints / "latest")

    def branch_off(self, step: int) -> None:
        """The run continues from `step`: checkpoints of later steps make way for the next save."""
        if self.rank == 0:
            self._retention.branch_off(step)

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
        assert self._buffer is not None
        save = RankSave(
            self.checkpoints,
            step,
            f"{self._token}-{self._saves}",
            self.rank,
            self.world_size,
            data=self._buffer.numpy().data,
            fragments=_spans(fragments),
            manifest={"format": FORMAT, "step": step, "training": training, "shapes": shapes},
            before_whole=self._before_whole,
            deadline=time.monotonic() + self.recipe.write_timeout_s,
        )
        self._thread = threading.Thread(
            target=self._write, args=(save, self._saves), name=f"checkpoint-{step}", daemon=True
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
            f"{state}/{part.name}": (torch.float32, (part.length,))
            for state in ALL_STATES
            for part in fragments
            if state in part.tensors
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
            for state, tensor in part.tensors.items():
                views[f"{state}/{part.name}"].copy_(tensor, non_blocking=True)
        for name, value in rng_state.items():
            views[RNG_STATE + name].copy_(value)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _write(self, save: RankSave, number: int) -> None:
        """Do each part of the save, again and again until it works, the time is over or a newer save waits."""
        self._remove_leftovers(before=number)
        pause_s = FIRST_PAUSE_S
        for part in save.parts():
            while True:
                try:
                    part()
                    break
                except Exception as error:  # a failing disk must not end the training
                    self._failing = True
                    left_s = save.deadline - time.monotonic()
                    if isinstance(error, GivenUpElsewhere) or left_s <= 0 or self._superseded.is_set():
                        self._give_up(save, error)
                        return
                    self.report(
                        f"checkpoint of step {save.step}: {error}; it is tried again in {min(pause_s, left_s):.2g} s"
                    )
                    self._superseded.wait(min(pause_s, left_s))
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._whole = True
        if self.rank == 0:
            with contextlib.suppress(OSError):  # the checkpoint is whole, whatever happens to the hint and to old ones
                write_atomically(self.checkpoints / "latest", save.final.name + "\n")
            with contextlib.suppress(BadInput, OSError):
                self._retention.saved(save.step)
                self._remove_leftovers(before=1)

    def _before_whole(self) -> None:
        self.sync_log()
        self._retention.set_aside()

    def _give_up(self, save: RankSave, error: Exception) -> None:
        self.report(f"checkpoint of step {save.step} given up ({error}); older checkpoints are untouched")
        if self.rank == 0:
            save.give_up()
        else:
            save.note_failure()

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
