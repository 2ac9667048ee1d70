"""Scores of classifiers after the steps of `sharebert compress`: one line a list of steps, over several classifiers.

    python -m benchmarks.step_scores STEPS.yaml TASK DATA CALIBRATION CLASSIFIER ... --out FOLDER

STEPS.yaml maps a name to a list of steps: `half: [{prune_structure: {heads: 0.5, columns: 0.5}}]`. Each CLASSIFIER is a
folder that `sharebert evaluate --save` wrote, one a seed. The steps look at train rows of the dataset CALIBRATION. A
score is that of the result on the dev rows of DATA, without fine-tuning after the steps. Results are kept in FOLDER,
and a command that is started again makes what is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml

from compress.recipe import CompressRecipe, ReportRecipe, RowsRecipe
from compress.report import read_report, result_row
from compress.run import compress
from exports.files import write_json
from scoring.recipe import EvaluateRecipe, TaskDataRecipe

AS_IT_IS = "as it is"
"""The line of the classifiers before the steps."""


def scored(steps: list[Any], given: argparse.Namespace, classifier: str) -> dict[str, Any]:
    """Main dev score of a classifier before and after steps, and bytes after."""
    header = given.header.split(",") if given.header else []
    task = EvaluateRecipe(task=given.task, data=TaskDataRecipe(path=given.data, header=header))
    recipe = CompressRecipe(
        steps=steps,
        calibration=RowsRecipe(dataset=given.calibration, rows=given.rows),
        task=task,
        report=ReportRecipe(latency=[]),
    )
    with tempfile.TemporaryDirectory(dir=given.out) as folder:
        compress(Path(classifier), recipe, Path(folder) / "out")
        rows = read_report(Path(folder) / "out")[2]
    before, after = (next(iter(row.scores.values()))[0] for row in (rows[0], result_row(rows)))
    return {"before": before, "after": after, "bytes": result_row(rows).bytes}


def main() -> None:
    """Score what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps")
    parser.add_argument("task")
    parser.add_argument("data")
    parser.add_argument("calibration")
    parser.add_argument("classifiers", nargs="+")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--header", default="", help="names of the columns, with commas, where files have none")
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    Path(given.out).mkdir(parents=True, exist_ok=True)
    file = Path(given.out) / "scores.json"
    done: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    lists = yaml.safe_load(Path(given.steps).read_text())
    for name, steps in lists.items():
        for classifier in given.classifiers:
            key = f"{name} {json.dumps(steps)}"
            if classifier not in done.setdefault(key, {}):
                done[key][classifier] = scored(steps, given, classifier)
                write_json(file, done)
    print("| | MB | score | of the classifiers |\n|---|---:|---:|---:|")
    before: list[float] = []
    for name, steps in lists.items():
        found = [done[f"{name} {json.dumps(steps)}"][classifier] for classifier in given.classifiers]
        if not before:
            before = [one["before"] for one in found]
            print(f"| {AS_IT_IS} | | {spread(before)} | 1 |")
        after = [one["after"] for one in found]
        size = statistics.mean(one["bytes"] for one in found) / 1e6
        kept = statistics.mean(after) / statistics.mean(before)
        print(f"| {name} | {size:.3f} | {spread(after)} | {kept:.3f} |")


def spread(values: list[float]) -> str:
    """Mean ± standard deviation in percent."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values) if len(values) > 1 else 0:.1f}"


if __name__ == "__main__":
    main()
