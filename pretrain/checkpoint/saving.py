"""One rank's part of one checkpoint on disk, in steps that can each be tried again.

    .step-00001000.TOKEN-3/     rank files, and a note of each rank that wrote its own
    step-00001000/              the same folder after rank 0 renamed it

The checkpoint is durable once the new name is flushed to the disk (`RankSave.move_into_place`).

No rank waits for a collective. The ranks meet in the unfinished folder. Its name carries a token of the attempt and
the number of the save, so that leftovers of a dead attempt never count.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from pretrain.checkpoint.direct_io import write_direct
from pretrain.checkpoint.format import folder_name, manifest_checksum, rank_file
from sharebert_common.files import flush, write_atomically


class GivenUpElsewhere(RuntimeError):
    """Another rank could not write its part."""


@dataclass
class RankSave:
    """What one rank does for one checkpoint."""

    checkpoints: Path
    step: int
    suffix: str
    """Token of the attempt and number of the save: the same on all ranks, and never used again."""
    rank: int
    world_size: int
    data: memoryview
    """This rank's file."""
    fragments: dict[str, list[int]]
    """Start and length of each fragment in it, by parameter."""
    manifest: dict[str, Any]
    """The manifest without the files."""
    before_whole: Callable[[], None]
    """Rank 0 calls it before the checkpoint becomes whole."""
    deadline: float
    """When rank 0 stops waiting for the files of the others, on `time.monotonic`'s clock."""
    _files: dict[str, Any] = field(default_factory=dict, init=False)
    _note_tried: bool = field(default=False, init=False)

    @property
    def partial(self) -> Path:
        """The unfinished folder."""
        return self.checkpoints / f".{folder_name(self.step)}.{self.suffix}"

    @property
    def final(self) -> Path:
        """The folder of the whole checkpoint."""
        return self.checkpoints / folder_name(self.step)

    def parts(self) -> list[Callable[[], None]]:
        """What this rank does, in order. Each may raise, and may be called again after it did."""
        own = [self.make_folder, self.write_rank_file]
        return own if self.rank else [*own, self.collect_notes, self.write_manifest, self.move_into_place]

    def make_folder(self) -> None:
        """Make the unfinished folder, unless another rank did."""
        self.partial.mkdir(exist_ok=True)

    def write_rank_file(self) -> None:
        """Write this rank's file, and then a note that it is whole.

        A note that is there although writing it failed is enough. Rank 0 may have read it, written the manifest,
        removed the notes and moved the folder, in this order: then the file must not be written again.
        """
        if self._note_tried and (
            self._note(self.rank).exists() or (self.partial / "manifest.json").exists() or not self.partial.exists()
        ):
            return
        write_direct(self.partial / rank_file(self.rank), self.data)
        size, checksum = len(self.data), xxhash.xxh3_128(self.data).hexdigest()
        entry = {"slices": self.fragments, "bytes": size, "xxh3_128": checksum}
        self._note_tried = True
        write_atomically(self._note(self.rank), json.dumps(entry))

    def collect_notes(self) -> None:
        """Wait for the notes of all ranks.

        Raises GivenUpElsewhere where a rank gave up, TimeoutError after the deadline.
        """
        waiting = list(range(self.world_size))
        while waiting := [rank for rank in waiting if not self._note(rank).exists()]:
            if any(self._given_up(rank).exists() for rank in waiting):
                raise GivenUpElsewhere(f"ranks {waiting[:8]} could not write")
            if time.monotonic() > self.deadline:
                raise TimeoutError(f"ranks {waiting[:8]} wrote no file in time")
            time.sleep(0.02)
        ranks = range(self.world_size)
        self._files = {rank_file(rank): json.loads(self._note(rank).read_text(encoding="utf-8")) for rank in ranks}

    def write_manifest(self) -> None:
        """Write the manifest in place of the notes, and make the folder durable."""
        self.before_whole()
        whole = json.loads(json.dumps(self.manifest | {"files": self._files}))  # as it will be read
        write_atomically(self.partial / "manifest.json", json.dumps(whole | {"checksum": manifest_checksum(whole)}))
        for rank in range(self.world_size):
            self._note(rank).unlink(missing_ok=True)
        flush(self.partial)

    def move_into_place(self) -> None:
        """Rename the folder and make the name durable. After this the checkpoint is whole and survives a power cut."""
        if self.partial.exists():  # not renamed yet by an earlier try
            if self.final.exists():  # damaged, or of the steps that this run returned from
                self.final.rename(self._aside)
            self.partial.rename(self.final)
        flush(self.checkpoints)

    def give_up(self) -> None:
        """Remove the unfinished folder, and put back the checkpoint of the same step that was moved aside for it."""
        shutil.rmtree(self.partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            if self._aside.exists() and not self.final.exists():
                self._aside.rename(self.final)

    def note_failure(self) -> None:
        """Tell rank 0 that this rank gave up."""
        with contextlib.suppress(OSError):
            self._given_up(self.rank).touch()  # an empty file fits on a full disk

    @property
    def _aside(self) -> Path:
        """Where an older checkpoint of the same step waits until this one is in its place."""
        return self.checkpoints / f".{self.final.name}.{self.suffix.rpartition('-')[0]}-0"

    def _note(self, rank: int) -> Path:
        return self.partial / f"rank-{rank:05d}.written.json"

    def _given_up(self, rank: int) -> Path:
        return self.partial / f"rank-{rank:05d}.given-up"
