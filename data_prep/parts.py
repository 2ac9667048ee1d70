"""Run the parts of a stage: on all local cores, each whole or absent, none twice.

A part's result is a folder that appears under its name only when it is complete. A rerun, on this machine or
another, does the parts whose folders are missing.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.progress import StageProgress
from sharebert_recipe import BadInput

_STATS = "stats.json"


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    `work(job, number, folder)` does part `number`: it writes into `folder` and returns what to remember of it
    (JSON; "bytes" and "tokens" show in the progress). It must be a function of a module, and a pure one.
    """

    name: str
    parts: int
    text_bytes: int
    work: Callable[[Any, int, Path], dict[str, Any]]


def part_folder(work: Path, stage: str, number: int) -> Path:
    """Where the result of a part lies."""
    return work / stage / f"part-{number:06d}"


def part_stats(work: Path, stage: str, number: int) -> dict[str, Any]:
    """What a finished part returned."""
    return json.loads((part_folder(work, stage, number) / _STATS).read_bytes())  # type: ignore[no-any-return]


def missing_parts(work: Path, stage: Stage) -> list[int]:
    """The parts that nobody has finished."""
    present = {path.name for path in (work / stage.name).glob("part-*")}
    return [n for n in range(stage.parts) if part_folder(work, stage.name, n).name not in present]


def run_parts(stage: Stage, job: Any, work: Path, numbers: Sequence[int], workers: int) -> None:
    """Do these parts of a stage.

    Raises BadInput: what a part raised, or a full disk, or a worker that was killed.
    """
    (work / stage.name).mkdir(parents=True, exist_ok=True)
    share = stage.text_bytes * len(numbers) // max(stage.parts, 1)
    with StageProgress(stage.name, len(numbers), share) as progress:
        for stats in _results(stage, job, work, numbers, min(workers, len(numbers))):
            progress.advance(stats.get("bytes", 0), stats.get("tokens", 0))


def _results(stage: Stage, job: Any, work: Path, numbers: Sequence[int], workers: int) -> Iterator[dict[str, Any]]:
    if workers <= 1:
        for number in numbers:
            yield _run_part(stage, job, work, number)
        return
    # Spawned, not forked: libraries with thread pools (tokenizers, Arrow) do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (stage, job, work)) as pool:
        futures = [pool.submit(_run_part_in_worker, number) for number in numbers]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise BadInput(
                f"{stage.name}: a worker was killed, most likely for memory; run again with fewer workers, "
                "what is done is kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Stage, Any, Path]


def _start_worker(stage: Stage, job: Any, work: Path) -> None:
    global _worker
    _worker = stage, job, work


def _run_part_in_worker(number: int) -> dict[str, Any]:
    return _run_part(*_worker, number)


def _run_part(stage: Stage, job: Any, work: Path, number: int) -> dict[str, Any]:
    target = part_folder(work, stage.name, number)
    try:
        with _whole_folder(target) as folder:
            stats = stage.work(job, number, folder)
            (folder / _STATS).write_text(json.dumps(stats))
        return stats
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(f"{work}: the disk is full; free some space and run again, what is done is kept") from error
        raise


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` at the end; where another process was first, its result stays."""
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield folder
        for path in [*(p for p in folder.rglob("*")), folder]:
            sync(path)
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file's or folder's content on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """As `np.save`, which does not say why where the disk is full."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
