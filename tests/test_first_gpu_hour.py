"""The first hour on a GPU, rehearsed on a CPU in an environment with only what a bare machine and the wheels hold."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from bare_environment import make

from benchmarks.gpu.wheels import NEEDED, THERE, required

ROOT = Path(__file__).parents[1]

ABSENT = ["datasets", "webdataset", "submitit", "zstandard", "orjson", "matplotlib", "pytest"]


def test_the_wheels_are_few_and_hold_none_that_a_bare_machine_has() -> None:
    lacking = required(NEEDED, frozenset(required(THERE)))
    assert {"deepspeed", "omegaconf", "hjson"} <= lacking.keys()
    assert not lacking.keys() & {"torch", "numpy", "transformers"}


@pytest.mark.slow
def test_every_stage_runs_on_a_bare_machine(tmp_path: Path) -> None:
    python = make(tmp_path / "environment", (*THERE, *NEEDED), frozenset())
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    variables |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    absent = f"import importlib.util; assert not any(map(importlib.util.find_spec, {ABSENT}))"
    subprocess.run([str(python), "-c", absent], check=True, env=variables)
    command = [str(python), "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path / "hour")]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "hour" / "results.json").read_text())
    assert {"kernels", "engine", "peers", "profile", "options"} < results.keys()
    errors = {row["operation"]: row["relative"] for row in results["kernels"] if "relative" in row}
    assert len(errors) == 3
    assert max(errors.values()) < 0.05  # of bfloat16
    for stage in ("engine", "options"):
        assert not [row for row in results[stage] if "failed" in row]
    assert all(row["tokens_per_s"] > 0 for row in results["engine"])
    assert results["options"][-1]["losses_equal_bit_for_bit"]
    assert all(row["ms"] > 0 for row in results["peers"])
    assert results["profile"][0]["ms a step"] > 0
    assert (tmp_path / "hour" / "profile" / "trace-2.json").stat().st_size > 1000
