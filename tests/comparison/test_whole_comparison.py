"""The whole command on a tiny table, with real trainings: it is killed once, and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_comparison import QUANTISE, base_recipe, small
from tiny_runs import log_of

from sharebert_common.run_files import read_state

DISTIL = {"distil": {"steps": 20, "rows": 8, "losses": {"logits": 1.0}}}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_table_whole(dataset: Path, tmp_path: Path) -> None:
    base = str(base_recipe(tmp_path, dataset))
    recipes = {
        "fastest": [DISTIL, {"prune_structure": {"heads": 0.5, "columns": 0.5}}, "onnx", "onnx_int8"],
        "smallest": [DISTIL, "trim", QUANTISE],
        "pc-lora": [{"prune_structure": {"layers": 0.5}}, {"pc_lora": {"rank": 4, "steps": 4, "batch": 8}}],
    }
    for name, steps in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"steps": steps, "calibration": {"rows": 32}}))
    distilled = {"distill.hidden": 1.0, "distill.attention": 1.0, "distill.logits": 1.0}
    rows = {
        "bert": {"train": base, "keys": {"model.sharing": "none"}},
        "albert": {"train": base, "keys": {"model.sharing": "layers"}},
        "tinybert": {
            "train": base,
            "keys": {"model.sharing": "none", "model.num_hidden_layers": 1, "model.hidden_size": 24, **distilled},
            "teacher": "bert",
        },
        "veps": {"train": base},
        "eps": {"train": base, "keys": {"model.sharing": "eps", "model.factor_size": 32}},
        "veps-fastest": {"of": "veps", "compress": str(tmp_path / "fastest.yaml"), "teacher": "bert"},
        "eps-smallest": {"of": "eps", "compress": str(tmp_path / "smallest.yaml"), "teacher": "bert"},
        "albert-pc-lora": {"of": "albert", "compress": str(tmp_path / "pc-lora.yaml")},
    }
    recipe = small(tmp_path, dataset, rows, seeds=[1], report={"latency": ["1x16"], "repeats": 2})
    out = Path(recipe.folder)
    command = [sys.executable, "-m", "sharebert_cli", "compare", str(tmp_path / "table.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    albert = out / "runs" / "albert,seed=0"
    while not (albert / "log.jsonl").exists() or not log_of(albert):
        assert first.poll() is None
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    written = (out / "exports" / "bert" / "model.safetensors").stat().st_mtime_ns
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert again.returncode == 0, again.stderr[-4000:]
    assert (out / "exports" / "bert" / "model.safetensors").stat().st_mtime_ns == written
    assert (out / "comparison.md").read_text() == again.stdout
    assert "not run" not in again.stdout
    lines = {line["name"]: line for line in json.loads((out / "comparison.json").read_text())["rows"]}
    assert list(lines) == list(rows)
    for name in ("bert", "albert", "tinybert", "veps", "eps"):
        run = out / "runs" / f"{name},seed=0"
        assert read_state(run)["state"] == "finished"
        measured = lines[name]["loss"]
        trained = [line["valid_loss"] for line in log_of(run) if "valid_loss" in line]
        assert measured < trained[0], f"{name} has learnt nothing"
        assert lines[name]["tokens"] == 30 * 10 * 32
    assert lines["albert"]["parameters"] < lines["bert"]["parameters"]
    assert lines["eps-smallest"]["tokens"] == 30 * 10 * 32 + 20 * 8 * 32
    assert lines["eps-smallest"]["flops"] > lines["eps"]["flops"]
    assert lines["veps-fastest"]["latency_ms"]["onnxruntime"]["1x16"] > 0
    assert lines["albert-pc-lora"]["tokens"] == 30 * 10 * 32 + 4 * 8 * 32
    for line in lines.values():
        assert len(line["scores"]["sst2"]) == 1
