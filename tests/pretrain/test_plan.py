"""What a run will cost: FLOPs by hand, and the page that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.flops import flops_per_token
from pretrain.plan import AUTHORS_TOKENS, PLAN_DEFAULTS, documented_tables, kernel_table, report, speed_table
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
    recipe = load(TrainRecipe, "sharebert-small", defaults=PLAN_DEFAULTS)
    config = ShareBertConfig.from_dict(SIZES["sharebert-small"])
    micro_rows = recipe.resolve(8, needs_data=False).micro_rows
    lines = report(recipe, gpus=8, gpu="h100").splitlines()
    assert f"FLOPs a token         {flops_per_token(config, 128, 0.15, micro_rows * 128) / 1e6:,.1f} M" in lines
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
