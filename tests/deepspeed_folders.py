"""Run under torchrun: save the same engines with DeepSpeed's own `save_checkpoint` and in our format.

Argument: a folder. One start of DeepSpeed does all of CASES: FOLDER/CASE/theirs holds what `engine.save_checkpoint`
writes, and FOLDER/CASE/ours a checkpoint of format 1 of the same state.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tiny_runs import open_writer

from pretrain import distributed
from pretrain.distributed import World
from pretrain.engine.config import ZeroRecipe, deepspeed_config
from pretrain.engine.engine import open_engine
from pretrain.engine.optimizer import OptimizerRecipe
from sharebert import ShareBertConfig, ShareBertForMaskedLM, initialize

STEPS = 3
LR = 1e-2

CASES: dict[str, dict[str, Any]] = {
    f"{stage}-{precision}": {"stage": stage, "precision": precision}
    for precision in ("fp32", "bf16")
    for stage in (1, 2, 3)
} | {
    "0-fp32": {"stage": 0, "precision": "fp32"},
    "2-frozen": {"stage": 2, "precision": "bf16", "frozen": True},
    "3-frozen": {"stage": 3, "precision": "bf16", "frozen": True},
    "2-round-robin": {"stage": 2, "precision": "bf16", "zero": {"round_robin_gradients": True}},
    "3-small-groups": {"stage": 3, "precision": "bf16", "zero": {"sub_group_size": 2000}},
}

CONFIG = ShareBertConfig(
    vocab_size=304,
    factor_size=9,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
    mlm_head="tied",
)


def save_both(folder: Path, world: World, case: dict[str, Any]) -> None:
    """Train a few steps and save the state in both formats."""
    torch.manual_seed(0)
    model = ShareBertForMaskedLM(CONFIG)
    initialize(model, "variance", 0)
    if case.get("frozen"):
        model.sharebert.token_type_embeddings.weight.requires_grad_(False)
    config = deepspeed_config(
        zero=ZeroRecipe(stage=case["stage"], deepspeed=case.get("zero", {})),
        precision=case["precision"],
        clip=0.5,
        micro_batch=2,
        micro_batches=1,
        parameters=20_000,
    )
    engine = open_engine(model, config, OptimizerRecipe())
    engine.learning_rate = LR
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step * world.world_size + world.rank)
        tokens = torch.randint(5, 300, (2, 16), generator=generator)
        output = engine(tokens, positions=torch.arange(8), labels=tokens.flatten()[:8], loss_weights=torch.ones(8))
        engine.backward(output.loss_sum / 8)
        engine.step()
    engine._deepspeed.save_checkpoint(str(folder / "theirs"))
    if not case.get("frozen"):
        writer = open_writer(folder / "ours", world.rank, world.world_size, print)
        torch.distributed.barrier()  # rank 0 clears the folder first
        writer.save(STEPS, engine.fragments(world), engine.shapes(), {}, {})
        writer.finish()
    torch.distributed.barrier()


def main() -> None:
    world = distributed.join(timeout_s=120)
    for name, case in CASES.items():
        save_both(Path(sys.argv[1]) / name, world, case)
    distributed.leave()


if __name__ == "__main__":
    main()
