"""The step `pc_lora`: what it ends in, and that nothing of the matrices is left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress_models import killed, tiny_export, tokens_of

from compress import training
from compress.calibrate import batches, hidden_states, objective
from compress.low_rank.fading import FadingMatrices, base_share
from compress.low_rank.pc_lora_step import PcLora
from compress.source import open_source
from exports.read import load_model, read_export
from sharebert.shared_linear import LowRank
from sharebert.sharing import Weights
from sharebert_common.errors import BadInput

NAMES = (*Weights._fields, "pooler")


def tools(scratch: Path) -> Any:
    tokens = torch.randint(5, 250, (24, 12), generator=torch.Generator().manual_seed(2))
    return SimpleNamespace(calibration=lambda: tokens, seed=0, scratch=scratch / "scratch", say=lambda line: None)


def trained(folder: Path, source: Path, **keys: Any) -> Path:
    step, out = PcLora(**{"rank": 5, "batch": 8, **keys}), folder / "out"
    step.check(open_source(source))
    step.apply(open_source(source), tools(folder), out)
    return out


@pytest.mark.parametrize("schedule", ["linear", "sine", "cosine"])
def test_the_share_of_the_matrices_falls_from_1_to_0(schedule: Any) -> None:
    shares = [base_share(schedule, number / 20) for number in range(25)]
    assert shares[0] == 1
    assert shares[20:] == [0.0] * 5
    assert shares == sorted(shares, reverse=True)
    half = {"linear": 0.5, "sine": 1 - 0.5**0.5, "cosine": 0.5}[schedule]
    assert base_share(schedule, 0.5) == pytest.approx(half)


def test_the_matrices_fade_in_the_steps_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    loss = PcLora.loss

    def watched(step: PcLora, student: Any, *given: Any) -> torch.Tensor:
        seen.append(student.sharebert.sharing.share)
        return loss(step, student, *given)

    monkeypatch.setattr(PcLora, "loss", watched)
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    trained(tmp_path, source, steps=10, fade=0.5, schedule="linear")
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0, 0])


def random_set(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"intermediate": (24, 40), "output": (40, 24)}
    return {name: torch.randn(shapes.get(name, (24, 24)), generator=generator) for name in NAMES}


def test_at_share_0_the_output_does_not_depend_on_the_matrices(tmp_path: Path) -> None:
    model = load_model(tiny_export(tmp_path / "source"))
    tokens = tokens_of(model.config)
    products = {name: LowRank(m[:, :4].clone(), m[:4].clone()) for name, m in random_set(3).items()}
    found = []
    for seed in (1, 2):
        fading = FadingMatrices(random_set(seed), products, from_zero=False)
        model.sharebert.sharing = fading
        outputs = []
        for share in (0.5, 0.0):
            fading.share = share
            with torch.no_grad():
                outputs.append(model.logits(tokens))
        found.append(outputs)
    assert not found[0][0].equal(found[1][0])
    assert found[0][1].equal(found[1][1])


def test_at_share_1_it_is_the_model_however_it_starts(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    tokens = tokens_of(read_export(source).config)
    rows = batches(tools(tmp_path).calibration(), source / "tokenizer.json", 0)
    expected = load_model(source).logits(tokens)
    for start in ("svd", "zero"):
        model = load_model(source)
        model.sharebert.sharing = PcLora(rank=4, start=start).fading(model, rows)  # type: ignore[arg-type]
        torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-3, atol=1e-4)


def test_it_learns_and_the_result_is_the_trained_products(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    rows = batches(tools(tmp_path).calibration(), source / "tokenizer.json", 0, 8)

    def loss(folder: Path) -> float:
        model = load_model(folder)
        with torch.no_grad():
            return sum(objective(model, b, hidden_states(model, b), torch.Generator()).item() for b in rows) / 24

    few = loss(trained(tmp_path / "few", source, steps=1, lr=1e-6))
    many = trained(tmp_path / "many", source, steps=60, lr=1e-2, task_weight=1.0)
    assert loss(many) < few - 0.1
    model = load_model(many)
    assert (model.config.sharing, model.config.rank) == ("low_rank", 5)
    assert not [name for name, _ in model.named_parameters() if "factor_linear_all" in name]


def test_a_killed_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    monkeypatch.setattr(training, "SAVE_EVERY", 4)
    whole = trained(tmp_path / "whole", source, steps=10)
    with killed(training, 8):
        trained(tmp_path / "killed", source, steps=10)
    again = trained(tmp_path / "killed", source, steps=10)
    expected, found = load_model(whole).state_dict(), load_model(again).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_an_encoder_without_a_head_learns_from_states_alone(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="none")
    with pytest.raises(BadInput, match=r"pc_lora\.task_weight"):
        PcLora(rank=4).check(open_source(source))
    out = trained(tmp_path, source, steps=2, task_weight=0.0)
    assert load_model(out).config.rank == 5


def test_wrong_keys_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"pc_lora\.rank: 30 is not below the hidden size, 24"):
        PcLora(rank=30).check(open_source(tiny_export(tmp_path / "source")))
    with pytest.raises(
        BadInput, match=r"pc_lora\.ranks: no matrix of this model has a name like 'valeu'; one is query; "
    ):
        PcLora(rank=4, ranks={"valeu": 5}).check(open_source(tmp_path / "source"))


def test_it_follows_pruning(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied", kept_heads=(0, 2), kept_columns=tuple(range(20)))
    config = load_model(out := trained(tmp_path, source, rank=23, steps=1, lr=1e-9)).config
    assert (config.heads, config.inner_size, config.rank_of("query")) == (2, 20, 16)
    tokens = tokens_of(config)
    torch.testing.assert_close(load_model(out).logits(tokens), load_model(source).logits(tokens), rtol=1e-3, atol=1e-3)


def test_ranks_by_matrix_are_those_of_the_result(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    model = load_model(trained(tmp_path, source, steps=1, ranks={"*output": 7, "value": 9}))
    assert model.config.ranks == {"attention_output": 7, "output": 7, "value": 9}
    found = {name: getattr(model.sharebert.sharing, f"{name}_b").shape[0] for name in NAMES}
    assert found == dict.fromkeys(NAMES, 5) | model.config.ranks
