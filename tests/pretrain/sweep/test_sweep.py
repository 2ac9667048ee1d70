"""Trials are what the recipe varies; the table is what the runs' files say; a killed sweep resumes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import pytest
import torch
from tiny_runs import log_of, train_arguments, whole
from torch.utils.flop_counter import FlopCounterMode

from pretrain.checkpoint.format import manifest_checksum
from pretrain.data.datasets import WeightedDataset
from pretrain.recipe import TrainRecipe
from pretrain.sweep.hparams import FINAL_LOSS, write_hparams
from pretrain.sweep.recipe import SweepRecipe, trials
from pretrain.sweep.runner import is_finished, refuse_other_keys
from pretrain.sweep.summary import summarise
from pretrain.sweep.table import rows_of, size_of, to_text
from sharebert import ShareBertConfig, ShareBertForMaskedLM
from sharebert_common.errors import STOPPED, BadInput
from sharebert_common.recipe import load, to_yaml
from sharebert_common.run_files import last_logged_step, read_state, write_state


@pytest.fixture
def base(dataset: Path, tmp_path: Path) -> Path:
    """A train recipe of a tiny model."""
    file = tmp_path / "base.yaml"
    recipe = load(TrainRecipe, None, train_arguments(dataset, tmp_path / "unused", steps=12, validate__every=4))
    file.write_text(to_yaml(recipe))
    return file


def sweep_recipe(base: Path, tmp_path: Path, **keys: object) -> Path:
    file = tmp_path / "sweep.yaml"
    arms = {"plain": {}, "muon": {"optimizer.muon.generated": True}}
    file.write_text(json.dumps({"folder": str(tmp_path / "out"), "base": str(base), "arms": arms} | keys))
    return file


def test_trials_are_arms_times_grid_times_seeds(base: Path, tmp_path: Path) -> None:
    arms = {"plain": {}, "fixed": {"optimizer.lr": 0.5}}
    file = sweep_recipe(base, tmp_path, arms=arms, grid={"optimizer.lr": [0.1, 0.2]}, seeds=[3, 4])
    made = trials(load(SweepRecipe, file))
    assert [(t.row, t.seed, t.recipe.optimizer.lr, t.recipe.seed) for t in made] == [
        ("plain,lr=0.1", 3, 0.1, 3),
        ("plain,lr=0.2", 3, 0.2, 3),
        ("fixed", 3, 0.5, 3),
        ("plain,lr=0.1", 4, 0.1, 4),
        ("plain,lr=0.2", 4, 0.2, 4),
        ("fixed", 4, 0.5, 4),
    ]
    assert len({t.run for t in made}) == 6
    alone = trials(load(SweepRecipe, file, ['only=["fixed"]']))
    assert [(t.row, t.seed) for t in alone] == [("fixed", 3), ("fixed", 4)]
    with pytest.raises(BadInput, match="only: no arm 'fixd'; did you mean 'fixed'"):
        trials(load(SweepRecipe, file, ["only=[fixd]"]))
    with pytest.raises(BadInput, match=r"arm plain: .*optimizer\.lrr: unknown key; did you mean 'lr'"):
        trials(load(SweepRecipe, sweep_recipe(base, tmp_path, common={"optimizer.lrr": 1})))
    with pytest.raises(BadInput, match="reference: no row 'plan'; did you mean 'plain'"):
        trials(load(SweepRecipe, sweep_recipe(base, tmp_path, reference="plan")))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"arms": {"lr 1": {"optimizer.lr": 0.1}, "lr_1": {"optimizer.lr": 0.2}}},
            r"arm lr_1: two trials, with different optimizer\.lr, would have the folder .*/runs/lr_1,seed=0; rename",
        ),
        (
            {"arms": {"a": {}, "a,lr=0.1": {"optimizer.lr": 0.5}}, "grid": {"optimizer.lr": [0.1]}},
            r"arm a,lr=0\.1: two trials, with different optimizer\.lr, .*/runs/a,lr=0\.1,seed=0",
        ),
        ({"grid": {"distill.teacher": ["a/b", "a_b"]}}, r"arm plain: two trials, with different distill\.teacher"),
        ({"grid": {"seed": [1, 2]}}, "grid: seed is set by the sweep for each trial .`seeds` is for that.; remove it"),
        ({"common": {"seed": 1}}, "common: seed is set by the sweep"),
        ({"arms": {"a": {"run": "elsewhere"}}}, "arms.a: run is set by the sweep for each trial .it follows from"),
        (
            {"arms": {"a": {"optimizer": {"lr": 0.5}}}, "grid": {"optimizer.lr": [0.1, 0.2]}},
            "arm a: 'a,lr=0.1' and 'a,lr=0.2' are the same training; .*write it as the grid does",
        ),
        ({"arms": {"a": {"zero.stage": 2}}, "grid": {"zero": [0, 1]}}, "arm a: 'a,zero=0' and 'a,zero=1' are the same"),
        ({"only": []}, "only: List should have at least 1 item"),
        ({"grid": {"optimizer.lr": []}}, r"grid\.optimizer\.lr: List should have at least 1 item"),
    ],
)
def test_no_trial_is_dropped_or_has_a_wrong_name(
    keys: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        trials(load(SweepRecipe, sweep_recipe(base, tmp_path, **keys)))


def test_the_table_is_what_the_logs_say(base: Path, tmp_path: Path) -> None:
    """Final losses 2.0 and 2.2 of the reference: their mean 2.1 is reached half way between 1,280 and 2,560 tokens."""
    made = trials(load(SweepRecipe, sweep_recipe(base, tmp_path, seeds=[0, 1])))
    finals = {("plain", 0): [4.0, 3.0, 2.0], ("plain", 1): [4.0, 3.0, 2.2], ("muon", 0): [2.6, 1.6, 1.5]}
    runs: dict[str, list[Path]] = {}
    for trial in made:
        runs.setdefault(trial.row, []).append(trial.run)
        found = finals.get((trial.row, trial.seed))
        if found:
            trial.run.mkdir(parents=True)
            (trial.run / "config.yaml").write_text(to_yaml(trial.recipe))
            lines = [{"step": 4 * n, "valid_loss": loss} for n, loss in enumerate(found, 1)]
            lines += [{"step": 12, "loss": 1.0, "step_s": 0.5}]
            (trial.run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain, muon = rows_of(runs, "plain")
    assert (plain.seeds, muon.seeds) == (2, 1)
    assert plain.loss == mean([2.0, 2.2])
    assert plain.loss_sd == stdev([2.0, 2.2])
    assert muon.loss_sd is None
    assert plain.tokens_to_reference is None  # its second seed never gets to the mean of both
    assert muon.tokens_to_reference == pytest.approx(4 * 10 * 32 * 1.5)
    assert muon.share == pytest.approx(0.5)
    assert muon.step_s == 0.5
    model = ShareBertForMaskedLM(made[0].recipe.resolve().model.config)
    assert plain.parameters == sum(p.numel() for name, p in model.named_parameters() if name.startswith("sharebert."))
    matrices, head, rows = 4 * 32 * 32 + 2 * 32 * 48, 32 * 8 + 8 * 304, 10 * 32
    layers, attention, making = 6 * 2 * matrices, 12 * 2 * 32 * 32, 6 * 8 * matrices / rows
    assert plain.flops_a_step == pytest.approx(rows * (layers + attention + 6 * 0.15 * head + making))
    text = to_text([plain, muon], "plain", unfinished=1)
    assert "| plain | 2 | 2.1000 ± 0.1414 | never |" in text
    assert "| muon | 1 | 1.5000 | 1,920 | 0.500 |" in text
    assert "\n\nThe reference is plain.\n" in text
    assert text.endswith("1 trials are not finished")
    assert "| muon | 1 | 1.5000 |  |  |" in to_text(rows_of(runs | {"other": []}, "other"), "other")
    write_hparams(made, tmp_path / "board")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board" / "muon,seed=0"))
    board.Reload()
    assert [point.value for point in board.Scalars(FINAL_LOSS)] == [1.5]
    assert "_hparams_/session_start_info" in board.PluginTagToContent("hparams")


def test_the_table_needs_no_dataset(base: Path, tmp_path: Path) -> None:
    """The rows' length is in the log, the model in the checkpoint. The recipe leaves both to the dataset, and the
    defaults (512 tokens, 30,522 words) are others."""
    (trial, *_) = trials(load(SweepRecipe, sweep_recipe(base, tmp_path)))
    recipe, model = trial.recipe, trial.recipe.resolve().model.config
    gone = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, dataset=[WeightedDataset(path="nowhere")]))
    checkpoint = trial.run / "checkpoints" / "step-00000012"
    checkpoint.mkdir(parents=True)
    manifest = {"format": 1, "step": 12, "training": {"model": model.to_dict()}, "shapes": {}, "files": {}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
    lines = [{"step": 12, "rows": 120, "tokens": 120 * 32, "step_s": 0.5}, {"step": 12, "valid_loss": 2.0}]
    (trial.run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables = []
    for written in (recipe, gone):
        (trial.run / "config.yaml").write_text(to_yaml(written))
        tables.append(rows_of({"plain": [trial.run]}, "plain"))
    assert tables[0] == tables[1]
    (row,) = tables[1]
    assert row.tokens_to_reference == 12 * 10 * 32
    assert (row.parameters, row.flops_a_step) == size_of(recipe)
    shutil.rmtree(trial.run / "checkpoints")
    (unknown,) = rows_of({"plain": [trial.run]}, "plain")
    assert unknown == dataclasses.replace(row, parameters=None, flops_a_step=None)
    assert "| 1.000 | unknown | unknown | 0.5000 |" in to_text([unknown], "plain")


def test_the_reference_may_be_left_out(base: Path, tmp_path: Path) -> None:
    """Of the arms that run, the first row is the reference then; a reference that is no row of any arm is wrong."""
    file = sweep_recipe(base, tmp_path, grid={"optimizer.lr": [0.1, 0.2]}, reference="plain,lr=0.2")

    def reference(*overrides: str) -> str:
        recipe = load(SweepRecipe, file, overrides)
        return summarise(recipe, trials(recipe)).splitlines()[3]

    assert reference() == "The reference is plain,lr=0.2, which is not finished."
    assert reference("only=[plain]") == "The reference is plain,lr=0.2, which is not finished."
    assert reference("only=[muon]") == "The reference is muon,lr=0.1, which is not finished."
    for only in ("null", "[muon]"):
        with pytest.raises(BadInput, match=r"reference: no row 'plain,lr=0\.3'; did you mean 'plain,lr=0\.[12]'"):
            trials(load(SweepRecipe, file, ["reference='plain,lr=0.3'", f"only={only}"]))


@pytest.mark.parametrize("state", ["finished", "stopped", "failed", "running"])
def test_a_run_with_other_keys_is_refused(state: str, base: Path, tmp_path: Path) -> None:
    """Else its row would show what was asked before, or, of a run that goes on, a mixture."""
    (trial, *_) = trials(load(SweepRecipe, sweep_recipe(base, tmp_path)))
    trial.run.mkdir(parents=True)
    settled = dataclasses.replace(trial.recipe, data=dataclasses.replace(trial.recipe.data, micro_batch=2))
    (trial.run / "config.yaml").write_text(to_yaml(settled))
    write_state(trial.run, state)
    assert is_finished(trial) == (state == "finished")
    refuse_other_keys([trial])
    (trial.run / "config.yaml").write_text(to_yaml(dataclasses.replace(settled, steps=settled.steps + 1)))
    with pytest.raises(BadInput, match=r"was trained with other keys \(steps\); remove it, or give another folder"):
        refuse_other_keys([trial])


@pytest.mark.parametrize(
    ("hidden", "layers", "inner", "factor", "heads", "parameters", "of_bert", "gflops"),
    [
        (64, 2, 128, 16, 2, 71_648, 140_192, (0.502, 0.517, 0.499)),
        (128, 2, 256, 32, 4, 147_392, 421_696, (1.830, 1.861, 1.804)),
        (128, 4, 512, 32, 4, 151_232, 949_824, (5.133, 5.195, 5.095)),
    ],
)
def test_the_rows_of_the_ladder_are_of_one_size(
    hidden: int,
    layers: int,
    inner: int,
    factor: int,
    heads: int,
    parameters: int,
    of_bert: int,
    gflops: tuple[float, ...],
) -> None:
    """At each size of docs/recipe.md: parameters within 3 % of the authors', and FLOPs of a step within 5 % of theirs
    and of the unshared BERT's, so that the losses compare."""
    model = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner, "factor_size": factor}
    model |= {"num_attention_heads": heads, "vocab_size": 4096, "max_position_embeddings": 32}
    common = {"data.dataset": "no data", "steps": 10_000} | {f"model.{key}": value for key, value in model.items()}
    one = ["seeds=[0]", "grid={optimizer.lr: [0.003]}", "reference=null"]
    made = trials(load(SweepRecipe, "ladder", [f"common={json.dumps(common)}", *one]))
    sizes = {trial.row.partition(",")[0]: size_of(trial.recipe) for trial in made}  # every arm is a model
    fast, authors, bert = (sizes[arm] for arm in ("fast", "authors", "bert-short-rows"))
    assert fast[0] == pytest.approx(authors[0], rel=0.03)
    assert fast[1] == pytest.approx(authors[1], rel=0.05)
    assert fast[1] == pytest.approx(bert[1], rel=0.05)
    assert (fast[0], authors[0], bert[0]) == (parameters, parameters, of_bert)
    assert tuple(round(flops / 1e9, 3) for _, flops in (fast, authors, bert)) == gflops


def counted_flops(config: ShareBertConfig, rows: int, masked: int) -> int:
    """FLOPs of the matrix products of a forward and a backward pass over whole rows, as torch counts them."""
    aten = torch.ops.aten

    def product(_: Any, a: list[int], b: list[int], **given: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    def attention(q: list[int], k: list[int], *others: Any, **given: Any) -> int:
        return 2 * 2 * q[0] * q[1] * q[2] * k[2] * q[3]

    def attention_backward(_: Any, *shapes: Any, **given: Any) -> int:
        return 2 * attention(*shapes)

    lacking = {
        aten.addmm_: product,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    tokens = torch.randint(config.vocab_size, (rows, config.max_position_embeddings))
    model = ShareBertForMaskedLM(config)
    chosen = torch.arange(masked)
    with FlopCounterMode(display=False, custom_mapping=lacking) as counter:
        output = model(tokens, positions=chosen, labels=tokens.view(-1)[:masked], loss_weights=torch.ones(masked))
        output.loss_sum.backward()
    return int(counter.get_total_flops())


@pytest.mark.slow
def test_a_stopped_or_killed_sweep_resumes_and_its_table_is_that_of_the_runs(base: Path, tmp_path: Path) -> None:
    file = sweep_recipe(base, tmp_path)
    command = [sys.executable, "-m", "sharebert_cli", "sweep", str(file), "common={steps: 300, checkpoint.every: 20}"]
    plain, stopped = tmp_path / "out" / "runs" / "plain,seed=0", {"step": 0}
    for asked in (signal.SIGTERM, signal.SIGKILL):
        sweep = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while last_logged_step(plain) <= stopped["step"]:
            assert sweep.poll() is None
            time.sleep(0.1)
        sweep.send_signal(asked)
        assert sweep.wait(60) == (STOPPED if asked == signal.SIGTERM else -signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (stopped := read_state(plain))["state"] != "stopped":  # also where the sweep could ask for nothing
            assert asked == signal.SIGKILL
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert stopped["reason"] == "signal SIGTERM"
    again = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert read_state(plain)["resumed_from"] == stopped["step"]
    table = (tmp_path / "out" / "TABLE.md").read_text()
    assert table in again.stdout
    for arm in ("plain", "muon"):
        log = log_of(tmp_path / "out" / "runs" / f"{arm},seed=0")
        losses = {line["step"]: line["valid_loss"] for line in log if "valid_loss" in line}
        row = next(line for line in table.splitlines() if line.startswith(f"| {arm} |"))
        assert row.startswith(f"| {arm} | 1 | {losses[300]:.4f} |")
        parameters, gflops = (cell.strip() for cell in row.split("|")[6:8])
        trained = whole(tmp_path / "out" / "runs" / f"{arm},seed=0", 300)
        shapes = {name: shape for name, shape in trained.manifest["shapes"].items() if name.startswith("sharebert.")}
        assert parameters == f"{sum(math.prod(shape) for shape in shapes.values()):,}"
        # Torch counts two small things more: the factor's product in the embedding, and columns that no layer uses.
        counted = counted_flops(ShareBertConfig.from_dict(trained.training["model"]), rows=10, masked=48)
        assert float(gflops) * 1e9 == pytest.approx(counted, rel=0.03)
        assert row.endswith(f" {median(line['step_s'] for line in log if 'step_s' in line):.4f} |")
        if arm == "plain":  # the reference
            first = next(step for step, loss in losses.items() if loss <= losses[300])
            tokens = int(row.split("|")[4].replace(",", ""))
            assert (first - 4) * 320 < tokens <= first * 320
