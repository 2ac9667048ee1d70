"""Seconds of a training step with further keys of a train recipe, against those without them.

    python -m benchmarks.step_time RECIPE [key=value ...] --with KEYS [--with KEYS ...] [--rounds 3] [--steps 30]

`key=value` are keys of all runs; KEYS are those of one arm, with spaces: `--with "optimizer.muon.generated=true"`. Each
round trains all arms, one after the other, on one process. Prints the median seconds of a step, and their ratio to a
step without further keys (the median of the rounds).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from sharebert_common.run_files import read_log

WARM_STEPS = 10
"""Steps at the start of each run that do not count."""


def call(*arguments: str) -> str:
    """What a command of sharebert prints. Ends this program with its errors where it fails."""
    command = [sys.executable, "-m", "sharebert_cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return done.stdout


def step_times(recipe: str, arms: Mapping[str, list[str]], rounds: int, folder: Path) -> str:
    """Train each arm in turn, and give a line of a table for each; the first is what the others are divided by.

    Args:
        recipe: a train recipe: a file, or the name of one in `configs`.
        arms: keys of each.
        rounds: how often all of them are trained.
        folder: for the runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for arm, (name, keys) in enumerate(arms.items()):
            run = folder / f"{number}-{arm}"
            watch = ["validate.every=0", "monitor.every=1", "checkpoint.every=100000", f"run={run}"]
            call("train", recipe, *keys, *watch)
            steps = [line["step_s"] for line in read_log(run) if "step_s" in line]
            seconds[name].append(median(steps[WARM_STEPS:]))
    first = seconds[next(iter(arms))]
    return "\n".join(
        f"| {name} | {median(own):.3f} s a step | {median(a / b for a, b in zip(own, first, strict=True)):.3f} |"
        for name, own in seconds.items()
    )


def main() -> None:
    """Train, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("keys", nargs="*")
    parser.add_argument("--with", dest="arms", action="append", default=[], metavar="KEYS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    plain = [*given.keys, f"steps={given.steps}"]
    arms = {given.recipe: plain} | {keys: [*plain, *keys.split()] for keys in given.arms}
    with tempfile.TemporaryDirectory() as folder:
        print(step_times(given.recipe, arms, given.rounds, Path(folder)))


if __name__ == "__main__":
    main()
