"""What a table of measured times predicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from compress.prune import latency_table
from compress.prune.latency_table import LatencyTable, Shape, config_of, keep_table, kept_table, measure_table
from compress.shape_times import Call, shape_times
from sharebert import ShareBertConfig
from sharebert_common.errors import BadInput

CALL = Call(1, 8, 1)


def made_up(config: ShareBertConfig) -> float:
    """A time with a rest of 2 ms, and layers of 1 ms, 0.5 ms a head and 0.05 ms a column."""
    return 2 + config.num_hidden_layers * (1 + 0.5 * config.heads + 0.05 * config.inner_size)


def test_between_two_measured_numbers_it_is_a_straight_line() -> None:
    table = LatencyTable(Shape(4, 8, 3), CALL, 10.0, {1: 7.0, 2: 7.6, 4: 10.0}, {2: 4.0, 8: 10.0}, {1: 4.0, 3: 10.0})
    assert table.of(Shape(4, 8, 3)) == 1
    assert table.of(Shape(2, 8, 3)) == pytest.approx(0.76)
    assert table.of(Shape(3, 8, 3)) == pytest.approx(0.88)
    assert table.of(Shape(4, 5, 3)) == pytest.approx(0.7)
    # a layer takes (10 - 4) / 2 = 3 ms, the rest 1; with 2 heads and 5 columns a layer saves (2.4 + 3) / 3 of it
    assert table.of(Shape(2, 5, 2)) == pytest.approx((1 + 2 * (3 - 1.8)) / 10)
    heads, columns = torch.tensor(1.5, requires_grad=True), torch.tensor([5.0, 8.0])
    found = table.share(heads, columns, 3)
    torch.testing.assert_close(found, torch.tensor([0.43, 0.73], dtype=torch.float64))
    found[0].backward()
    assert heads.grad is not None
    assert heads.grad.item() == pytest.approx((7.6 - 7.0) / 10)


def test_a_time_of_independent_parts_is_predicted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_table, "shape_times", lambda configs, call: [made_up(c) for c in configs])
    config = tiny_model(num_hidden_layers=5).config
    table = measure_table(config, CALL)
    for shape in (Shape(2, 33, 4), Shape(1, 5, 1), Shape(3, 40, 2)):
        assert table.of(shape) == pytest.approx(made_up(config_of(config, shape)) / made_up(config))
    assert table.column_counts == list(range(40, 4, -1))
    assert table.least == Shape(1, 5, 1)


def test_a_disturbed_measurement_is_not_above_that_of_more_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed = {10: 99.0}
    monkeypatch.setattr(
        latency_table, "shape_times", lambda configs, call: [disturbed.get(c.inner_size, made_up(c)) for c in configs]
    )
    table = measure_table(tiny_model().config, CALL)
    assert table.columns[10] == table.columns[20] < table.columns[40]


def test_a_kept_table_is_for_its_processor_model_and_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_table, "shape_times", lambda configs, call: [made_up(c) for c in configs])
    config, path = tiny_model().config, tmp_path / "table.json"
    assert kept_table(path, config, CALL) is None
    table = measure_table(config, CALL)
    keep_table(path, table)
    assert kept_table(path, config, CALL) == table
    assert kept_table(path, config, CALL._replace(threads=2)) is None
    assert kept_table(path, tiny_model(num_hidden_layers=3).config, CALL) is None
    monkeypatch.setattr(latency_table, "cpu_name", lambda: "another")
    assert kept_table(path, config, CALL) is None
    for text in (path.read_text()[:-9], "[]", "{}"):
        path.write_text(text)
        monkeypatch.setattr(latency_table, "cpu_name", lambda: None)
        with pytest.raises(BadInput, match=f"{path}: damaged .*; remove it"):
            kept_table(path, config, CALL)


def test_shapes_are_timed_in_a_process_of_their_own() -> None:
    config = tiny_model(num_hidden_layers=12, hidden_size=96, intermediate_size=192, vocab_size=2400).config
    few = config_of(config, Shape(1, 20, 1))
    assert (few.heads, few.inner_size, few.num_hidden_layers) == (1, 20, 1)
    long, short = shape_times([config, few], CALL)
    assert 0 < short < 0.7 * long
    with pytest.raises(BadInput, match="cannot be timed here"):
        shape_times([config], Call(1, 10_000, 1))
