"""The recipe of `sharebert train`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from pretrain.checkpoint.writer import CheckpointRecipe
from pretrain.data.loader import DataRecipe
from pretrain.engine.engine import OptimizerRecipe, Precision, ScheduleRecipe
from pretrain.faults.detection import FaultsRecipe
from pretrain.run.metric_log import MonitorRecipe
from pretrain.validate import ValidateRecipe
from sharebert_common.recipe import STRICT


@dataclass(config=STRICT, kw_only=True)
class TrainRecipe:
    """A training run. The same recipe started again goes on from the newest whole checkpoint."""

    SHORTHAND: ClassVar[dict[str, str]] = {"model": "size", "zero": "stage", "data": "dataset"}

    run: str
    """Directory of the run."""
    data: DataRecipe
    """What it reads."""
    steps: Annotated[int, Field(gt=0)] = 23_000
    """Optimizer steps in all."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the first weights, order, masks and dropout."""
    model: dict[str, Any] = field(default_factory=lambda: {"size": "sharebert-base"})
    """`size` (sharebert-small, -base or -large), any key of config.json, `init` (variance or authors), or
    `init_from`, an export to go on from."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    """AdamW."""
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    """Learning rate over the steps."""
    precision: Precision = "bf16"
    """Of the products: fp32, bf16, or (on CUDA) fp16. Master weights and moments are fp32."""
    recompute: bool = False
    """Keep the input of each layer alone, and make the rest again in the backward pass: a third more work, for
    micro-batches that would not fit into memory otherwise."""
    compile: bool = False
    """Run the layers through torch.compile, in place of this project's kernels. Not with ZeRO 3."""
    zero: dict[str, Any] = field(default_factory=lambda: {"stage": 1})
    """`stage` (0 to 3) and any key of DeepSpeed's `zero_optimization`."""
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    """When checkpoints are made."""
    validate: ValidateRecipe = field(default_factory=ValidateRecipe)
    """When held-out rows are scored."""
    monitor: MonitorRecipe = field(default_factory=MonitorRecipe)
    """What is logged."""
    faults: FaultsRecipe = field(default_factory=FaultsRecipe)
    """What is done about steps that are not finite, spikes, ranks that hang or are slow, and memory."""
    collective_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """A collective that some rank does not join for so long ends the launch."""
