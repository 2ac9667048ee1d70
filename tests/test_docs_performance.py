"""docs/performance.md: its roofline computed again by hand, the origin of each section's claims, its list of points."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pretrain.plan.roofline import roofline_table
from sharebert import SIZES, ShareBertConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
PEAK, BANDWIDTH = 989e12, 3.35e12
"""An H100 SXM's dense bf16 FLOP/s, and bytes/s."""
V, T, MASKED = 30_528, 128, 19
"""Words, tokens of a row, masked ones of them."""


def table(first_cell: str) -> dict[str, list[str]]:
    """The rows of a table of the page, by their first cell, with the header's."""
    lines = PAGE[PAGE.index(f"| {first_cell}") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


ROOFLINE = table("estimated, one H100 SXM")
COLUMNS = next(iter(ROOFLINE.values()))


def sizes(size: str) -> tuple[int, int, int, int]:
    """H, I, L and F of a published size."""
    config = ShareBertConfig.from_dict(SIZES[size])
    return config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.factor_size


def by_hand(size: str, rows: int) -> dict[str, float]:
    """Milliseconds of each part, from the sizes alone: FLOPs at 67 % of the peak, bytes at 75 % of the bandwidth."""
    h, i, layers, _ = sizes(size)
    matrices, n = 4 * h * h + 2 * h * i, rows * T
    chunks = -(-rows * MASKED // (2**28 // V))

    def products(flops: float) -> float:
        return 1e3 * flops / (0.67 * PEAK)

    def moves(size_bytes: float, share: float = 0.75) -> float:
        return 1e3 * size_bytes / (share * BANDWIDTH)

    return {
        "products of the layers": products(6 * layers * matrices * n),
        "products of the head": products(6 * rows * MASKED * (h * h + h * V)),
        "dropout, sums and norms": moves((2 * layers + 1) * 9 * 2 * h * n),
        "attention": moves(layers * 12 * 2 * h * n, 0.48),
        "bias and GELU": moves(layers * 5 * 2 * i * n),
        "cross-entropy": moves(3 * 2 * V * rows * MASKED),
        "sums for five biases a layer": moves(layers * 5 * 2 * h * n),
        "input gradient of query, key and value": moves(layers * 2 * 2 * h * n),
        "weight gradients added up over layers": moves((layers - 1) * 8 * matrices),
        "decoder gradient": moves((18 + 8 * (chunks - 1)) * V * h),
        "virtual weights": moves(18 * matrices),
        "rest": 1.0,
    }


@pytest.mark.parametrize("column", range(len(COLUMNS)))
def test_the_roofline_is_its_arithmetic(column: int) -> None:
    found = re.fullmatch(r"(\w+), (\d+) x 128", COLUMNS[column])
    assert found
    size, rows = f"sharebert-{found[1]}", int(found[2])
    expected = by_hand(size, rows)
    for name, milliseconds in expected.items():
        assert float(ROOFLINE[name][column]) == pytest.approx(milliseconds, abs=0.051), name
    total = sum(expected.values())
    assert float(ROOFLINE["total"][column]) == pytest.approx(total, abs=0.051)
    h, i, layers, factor = sizes(size)
    matrices = 4 * h * h + 2 * h * i
    a_token = 6 * layers * matrices + 12 * layers * T * h + 6 * 0.15 * (h * h + h * V)
    flops = rows * T * a_token + 6 * factor * matrices
    share = int(ROOFLINE["share of 989 TFLOP/s"][column].strip("%"))
    assert share == pytest.approx(100 * flops / PEAK / total * 1e3, abs=0.51)
    assert set(ROOFLINE) - set(expected) == {"estimated, one H100 SXM, ms a micro-batch", "---", "total",
                                             "share of 989 TFLOP/s"}  # fmt: skip


def needed_products(size: str, rows: int, goal: float) -> tuple[float, float, float]:
    """For a goal: milliseconds of a micro-batch, the share that products must reach, and milliseconds of the rest if
    they do not."""
    parts = by_hand(size, rows)
    products = parts["products of the layers"] + parts["products of the head"]
    others = sum(parts.values()) - products
    column = COLUMNS.index(f"{size.removeprefix('sharebert-')}, {rows} x 128")
    total = float(ROOFLINE["total"][column])
    share = float(ROOFLINE["share of 989 TFLOP/s"][column].strip("%")) / 100
    allowed = total * share / goal
    return allowed, 0.67 * products / (allowed - others), allowed - products


def test_what_the_goals_need() -> None:
    """The sentences below the table. A share in whole percent is known to one part in a hundred."""
    text = " ".join(PAGE.split())
    small = re.search(
        r"500 rows in (\d+) ms: products at (\d+) % of the peak, or (\d+) ms instead of (\d+) ms .*? With 64 rows it "
        r"needs products at (\d+) %\. .*? with 64 rows it needs products at (\d+) %",
        text,
    )
    assert small
    allowed, share, others, now, small_64, large_64 = (int(number) for number in small.groups())
    expected = needed_products("sharebert-small", 500, 0.55)
    assert allowed == pytest.approx(expected[0], rel=0.012)
    assert share == pytest.approx(100 * expected[1], rel=0.02)
    assert others == pytest.approx(expected[2], abs=4)
    parts = by_hand("sharebert-small", 500)
    assert now == round(sum(ms for name, ms in parts.items() if "products" not in name))
    assert small_64 == pytest.approx(100 * needed_products("sharebert-small", 64, 0.55)[1], rel=0.02)
    assert large_64 == pytest.approx(100 * needed_products("sharebert-large", 64, 0.5)[1], rel=0.02)
    column = COLUMNS.index("large, 500 x 128")
    assert int(ROOFLINE["share of 989 TFLOP/s"][column].strip("%")) >= 50


def test_the_page_shows_the_planners_roofline() -> None:
    assert roofline_table() in PAGE, "docs/performance.md is out of date; `python -m pretrain.plan` prints its tables"


def test_each_section_says_where_its_claims_come_from() -> None:
    for section in PAGE.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        if title != "What a reading for GPUs found":
            assert re.match(r"\*.*(measured|estimated|counted)", text.strip(), re.IGNORECASE), title


def test_each_point_of_the_reading_names_what_shows_it() -> None:
    points = table("point | what was done | where")
    assert list(points)[2:] == [str(number) for number in range(1, 18)]
    for number, (_, where) in list(points.items())[2:]:
        tests = re.findall(r"`(tests/[\w/.]+)`", where)
        assert tests, f"point {number}"
        for test in tests:
            assert (ROOT / test).is_file(), test
