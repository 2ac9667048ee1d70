"""How often an optimizer step makes the host wait for the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "host_reads.py"

MOST = {"0": 1, "1": 2, "2": 4, "3": 1}
"""Reads a step, of two micro-batches in bf16. At stage 0 the one is ours, of the gradient's norm; the others are
DeepSpeed's own checks that the gradient is finite, and where they are more than one they follow each other."""


@pytest.mark.slow
def test_reads_of_an_optimizer_step() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parents[2])])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reads = json.loads(done.stdout.splitlines()[-1])
    assert reads.keys() == MOST.keys()
    for stage, most in MOST.items():
        assert reads[stage] <= most, f"ZeRO {stage}: {reads[stage]} reads"
