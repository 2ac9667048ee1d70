"""What the engine costs: how often a step makes the host wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "engine_costs.py"

MOST = {"0": 1, "1": 2, "2": 4, "3": 1}
"""Reads a step, of two micro-batches in bf16. At stage 0 the one is ours, of the gradient's norm; the others are
DeepSpeed's own checks that the gradient is finite, and where they are more than one they follow each other."""


@pytest.fixture(scope="module")
def costs() -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parents[3])])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_reads_of_an_optimizer_step(costs: dict[str, Any]) -> None:
    assert costs["reads"].keys() == MOST.keys()
    for stage, most in MOST.items():
        assert costs["reads"][stage] <= most, f"ZeRO {stage}: {costs['reads'][stage]} reads"


def test_nothing_waits_for_the_whole_device(costs: dict[str, Any]) -> None:
    assert costs["synchronisations"] == dict.fromkeys(MOST, 0)
