"""Rows that made training fail, and are passed over: `RUN/bad_rows.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain import distributed
from pretrain.data.loader import Loader
from pretrain.distributed import World
from sharebert_common.files import write_atomically


@dataclass(frozen=True)
class BadRows:
    """Positions `first` to `end` - 1 of the order of rows, given up at `step` for the checkpoint of `back_to`."""

    first: int
    end: int
    step: int
    back_to: int


@dataclass
class BadRowsFile:
    """`RUN/bad_rows.jsonl`: what was given up, and is passed over by this launch and all later ones."""

    path: Path
    world: World
    report: Callable[[str], None]
    entries: list[BadRows] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Read by rank 0 for all; a collective. Raises BadInput, on every rank, where it is not what was written."""
        text, refusal = "", None
        if self.world.is_main and self.path.exists():
            text = self.path.read_text(encoding="utf-8")
        try:
            fields = list(BadRows.__dataclass_fields__)
            lines = [json.loads(line) for line in distributed.broadcast_from_main(text).splitlines()]
            self.entries = [BadRows(**{name: int(line[name]) for name in fields}) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            refusal = f"{self.path}: not a list of rows to pass over ({error}); remove the line that is damaged"
        distributed.first_refusal(refusal)

    def add(self, entry: BadRows) -> None:
        """Remember `entry`, on disk before anything else happens. Every rank calls this with the same one."""
        self.entries.append(entry)
        if self.world.is_main:
            try:
                write_atomically(self.path, "".join(json.dumps(asdict(e)) + "\n" for e in self.entries))
            except OSError as error:  # this launch remembers them
                self.report(f"{self.path}: could not be written ({error.strerror})")

    def returns_to(self, step: int) -> int:
        """How often the run went back to the checkpoint of `step`."""
        return sum(entry.back_to == step for entry in self.entries)

    def pass_over(self, loader: Loader, global_batch: int) -> None:
        """Let `loader` go on behind the bad rows where its next global batch would hold some."""
        state = loader.state()
        start = int(state["rows_consumed"])
        while behind := [e.end for e in self.entries if e.first < start + global_batch and start < e.end]:
            start = max(behind)
        if start != state["rows_consumed"]:
            loader.load_state(state | {"rows_consumed": start})
