"""The watchdog of one rank: what hangs is ended with its stacks, and what was suspended is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from pretrain import train as training
from pretrain.distributed import World
from pretrain.faults.watchdog import Watchdog
from pretrain.run.folder import RunFolder

ROOT = Path(__file__).parents[3]

RANK = """
import ctypes, sys, time
import torch
from pretrain.distributed import World
from pretrain.faults.watchdog import Watchdog
from pretrain.run.folder import RunFolder

what, seconds = sys.argv[2], float(sys.argv[3])
with Watchdog(RunFolder(sys.argv[1]), World(0, 1, 0, torch.device("cpu")), hang_s=2.0) as watchdog:
    watchdog.at("working")
    print("watched", flush=True)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if what == "works":
            watchdog.at("working")
        if what == "holds the lock":
            ctypes.PyDLL(None).sleep(60)
        time.sleep(0.05)
print("done", flush=True)
"""


def start(folder: Path, what: str, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(folder), what, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "watched\n"
    return process


@pytest.mark.parametrize(
    "whole_job",
    [pytest.param(True, id="the whole job", marks=pytest.mark.slow), pytest.param(False, id="the rank alone")],
)
def test_time_in_which_the_process_was_suspended_does_not_count(tmp_path: Path, whole_job: bool) -> None:
    """As `scontrol suspend`, SIGSTOP and a laptop's lid do: for far longer than a rank may hang."""
    rank = start(tmp_path, "works", 8.0)
    send = os.killpg if whole_job else os.kill
    send(rank.pid, signal.SIGSTOP)
    time.sleep(6.0)
    send(rank.pid, signal.SIGCONT)
    said, errors = rank.communicate(timeout=60)
    assert (rank.returncode, said) == (0, "done\n"), errors


def test_a_rank_that_hangs_after_it_was_suspended_is_ended(tmp_path: Path) -> None:
    rank = start(tmp_path, "hangs", 60.0)
    os.killpg(rank.pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.killpg(rank.pid, signal.SIGCONT)
    _, errors = rank.communicate(timeout=30)
    assert rank.returncode == 1
    assert "rank 0 has not moved for" in errors


def test_a_rank_in_which_no_python_runs_any_more_is_killed_with_its_stacks(tmp_path: Path) -> None:
    started = time.monotonic()
    rank = start(tmp_path, "holds the lock", 60.0)
    _, errors = rank.communicate(timeout=40)
    assert rank.returncode == -signal.SIGKILL
    assert time.monotonic() - started < 30
    assert "Current thread" in errors
    assert "_watch" in errors


def test_the_guard_ends_with_the_rank(tmp_path: Path) -> None:
    rank = start(tmp_path, "works", 60.0)
    (guard,) = map(int, Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split())
    rank.kill()
    rank.communicate(timeout=20)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{guard}").exists() and "Z" not in Path(f"/proc/{guard}/stat").read_text().split(")")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_block_of_a_validation_and_a_look_are_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation of many short blocks may take longer than a rank may hang."""
    watchdog = Watchdog(RunFolder(tmp_path), World(0, 1, 0, torch.device("cpu")), hang_s=2.0)
    trainer, seen = MagicMock(), []
    trainer.watchdog = watchdog
    trainer.metric_log.progress = lambda items, what, total: items
    trainer.look = lambda step: seen.append((watchdog._moves, watchdog._place))

    def validate(*given: Any, progress: Any, **more: Any) -> tuple[float, float]:
        seen.extend((watchdog._moves, watchdog._place) for _ in progress("abc", "validation", 3))
        return 1.0, 0.5

    monkeypatch.setattr(training, "validate", validate)
    training.Trainer.validate(trainer, 7)
    assert [place for _, place in seen] == [
        *(f"validation after step 7, block {n}" for n in range(3)),
        "validation after step 7 done",
    ]
    assert [moves for moves, _ in seen] == [2, 3, 4, 5]
    assert watchdog._place == "validation after step 7 and look done"
