"""The first line of a run."""

from __future__ import annotations

from pretrain.plan.estimate import count_parameters
from pretrain.recipe import ResolvedTraining, TrainRecipe


def introduction(recipe: TrainRecipe, training: ResolvedTraining, step: int, ranks: int) -> str:
    """What a run is, how much is left of it, and where its curves are: the first line that people see."""
    config = training.model.config
    tokens = (recipe.steps - step) * recipe.data.global_batch * training.seq_len
    parameters = count_parameters(config)["all"]
    picked = f"; {training.picked}" if training.picked else ""
    return (
        f"{config.sharing}, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{parameters / 1e6:,.1f} M parameters, {recipe.precision}, ZeRO {recipe.zero.stage}{picked}\n"
        f"{tokens / 1e6:,.1f} M tokens in {recipe.steps - step:,} steps to go on {ranks} rank{'s' * (ranks > 1)}; "
        f"curves: tensorboard --logdir {recipe.run}/tensorboard"
    )
