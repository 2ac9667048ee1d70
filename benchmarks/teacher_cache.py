"""Steps of a student with a cached teacher, with the teacher itself, and without one.

    python -m benchmarks.teacher_cache DATASET TEACHER [key=value ...] [--rounds 2] [--steps 30]

`key=value` are keys of the train recipe, such as `distill.relations=1` and `model.hidden_size=256`. Each round trains
all three, one after the other, on one process. Prints the median seconds of a step, their ratio to a step without a
teacher (the median of the rounds), and the line of `cache-teacher`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.step_time import call, step_times


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
        print(call("cache-teacher", str(recipe), *cached, f"run={folder}/none").strip().splitlines()[-1])
        arms = {"no teacher": plain, "cached teacher": cached, "teacher in each step": taught}
        print(step_times(str(recipe), arms, given.rounds, Path(folder)))


if __name__ == "__main__":
    main()
