"""What a checkpoint of a training holds beside weights and moments, and how a run goes on from one."""

from __future__ import annotations

import secrets
from typing import Any

import torch

from pretrain import distributed
from pretrain.checkpoint import format as checkpoint
from pretrain.checkpoint.format import Checkpoint
from pretrain.checkpoint.identity import refuse_differences
from pretrain.checkpoint.rng_state import generators, set_generators
from pretrain.checkpoint.writer import CheckpointRecipe, CheckpointWriter
from pretrain.data.loader import Loader
from pretrain.distributed import World
from pretrain.engine import fragments as slices
from pretrain.engine.engine import load_scaler_state, scaler_state
from pretrain.run.folder import RunFolder
from sharebert_common.errors import BadInput


def find_checkpoint(run: RunFolder, world: World, ours: dict[str, Any], loader: Loader) -> Checkpoint | None:
    """The newest whole checkpoint of a run, the same on every rank; sets `loader` to where it was taken.

    Raises BadInput, on every rank, where it belongs to another model, tokenizer or dataset than `ours`.
    """
    newest = checkpoint.newest_whole(run.checkpoints, run.say) if world.is_main else None
    name = distributed.broadcast_from_main(newest.folder.name if newest else "")
    found, refusal = None, None
    if name:
        try:
            found = checkpoint.read_manifest(run.checkpoints / name)
            refuse_differences(found, ours)
            loader.load_state(found.training["loader"])
        except BadInput as error:
            refusal = str(error)
    distributed.first_refusal(refusal)
    if found is not None and world.is_main:
        before, now = (state["fingerprint"] for state in (found.training["loader"], loader.state()))
        if before != now:
            run.say(
                f"the data changed: {before} before step {found.step}, {now} from now on, from row "
                f"{found.training['loader']['rows_consumed']} of the new order; rows may come twice or not at all "
                "in this epoch"
            )
    return found


class Saver:
    """Saves the whole state of a training, and loads it. Every rank has one."""

    def __init__(
        self,
        recipe: CheckpointRecipe,
        run: RunFolder,
        world: World,
        engine: Any,
        loader: Loader,
        ours: dict[str, Any],
    ) -> None:
        """`ours` is the `identity` of the run."""
        self.run, self.world, self.engine, self.loader, self.ours = run, world, engine, loader, ours
        self.files = CheckpointWriter(
            run.checkpoints,
            recipe,
            world.rank,
            world.world_size,
            token=distributed.broadcast_from_main(secrets.token_hex(4)),
            report=run.say,
        )
        self.files.prepare(slices.owned(engine, world), generators())

    def save(self, step: int) -> None:
        """Save after optimizer step `step`; the writing goes on in the background."""
        training = {
            **self.ours,
            "loader": self.loader.state(),
            "adam_steps": slices.adam_steps(self.engine),
            "scaler": scaler_state(self.engine),
            "skipped": self.engine.skipped_steps,
        }
        owned = slices.owned(self.engine, self.world)
        self.files.save(step, owned, slices.shapes(self.engine), generators(), training)

    def finish(self) -> bool:
        """Wait until the last save is on disk or given up; whether it is whole. A collective."""
        return distributed.all_agree(self.files.finish())

    def load(self, found: Checkpoint, seed: int) -> int:
        """Take weights, moments and generators of a checkpoint. Returns its step. A collective."""
        saved = found.training
        checkpoint.load(found, slices.loaded(self.engine, self.world))
        slices.refresh_working_weights(self.engine)
        slices.set_adam_steps(self.engine, saved["adam_steps"])
        load_scaler_state(self.engine, saved["scaler"])
        self.engine.skipped_steps = saved["skipped"]
        self.engine.global_steps = found.step
        if found.world_size == self.world.world_size:
            set_generators(checkpoint.load_generators(found, self.world.rank))
        else:
            torch.manual_seed(distributed.seed_of(seed, found.step, self.world.rank))
            if self.world.is_main:
                self.run.say(
                    f"checkpoint of {found.world_size} ranks on {self.world.world_size}: dropout is seeded anew from "
                    f"(seed {seed}, step {found.step}, rank)"
                )
        return found.step
