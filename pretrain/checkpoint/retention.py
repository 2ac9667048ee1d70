"""Which checkpoints are deleted, and when. Only rank 0 deletes, and nothing on a guess."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from pretrain.checkpoint.format import Damaged, Unreadable, folder_name, found, read_whole_checkpoint, step_of
from sharebert_common.errors import BadInput


class Retention:
    """Deletes old checkpoints of a run.

    Args:
        checkpoints: the folder of the run's checkpoints.
        keep: how many of the newest whole checkpoints are kept.
        keep_every: checkpoints at multiples of this number of steps are never deleted; 0 for none.
        report: takes a line for the log.
    """

    def __init__(self, checkpoints: Path, keep: int, keep_every: int, report: Callable[[str], None]) -> None:
        self._checkpoints, self._keep, self._keep_every, self._report = checkpoints, keep, keep_every, report
        self._known_whole: set[str] = set()
        self._left_behind: list[Path] = []

    def branch_off(self, step: int) -> None:
        """The run continues from `step`, and leaves checkpoints of later steps behind.

        They make way when the next checkpoint becomes whole (`set_aside`): damaged ones are deleted, and those that
        cannot be read now are renamed, so that no later attempt of this run takes them.
        """
        self._known_whole.add(folder_name(step))
        self._left_behind = [folder for folder in found(self._checkpoints) if step_of(folder) > step]
        if self._left_behind:
            names = ", ".join(folder.name for folder in reversed(self._left_behind))
            self._report(f"continuing from step {step}; {names} will make way for the next checkpoint")

    def set_aside(self) -> None:
        """Move away what `branch_off` left behind, before the next checkpoint becomes whole."""
        for folder in self._left_behind:
            if not folder.exists():  # moved by an earlier try
                continue
            try:
                read_whole_checkpoint(folder, tries=1)
                readable = True
            except BadInput as error:
                readable = isinstance(error, Damaged)
            # What begins with a point is deleted with the leftovers of dead attempts.
            aside = f".{folder.name}.left-0" if readable else f"unreadable-{folder.name}"
            folder.rename(self._checkpoints / aside)
            if not readable:
                self._report(f"{folder} could not be read; it is kept as {aside}")

    def saved(self, newest: int) -> None:
        """Delete what is not kept, now that the checkpoint of step `newest` is whole.

        An older one counts among those that are kept only if it verifies; it is read once for that. One that is
        damaged is deleted, and one that cannot be read now stays.
        """
        self._left_behind = []
        kept = 1
        for folder in found(self._checkpoints):
            step = step_of(folder)
            if step == newest:
                self._known_whole.add(folder.name)
            elif step < newest:
                forever = bool(self._keep_every) and step % self._keep_every == 0
                if kept < self._keep:
                    with contextlib.suppress(Unreadable):
                        whole = self._is_whole(folder)
                        kept += whole
                        if not whole and not forever:
                            shutil.rmtree(folder, ignore_errors=True)
                elif not forever:
                    shutil.rmtree(folder, ignore_errors=True)

    def _is_whole(self, folder: Path) -> bool:
        """Raises Unreadable where that cannot be known now."""
        if folder.name not in self._known_whole:
            try:
                read_whole_checkpoint(folder, tries=1)
            except Damaged as damage:
                self._report(f"{damage}; deleted, since a later checkpoint is whole")
                return False
            self._known_whole.add(folder.name)
        return True
