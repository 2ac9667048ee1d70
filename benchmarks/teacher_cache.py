"""Steps of a student with a cached teacher, with the teacher itself, and without one.

    python -m benchmarks.teacher_cache DATASET TEACHER [key=value ...] [--rounds 2] [--steps 30]

`key=value` are keys of the train recipe, such as `distill.relations=1` and `model.hidden_size=256`. Each round trains
all three, one after the other, on one process. Prints the median seconds of a step, their ratio to a step without a
teacher (the median of the rounds), and the line of `cache-teacher`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from sharebert_common.run_files import read_log

MODES = ("no teacher", "cached teacher", "teacher in each step")
WARM_STEPS = 10


def main() -> None:
    """Train, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("teacher")
    parser.add_argument("keys", nargs="*", default=["distill.relations=1"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(f"data: {{dataset: {given.dataset}}}\nsteps: {given.steps}\n")
        plain = [key for key in given.keys if not key.startswith("distill.")]
        taught = [*given.keys, f"distill.teacher={given.teacher}"]
        cached = [*taught, f"distill.cache={folder}/cache"]
        print(_call("cache-teacher", recipe, [*cached, f"run={folder}/none"]).strip().splitlines()[-1])
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        for number in range(given.rounds):
            for mode, keys in zip(MODES, (plain, cached, taught), strict=True):
                run = Path(folder) / f"{number}-{MODES.index(mode)}"
                watch = ["validate.every=0", "monitor.every=1", "checkpoint.every=100000", f"run={run}"]
                _call("train", recipe, [*keys, *watch])
                steps = [line["step_s"] for line in read_log(run) if "step_s" in line]
                seconds[mode].append(median(steps[WARM_STEPS:]))
    for mode in MODES:
        ratio = median(ours / none for ours, none in zip(seconds[mode], seconds[MODES[0]], strict=True))
        print(f"| {mode} | {median(seconds[mode]):.3f} s a step | {ratio:.3f} |")


def _call(verb: str, recipe: Path, keys: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sharebert_cli", verb, str(recipe), *keys], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return done.stdout


if __name__ == "__main__":
    main()
