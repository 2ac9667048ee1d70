"""What the words of the command stand for: types of argparse, and flags that are keys of a cluster recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

CLUSTER_FLAGS = {
    "nodes": "number of nodes; with --stage prep, number of tasks of the array",
    "gpus-per-node": "number of GPUs of each node",
    "procs-per-node": "number of processes of each node (default: one for each GPU)",
    "cpus-per-process": "number of CPU cores of each process",
    "time": "time limit, such as 24:00:00; a run that needs more time requeues itself",
    "partition": "partition of SLURM",
    "account": "account of SLURM",
    "qos": "quality of service of SLURM",
    "memory": "memory of each node, such as 64G",
    "constraint": "features that the nodes must have",
    "exclude": "nodes that the job must not use",
    "container": "container image that the job runs in",
}
"""Keys of a cluster recipe that have a flag of their own."""


def quoted(value: str) -> str:
    """The value of a flag as a YAML string: without quotes 24:00:00 would be a number."""
    return f'"{value}"'


def path(text: str) -> Path:
    """A path; `~` is the home, also where the shell does not expand it, as in `--save=~/x`."""
    return Path(text).expanduser()


def numbers(kind: type[int] | type[float]) -> Any:
    """A type of argparse: positive numbers with commas between them."""

    def parse(text: str) -> list[float]:
        numbers = [kind(part) for part in text.split(",")]
        if min(numbers) <= 0:
            raise argparse.ArgumentTypeError(f"'{text}': numbers above 0, with commas between them")
        return numbers

    parse.__name__ = "number"
    return parse


def count(text: str) -> int:
    """A number above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}': give a number above 0")
    return int(text)


def task(text: str) -> tuple[int, int]:
    """The two numbers of `I/N`."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"'{text}': write I/N, with I from 0 to N-1")
    return int(number), int(count)
