"""What the workers wrote: the log of rank 0 as it grows, or the traceback of the first rank that failed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from cluster.folder import ClusterFolder
from sharebert_common.errors import BadInput

TRACEBACK = "Traceback (most recent call last)"
TAIL_LINES = 10


def first_failure(folder: ClusterFolder, attempt: str) -> str:
    """The traceback of the rank of an attempt that failed first; the ends of all logs where there is none.

    Ranks that fail because another one is gone do so after it. Only the last time that torchrun started the workers
    counts.
    """
    logs = sorted((folder.workers / attempt).rglob("stderr.log"), key=lambda file: file.stat().st_mtime_ns)
    newest = max((_torchrun_attempt(file) for file in logs), default=0)
    logs = [file for file in logs if _torchrun_attempt(file) == newest]
    for file in logs:
        _, found, traceback = file.read_text(encoding="utf-8", errors="replace").rpartition(TRACEBACK)
        if found:
            return f"{_worker(folder, file)}:\n{found}{traceback.rstrip()}"
    ends = [f"{_worker(folder, file)}:\n{_end(file)}" for file in logs]
    return "\n".join(["no worker wrote a traceback (killed?)", *ends])


def _torchrun_attempt(file: Path) -> int:
    """How often torchrun had started the workers in place before those of a log."""
    return int(file.parent.parent.name.removeprefix("attempt_"))


def _end(file: Path) -> str:
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])


def _worker(folder: ClusterFolder, file: Path) -> str:
    """A worker in words, from its file workers/ATTEMPT/NODE/ID/attempt_N/LOCAL/…"""
    attempt, node, _, in_place, local = file.relative_to(folder.workers).parts[:5]
    return f"attempt {attempt}, node {node}, local rank {local}, restart in place {in_place.removeprefix('attempt_')}"


def newest_failure(run: Path) -> str:
    """The failure of the newest attempt. Raises BadInput where there is none."""
    folder = ClusterFolder(run)
    if not folder.attempts:
        raise BadInput(f"{run}: was not started by `sharebert submit`")
    return first_failure(folder, folder.attempts[-1]["start"])


def rank_0(run: Path, *, follow: bool) -> Iterator[str]:
    """The lines of rank 0 and of the agents in the newest job; with `follow` until the job's end.

    Raises BadInput where nothing was submitted.
    """
    folder = ClusterFolder(run)
    if not folder.submissions:
        raise BadInput(f"{run}: was not submitted with `sharebert submit`")
    read: dict[Path, int] = {}
    while True:
        over = not follow or _is_over(folder)
        job_folder = Path(folder.submissions[-1]["folder"])
        for file in sorted(job_folder.glob("*_log.out")):
            with file.open("rb") as log:
                log.seek(read.get(file, 0))
                text = log.read()
            whole = text[: text.rfind(b"\n") + 1]
            read[file] = read.get(file, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                if not line.startswith("[rank ") or line.startswith("[rank 0]"):
                    yield line
        if over:
            return
        time.sleep(1)


def _is_over(folder: ClusterFolder) -> bool:
    from cluster.scheduler import is_over

    newest = folder.submissions[-1]
    return is_over(newest["job"], newest["launcher"])
