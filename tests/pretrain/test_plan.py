"""What a run will cost: by hand, by DeepSpeed's own estimators, by a measurement; and the page that shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.engine.config import BUCKET_ELEMENTS
from pretrain.flops import flops_per_token
from pretrain.plan import memory as memory_module
from pretrain.plan.command import plan
from pretrain.plan.estimate import (
    PLAN_DEFAULTS,
    Assumptions,
    count_parameters,
    largest_rows,
    make_plan,
    matrix_elements,
    network_bytes,
    shape_of,
)
from pretrain.plan.gpus import GPUS, gpu_of, gpu_of_device
from pretrain.plan.measure import measure
from pretrain.plan.memory import Shape, memory, state_bytes
from pretrain.plan.tables import AUTHORS_TOKENS, documented_tables, kernel_table, speed_table
from pretrain.recipe import TrainRecipe
from sharebert import SIZES, ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def test_flops_a_token_by_hand() -> None:
    """sharebert-small at 64 x 128 tokens, each term written out."""
    config = ShareBertConfig.from_dict(SIZES["sharebert-small"])
    matrices = 4 * 2048 * 2048 + 2 * 2048 * 4096
    layers = 6 * 12 * matrices + 12 * 12 * 128 * 2048
    head = 6 * 0.15 * (2048 * 2048 + 2048 * 30_528)
    making = 6 * 128 * matrices / 8192
    assert flops_per_token(config, 128, 0.15, 8192) == pytest.approx(layers + head + making, rel=1e-12)


def test_a_second_feed_forward_pair_costs_what_makes_it() -> None:
    """No parameter, 2HI more generated elements (bf16, and their gradients), and 6F a element and micro-batch."""
    config = ShareBertConfig.from_dict(SIZES["sharebert-small"])
    pairs, wide = replace(config, ffn_pairs=2), 2 * 2048 * 4096
    more = flops_per_token(pairs, 128, 0.15, 8192) - flops_per_token(config, 128, 0.15, 8192)
    assert more == pytest.approx(6 * 128 * wide / 8192, rel=1e-9)
    before, after = (memory(of, small_shape()) for of in (config, pairs))
    assert after.generated - before.generated == 2 * 2 * wide
    assert replace(after, generated=before.generated) == before
    counted = count_parameters(pairs)
    assert counted == count_parameters(config) | {"generated": 4 * 2048 * 2048 + 2 * wide}
    gains = replace(config, branch_gain=0.2, learned_branch_gains=True)
    assert memory(gains, small_shape()).activations - before.activations == 64 * 128 * 12 * 2 * 2 * 2048


def test_hours_by_hand() -> None:
    """At 40 % of an A100's 312 TFLOP/s, one GPU takes the authors' tokens x FLOPs a token / that rate."""
    per_token = flops_per_token(ShareBertConfig.from_dict(SIZES["sharebert-large"]), 128, 0.15, 8192)
    hours = AUTHORS_TOKENS * per_token / (0.4 * 312e12) / 3600
    row = next(line for line in speed_table(64).splitlines() if line.startswith("| sharebert-large") and "A100" in line)
    assert row.split("|")[6].strip() == f"{hours:.1f}"


def test_bytes_of_a_kernel_by_hand() -> None:
    """The forward pass of dropout + add + LayerNorm reads and writes two [8192, 2048] in bf16 each."""
    row = next(line for line in kernel_table("sharebert-small", 64).splitlines() if "LayerNorm, forward" in line)
    moved = 4 * 8192 * 2048 * 2
    _, _, times, megabytes, a100, *_ = (cell.strip() for cell in row.split("|"))
    assert (times, megabytes, a100) == ("25", f"{moved / 1e6:.1f}", f"{moved / 2.039e12 * 1e6:.0f}")


def test_the_page_shows_what_the_functions_give() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for table in documented_tables():
        assert table in page, (
            f"docs/performance.md is out of date; its tables are printed by `python -m pretrain.plan`:\n{table}"
        )


def test_a_plan_needs_no_dataset_where_the_recipe_gives_the_sizes() -> None:
    recipe = load(TrainRecipe, "sharebert-small", ["data.row_length.first=null"], defaults=PLAN_DEFAULTS)
    config = ShareBertConfig.from_dict(SIZES["sharebert-small"])
    micro_rows = recipe.resolve(8, needs_data=False).micro_rows
    text = plan(recipe, [8], ["h100"], Assumptions())
    assert f"FLOPs a token    {flops_per_token(config, 128, 0.3, micro_rows * 128) / 1e6:,.1f} M" in text
    assert "parameters       71,704,832" in text
    with pytest.raises(BadInput, match=r"no dataset|no such|manifest"):
        recipe.resolve(8)
    with pytest.raises(BadInput, match="model: hidden_size"):
        load(TrainRecipe, "sharebert-small", ["model.hidden_size=-1"], defaults=PLAN_DEFAULTS).resolve(
            8, needs_data=False
        )


def test_a_plan_takes_the_sizes_of_a_dataset_that_exists(dataset: Path) -> None:
    keys = [
        f"data.dataset={dataset}",
        "data.global_batch=8",
        "data.micro_batch=4",
        "model.hidden_size=32",
        "model.intermediate_size=48",
    ]
    recipe = load(TrainRecipe, "demo", keys, defaults=PLAN_DEFAULTS)
    training = recipe.resolve(needs_data=False)
    assert training.seq_len == training.datasets[0].seq_len
    assert training.model.config.vocab_size >= training.datasets[0].vocab_size


SMALL = ShareBertConfig.from_dict(SIZES["sharebert-small"])


def small_shape(**changes: Any) -> Shape:
    shape = Shape(parameters=71_704_832, world_size=8, stage=1, precision="bf16", rows=64, seq_len=128, masked=19)
    return replace(shape, **changes)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_model_states_are_those_of_deepspeeds_estimators(ranks: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    parameters, largest = 71_704_832, 30_528 * 2048
    nodes = max(1, ranks // 8)
    _, second = estimate_zero2_model_states_mem_needs(parameters, ranks // nodes, nodes, cpu_offload=False)
    _, third, _ = estimate_zero3_model_states_mem_needs(
        parameters, largest, ranks // nodes, nodes, cpu_offload=False, cpu_offload_params=False
    )
    for stage, theirs in ((2, second), (3, third)):
        ours = sum(state_bytes(small_shape(world_size=ranks, stage=stage), largest).values())
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_states_of_muon_and_of_the_average_by_hand() -> None:
    """8 ranks at stage 1: an average adds 4 bytes a number, Muon takes 4 of AdamW's 8, both divided by the ranks."""
    plain = memory(SMALL, small_shape()).optimizer
    assert memory(SMALL, small_shape(ema=True)).optimizer - plain == 71_704_832 // 2
    assert plain - memory(SMALL, small_shape(by_muon=8_000)).optimizer == 4_000
    generated = memory(SMALL, small_shape(generated_muon=True)).optimizer - plain
    assert generated == 8 * (4 * 2048**2 + 2 * 2048 * 4096)
    config = ShareBertConfig.from_dict({**SIZES["sharebert-small"], "sharing": "none", "num_hidden_layers": 2})
    factor_linear = config.factor_size * 2048
    assert matrix_elements(config) == 2 * (4 * 2048**2 + 2 * 2048 * 4096) + 2048**2 + factor_linear, "with the pooler"


def test_activations_of_a_layer_on_a_gpu_by_hand() -> None:
    """Two more layers of sharebert-small keep 48 KiB and 64 bytes of log-sum-exp a token more, each."""
    more = replace(SMALL, num_hidden_layers=SMALL.num_hidden_layers + 2)
    shape = small_shape()
    added = memory(more, shape).activations - memory(SMALL, shape).activations
    by_hand = 2 * (2 * 2048 * 2 + 2 * 2048 * 6 + 2 * 4096 * 2 + 4 * 16)
    assert added == 64 * 128 * by_hand
    recomputed = replace(shape, recompute=True)
    assert memory(SMALL, recomputed).activations < memory(SMALL, shape).activations / 3


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    room = 30e9
    rows = largest_rows(SMALL, small_shape(), room)
    assert memory(SMALL, small_shape(rows=rows)).total <= room < memory(SMALL, small_shape(rows=rows + 1)).total
    assert largest_rows(SMALL, small_shape(), 1e6) == 0


def test_bytes_on_the_network_by_hand() -> None:
    """Ring algorithms on 4 ranks: 3/4 of the size each way."""
    shape = small_shape(parameters=1000, world_size=4)
    sent = {stage: network_bytes(replace(shape, stage=stage), 3) for stage in range(4)}
    assert sent == {0: 6000, 1: 7500, 2: 0.75 * (3 * 2 * 4000 + 2000), 3: 0.75 * 3 * (4000 + 2 * 2000)}
    assert network_bytes(replace(shape, world_size=1), 3) == 0


DEVICES = {
    "NVIDIA A40": "a40",
    "NVIDIA RTX A4000": "a4000",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "A100-PCIE-40GB": "a100-40",
    "NVIDIA A10": "a10",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000-ada",
    "Tesla V100-SXM2-32GB": "v100",
    "AMD Instinct MI300X": "mi300x",
}
"""What drivers call the GPUs."""


@pytest.mark.parametrize("device", DEVICES)
def test_a_devices_name_means_one_gpu(device: str) -> None:
    assert gpu_of_device(device) is GPUS[DEVICES[device]]


def test_every_gpu_has_a_device() -> None:
    assert set(DEVICES.values()) == set(GPUS)
    for other in ("NVIDIA A400", "NVIDIA RTX A6000", "NVIDIA L40", "NVIDIA A30", "Quadro RTX 6000", "cpu"):
        assert gpu_of_device(other) is None
    with pytest.raises(BadInput, match="--gpu: no 'h1000' known"):
        gpu_of("h1000")


def test_buckets_are_those_of_the_engine() -> None:
    assert memory_module.BUCKET_ELEMENTS == BUCKET_ELEMENTS


def test_a_table_of_several_gpus_and_its_json() -> None:
    recipe = load(TrainRecipe, "sharebert-small", defaults=PLAN_DEFAULTS)
    assumed = Assumptions(utilisations=[0.5], network_bytes_per_s=25e9, price=3.0)
    lines = plan(recipe, [8, 64], ["h100", "l4"], assumed).splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["H100", "SXM"], ["H100", "SXM"], ["L4", "8"], ["L4", "64"]]
    plans = json.loads(plan(recipe, [8, 64], ["h100", "l4"], assumed, as_json=True))["plans"]
    assert [(one["gpu"], one["gpus"]) for one in plans] == [("h100", 8), ("h100", 64), ("l4", 8), ("l4", 64)]
    one = plans[1]
    hours = 23_000 * 4_000 * 128 * one["flops_per_token"] / (64 * 989e12 * 0.5) / 3600
    assert one["speeds"] == [
        {
            "utilisation": 0.5,
            "tokens_per_s": pytest.approx(64 * 989e12 * 0.5 / one["flops_per_token"]),
            "hours": pytest.approx(hours),
            "price": pytest.approx(3 * 64 * hours),
        }
    ]
    assert one["checkpoint_bytes"] == 12 * 71_704_832
    assert one["network_s"]["1"] == pytest.approx(one["network_bytes"]["1"] / 25e9)
    assert one["epochs"] is None


def test_epochs_need_a_dataset(dataset: Path) -> None:
    keys = [f"data.dataset={dataset}", "data.global_batch=8", "data.micro_batch=4", "model.hidden_size=32"]
    recipe = load(TrainRecipe, "demo", [*keys, "model.intermediate_size=48", "steps=10"], defaults=PLAN_DEFAULTS)
    rows = recipe.resolve(1).datasets[0].split("train").rows
    assert make_plan(recipe, 1, "a10", Assumptions()).epochs == pytest.approx(80 / rows)
    with pytest.raises(BadInput, match="--gpus: 0"):
        make_plan(recipe, 0, "a10", Assumptions())


MEASURED_SHAPES = {
    "wide": {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "factor_size": 256},
    "eps, tied": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 2,
        "factor_size": 1024,
        "sharing": "eps",
        "mlm_head": "tied",
        "max_position_embeddings": 64,
    },
    "sharebert-small, two layers": {"size": "sharebert-small", "num_hidden_layers": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MEASURED_SHAPES)
def test_memory_is_that_of_a_measurement(name: str, precision: str) -> None:
    keys = [f"model.{key}={value}" for key, value in MEASURED_SHAPES[name].items()]
    stage = 0 if precision == "fp32" else 1
    keys += ["data.global_batch=8", "data.micro_batch=4", f"precision={precision}", f"zero.stage={stage}"]
    recipe = load(TrainRecipe, None, keys, defaults=PLAN_DEFAULTS)
    training = recipe.resolve(1, needs_data=False)
    measured = measure(recipe, micro_batches=2, micro_rows=4)
    predicted = memory(training.model.config, shape_of(recipe, training, 1, cuda=False)).total
    assert predicted == pytest.approx(measured.memory_bytes, rel=0.1)


def test_a_measurement_beside_the_plan() -> None:
    keys = ["data.global_batch=8", "data.micro_batch=4", "model.hidden_size=64", "model.intermediate_size=128"]
    recipe = load(TrainRecipe, "demo", keys, defaults=PLAN_DEFAULTS)
    text = plan(recipe, [1], ["h100"], Assumptions(), with_measure=True)
    measured = text.split("\n\n")[-1]
    assert measured.startswith("measured here (cpu, 1 process, 2 micro-batches a step)")
    assert "predicted" in measured
    assert " tokens/s" in measured
