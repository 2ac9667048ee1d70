"""All numbers of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from pretrain.data.datasets import micro_shape
from pretrain.engine.parameter_groups import STEPPED, group_of
from pretrain.flops import flops_per_token, made_elements
from pretrain.plan.gpus import Gpu, gpu_of
from pretrain.plan.memory import Memory, Shape, memory
from pretrain.plan.tables import UTILISATIONS, traffic
from sharebert import ShareBertConfig, ShareBertForMaskedLM, parameter_roles
from sharebert_common.errors import BadInput

if TYPE_CHECKING:
    from pretrain.recipe import ResolvedTraining, TrainRecipe

PLAN_DEFAULTS = {"run": "(not given)", "data": {"dataset": "(not given)"}}
"""Keys that a plan can do without."""

USABLE = 0.92
"""Share of a GPU's memory that a plan fills. The rest is for CUDA, NCCL and the allocator's holes."""

MOST_ROWS = 2**14
"""The largest micro-batch that is looked for."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan cannot know."""

    utilisations: Sequence[float] = UTILISATIONS
    """Shares of the peak that products reach, whole steps counted."""
    network_bytes_per_s: float = 50e9
    """Bandwidth of a GPU to the others, in one direction; 50e9 is 400 Gbit/s."""
    price: float | None = None
    """Price of one GPU for an hour."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe on a number of GPUs of one kind. Sizes are of one rank where they do not say otherwise."""

    gpu: str
    """Key of `pretrain.plan.gpus.GPUS`."""
    gpus: int
    """Ranks."""
    parameters: dict[str, int]
    """Learned numbers: of `factors`, `layers`, `head`, and in `all`. `generated` are made from the factors."""
    rows: int
    """Rows of a micro-batch."""
    micro_batches: int
    """Micro-batches of a rank in a step."""
    stage: int
    """ZeRO stage of the recipe."""
    memory: dict[int, Memory]
    """By ZeRO stage."""
    largest_rows: dict[int, int]
    """The largest micro-batch that fits into the GPU's memory, by ZeRO stage; 0 where one row does not."""
    flops_per_token: float
    """Forward and backward pass, a multiply-add counted as two."""
    roofline: float
    """Highest utilisation that the bandwidth of memory allows, if nothing overlaps."""
    tokens: int
    """Tokens of the run."""
    epochs: float | None
    """How often the run sees the dataset; None without one."""
    speeds: list[dict[str, float]]
    """For each utilisation: `utilisation`, `tokens_per_s` of all GPUs, `hours`, and `price` where a rate is given."""
    checkpoint_bytes: int
    """Weights, moments, momenta and moving average in fp32, of the whole model."""
    network_bytes: dict[int, float]
    """Bytes that a rank sends in a step, by ZeRO stage."""
    network_s: dict[int, float]
    """Their time, if nothing overlaps."""

    def to_dict(self) -> dict[str, Any]:
        """The plan for JSON."""
        totals = {stage: {"total": held.total, "states": held.states} for stage, held in self.memory.items()}
        return asdict(self) | {"memory": {stage: asdict(held) | totals[stage] for stage, held in self.memory.items()}}


def make_plan(recipe: TrainRecipe, gpus: int, gpu: str, assumed: Assumptions) -> Plan:
    """Plan a recipe. Raises BadInput for what the recipe, the number or the kind of GPUs has wrong."""
    kind = gpu_of(gpu)
    if gpus < 1:
        raise BadInput(f"--gpus: {gpus}, at least 1 is needed")
    training = resolve_on(recipe, gpus, kind)
    config, seq_len = training.model.config, training.seq_len
    counted = count_parameters(config)
    per_token = flops_of_token(recipe, training)
    tokens = recipe.steps * recipe.data.global_batch * seq_len
    shape = shape_of(recipe, training, gpus)
    stages = {stage: replace(shape, stage=stage) for stage in range(4 if config.generates else 3)}  # see TrainRecipe
    sent = {stage: network_bytes(of, training.micro_batches) for stage, of in stages.items()}
    rows = sum(dataset.split("train").rows for dataset in training.datasets)
    return Plan(
        gpu=gpu,
        gpus=gpus,
        parameters=counted,
        rows=training.micro_rows,
        micro_batches=training.micro_batches,
        stage=recipe.zero.stage,
        memory={stage: memory(config, of) for stage, of in stages.items()},
        largest_rows={stage: largest_rows(config, of, USABLE * kind.memory_bytes) for stage, of in stages.items()},
        flops_per_token=per_token,
        roofline=roofline(config, recipe, training, kind, per_token),
        tokens=tokens,
        epochs=recipe.steps * recipe.data.global_batch / rows if rows else None,
        speeds=[_speed(share, gpus, kind, per_token, tokens, assumed.price) for share in assumed.utilisations],
        checkpoint_bytes=checkpoint_bytes(config, shape),
        network_bytes=sent,
        network_s={stage: size / assumed.network_bytes_per_s for stage, size in sent.items()},
    )


def flops_of_token(recipe: TrainRecipe, training: ResolvedTraining) -> float:
    """FLOPs of forward and backward a token, in the mean over the steps of a run."""
    length = recipe.data.row_length.mean(recipe.steps, training.seq_len)
    micro_tokens = training.micro_rows * training.seq_len
    return flops_per_token(training.model.config, length, recipe.data.highest_mask_rate, micro_tokens)


def resolve_on(recipe: TrainRecipe, gpus: int, kind: Gpu) -> ResolvedTraining:
    """Resolve a recipe, whose dataset need not exist. `data.micro_batch: auto` becomes the estimate of what fits.

    Raises BadInput where something is wrong, or not even one row fits.
    """
    training = recipe.resolve(gpus, needs_data=False)
    if recipe.data.micro_batch != "auto":
        return training
    config = training.model.config
    rows = largest_rows(config, shape_of(recipe, training, gpus), USABLE * kind.memory_bytes)
    if not rows:
        raise BadInput(f"data.micro_batch: auto: not even one row fits into a {kind.title}; see zero.stage, recompute")
    settled = replace(recipe.data, micro_batch=min(rows, training.micro_rows))
    micro_batches, micro_rows = micro_shape(settled, gpus)
    return replace(training, micro_batches=micro_batches, micro_rows=micro_rows)


def shape_of(recipe: TrainRecipe, training: ResolvedTraining, ranks: int, *, cuda: bool = True) -> Shape:
    """What decides the memory of a rank of this recipe."""
    return Shape(
        parameters=count_parameters(training.model.config)["all"],
        world_size=ranks,
        stage=recipe.zero.stage,
        precision=recipe.precision,
        rows=training.micro_rows,
        seq_len=training.seq_len,
        masked=max(1, round(recipe.data.highest_mask_rate * training.seq_len)),
        recompute=recipe.recompute,
        ema=recipe.optimizer.ema.decay > 0,
        by_muon=matrix_elements(training.model.config) if recipe.optimizer.muon.matrices else 0,
        generated_muon=recipe.optimizer.muon.generated,
        cuda=cuda,
    )


def checkpoint_bytes(config: ShareBertConfig, shape: Shape) -> int:
    """Bytes of weights, moments, momenta and moving average of the whole model, in fp32."""
    momenta = 4 * made_elements(config) if shape.generated_muon else 0
    return (12 + 4 * shape.ema) * shape.parameters - 4 * shape.by_muon + momenta


def matrix_elements(config: ShareBertConfig) -> int:
    """Learned numbers in the groups that Muon steps."""
    with torch.device("meta"):
        model = ShareBertForMaskedLM(config)
    roles = parameter_roles(model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(size for name, size in sizes.items() if group_of(name, decayed=roles[name].decayed) in STEPPED)


def count_parameters(config: ShareBertConfig) -> dict[str, int]:
    """Learned numbers of factors (embedding and projections), layers and head, and of the generated matrices."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in ShareBertForMaskedLM(config).named_parameters()}
    head = sum(size for name, size in sizes.items() if name.startswith("mlm_head."))
    layers = sum(size for name, size in sizes.items() if name.startswith("sharebert.layers."))
    whole = sum(sizes.values())
    return {
        "factors": whole - head - layers,
        "layers": layers,
        "head": head,
        "all": whole,
        "generated": made_elements(config) if config.generates else 0,
    }


def largest_rows(config: ShareBertConfig, shape: Shape, room_bytes: float) -> int:
    """The largest micro-batch whose memory is at most `room_bytes`; 0 where one row is too much."""
    low, high = 0, MOST_ROWS + 1
    while high - low > 1:
        middle = (low + high) // 2
        if memory(config, replace(shape, rows=middle)).total <= room_bytes:
            low = middle
        else:
            high = middle
    return low


def network_bytes(shape: Shape, micro_batches: int) -> float:
    """Bytes that a rank sends in an optimizer step, by ring algorithms: (n-1)/n of the size for a reduce-scatter or a
    gather, and both for an all-reduce. Gradients travel in fp32, weights in the working precision.

    Stages 2 and 3 reduce gradients in every micro-batch, stage 2 of DeepSpeed by all-reduces of whole buckets; stage 3
    gathers weights in every forward and backward pass.
    """
    part = (shape.world_size - 1) / shape.world_size
    gradients, weights = 4 * shape.parameters, (4 if shape.precision == "fp32" else 2) * shape.parameters
    return (
        part
        * {
            0: 2 * gradients,
            1: 2 * gradients + weights,
            2: 2 * micro_batches * gradients + weights,
            3: micro_batches * (gradients + 2 * weights),
        }[shape.stage]
    )


def roofline(
    config: ShareBertConfig, recipe: TrainRecipe, training: ResolvedTraining, kind: Gpu, per_token: float
) -> float:
    """Utilisation when products run at the peak and everything else moves its bytes at full bandwidth, one after the
    other (Williams et al., CACM 2009)."""
    tokens = training.micro_rows * training.seq_len
    bytes_a_token = 0.0
    for name, (size, times) in traffic(config, recipe.data.highest_mask_rate, training.seq_len).items():
        share = 1 / tokens if name.endswith("a micro-batch") else 1.0
        share = 1 / (tokens * training.micro_batches) if name.endswith("an optimizer step") else share
        bytes_a_token += size * times * share
    products_s = per_token / kind.peak_flops
    return products_s / (products_s + bytes_a_token / kind.bandwidth)


def _speed(
    utilisation: float, gpus: int, kind: Gpu, per_token: float, tokens: int, price: float | None
) -> dict[str, float]:
    rate = gpus * kind.peak_flops * utilisation / per_token
    hours = tokens / rate / 3600
    speed = {"utilisation": utilisation, "tokens_per_s": rate, "hours": hours}
    return speed if price is None else speed | {"price": price * gpus * hours}
