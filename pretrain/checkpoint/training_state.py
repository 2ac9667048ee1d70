"""What a checkpoint of a training holds beside weights and moments, and how a run resumes from one."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pretrain import distributed
from pretrain.checkpoint.format import Checkpoint, load_fragments, load_rng_state, newest_whole, read_whole_checkpoint
from pretrain.checkpoint.identity import refuse_differences
from pretrain.checkpoint.rng_state import rng_state, set_rng_state
from pretrain.checkpoint.writer import CheckpointRecipe, CheckpointWriter
from pretrain.data.loader import Loader
from pretrain.distributed import World
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import EMA, MOMENTUM, STATES
from pretrain.run.folder import RunFolder
from pretrain.run.meter import Meter

LACKING = {
    STATES[1:]: "moments of AdamW: they start at 0",
    (MOMENTUM,): "momenta of Muon: they start at 0",
    (EMA,): "average of the weights: it begins anew",
}
"""What is said where a checkpoint lacks states of the optimizer."""


def find_checkpoint(
    run: RunFolder,
    world: World,
    identity: Mapping[str, Any],
    check_loader_state: Callable[[Mapping[str, Any]], None],
    *,
    or_none: bool = False,
) -> Checkpoint | None:
    """The newest whole checkpoint of a run, the same on every rank. A collective.

    Args:
        run: whose checkpoints are looked at.
        world: of this process.
        identity: of this attempt, from `identity.identity`.
        check_loader_state: raises BadInput where the loader could not continue from a state.
        or_none: None where there are checkpoints and none can be read.

    Raises BadInput, on every rank, where there are checkpoints and none can be read, and where the newest one belongs
    to another model, tokenizer or dataset.
    """
    name, found = "", None
    with distributed.refused_by_all():
        if world.is_main:
            newest = newest_whole(run.checkpoints, run.say, or_none=or_none)
            name = newest.folder.name if newest else ""
    name = distributed.broadcast_from_main(name)
    with distributed.refused_by_all():
        if name:
            found = read_whole_checkpoint(run.checkpoints / name, verified=False)  # rank 0 compared the checksums
            refuse_differences(found, identity)
            check_loader_state(found.training["loader"])
    return found


class TrainingState:
    """Saves the whole state of a training, and loads it. Every rank has one."""

    def __init__(
        self,
        recipe: CheckpointRecipe,
        run: RunFolder,
        world: World,
        engine: Engine,
        loader: Loader,
        meter: Meter,
        identity: dict[str, Any],
        sync_log: Callable[[], None],
    ) -> None:
        """`sync_log` makes the run's log durable; it is called before a checkpoint becomes whole."""
        self.run, self.world, self.engine, self.loader, self.identity = run, world, engine, loader, identity
        self.meter = meter
        self.files = CheckpointWriter(run.checkpoints, recipe, world.rank, world.world_size, run.say, sync_log)

    def open(self) -> None:
        """Make ready to save: agree on this attempt's token, remove leftovers, allocate the buffer. A collective."""
        self.files.open(token=distributed.broadcast_from_main(secrets.token_hex(4)))
        self.files.allocate(self.engine.fragments(self.world), rng_state())

    def save(self, step: int) -> None:
        """Save the state after optimizer step `step`. The files are written in the background. A collective."""
        interval = {"interval": self.meter.state()}
        training = {**self.identity, "loader": self.loader.state(), **self.engine.state(), **interval}
        self.files.save(step, self.engine.fragments(self.world), self.engine.shapes(), rng_state(), training)

    def finish(self) -> bool:
        """Wait until the last save is on disk or given up; whether it is whole. A collective."""
        return distributed.all_agree(self.files.finish())

    def begin(self) -> int:
        """Start without a checkpoint, at step 0. Returns 0."""
        self.files.branch_off(0)
        return 0

    def load(self, found: Checkpoint, seed: int) -> int:
        """Take up a checkpoint: weights, moments, counters, rows, generators, and the sums of the interval of the log
        that it is in. Returns its step. A collective.

        Args:
            found: from `find_checkpoint`.
            seed: of the run; on another world size than the checkpoint's, dropout is seeded from it.
        """
        lacking = load_fragments(found, self.engine.writable_fragments(self.world))
        for states, text in LACKING.items():
            if names := set().union(*(lacking.get(state, ()) for state in states)):
                self._report(f"checkpoint of step {found.step} has no {text} (of {min(names)} and the like)")
        self.files.branch_off(found.step)
        self.engine.load_state(found.step, found.training)
        self._report_changed_data(found)
        self.loader.load_state(found.training["loader"])
        self.meter.load_state(found.training.get("interval", (0.0, 0.0, 0.0)))  # older checkpoints have none
        if found.world_size == self.world.world_size:
            set_rng_state(load_rng_state(found, self.world.rank))
        else:
            torch.manual_seed(distributed.seed_of(seed, found.step, self.world.rank))
            self._report(
                f"checkpoint of {found.world_size} ranks on {self.world.world_size}: dropout is seeded anew from "
                f"(seed {seed}, step {found.step}, rank)"
            )
        return found.step

    def _report_changed_data(self, found: Checkpoint) -> None:
        saved = found.training["loader"]
        if saved["fingerprint"] != self.loader.fingerprint:
            self._report(
                f"the data changed: {saved['fingerprint']} before step {found.step}, {self.loader.fingerprint} from "
                f"now on, from row {saved['rows_consumed']} of the new order; rows may come twice or not at all in "
                "this epoch"
            )

    def _report(self, text: str) -> None:
        if self.world.is_main:
            self.run.say(text)
