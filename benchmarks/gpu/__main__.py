"""`python -m benchmarks.gpu`: the stages one after the other, each in a process of its own with its own minutes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Stage(NamedTuple):
    """A part of the hour."""

    minutes: float
    where: str
    """"module:function"; the function takes (folder, device) and yields rows."""
    what: str


STAGES = {
    "kernels": Stage(
        4, "benchmarks.gpu.kernels:kernels", "kernels: error, time, bandwidth; attention; virtual weights"
    ),
    "engine": Stage(8, "benchmarks.gpu.training:engine", "trainings: ZeRO stages and micro-batches"),
    "peers": Stage(5, "benchmarks.gpu.peers:peers", "BertForMaskedLM and nn.TransformerEncoder, plain and compiled"),
    "profile": Stage(5, "benchmarks.gpu.profile:profile_steps", "the kernels of a step"),
    "options": Stage(12, "benchmarks.gpu.training:options", "trainings: options, fp16, out of memory, stop and resume"),
}


def facts(device: str) -> dict[str, Any]:
    """The card, the versions and the commit."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
    }
    for name in ("torch", "triton", "deepspeed", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"memory_gb": properties.total_memory / 1e9, "capability": f"{properties.major}.{properties.minor}"}
    return found


def run_stage(name: str, folder: Path, device: str) -> None:
    """In a process of its own: print a line of JSON for each row as soon as there is one."""
    from importlib import import_module

    module, _, function = STAGES[name].where.partition(":")
    rows: Callable[[Path, str], Iterator[dict[str, Any]]] = getattr(import_module(module), function)
    for row in rows(folder, device):
        print(json.dumps(row), flush=True)


def collect(name: str, folder: Path, device: str) -> list[dict[str, Any]]:
    """Run a stage; its rows, and a last one with the reason where it did not end well."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    output, errors = folder / f"{name}.jsonl", folder / f"{name}.log"
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, "--device", device, "--out", str(folder / name)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with output.open("w") as out, errors.open("w") as log:
        try:
            code = subprocess.run(
                command,
                stdout=out,
                stderr=log,
                timeout=STAGES[name].minutes * 60,
                cwd=ROOT,
                env=environment,
                check=False,
            ).returncode
            end = "" if code == 0 else f"exit code {code}; see {errors}"
        except subprocess.TimeoutExpired:
            end = f"cut after {STAGES[name].minutes:g} minutes"
    lines = [line for line in output.read_text().splitlines() if line.startswith("{")]
    rows = [json.loads(line) for line in lines]
    return rows + ([{"failed": end}] if end else [])


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row: key value, key value."""

    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "\n".join("  " + ", ".join(f"{key} {shown(value)}" for key, value in row.items()) for row in rows)


def main() -> int:
    """Run the stages that were asked for; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", default=",".join(STAGES), help="stages, with commas between (default: all)")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of results.json, logs and traces")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        run_stage(given.stage, given.out, given.device)
        return 0
    wanted = given.only.split(",")
    unknown = sorted(set(wanted) - set(STAGES))
    if unknown:
        parser.error(f"--only: no stage '{unknown[0]}' (there are: {', '.join(STAGES)})")
    import torch

    device = "cpu" if given.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --rehearse runs the same on a CPU, at tiny sizes")
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"facts": facts(device)}
    print(table([results["facts"]]), flush=True)
    for name in wanted:
        print(f"{name} (at most {STAGES[name].minutes:g} minutes): {STAGES[name].what}", file=sys.stderr, flush=True)
        results[name] = collect(name, given.out.resolve(), device)
        (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name in wanted:
        print(f"{name}: {STAGES[name].what}\n{table(results[name])}")
    print(given.out / "results.json")
    ended = all(not any(set(row) == {"failed"} for row in results[name]) for name in wanted)
    return 0 if ended else 1


if __name__ == "__main__":
    sys.exit(main())
