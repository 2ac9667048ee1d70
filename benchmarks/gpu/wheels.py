"""Gather the wheels that a bare machine lacks: one with torch, triton, transformers, safetensors and tensorboard.

    make gpu-wheels [GPU_PYTHON=3.12]     or: python -m benchmarks.gpu.wheels [--python 3.12] [--out gpu-wheels]

On the bare machine, without a network:

    pip install --no-index --no-deps gpu-wheels/*.whl
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

THERE = ("torch", "triton", "transformers", "safetensors", "tensorboard")
"""What a bare machine has, with all that these require."""

NEEDED = ("deepspeed", "omegaconf", "pydantic", "xxhash")
"""What a training imports beside."""

NO_WHEEL = {"deepspeed"}
"""Comes as source alone: built here, for any Python, without the ops that DeepSpeed would compile."""


def required(names: Iterable[str], left_out: frozenset[str] = frozenset()) -> dict[str, metadata.Distribution]:
    """The installed distributions of these names and of all that they require, without extras, by name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found or name in left_out:
            continue
        found[name] = metadata.distribution(name)
        requirements = map(Requirement, found[name].requires or [])
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def gather(out: Path, python: str) -> None:
    """Download for Linux on x86-64 and the given Python; build what has no wheel. Raises CalledProcessError."""
    lacking = required(NEEDED, frozenset(required(THERE)))
    pins = {name: f"{name}=={distribution.version}" for name, distribution in lacking.items()}
    pip = [sys.executable, "-m", "pip"]
    platforms = [f"--platform={name}" for name in ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "any")]
    only = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    wheels = [pin for name, pin in pins.items() if name not in NO_WHEEL]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", *only, "--dest", str(out), *wheels], check=True)
    sources = [pin for name, pin in pins.items() if name in NO_WHEEL]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), *sources]
    subprocess.run(build, check=True, env=os.environ | {"DS_BUILD_OPS": "0"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    parser.add_argument("--out", type=Path, default=Path("gpu-wheels"))
    given = parser.parse_args()
    gather(given.out, given.python)
    files = sorted(given.out.glob("*.whl"))
    print(*(file.name for file in files), sep="\n")
    print(f"{given.out}: {len(files)} wheels, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
