"""Run the parts of a stage on all local cores. Each part is complete or absent, and runs once.

A part's result is a folder that appears under its name only when it is complete and on the disk, so it survives a kill
and a power cut. A rerun, on this machine or another, does the parts that are missing or damaged.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from data_prep.disk import flush_below
from data_prep.progress import StageProgress, say
from sharebert_common.errors import BadInput
from sharebert_common.files import flush

_STATS = "stats.json"
_ENDING = 4  # parts that are moved to their place at once; a disk flushes four files in about the time of one


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    `work(job, number, folder)` does part `number`: it writes into `folder` and returns statistics of the part as JSON
    ("bytes" and "tokens" show in the progress). It must be a function of a module, so that it can be pickled, and pure.
    """

    name: str
    parts: int
    work: Callable[[Any, int, Path], dict[str, Any]]


def part_folder(work: Path, stage: str, number: int) -> Path:
    """Folder of the result of a part."""
    return work / stage / f"part-{number:06d}"


def part_stats(work: Path, stage: str, number: int) -> dict[str, Any]:
    """What a finished part returned."""
    return json.loads((part_folder(work, stage, number) / _STATS).read_bytes())["stats"]  # type: ignore[no-any-return]


def missing_parts(work: Path, stage: Stage) -> list[int]:
    """The parts that are not finished. Damaged ones are removed, and missing then."""
    present = {path.name for path in (work / stage.name).glob("part-*")}
    folders = [part_folder(work, stage.name, number) for number in range(stage.parts)]
    return [n for n, folder in enumerate(folders) if folder.name not in present or not _is_whole_or_removed(folder)]


def _is_whole_or_removed(folder: Path) -> bool:
    """Whether a part has all its files in their sizes; else it is removed."""
    if _is_whole(folder):
        return True
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        folder.rename(aside / folder.name)
        if _is_whole(aside / folder.name):  # another process has made it again just now
            (aside / folder.name).rename(folder)
            return True
        say(f"{folder.parent.name}: {folder.name} is damaged, and is made again")
    except FileNotFoundError:  # another process has removed it
        pass
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return False


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _STATS).read_bytes())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


class LocalCores:
    """Runs parts on the cores of this machine. This process is one of the workers. It is a context manager.

    Args:
        workers: number of processes, this one included. The others start in `__enter__`, so that their imports, which
            take most of the time of a small run, happen while this process plans.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._taken: Any = None
        self._processes: list[tuple[Any, Connection]] = []

    def __enter__(self) -> LocalCores:
        if self._workers > 1:
            # Spawned, not forked: libraries with thread pools (tokenizers, Arrow) do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._taken = context.Value("q")
            for _ in range(self._workers - 1):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self._taken), daemon=True)
                process.start()
                theirs.close()
                self._processes.append((process, ours))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, _ in self._processes:
            # It is idle now, and a clean exit would take 60 ms. TERM may be ignored here, and children inherit that.
            process.kill()
            process.join()

    def run(self, stage: Stage, job: Any, work: Path, numbers: Sequence[int]) -> None:
        """Do these parts of a stage.

        Raises what a part raised, or BadInput if a worker was killed.
        """
        (work / stage.name).mkdir(parents=True, exist_ok=True)
        with StageProgress(stage.name, len(numbers)) as progress:
            for stats in self._results(stage, job, work, numbers):
                progress.advance(stats.get("bytes", 0), stats.get("tokens", 0))

    def _results(self, stage: Stage, job: Any, work: Path, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        if not self._processes or len(numbers) == 1:
            yield from _run_parts(stage, job, work, numbers)
            return
        results: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._taken.value = 0
        task = stage, job, work, numbers
        with ThreadPoolExecutor(len(self._processes)) as threads:
            others = [threads.submit(_attend, connection, task, results) for _, connection in self._processes]
            try:
                for stats in _run_parts(stage, job, work, _untaken(numbers, self._taken)):
                    yield stats
                    yield from _received(results)
                    for other in others:
                        if other.done():
                            other.result()
                for other in as_completed(others):
                    other.result()
                    yield from _received(results)
            finally:
                self._taken.value = len(numbers)  # after an error no process begins another part


def _attend(connection: Connection, task: Any, results: SimpleQueue[dict[str, Any]]) -> None:
    """Run in a thread for each worker: send the worker the stage, and receive the statistics of each part."""
    try:
        connection.send(task)
        while isinstance(message := connection.recv(), dict):
            results.put(message)
    except (EOFError, ConnectionError) as error:
        raise BadInput(
            "a worker was killed, most likely for memory; run again with fewer workers, what is done is kept"
        ) from error
    if message is not None:
        raised, trace = message
        raise raised from RuntimeError(f"in a worker:\n{trace}")


def _received(results: SimpleQueue[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while not results.empty():
        yield results.get()


def _serve(connection: Connection, taken: Any) -> None:
    """The main loop of a worker: parts of one stage after the other, until the parent ends it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each core already has a worker
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            stage, job, work, numbers = connection.recv()
        except (EOFError, ConnectionError):  # the parent is gone
            return
        try:
            for stats in _run_parts(stage, job, work, _untaken(numbers, taken)):
                connection.send(stats)
            connection.send(None)
        except Exception as error:
            connection.send((error, traceback.format_exc()))


def _die_with_parent() -> None:
    """End the worker when its parent is killed: a part may take minutes more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _untaken(numbers: Sequence[int], taken: Any) -> Iterator[int]:
    """Take parts that no other process has taken, one at a time, so that no process is idle while another has two."""
    while True:
        with taken.get_lock():
            place = taken.value
            taken.value = place + 1
        if place >= len(numbers):
            return
        yield numbers[place]


def _run_parts(stage: Stage, job: Any, work: Path, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Do parts. Each is moved to its place while the next ones are computed, as a wait for the disk takes no CPU."""
    ending: deque[Future[dict[str, Any]]] = deque()
    with ThreadPoolExecutor(_ENDING) as aside:
        for number in numbers:
            ending.append(aside.submit(_compute(stage, job, work, number).complete))
            while ending and (len(ending) > _ENDING or ending[0].done()):
                yield ending.popleft().result()
        for part in ending:
            yield part.result()


@dataclass(frozen=True)
class _Computed:
    """The result of a part, in a temporary folder."""

    folder: Path
    target: Path
    stats: dict[str, Any]

    def complete(self) -> dict[str, Any]:
        """Give the folder its name. If another process was first, its result stays."""
        try:
            files = [path for path in self.folder.rglob("*") if path.is_file()]
            sizes = {str(path.relative_to(self.folder)): path.stat().st_size for path in files}
            (self.folder / _STATS).write_text(json.dumps({"stats": self.stats, "files": sizes}))
            flush_below(self.folder)
            self.folder.rename(self.target)
            flush(self.target.parent)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.stats


def _compute(stage: Stage, job: Any, work: Path, number: int) -> _Computed:
    target = part_folder(work, stage.name, number)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        return _Computed(folder, target, stage.work(job, number, folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
