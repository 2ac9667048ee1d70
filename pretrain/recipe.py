"""The recipe of `sharebert train`, and what it resolves to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as recipe_dataclass

from data_prep.shards.reader import Dataset
from exports.fake_quantise import QuantiseRecipe
from pretrain.checkpoint.writer import CheckpointRecipe
from pretrain.data.datasets import DataRecipe, micro_shape, open_datasets
from pretrain.distill.cache import TeacherCache, cache_identity, open_cache
from pretrain.distill.recipe import DistillPlan, DistillRecipe, plan_distillation
from pretrain.engine.config import Precision, ZeroRecipe, ZeroSettings, check_zero
from pretrain.engine.optimizer import OptimizerRecipe, ScheduleRecipe
from pretrain.faults.recipe import FaultsRecipe
from pretrain.model import ModelChoice, ModelRecipe, choose_model, refuse_other_tokenizer
from pretrain.run.metric_log import MonitorRecipe
from pretrain.validate import ValidateRecipe, refuse_nothing_to_validate
from sharebert import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import MOST_SECONDS, STRICT


@dataclass(frozen=True)
class ResolvedTraining:
    """A recipe that was checked against its dataset and a world size."""

    datasets: list[Dataset]
    """Opened; empty where none exists and none was needed."""
    model: ModelChoice
    seq_len: int
    """Tokens of a row."""
    micro_batches: int
    """Of a rank in an optimizer step."""
    micro_rows: int
    """Rows of a micro-batch."""
    distill: DistillPlan | None = None
    """How a teacher is learned from; None without one."""
    teacher_cache: TeacherCache | None = None
    """Where its outputs are read; None where the teacher itself runs."""
    picked: str = ""
    """What was picked for `data.micro_batch: auto`, and why, in one line."""


@recipe_dataclass(config=STRICT, kw_only=True)
class TrainRecipe:
    """A training run. Started again with the same recipe, it resumes from its newest whole checkpoint."""

    SHORTHAND: ClassVar[dict[str, str]] = {
        "model": "size",
        "zero": "stage",
        "data": "dataset",
        "quantise": "bits",
        "distill": "teacher",
    }

    run: str
    """Directory of the run."""
    data: DataRecipe
    """What the run reads."""
    steps: Annotated[int, Field(gt=0)] = 23_000
    """Optimizer steps in all."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the weights at the start, the order of rows, the masks and dropout."""
    model: ModelRecipe = field(default_factory=lambda: ModelRecipe(size="sharebert-base"))
    """What is trained. A key of `config.json` that is not given is that of `init_from`, else of `size`, else H 2048, I
    4096, A 16, L 12, F 384, dropout 0.1, `sharing: veps`, `mlm_head: untied`, `attention_scale: authors`."""
    quantise: QuantiseRecipe = field(default_factory=QuantiseRecipe)
    """Quantisation-aware training: each forward pass rounds the matrices that compression will quantise. Not with
    ZeRO 3."""
    distill: DistillRecipe = field(default_factory=DistillRecipe)
    """Learning from a teacher as well. Not with `quantise` or `compile`."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    """Settings of AdamW and Muon, and a moving average of the weights."""
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    """Learning rate over the steps."""
    precision: Precision = "bf16"
    """Precision of matrix products: fp32, bf16, or (on CUDA) fp16. Master weights and moments are always fp32."""
    recompute: bool = False
    """Keep only the input of each layer, and compute the rest again in the backward pass. It costs a third more work
    and allows micro-batches that would not fit into memory otherwise."""
    compile: bool = False
    """Run the layers through torch.compile instead of this project's kernels. Not with ZeRO 3 or `data.row_length`."""
    deterministic: bool = False
    """Use only operations that repeat bit by bit on the same GPUs, which costs speed. CPUs repeat without it."""
    zero: ZeroSettings = field(default_factory=ZeroRecipe)
    """How the state is split over the ranks: `stage`, and any key of DeepSpeed's `zero_optimization`."""
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    """When checkpoints are made, and which are kept."""
    validate: ValidateRecipe = field(default_factory=ValidateRecipe)
    """When the model is validated."""
    monitor: MonitorRecipe = field(default_factory=MonitorRecipe)
    """What is logged."""
    faults: FaultsRecipe = field(default_factory=FaultsRecipe)
    """What is done about steps that are not finite, spikes of the loss, ranks that hang or are slow, and memory."""
    collective_timeout_s: Annotated[float, Field(gt=0, le=MOST_SECONDS)] = 1800.0
    """A collective that some rank does not join for this long ends the attempt."""

    def resolve(self, world_size: int = 1, *, needs_data: bool = True) -> ResolvedTraining:
        """Find what is wrong before anything is built or a job waits in a queue, and open the datasets.

        Args:
            world_size: processes that share a global batch.
            needs_data: a dataset must exist. Otherwise, where there is no such folder, the sizes are those of `model`.

        Raises BadInput, naming the key.
        """
        self.check_engine()
        exists = any("://" in entry.path or Path(entry.path).exists() for entry in self.data.dataset)
        datasets = open_datasets(self.data) if needs_data or exists else []
        micro_batches, micro_rows = micro_shape(self.data, world_size)
        if not datasets:
            model = choose_model(self.model, None, None)
            self._check_sharing(model.config)
            self.data.row_length.check(model.config.max_position_embeddings)
            return ResolvedTraining([], model, model.config.max_position_embeddings, micro_batches, micro_rows)
        refuse_nothing_to_validate(datasets, self.validate)
        self.data.row_length.check(datasets[0].seq_len)
        model = choose_model(self.model, datasets[0].vocab_size, datasets[0].seq_len)
        self._check_sharing(model.config)
        refuse_other_tokenizer(model, datasets[0])
        distill = plan_distillation(self.distill, model.config, datasets[0].tokenizer_path, datasets[0].seq_len)
        cache = None if distill is None else self._open_cache(distill, datasets)
        return ResolvedTraining(datasets, model, datasets[0].seq_len, micro_batches, micro_rows, distill, cache)

    def _check_sharing(self, config: ShareBertConfig) -> None:
        if config.generates:
            return
        if self.optimizer.muon.generated:
            raise BadInput(
                "optimizer.muon.generated: model.sharing generates no matrices; use veps or eps, or AdamW alone"
            )
        if self.zero.stage == 3:  # it gathers a module's parameters for that module alone, and layers use another's
            raise BadInput(
                f"zero.stage: 3 is for matrices that are generated (veps, eps), not for {config.sharing}; use stage 2"
            )

    def check(self, world_size: int) -> None:
        """Find what is wrong, as `resolve` does, on a machine that does not train: no dataset is copied into a cache.

        Raises BadInput, naming the key.
        """
        if any("://" in entry.path for entry in self.data.dataset):  # only a cache can open these
            self.check_engine()
            micro_shape(self.data, world_size)
        else:
            replace(self, data=replace(self.data, cache=None)).resolve(world_size)

    def _open_cache(self, plan: DistillPlan, datasets: list[Dataset]) -> TeacherCache | None:
        if self.distill.cache is None:
            return None
        identity = cache_identity(plan, datasets, self.data, self.seed)
        run_rows, repeat = self.steps * self.data.global_batch, self.distill.repeat_cache
        return open_cache(Path(self.distill.cache), plan, identity, run_rows=run_rows, repeat=repeat)

    def check_engine(self) -> None:
        """Find keys that exclude each other, without a dataset or a teacher. Raises BadInput, naming them."""
        check_zero(self.zero)
        if self.optimizer.muon.generated and (self.zero.stage == 3 or self.precision == "fp16"):
            raise BadInput(
                "optimizer.muon.generated: not with zero.stage 3 or precision fp16; use stage 0 to 2 and bf16"
            )
        if self.optimizer.muon.matrices and self.zero.stage == 3:
            raise BadInput("optimizer.muon.matrices: not with zero.stage 3; use stage 0 to 2")
        if self.optimizer.muon.matrices and self.model.sharing == "eps":
            raise BadInput("optimizer.muon.matrices: model.sharing eps has no matrices that are parameters; remove it")
        if self.optimizer.groups.clipped and self.zero.stage == 3:
            raise BadInput("optimizer.groups: groups cannot clip with zero.stage 3; use stage 0 to 2")
        if self.validate.ema and not self.optimizer.ema.decay:
            raise BadInput(
                "validate.ema: the run keeps no average of the weights; set optimizer.ema.decay, such as 0.999"
            )
        if self.quantise.bits and self.zero.stage == 3:
            raise BadInput("quantise: not with zero.stage 3, where no rank holds whole matrices; use stage 2")
        if self.model.keep_zeros and self.zero.stage == 3:
            raise BadInput("model.keep_zeros: not with zero.stage 3, where no rank holds whole matrices; use stage 2")
        if self.model.keep_zeros and (self.optimizer.muon.generated or self.optimizer.muon.matrices):
            raise BadInput("model.keep_zeros: not with optimizer.muon, which moves every weight of a matrix")
        if self.distill.teacher is not None and (self.compile or self.quantise.bits):
            raise BadInput("distill: not with compile or quantise; distil first, then quantise with model.init_from")
        if self.distill.teacher is not None and self.data.micro_batch == "auto":
            raise BadInput("data.micro_batch: auto does not count the memory of a teacher (distill); give a number")
        if self.data.row_length.first is not None and (self.compile or self.distill.cache is not None):
            raise BadInput(
                "data.row_length: not with compile or distill.cache; set data.row_length.first=null, and rows are whole"
            )
        if self.distill.uses_projections and self.recompute:
            raise BadInput(
                "distill: relations and attention need each layer's queries, keys and values, which recompute drops"
            )
        if self.compile and self.zero.stage == 3:
            raise BadInput("compile: not with zero.stage 3, which gathers weights while layers run; use stage 2")
