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
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from compress.recipe import CompressRecipe
from compress.report import read_report, result_row
from compress.run import compress
from exports.files import write_json
from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256, make_folders
from sharebert_common.recipe import parse

AS_IT_IS = "as it is"
"""The line of the classifiers before the steps."""


def scored(steps: list[Any], given: argparse.Namespace, classifier: str) -> dict[str, Any]:
    """Main dev score of a classifier before and after steps, and bytes after."""
    recipe = {
        "steps": steps,
        "calibration": {"dataset": given.calibration, "rows": given.rows},
        "task": {
            "task": given.task,
            "data": {"path": given.data, "header": [*filter(None, given.header.split(","))]},
            "finetune": {"max_length": given.max_length},
        },
        "report": {"latency": []},
    }
    with tempfile.TemporaryDirectory(dir=given.out) as folder:
        compress(Path(classifier), parse(CompressRecipe, recipe, given.steps), Path(folder) / "out")
        rows = read_report(Path(folder) / "out")[2]
    before, after = (next(iter(row.scores.values()))[0] for row in (rows[0], result_row(rows)))
    return {"before": before, "after": after, "bytes": result_row(rows).bytes}


def steps_of(file: str) -> dict[str, list[Any]]:
    """The lists of steps by their names. Raises BadInput: not readable, or something else."""
    try:
        found = yaml.safe_load(Path(file).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(steps, list) for steps in found.values()):
        raise BadInput(f"{file}: not a mapping of names to lists of steps")
    return found


def table(given: argparse.Namespace) -> str:
    """Score what is missing. Raises BadInput: a classifier, a step or data that is wrong."""
    make_folders(Path(given.out))
    file = Path(given.out) / "scores.json"
    done: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    weights = {
        classifier: [file_sha256(path) for path in sorted(Path(classifier).glob("*.safetensors"))]
        for classifier in given.classifiers
    }
    asked = [given.task, given.data, given.calibration, given.rows, given.header, given.max_length]
    lines = ["| | MB | score | of the classifiers |", "|---|---:|---:|---:|"]
    for name, steps in steps_of(given.steps).items():
        found = []
        for classifier in given.classifiers:
            key = json.dumps([steps, *asked, weights[classifier]])
            if key not in done:
                done[key] = scored(steps, given, classifier)
                write_json(file, done)
            found.append(done[key])
        before, after = ([one[key] for one in found] for key in ("before", "after"))
        if len(lines) == 2:
            lines.append(f"| {AS_IT_IS} | | {spread(before)} | 1 |")
        kept, size = mean(after) / mean(before), mean(one["bytes"] for one in found) / 1e6
        lines.append(f"| {name} | {size:.3f} | {spread(after)} | {kept:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or what is wrong in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps")
    parser.add_argument("task")
    parser.add_argument("data")
    parser.add_argument("calibration")
    parser.add_argument("classifiers", nargs="+")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--header", default="", help="names of the columns, with commas, where files have none")
    parser.add_argument("--max-length", type=int, default=64, help="longer texts are cut")
    parser.add_argument("--out", required=True)
    try:
        print(table(parser.parse_args()))
    except (BadInput, OSError) as error:
        raise SystemExit(str(error)) from error


def spread(values: list[float]) -> str:
    """Mean ± standard deviation in percent."""
    return f"{100 * mean(values):.1f} ± {100 * stdev(values) if len(values) > 1 else 0:.1f}"


if __name__ == "__main__":
    main()
