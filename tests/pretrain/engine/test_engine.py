"""Schedule, weight decay, and what DeepSpeed is told; bf16 keeps its fp32 masters at every stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
from tiny_runs import losses, train_arguments, train_many

from pretrain.engine.config import Precision, ZeroRecipe, check_zero, deepspeed_config
from pretrain.engine.optimizer import OptimizerRecipe, ScheduleRecipe, learning_rate, optimizer_groups
from pretrain.recipe import TrainRecipe
from sharebert import ShareBertConfig, ShareBertForMaskedLM
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

ROOT = Path(__file__).parents[3]

MASTERS_BAR = 2e-3
"""Nats between bf16 and fp32 after 150 small steps."""


def test_the_authors_schedule() -> None:
    """Linear warm-up over 6 % from 0, linear decay to 0 (23,000 steps: 1,380 of warm-up)."""
    rate = [learning_rate(step, 23_000, 1e-3, ScheduleRecipe()) for step in range(1, 23_001)]
    assert rate[0] == pytest.approx(1e-3 / 1380)
    assert rate[689] == pytest.approx(0.5e-3)
    assert max(rate) == rate[1379] == pytest.approx(1e-3)
    assert rate[1379 + 10_810] == pytest.approx(0.5e-3)
    assert rate[-1] == 0


def test_other_schedules() -> None:
    cosine = ScheduleRecipe(warmup=10, decay="cosine", final=0.1)
    assert learning_rate(5, 110, 1.0, cosine) == 0.5
    assert learning_rate(60, 110, 1.0, cosine) == pytest.approx(0.55)
    assert learning_rate(110, 110, 1.0, cosine) == pytest.approx(0.1)
    assert learning_rate(99, 110, 1.0, ScheduleRecipe(warmup=0, decay="constant")) == 1.0


def test_wsd_stays_at_the_highest_rate_until_its_cooldown() -> None:
    wsd = ScheduleRecipe(warmup=10, decay="wsd", cooldown=0.2, final=0.1)
    assert learning_rate(5, 100, 1.0, wsd) == 0.5
    assert {learning_rate(step, 100, 1.0, wsd) for step in range(10, 81)} == {1.0}
    assert learning_rate(90, 100, 1.0, wsd) == pytest.approx(0.55)
    assert learning_rate(100, 100, 1.0, wsd) == pytest.approx(0.1)
    assert learning_rate(95, 100, 1.0, ScheduleRecipe(warmup=10, decay="wsd", cooldown=10)) == pytest.approx(0.5)


def test_decay_acts_where_the_authors_have_it() -> None:
    """On all but biases and the layers' LayerNorms; their two factor norms are decayed."""
    config = ShareBertConfig(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        factor_size=8,
        mlm_head="untied",
    )
    model = ShareBertForMaskedLM(config)
    decayed, rest = optimizer_groups(model, 0.01)
    chosen = {id(parameter) for parameter in decayed["params"]}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in chosen} == {
        "sharebert.word_embeddings.weight",
        "sharebert.pre_factor_norm.weight",
        "sharebert.factor_linear.weight",
        "sharebert.factor_linear_all.weight",
        "sharebert.pos_factor_norm.weight",
        "sharebert.position_embeddings.weight",
        "sharebert.token_type_embeddings.weight",
        "mlm_head.dense.weight",
        "mlm_head.decoder.weight",
    }
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_deepspeed_is_told(stage: int, precision: Precision) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = deepspeed_config(
        zero=ZeroRecipe(stage=stage), precision=precision, clip=0.5, micro_batch=4, micro_batches=3, parameters=1000
    )
    DeepSpeedConfig(dict(config))  # its own check
    halves = {key for key in ("bf16", "fp16") if config.get(key, {}).get("enabled")}
    assert halves == ({precision} if stage and precision != "fp32" else set())
    assert config.get("torch_autocast", {}).get("enabled", False) is (stage == 0 and precision != "fp32")
    if stage:
        assert config["data_types"]["grad_accum_dtype"] == "fp32"
    if stage and precision == "fp16":
        assert config["fp16"]["loss_scale"] == 0, "0 is DeepSpeed's word for dynamic"


def zero_of(*overrides: str) -> ZeroRecipe:
    return load(TrainRecipe, "demo", ["run=r", "data.dataset=d", *overrides]).zero


def test_deepspeeds_own_keys_win_and_unknown_ones_are_refused() -> None:
    zero = zero_of("zero.stage=2", "zero.reduce_bucket_size=77", "zero.contiguous_gradients=false")
    config = deepspeed_config(zero=zero, precision="fp32", clip=0, micro_batch=1, micro_batches=1, parameters=5)
    assert config["zero_optimization"]["reduce_bucket_size"] == 77
    assert config["zero_optimization"]["contiguous_gradients"] is False
    check_zero(zero)
    with pytest.raises(BadInput, match="did you mean 'reduce_bucket_size'"):
        check_zero(zero_of("zero.reduce_bucket=1"))
    with pytest.raises(BadInput, match="no ZeRO stage"):
        zero_of("zero=5")
    with pytest.raises(BadInput, match="round_robin_gradients: checkpoints would be wrong"):
        check_zero(zero_of("zero.stage=2", "zero.round_robin_gradients=true"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("zero.deepspeed.stage=3", "zero.deepspeed.stage: this is a key of zero itself; write zero.stage"),
        ("zero.contiguous_gradients=maybe", "zero.contiguous_gradients: Input should be a valid boolean.*got 'maybe'"),
        ("zero.stage3_prefetch_bucket_size=-1", "zero.stage3_prefetch_bucket_size: Input should be greater"),
        ("zero.offload_param={device: moon}", "zero.offload_param.device: Input should be 'none', 'cpu' or 'nvme'"),
        ("zero.offload_optimizer={device: cpu}", "zero.offload_optimizer: DeepSpeed offloads its own Adam alone"),
        ("zero.cpu_offload=true", "zero.offload_optimizer: DeepSpeed offloads its own Adam alone"),
        ("zero.compute_grad_norm=false", "zero: compute_grad_norm=false is supported only with ZeRO Stage 1 or 2$"),
    ],
)
def test_wrong_values_of_deepspeeds_keys_are_one_line(given: str, said: str) -> None:
    with pytest.raises(BadInput, match=f"^{said}") as raised:
        check_zero(zero_of("zero.stage=3", given))
    assert "\n" not in str(raised.value)


def test_a_start_does_not_load_a_compiler() -> None:
    """DeepSpeed asks for its Muon optimizer at every start, whose decorators would load Inductor."""
    code = (
        "import sys; from pretrain.engine.deepspeed_import import import_deepspeed; import_deepspeed();"
        "from deepspeed.runtime.zero.utils import is_zero_supported_optimizer as supported;"
        "import deepspeed.comm; deepspeed.comm.get_rank = lambda group=None: 1; supported(None);"
        "print(*(name in sys.modules for name in sys.argv[1:]))"
    )
    modules = ["deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.compile_fx"]
    command = [sys.executable, "-c", code, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["True", "False"]


def test_the_recipe_is_the_authors() -> None:
    recipe = OptimizerRecipe()
    assert (recipe.lr, recipe.betas, recipe.eps, recipe.weight_decay, recipe.clip) == (
        1e-3,
        (0.9, 0.98),
        1e-6,
        0.01,
        0.5,
    )


@pytest.fixture(scope="module")
def small_steps(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The mean of the last losses of a training with steps so small that bf16 weights would lose many of them."""
    folder = tmp_path_factory.mktemp("masters")

    def run(name: str, precision: str, stage: int, **extra: bool) -> dict[str, object]:
        overrides = train_arguments(
            dataset,
            folder / name,
            steps=150,
            precision=precision,
            zero__stage=stage,
            optimizer__lr=3e-4,
            model__mlm_head="untied",
        )
        return {"overrides": overrides, **extra}

    plan = [run("fp32", "fp32", 0), *(run(f"bf16-{stage}", "bf16", stage) for stage in range(4))]
    train_many([*plan, run("control", "bf16", 0, no_masters=True)], 1, folder)
    return {path.name: mean(losses(path)[-10:]) for path in folder.iterdir() if path.is_dir()}


@pytest.mark.parametrize("stage", range(4))
def test_bf16_has_fp32_masters(small_steps: dict[str, float], stage: int) -> None:
    assert abs(small_steps[f"bf16-{stage}"] - small_steps["fp32"]) < MASTERS_BAR


def test_without_masters_the_bar_is_missed(small_steps: dict[str, float]) -> None:
    assert abs(small_steps["control"] - small_steps["fp32"]) > 2 * MASTERS_BAR


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 trains on CUDA alone: DeepSpeed refuses it on a CPU")
@pytest.mark.parametrize("stage", range(4))
def test_fp16_trains_with_loss_scaling(dataset: Path, tmp_path: Path, stage: int) -> None:
    train_many(
        [
            {"overrides": train_arguments(dataset, tmp_path / name, steps=60, precision=name, zero__stage=stage)}
            for name in ("fp16", "fp32")
        ],
        1,
        tmp_path,
    )
    assert mean(losses(tmp_path / "fp16")[-10:]) == pytest.approx(mean(losses(tmp_path / "fp32")[-10:]), abs=0.02)
