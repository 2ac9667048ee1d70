"""What a power cut may leave of a folder that a program writes: every state, as a folder to look at."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.failing_calls import CrashStates, read_tree, tracing, write_tree

ROOT = Path(__file__).parents[1]


def python(code: str, *given: str, **environment: str) -> str:
    """What a program prints that may import what tests share. Fails the test where it fails."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/pretrain/checkpoint")))
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def states_after_power_cuts(shim: Path, folder: Path, code: str) -> Iterator[tuple[Path, str, list[str]]]:
    """Run `code`, which writes below its argument, and yield each state that a power cut could leave.

    Args:
        shim: the library of `failing_calls.py`.
        folder: an empty one, for all that is made here.
        code: a Python program. What it prints ends up in `folder/printed`.

    Yields (a folder with the state, the last call, names that stood in the root then, whether they are on the disk or
    not: the program makes a name there to say that something should be durable from now on).
    """
    root, state = folder / "root", folder / "state"
    root.mkdir()
    before = read_tree(root)
    (folder / "printed").write_text(python(code, str(root), **tracing(shim, folder / "trace", root)))
    for call, disk, least in CrashStates(before, folder / "trace", root):
        shutil.rmtree(state, ignore_errors=True)
        write_tree(disk, state, least)
        yield state, call, sorted(disk.now)
