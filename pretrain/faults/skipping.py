"""Steps that are not finite, and the rows that are skipped for them (`RUN/bad_rows.jsonl`).

A step whose gradient is not finite is skipped: its rows and its learning rate are used up, weights and moments stay.
After too many in a row the run returns to its newest checkpoint and skips the rows of those steps. Where that does not
help, it skips all rows since the checkpoint, as PaLM's authors did (Chowdhery et al. 2022, section 5.1). A run that
returns to the same checkpoint too often fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain import distributed
from pretrain.checkpoint.format import Checkpoint
from pretrain.distributed import World
from pretrain.faults.recipe import FaultsRecipe
from sharebert_common.files import write_atomically


class TooManyFaults(RuntimeError):
    """The run cannot continue by itself; the message says what was tried."""


@dataclass(frozen=True)
class BadRows:
    """Positions `first` to `end` - 1 of the order of rows, given up at `step` on the return to step `back_to`."""

    first: int
    end: int
    step: int
    back_to: int

    @property
    def rows(self) -> range:
        """The positions."""
        return range(self.first, self.end)


@dataclass
class BadRowsFile:
    """`RUN/bad_rows.jsonl`: rows that this attempt and all later ones skip."""

    path: Path
    world: World
    report: Callable[[str], None]
    entries: list[BadRows] = field(default_factory=list)

    def read(self) -> None:
        """Take the entries of earlier attempts. A collective: rank 0 reads for all.

        Raises BadInput, on every rank, where the file is not what was written.
        """
        text = ""
        if self.world.is_main and self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
        text = distributed.broadcast_from_main(text)
        try:
            fields = list(BadRows.__dataclass_fields__)
            lines = [json.loads(line) for line in text.splitlines()]
            self.entries = [BadRows(**{name: int(line[name]) for name in fields}) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise distributed.Refused(  # the same text on every rank
                f"{self.path}: not a list of rows to skip ({error}); remove the line that is damaged"
            ) from error

    def add(self, entry: BadRows) -> None:
        """Add `entry`, on disk before this returns. Every rank calls this with the same one."""
        self.entries.append(entry)
        if self.world.is_main:
            try:
                write_atomically(self.path, "".join(json.dumps(asdict(e)) + "\n" for e in self.entries))
            except OSError as error:  # this attempt knows them all the same
                self.report(f"{self.path}: could not be written ({error.strerror})")

    def returns_to(self, step: int) -> int:
        """How often the run returned to the checkpoint of `step`."""
        return sum(entry.back_to == step for entry in self.entries)


class SkippedSteps:
    """Counts the steps skipped in a row, and decides what follows from too many."""

    def __init__(self, recipe: FaultsRecipe, bad_rows: BadRowsFile, report: Callable[[str], None]) -> None:
        self._recipe, self._bad_rows, self._report = recipe, bad_rows, report
        self._forget()

    def _forget(self) -> None:
        self.in_a_row, self._first_row, self._end_row = 0, 0, 0

    def count(self, step: int, rows: range, skipped: bool) -> None:
        """Note how `step` on the positions `rows` went."""
        if not skipped:
            self._forget()
            return
        if not self.in_a_row:
            self._first_row = rows.start
        self.in_a_row += 1
        self._end_row = rows.stop
        self._report(
            f"step {step}: the gradient is not finite; skipped, {self.in_a_row} in a row "
            f"(rows {rows.start} to {rows.stop - 1} of the order)"
        )

    @property
    def too_many(self) -> bool:
        """Whether the run must return to a checkpoint."""
        return self.in_a_row >= self._recipe.max_skipped

    def give_up_rows(self, step: int, found: Checkpoint | None) -> range:
        """The rows to skip from now on, when the run returns from `step` to `found`. The count starts anew.

        Raises TooManyFaults where there is no checkpoint, or the run returned to it often enough.
        """
        skipped = f"step {step}: {self.in_a_row} steps in a row were not finite"
        back_to = found.step if found else 0
        returns = self._bad_rows.returns_to(back_to)
        if returns >= self._recipe.max_returns:
            raise TooManyFaults(
                f"{skipped}, and returning to step {back_to} {returns} times did not help "
                f"(rows tried: {self._bad_rows.path}); lower optimizer.lr, or look at these rows"
            )
        first_since = int(found.training["loader"]["rows_consumed"]) if found else 0
        given_up = BadRows(self._first_row if returns == 0 else first_since, self._end_row, step, back_to)
        self._bad_rows.add(given_up)
        will_skip = f"rows {given_up.first} to {given_up.end - 1} of the order will be skipped"
        if found is None:
            raise TooManyFaults(f"{skipped}, and there is no checkpoint to return to; start the run again: {will_skip}")
        self._report(f"{skipped}; returning to step {back_to}; {will_skip}")
        self._forget()
        return given_up.rows
