"""Which checkpoints are deleted, and when. Only rank 0 deletes, and nothing on a guess."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from pretrain.checkpoint.format import Damaged, Unreadable, found, read_whole_checkpoint, step_of


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
        self._abandoned: list[Path] = []

    def branch_off(self, step: int) -> None:
        """The run continues from `step`. Checkpoints of later steps are deleted once the next one is whole."""
        self._abandoned = [folder for folder in found(self._checkpoints) if step_of(folder) > step]
        if self._abandoned:
            names = ", ".join(folder.name for folder in reversed(self._abandoned))
            self._report(f"continuing from step {step}; {names} will be deleted after the next checkpoint")

    def saved(self, newest: int) -> None:
        """Delete what is not kept, now that the checkpoint of step `newest` is whole.

        An older one counts among those that are kept only if it verifies; it is read once for that. One that is
        damaged is deleted, and one that cannot be read now stays.
        """
        for folder in self._abandoned:
            if step_of(folder) != newest:  # that one was replaced
                shutil.rmtree(folder, ignore_errors=True)
        self._abandoned = []
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
                read_whole_checkpoint(folder)
            except Damaged as damage:
                self._report(f"{damage}; deleted, since a later checkpoint is whole")
                return False
            self._known_whole.add(folder.name)
        return True
