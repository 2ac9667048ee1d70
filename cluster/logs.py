"""What the workers wrote: rank 0 as it goes, or the first rank that failed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from cluster.folder import ClusterFolder
from sharebert_common.errors import BadInput

TRACEBACK = "Traceback (most recent call last)"
TAIL_LINES = 10


def first_failure(folder: ClusterFolder, start: str) -> str:
    """The traceback of the rank of a start that failed first, and where; the ends of all logs where there is none.

    Ranks that fail because another one is gone do so after it. Only the last launch within the start counts.
    """
    logs = sorted((folder.workers / start).rglob("stderr.log"), key=lambda file: file.stat().st_mtime_ns)
    newest = max((_attempt(file) for file in logs), default=0)
    logs = [file for file in logs if _attempt(file) == newest]
    for file in logs:
        _, found, traceback = file.read_text(encoding="utf-8", errors="replace").rpartition(TRACEBACK)
        if found:
            return f"{_worker(folder, file)}:\n{found}{traceback.rstrip()}"
    ends = [f"{_worker(folder, file)}:\n{_end(file)}" for file in logs]
    return "\n".join(["no worker wrote a traceback (killed?)", *ends])


def _attempt(file: Path) -> int:
    return int(file.parent.parent.name.removeprefix("attempt_"))


def _end(file: Path) -> str:
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])


def _worker(folder: ClusterFolder, file: Path) -> str:
    """A worker from its file workers/START/NODE/ID/attempt_N/LOCAL/…"""
    start, node, _, attempt, local = file.relative_to(folder.workers).parts[:5]
    return f"start {start}, node {node}, local rank {local}, {attempt.replace('_', ' ')}"


def newest_failure(run: Path) -> str:
    """The failure of the newest start. Raises BadInput where nothing was started."""
    folder = ClusterFolder(run)
    if not folder.starts:
        raise BadInput(f"{run}: was not started on a cluster")
    return first_failure(folder, folder.starts[-1]["start"])


def rank_0(run: Path, *, follow: bool) -> Iterator[str]:
    """What rank 0 and the agents wrote, from the newest start on; with `follow` until the job's end.

    Raises BadInput where nothing was started.
    """
    folder = ClusterFolder(run)
    if not folder.submissions:
        raise BadInput(f"{run}: was not submitted to a cluster")
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
