"""What DeepSpeed is told: precision, ZeRO, batch sizes and clipping, as one dict of DeepSpeed's keys.

Precision by stage. ZeRO 1, 2 and 3 hold the working weights in bf16 or fp16 and fp32 masters beside them, and
accumulate gradients in fp32. DeepSpeed's stage 0 accumulates and reduces gradients in 16 bits (and, with some
optimizers, keeps no masters), so at stage 0 the weights stay in fp32 and the products run under torch's autocast.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic.dataclasses import dataclass

from pretrain.engine.deepspeed_import import import_deepspeed
from sharebert_common.errors import BadInput, nearest
from sharebert_common.recipe import STRICT

Precision = Literal["fp32", "bf16", "fp16"]

BUCKET_ELEMENTS = 2**23
"""Gradient elements that ZeRO reduces at once. The decoder's [V, H] has more, so it is never copied into a bucket.
It is ready at the start of the backward pass, so at stages 2 and 3 its reduction runs while the rest of that pass
computes."""


def _known_stage(stage: int) -> int:
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{stage} is no ZeRO stage (0, 1, 2 or 3)")
    return stage


@dataclass(config=STRICT, kw_only=True)
class ZeroRecipe:
    """How weights, gradients and moments are split over the ranks (Rajbhandari et al., SC 2020)."""

    stage: Annotated[int, AfterValidator(_known_stage)] = 2
    """What is split: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also weights. Stages 2 and 3 reduce
    gradients while the backward pass computes, 0 and 1 after it."""
    reduce_bucket_size: Annotated[int, Field(gt=0)] | None = None
    """Gradient elements that are reduced at once. Without it, the smaller of 2^23 and the model's size."""
    allgather_bucket_size: Annotated[int, Field(gt=0)] | None = None
    """Weight elements that are gathered at once. Without it, the model's size."""
    overlap_comm: bool | None = None
    """Reduce gradients while the backward pass computes. Without it, on CUDA from stage 2 on."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's `zero_optimization`. They may also stand beside `stage`."""

    def deepspeed_keys(self) -> dict[str, Any]:
        """Everything that was asked for, as keys of DeepSpeed's `zero_optimization`."""
        named = {
            "stage": self.stage,
            "reduce_bucket_size": self.reduce_bucket_size,
            "allgather_bucket_size": self.allgather_bucket_size,
            "overlap_comm": self.overlap_comm,
        }
        return {key: value for key, value in named.items() if value is not None} | self.deepspeed


def _gather_deepspeed_keys(value: Any) -> Any:
    """Move keys that a ZeroRecipe does not have into its `deepspeed`."""
    if not isinstance(value, dict):
        return value
    ours = {key: inner for key, inner in value.items() if key in ZeroRecipe.__dataclass_fields__}
    further = {key: inner for key, inner in value.items() if key not in ours}
    return ours | ({"deepspeed": further | (ours.get("deepspeed") or {})} if further else {})


ZeroSettings = Annotated[ZeroRecipe, BeforeValidator(_gather_deepspeed_keys)]
"""The type of the key `zero` of a recipe."""


def check_zero(zero: ZeroRecipe) -> None:
    """Raise BadInput where a key is none of DeepSpeed's or its value is wrong, where it would make our checkpoints
    wrong, and where DeepSpeed cannot do it with our optimizer."""
    if not zero.deepspeed:
        return
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {info.alias for info in fields.values() if info.alias}
    for key in zero.deepspeed:
        if key in ZeroRecipe.__dataclass_fields__:
            raise BadInput(f"zero.deepspeed.{key}: this is a key of zero itself; write zero.{key}")
        if key not in known:
            raise BadInput(f"zero.{key}: unknown key{nearest(key, known)}")
    try:
        checked = DeepSpeedZeroConfig(**zero.deepspeed_keys())
    except ValidationError as error:
        raise BadInput("; ".join(map(_explain, error.errors()))) from error
    except AssertionError as error:  # an old name of a key beside its new one
        raise BadInput(f"zero: {error}") from error
    if checked.offload_optimizer is not None and checked.offload_optimizer.device != "none":
        # DeepSpeed 0.19.8 refuses it by an exception. With `zero_force_ds_cpu_optimizer: false` it runs, but losses in
        # bf16 are not numbers after a resume.
        raise BadInput(
            "zero.offload_optimizer: DeepSpeed offloads its own Adam alone, not the optimizer of this program; remove "
            "it, and raise zero.stage where memory does not suffice"
        )
    if checked.round_robin_gradients:
        # DeepSpeed 0.19.8 then lays parameters out in another order than its map of fp32 fragments says, and a
        # checkpoint would hold each parameter's values under another's name.
        raise BadInput("zero.round_robin_gradients: checkpoints would be wrong with it; remove it")


def _explain(error: Any) -> str:
    """An error of pydantic about DeepSpeed's keys, in one line."""
    key, text = ".".join(["zero", *map(str, error["loc"])]), error["msg"].removeprefix("Value error, ")
    return f"{key}: {text} (got {error['input']!r})" if error["loc"] else f"{key}: {text}"


def refuse_fp16_without_cuda(precision: Precision, device: torch.device) -> None:
    """Raise BadInput for a precision that the device cannot do."""
    if precision == "fp16" and device.type != "cuda":
        raise BadInput("precision: fp16 needs a CUDA device; on a CPU use fp32 or bf16")


def deepspeed_config(
    *,
    zero: ZeroRecipe,
    precision: Precision,
    clip: float,
    micro_batch: int,
    micro_batches: int,
    parameters: int,
) -> dict[str, Any]:
    """DeepSpeed's config of a run.

    Args:
        zero: its keys win over those that are set here.
        precision: of products and working weights.
        clip: highest gradient norm; 0 does not clip.
        micro_batch: rows that a rank puts through the model at once.
        micro_batches: gradient accumulation: micro-batches of a rank in an optimizer step.
        parameters: of the model; ZeRO's buffers are no larger.
    """
    stage = zero.stage
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip if stage else 0.0,  # at stage 0 `Engine.step` clips
        "steps_per_print": None,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},  # else it waits for the device twice a micro-batch
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
    config["zero_optimization"] |= zero.deepspeed_keys()
    return config
