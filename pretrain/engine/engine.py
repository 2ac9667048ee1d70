"""The DeepSpeed engine: precision, ZeRO, optimizer and learning-rate schedule, as one dict of DeepSpeed's keys.

Precision by stage. ZeRO 1, 2 and 3 hold the working weights in bf16 or fp16 and fp32 masters beside
them, and accumulate gradients in fp32. DeepSpeed's stage 0 accumulates and reduces them in 16 bits (and,
by optimizer, may keep no masters), so there the weights stay in fp32 and the products run under torch's
autocast.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import math
import os
import platform
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from sharebert import ShareBertForMaskedLM
from sharebert_common.errors import BadInput, nearest
from sharebert_common.recipe import STRICT

Precision = Literal["fp32", "bf16", "fp16"]

BUCKET_ELEMENTS = 2**23
"""Gradients that ZeRO reduces at once. The decoder's [V, H] is larger, so it is never copied into a bucket, and
most of all the gradients, it leaves at the start of the backward pass, with the rest of it to hide behind."""


LARGE_BLOCK_BYTES = 4 * 2**20
"""On a CPU, blocks from this size on come from the system and go back to it at once. The step of benchmarks/train_step
then takes the processor time that it takes without, and a fifth less memory at its peak; from 1 MiB on, a fifth more
time."""
LARGE_MODEL_PARAMETERS = 5_000_000
"""For smaller models than those of the paper that is not done: with 2 M parameters, fetching the memory of logits and
gradients anew took a quarter of a step."""


@dataclass(config=STRICT, kw_only=True)
class OptimizerRecipe:
    """AdamW, with the authors' settings."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Highest learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled decay, on all but biases and the LayerNorms of layers and head."""
    clip: Annotated[float, Field(ge=0)] = 0.5
    """Highest norm of the whole gradient; 0 does not clip."""


@dataclass(config=STRICT, kw_only=True)
class ScheduleRecipe:
    """Learning rate over the steps: linear warm-up from 0, then decay to `final`."""

    warmup: Annotated[float, Field(ge=0)] = 0.06
    """Length of the warm-up: a fraction of all steps below 1, a number of steps from 1."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warm-up."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last learning rate as a fraction of the highest."""


def learning_rate(step: int, steps: int, highest: float, recipe: ScheduleRecipe) -> float:
    """The learning rate of optimizer step `step`, counted from 1, of `steps`. A pure function."""
    warmup = recipe.warmup if recipe.warmup >= 1 else recipe.warmup * steps
    if step < warmup:
        return highest * step / warmup
    if recipe.decay == "constant":
        return highest
    done = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    shape = 1 - done if recipe.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return highest * (recipe.final + (1 - recipe.final) * shape)


def is_decayed(name: str) -> bool:
    """Whether weight decay acts on the parameter `name`.

    As in the authors' recipe: not on biases, nor on the LayerNorms of the layers (with the final one
    and the head's); their two factor norms are decayed.
    """
    if name.endswith("bias"):
        return False
    return not name.endswith("norm.weight") or "factor_norm" in name


def optimizer_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters in two groups, decayed and not; the order is that of `named_parameters`."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if is_decayed(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not is_decayed(name)], "weight_decay": 0.0},
    ]


def deepspeed_config(
    *,
    zero: dict[str, Any],
    precision: Precision,
    clip: float,
    micro_batch: int,
    micro_batches: int,
    parameters: int,
) -> dict[str, Any]:
    """DeepSpeed's config for one run.

    Args:
        zero: `stage`, and any key of DeepSpeed's `zero_optimization`, which wins over ours.
        precision: of products and working weights.
        clip: highest gradient norm, 0 for none.
        micro_batch: rows a rank puts through the model at once.
        micro_batches: gradient accumulation: micro-batches a rank, every optimizer step.
        parameters: of the model; ZeRO's buffers are no larger than it.
    """
    stage = zero.get("stage", 1)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip if stage else 0.0,  # at stage 0 `optimizer_step` clips
        "steps_per_print": None,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    if stage:
        config["zero_optimization"] |= {
            "reduce_bucket_size": min(parameters, BUCKET_ELEMENTS),
            "allgather_bucket_size": parameters,
            "overlap_comm": torch.cuda.is_available() and stage > 1,
        }
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        if precision == "bf16":
            config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if precision == "fp16":
            config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}
    elif precision != "fp32":
        config["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[precision]}
    config["zero_optimization"] |= zero
    return config


def check_zero(zero: dict[str, Any]) -> None:
    """Refuse a ZeRO stage or key that DeepSpeed does not have; raises BadInput."""
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if zero.get("stage", 1) not in (0, 1, 2, 3):
        raise BadInput(f"zero.stage: {zero['stage']!r} is no ZeRO stage (0, 1, 2 or 3)")
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    for key in zero:
        if key not in known:
            raise BadInput(f"zero.{key}: unknown key{nearest(key, known)}")
    if zero.get("round_robin_gradients"):
        # It then lays parameters out in another order than its map of fp32 fragments says (0.19.8), and a
        # checkpoint of ours would hold each parameter's values under another's name.
        raise BadInput("zero.round_robin_gradients: checkpoints would be wrong with it; leave it away")


def import_deepspeed() -> Any:
    """DeepSpeed, without its chatter and without the op that it would compile on a CPU.

    On a CPU its communication backend builds a shared-memory op with a C++ compiler (about a minute,
    and an error where there is none). Only its inference all-reduce uses it.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer, as `initialize` will, without what its decorators would take with them.

    It calls torch.compile at its import, which loads the whole of Inductor: a second of a CPU at every start.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def compile_layers(model: ShareBertForMaskedLM, backend: str = "inductor") -> None:
    """Run the layers through torch.compile, each alone: they are one code with parameters of their own.

    Shapes are those of a micro-batch, always the same; there is a graph for training and one for evaluation, and
    in each one for the first layer, which has no branch to add.
    """
    for layer in model.sharebert.layers:
        layer.compile(dynamic=False, backend=backend)


def hand_back_large_blocks() -> None:
    """Have glibc's allocator give each freed block of LARGE_BLOCK_BYTES or more back to the system; for good.

    By itself it raises that size to the largest block it saw freed, up to 32 MiB, and cuts smaller ones from heaps,
    where what stays alive between them keeps the memory of the others from being used again. Other allocators are left
    alone.
    """
    m_mmap_threshold = -3  # <malloc.h>
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(m_mmap_threshold, LARGE_BLOCK_BYTES)


def build_engine(model: torch.nn.Module, config: dict[str, Any], optimizer: OptimizerRecipe) -> Any:
    """A DeepSpeedEngine around `model`. The process group must exist; every rank calls this.

    Raises BadInput for a precision that the device cannot do.
    """
    deepspeed = import_deepspeed()
    if not torch.cuda.is_available() and sum(p.numel() for p in model.parameters()) >= LARGE_MODEL_PARAMETERS:
        hand_back_large_blocks()
    stage = config["zero_optimization"]["stage"]
    half = config.get("fp16") or config.get("torch_autocast", {}).get("dtype") == "float16"
    if half and not torch.cuda.is_available():
        raise BadInput("precision: fp16 needs a CUDA device; on a CPU use fp32 or bf16")
    adamw = torch.optim.AdamW(
        optimizer_groups(model, optimizer.weight_decay),
        lr=0.0,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=True,
    )
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
    with contextlib.redirect_stdout(None) if stage == 3 else contextlib.nullcontext():
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    if stage == 0 and torch.distributed.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # there is nobody to add to, and it copies every gradient twice
    if getattr(getattr(engine.optimizer, "loss_scaler", None), "dynamic", False):
        # At the lowest scale DeepSpeed would raise; to us such a step is one that is not finite, and is skipped.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    return engine


def set_learning_rate(engine: Any, lr: float) -> None:
    """Use `lr` from the next optimizer step on."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def optimizer_step(engine: Any, clip: float) -> bool:
    """End a micro-batch: `engine.step`, which acts after the last one of an optimizer step.

    Returns whether that step was skipped, on all ranks alike, because the gradient is not finite: weights
    and moments are as before. ZeRO 1, 2 and 3 do so by themselves. At stage 0 DeepSpeed clips, but keeps
    the norm to itself and never looks at it; here it is computed once, for both.
    """
    skipped_before = engine.skipped_steps
    if engine.zero_optimization_stage() == 0 and engine.is_gradient_accumulation_boundary():
        if engine.torch_autocast_z0_gradscaler:
            engine.torch_autocast_z0_gradscaler.unscale_(engine.optimizer)
        for parameter in engine.module.parameters():
            if parameter.grad is None:  # the pooler's; where ranks add up their gradients, DeepSpeed does the same
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), clip or math.inf)
        if not torch.isfinite(norm):
            norm.fill_(math.inf)
            engine.zero_grad()  # Adam leaves parameters without a gradient alone
            engine.skipped_steps += 1
        engine._global_grad_norm = norm
    engine.step()
    return bool(engine.skipped_steps > skipped_before)


def scale_can_fall(engine: Any) -> bool:
    """Whether a skipped step may be fp16's search for a loss scale, and no fault."""
    return loss_scale(engine) > 1.0


def gradient_norm(engine: Any) -> float:
    """Norm of the whole gradient of the last optimizer step, before clipping; infinite where it was skipped."""
    return float(engine.get_global_grad_norm())


def loss_scale(engine: Any) -> float:
    """fp16's loss scale; 1 in other precisions."""
    torch_scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    if torch_scaler:
        return float(torch_scaler.get_scale())
    return float(getattr(engine.optimizer, "cur_scale", getattr(engine.optimizer, "loss_scale", 1.0)))


def current_learning_rate(engine: Any) -> float:
    """The learning rate of the last optimizer step."""
    return float(engine.optimizer.param_groups[0]["lr"])


SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def scaler_state(engine: Any) -> dict[str, Any]:
    """State of fp16's dynamic loss scaling, as JSON values; empty in other precisions."""
    torch_scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    if torch_scaler:
        return dict(torch_scaler.state_dict())
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in SCALER_KEYS} if getattr(scaler, "dynamic", False) else {}


def load_scaler_state(engine: Any, state: dict[str, Any]) -> None:
    """Go on with a loss scale; a state from another precision or stage is left aside."""
    torch_scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    if torch_scaler and "scale" in state:
        torch_scaler.load_state_dict(state)
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if getattr(scaler, "dynamic", False) and "cur_scale" in state:
        for key in SCALER_KEYS:
            setattr(scaler, key, state[key])
