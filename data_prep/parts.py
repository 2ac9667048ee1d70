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
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
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


class LocalCores:
    """Runs parts on the cores of this machine; a context manager. This process is one of the workers.

    Args:
        job: handed to every part's work.
        work: the folder of the results.
        workers: processes, this one included.
    """

    def __init__(self, job: Any, work: Path, workers: int) -> None:
        self._job, self._work, self._workers = job, work, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> LocalCores:
        if self._workers > 1:
            # Spawned, not forked: libraries with thread pools (tokenizers, Arrow) do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers - 1, context, _start_worker, (self._job, self._work))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, stage: Stage, numbers: Sequence[int]) -> None:
        """Do these parts of a stage.

        Raises what a part raised; BadInput where a worker was killed.
        """
        (self._work / stage.name).mkdir(parents=True, exist_ok=True)
        with StageProgress(stage.name, len(numbers)) as progress:
            try:
                for stats in self._results(stage, numbers):
                    progress.advance(stats.get("bytes", 0), stats.get("tokens", 0))
            except BrokenProcessPool as error:
                raise BadInput(
                    f"{stage.name}: a worker was killed, most likely for memory; run again with fewer workers, "
                    "what is done is kept"
                ) from error

    def _results(self, stage: Stage, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        if self._pool is None or len(numbers) == 1:
            for number in numbers:
                yield _run_part(stage, self._job, self._work, number)
            return
        # The pool takes parts from the front, this process from the back those that the pool has not begun.
        futures = {number: self._pool.submit(_run_part_in_worker, stage, number) for number in numbers}
        while futures:
            number, future = futures.popitem()
            if not future.cancel():
                futures[number] = future
                break
            yield _run_part(stage, self._job, self._work, number)
            for number in [number for number, future in futures.items() if future.done()]:
                yield futures.pop(number).result()
        for future in as_completed(futures.values()):
            yield future.result()


_worker: tuple[Any, Path]


def _start_worker(job: Any, work: Path) -> None:
    global _worker
    _worker = job, work
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there is a worker for every core already
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A pool's worker waits for ever where its parent was killed; this one does not."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_part_in_worker(stage: Stage, number: int) -> dict[str, Any]:
    return _run_part(stage, *_worker, number)


def _run_part(stage: Stage, job: Any, work: Path, number: int) -> dict[str, Any]:
    target = part_folder(work, stage.name, number)
    with _whole_folder(target) as folder:
        stats = stage.work(job, number, folder)
        (folder / _STATS).write_text(json.dumps(stats))
    return stats


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` at the end; where another process was first, its result stays.

    Not flushed to disk: it survives a kill of the process, and only the finished dataset must survive a power cut.
    """
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield folder
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """As `np.save`, which does not say why where the disk is full."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
