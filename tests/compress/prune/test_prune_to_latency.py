"""The step `prune_to_latency`; times are made up, so that they do not depend on the machine."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress_models import export_with_dead_parts, killed, tiny_export

from compress import training
from compress.calibrate import Batch, batches, calibration_batches, hidden_error, hidden_states, objective
from compress.prune import latency_step, latency_table
from compress.prune.gate_training import GateTraining
from compress.prune.hard_concrete import open_probability
from compress.prune.latency_step import cut
from compress.prune.latency_table import LatencyTable, Shape
from compress.prune.structure import Fisher
from compress.prune.structure_search import Structure, by_gradients, by_probability, candidates, masked_loss
from compress.prune.structure_step import PruneStructure
from compress.shape_times import Call
from compress.source import open_source
from compress.steps import step_of
from exports.compact import Compact
from exports.forms import write_export
from exports.read import load_model, read_export
from exports.weight_files import read_weights
from exports.weight_source import all_tensors
from sharebert import ShareBertConfig
from sharebert_common.errors import BadInput

GATES = {"method": "hard_concrete", "steps": 40, "batch": 8}


def made_up(config: ShareBertConfig) -> float:
    """A time with a rest of 0.5 ms, and layers of 0.2 ms, 0.5 ms a head and 0.05 ms a column."""
    return 0.5 + config.num_hidden_layers * (0.2 + 0.5 * config.heads + 0.05 * config.inner_size)


@pytest.fixture(autouse=True)
def made_up_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (latency_table, latency_step):
        monkeypatch.setattr(module, "shape_times", lambda configs, call: [made_up(config) for config in configs])


def tools(scratch: Path) -> Any:
    tokens = torch.randint(5, 250, (40, 12), generator=torch.Generator().manual_seed(2))
    (scratch / "scratch").mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(calibration=lambda: tokens, seed=0, scratch=scratch / "scratch", say=lambda line: None)


def pruned(folder: Path, source: Path, **keys: Any) -> tuple[Path, dict[str, Any]]:
    _, step = step_of({"prune_to_latency": keys}, "steps.0")
    out = folder / "out"
    step.check(open_source(source))
    return out, step.apply(open_source(source), tools(folder), out)


TABLE = LatencyTable(
    Shape(3, 5, 2), Call(1, 8, 1), 10.0, {1: 7.0, 2: 9.0, 3: 10.0}, {1: 6.0, 5: 10.0}, {1: 6.0, 2: 10.0}
)


def least_of_all(costs: list[torch.Tensor], target: float) -> float:
    """The least sum of the costs of parts that go, over all structures within the target."""
    best = float("inf")
    subsets = [
        [set(s) for n in range(1, count + 1) for s in itertools.combinations(range(count), n)] for count in TABLE.whole
    ]
    for parts in itertools.product(*subsets):
        if TABLE.of(Shape(*map(len, parts))) <= target:
            lost = (float(v) for own, p in zip(costs, parts, strict=True) for n, v in enumerate(own) if n not in p)
            best = min(best, sum(lost))
    return best


@pytest.mark.parametrize("target", [0.4, 0.5, 0.8])
def test_the_best_candidate_is_that_of_all_structures(target: float) -> None:
    generator = torch.Generator().manual_seed(3)
    squares = [torch.rand(count, generator=generator, dtype=torch.float64) for count in (3, 5, 2)]
    found = candidates(by_gradients(Fisher(*map(torch.diag, squares))), TABLE, target)
    assert found[0].cost == pytest.approx(least_of_all([own / 2 for own in squares], target))
    assert all(TABLE.of(candidate.shape) <= target + 1e-9 for candidate in found)
    likely = [own / 2 + 0.5 for own in squares]  # -log of (1 - p) / p: what a part that goes costs
    found = candidates(by_probability(likely), TABLE, target)
    assert found[0].cost == pytest.approx(least_of_all([torch.log(p / (1 - p)) for p in likely], target))


def test_the_cost_of_a_set_counts_what_its_parts_do_together() -> None:
    matrix = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.1, 0.0], [0.0, 0.0, 2.5]], dtype=torch.float64)
    ranking, *_ = by_gradients(Fisher(matrix, matrix, matrix))
    assert ranking.order == [0, 2]
    assert ranking.costs.tolist() == [0, 0.5, 1.75]


@pytest.mark.parametrize("head", ["tied", "none"])
def test_by_fisher_the_result_is_the_masked_model_within_the_target(tmp_path: Path, head: str) -> None:
    source = tiny_export(tmp_path / "source", mlm_head=head)
    out, notes = pruned(tmp_path, source, latency=0.5)
    config = read_export(out).config
    share = made_up(config) / made_up(read_export(source).config)
    assert notes["predicted share of the time"] == pytest.approx(share, abs=1e-4)
    assert notes["measured share of the time"] == pytest.approx(share, abs=1e-4)
    assert 0.45 < share <= 0.5
    assert (config.heads, config.inner_size) == (len(notes["heads"]), notes["columns"])
    assert notes["table"]["tokens"] == 12
    if head == "tied":
        model = load_model(out)
        rows = batches(tools(tmp_path).calibration(), source / "tokenizer.json", 0)
        total = sum(objective(model, b, hidden_states(model, b), torch.Generator()).item() for b in rows)
        assert total / 40 == pytest.approx(notes["loss on calibration rows"], abs=1e-3)
    else:
        assert 0 <= notes["error of hidden states on calibration rows"] < 1
        assert "loss on calibration rows" not in notes


def test_what_is_cut_is_what_factors_of_0_leave(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    structure = Structure([0, 2], [1, 4, 5, 33], [1])
    heads, columns, layers = structure.factors(Shape(3, 40, 2))
    heads, columns = heads * torch.tensor([0.3, 1.0, 0.9]), columns * torch.rand(1, 40)
    model, (batch, *_) = load_model(source), batches(tools(tmp_path).calibration(), source / "tokenizer.json", 0)
    expected = hidden_states(model, batch, heads, columns, layers)
    write_export(cut(read_export(source), structure, heads[0], columns[0]), tmp_path / "cut")
    small = load_model(tmp_path / "cut")
    assert small.config.num_hidden_layers == 1
    assert (hidden_states(small, batch) - expected).abs().max() <= 1e-5 * expected.abs().max()
    whole = Structure([0, 1, 2], list(range(40)), [0, 1])
    assert cut(read_export(source), whole).config == model.config
    assert masked_loss(model, [batch], whole, Shape(3, 40, 2)) == pytest.approx(
        objective(model, batch, hidden_states(model, batch), torch.Generator()).item() / len(batch.tokens)
    )


def test_least_squares_are_those_of_prune_structure(tmp_path: Path) -> None:
    """Of a structure that it chose, with a layer, a head and columns gone."""
    source = tiny_export(tmp_path / "source", mlm_head="tied", branch_gain=0.5, num_hidden_layers=3)
    keys = {"heads": 2, "columns": 0.5, "layers": 2}
    notes = PruneStructure(**keys).apply(open_source(source), tools(tmp_path), tmp_path / "out")  # type: ignore[arg-type]
    expected = read_export(tmp_path / "out")
    kept = [number for number in range(3) if number not in notes["layers removed"]]
    assert 0 in kept  # so that the mean of the other one goes into a bias
    assert expected.config.kept_columns is not None
    structure = Structure(notes["heads kept"], list(expected.config.kept_columns), kept)
    rows = calibration_batches(open_source(source), tools(tmp_path))
    found = cut(read_export(source), structure, rows=rows)
    assert found.config == expected.config
    tensors, others = all_tensors(found.weights), all_tensors(expected.weights)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name])


def test_rescaled_it_is_nearer_to_the_source(tmp_path: Path) -> None:
    """The same structure, with factors and biases."""
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    rows = batches(tools(tmp_path).calibration(), source / "tokenizer.json", 0)
    errors, chosen = [], []
    for rescale in (False, True):
        out, notes = pruned(tmp_path / str(rescale), source, latency=0.8, rescale=rescale)
        chosen.append([notes[key] for key in ("heads", "columns", "layers")])
        small, whole = load_model(out), load_model(source)
        pairs = [(hidden_states(small, batch), hidden_states(whole, batch), batch) for batch in rows]
        errors.append(sum(hidden_error(*pair).item() for pair in pairs))
    assert "loss on calibration rows before least squares" in notes
    assert chosen[0] == chosen[1]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_gates_end_within_the_target(tmp_path: Path, weight: float) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    out, notes = pruned(tmp_path, source, latency=0.6, task_weight=weight, **GATES)
    assert 0.4 < notes["predicted share of the time"] <= 0.6
    model = load_model(out)
    assert model.config.heads == len(notes["heads"])
    assert model.sharebert.kept_inner_scale is not None
    before = load_model(source).sharebert.final_norm.weight
    assert not model.sharebert.final_norm.weight.equal(before)


def test_gates_of_what_adds_nothing_close_while_the_multipliers_rise(tmp_path: Path) -> None:
    source = export_with_dead_parts(tmp_path / "source", head=1, columns=[], layer=1)
    model, whole = load_model(source), load_model(source)
    for one in (model, whole):
        one.requires_grad_(False).sharebert.kept_attention_scale.mul_(10)  # so that the other heads matter
    heads, columns, layers = {1: 6.0, 2: 8.0, 3: 10.0}, {5: 9.0, 40: 10.0}, {1: 8.0, 3: 10.0}
    table = LatencyTable(Shape(3, 40, 3), Call(1, 12, 1), 10.0, heads, columns, layers)
    over, multipliers = [], []

    class Watched(GateTraining):
        def penalty(self, target: float) -> torch.Tensor:
            over.append(float(self.share().detach()) - target)
            multipliers.append(self.multipliers.detach().clone())
            return super().penalty(target)

    gates = Watched(model, whole, table, 0.6, 0.0, 0)
    rows = batches(tools(tmp_path).calibration(), source / "tokenizer.json", 0, 8)
    kept = gates.run(rows, 60, 1e-3, 0.2, tmp_path / "gates", lambda *_: None)
    assert len(over) == 36
    assert min(over) > 0
    assert all((after > before).all() for before, after in itertools.pairwise(multipliers))
    of_heads, _, of_layers = (open_probability(alpha.detach()) for alpha in gates.alphas)
    assert of_heads[1] < 0.2
    assert of_heads[2] > 0.9
    assert (of_layers > 0.9).tolist() == [True, False, True]
    assert 1 not in kept.structure.heads
    assert kept.structure.layers == [0, 2]


def test_a_killed_training_of_gates_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    monkeypatch.setattr(training, "SAVE_EVERY", 10)
    whole, notes = pruned(tmp_path / "whole", source, latency=0.6, **GATES)
    for last in (20, 40):  # in the middle of the gates, and after the structure is fixed
        with killed(training, last):
            pruned(tmp_path / "killed", source, latency=0.6, **GATES)
    with monkeypatch.context() as patch:
        patch.setattr(latency_table, "shape_times", None)  # the table is there
        again, same = pruned(tmp_path / "killed", source, latency=0.6, **GATES)
    assert same == notes
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_on_another_processor_times_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    monkeypatch.setattr(latency_table, "cpu_name", lambda: "first")
    pruned(tmp_path / "moved", source, latency=0.6, **GATES)
    monkeypatch.setattr(latency_table, "cpu_name", lambda: "second")
    for module in (latency_table, latency_step):  # where columns cost nothing
        monkeypatch.setattr(module, "shape_times", lambda configs, call: [1 + c.num_hidden_layers for c in configs])
    _, expected = pruned(tmp_path / "fresh", source, latency=0.7, **GATES)
    _, notes = pruned(tmp_path / "moved", source, latency=0.7, **GATES)
    assert notes == expected
    assert notes["layers"] in ([0], [1])


def test_the_report_names_heads_as_the_config_does(tmp_path: Path) -> None:
    source, _ = pruned(tmp_path / "first", tiny_export(tmp_path / "source"), latency=0.8)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"kept_heads": [1, 2][: len(config["kept_heads"])]}))
    out, notes = pruned(tmp_path / "second", source, latency=0.6)
    assert notes["heads"] == list(read_export(out).config.kept_heads or ())
    assert set(notes["heads"]) <= {1, 2}


def test_what_stands_at_padding_is_no_error() -> None:
    hidden, expected = torch.ones(2, 3, 4), torch.full((2, 3, 4), 2.0)
    visible = torch.tensor([[1, 1, 0], [1, 0, 0]])
    hidden[0, 2], expected[1, 1:] = 1e6, -1e6
    assert hidden_error(hidden, expected, Batch(visible, visible, visible)).item() == pytest.approx(1 / 4)


def test_tensors_keep_their_dtype(tmp_path: Path) -> None:
    write_export(read_export(tiny_export(tmp_path / "source")), tmp_path / "half", Compact(torch.bfloat16))
    out, _ = pruned(tmp_path, tmp_path / "half", latency=0.6)
    wide = [name for name, tensor in read_weights(out).items() if tensor.dtype != torch.bfloat16]
    assert all("kept_" in name for name in wide)


def test_a_large_seed_is_taken(tmp_path: Path) -> None:
    model = load_model(tiny_export(tmp_path / "source"))
    training = GateTraining(model, model, dataclasses.replace(TABLE, whole=Shape(3, 40, 2)), 0.5, 1.0, 2**63 - 1)
    assert not training.gates(2, 1)[0].equal(training.gates(2, 2)[0])


def test_a_loss_that_is_not_finite_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^the loss is nan at step \d+ of 40; lower the learning rate of this step$"):
        pruned(tmp_path, tiny_export(tmp_path / "source"), latency=0.6, **GATES, lr=1e30)


@pytest.mark.parametrize(
    ("keys", "changes", "message"),
    [
        ({"latency": 0.0}, {}, r"prune_to_latency: latency: Input should be"),
        ({"latency": 1.5}, {}, r"prune_to_latency: latency: Input should be"),
        ({"latency": 0.5, "timed": "128"}, {}, "'128' is no shape"),
        ({"latency": 0.5, "timed": "1x128"}, {}, "1x128 has more tokens than the model's 16 positions"),
        ({"latency": 0.1}, {}, r"latency: 0\.1 of the time is out of reach; 1 layer, 1 head and 5 columns take 0\.184"),
        ({"latency": 0.5}, {"sharing": "layers"}, "sharing: veps or eps, this one has layers; use prune_structure"),
        ({"latency": 0.5}, {"intermediate_size": 20, "ffn_pairs": 2}, "one feed-forward pair"),
        ({"latency": 0.5, **GATES, "rescale": True}, {}, "prune_to_latency.rescale: is for method: fisher"),
        ({"latency": 0.5, **GATES}, {"mlm_head": "none"}, "prune_to_latency.task_weight: .* set it to 0"),
    ],
)
def test_wrong_keys_are_one_line(tmp_path: Path, keys: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        pruned(tmp_path, tiny_export(tmp_path / "source", **changes), **keys)
    assert "\n" not in str(error.value)
