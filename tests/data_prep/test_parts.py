"""Parts on several processes: each part is done once, also when a worker fails or dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep.parts import LocalCores, Stage, missing_parts, part_stats
from sharebert_common.errors import BadInput


def write(job: Any, number: int, folder: Path) -> dict[str, Any]:
    time.sleep(0.02)
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text(f"{job} {number}")
    return {"number": number, "process": os.getpid()}


def fail_in_a_worker(job: Any, number: int, folder: Path) -> dict[str, Any]:
    if multiprocessing.parent_process():
        raise BadInput(f"{job}, row 7")
    return write(job, number, folder)


def die_in_a_worker(job: Any, number: int, folder: Path) -> dict[str, Any]:
    if multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    return write(job, number, folder)


def test_every_part_once_by_all_processes(tmp_path: Path) -> None:
    stage = Stage("stage", 300, write)
    with LocalCores(2) as cores:
        cores.run(stage, "job", tmp_path, range(0, 300, 3))
        assert missing_parts(tmp_path, stage) == [n for n in range(300) if n % 3]
        cores.run(stage, "job", tmp_path, missing_parts(tmp_path, stage))
    assert missing_parts(tmp_path, stage) == []
    stats = [part_stats(tmp_path, "stage", number) for number in range(300)]
    assert [stat["number"] for stat in stats] == list(range(300))
    assert len({stat["process"] for stat in stats}) == 2
    assert (tmp_path / "stage" / "part-000299" / "sub" / "file").read_text() == "job 299"
    assert len(list((tmp_path / "stage").iterdir())) == 300, "no temporary folder is left"


@pytest.mark.parametrize(
    ("work", "message"), [(fail_in_a_worker, "corpus, row 7"), (die_in_a_worker, "a worker was killed")]
)
def test_what_happens_in_a_worker_ends_the_run(tmp_path: Path, work: Any, message: str) -> None:
    stage = Stage("stage", 3000, work)
    with LocalCores(2) as cores, pytest.raises(BadInput, match=message):
        cores.run(stage, "corpus", tmp_path, range(3000))
    assert missing_parts(tmp_path, stage)
    assert not multiprocessing.active_children()


@pytest.mark.timeout(60)
def test_workers_end_where_term_is_ignored() -> None:
    """Children inherit that a signal is ignored, as from a script with `trap '' TERM`."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with LocalCores(2):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not multiprocessing.active_children()
