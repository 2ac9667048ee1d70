"""The time from the command to the first optimizer step, by stage, for a tiny model on 2 ranks of one machine.

    python -m benchmarks.start_up [--rounds 3] [--ranks 2]

Each line is a launch by torchrun that ends one stage later; the cost of a stage is the difference of the medians:

    agent      the workers do nothing
    torch      they import torch
    imports    they import all that training imports: DeepSpeed and this project
    step       `python -m pretrain` with steps=1, until its log has the step
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

STAGES = {
    "agent": "",
    "torch": "import torch",
    "imports": "import pretrain.train, pretrain.engine.deepspeed_import as d; d.import_deepspeed()",
}


def launch(ranks: int, *arguments: str) -> subprocess.Popen[bytes]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*start, *arguments], env=environment, stderr=subprocess.DEVNULL)


def until_imported(ranks: int, code: str, folder: Path) -> float:
    script = folder / "stage.py"
    script.write_text(code)
    started = time.perf_counter()
    if launch(ranks, str(script)).wait():
        sys.exit(f"error: a worker that runs '{code}' failed")
    return time.perf_counter() - started


def until_first_step(ranks: int, dataset: Path, run: Path) -> float:
    from sharebert_common.run_files import LOG_FILE
    from tests.tiny_runs import train_arguments

    started = time.perf_counter()
    process = launch(ranks, "-m", "pretrain", "demo", *train_arguments(dataset, run, steps=1))
    log = run / LOG_FILE
    while not (log.exists() and log.stat().st_size):
        if process.poll() not in (None, 0):
            sys.exit(f"error: training failed; see {run}")
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    from tests.conftest import make_dataset

    times: dict[str, list[float]] = {name: [] for name in (*STAGES, "step")}
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder) / "dataset")
        for n in range(given.rounds):
            for name, code in STAGES.items():
                times[name].append(until_imported(given.ranks, code, Path(folder)))
            times["step"].append(until_first_step(given.ranks, dataset, Path(folder) / f"run-{n}"))
    before = 0.0
    for name, seconds in times.items():
        after = statistics.median(seconds)
        print(f"{name:8} {after:5.1f} s since the command (+{after - before:.1f} s)")
        before = after


if __name__ == "__main__":
    main()
