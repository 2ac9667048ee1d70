"""One process at a time in a folder for work in progress; the tasks of an array share it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from data_prep.progress import say
from sharebert_common.errors import BadInput
from sharebert_common.files import mkdir_durably

LOCK = "lock"


@contextmanager
def locked(work: Path, shared: bool = False, who: str = "prep", at: Path | None = None) -> Iterator[None]:
    """Hold the lock of a folder for work in progress, which is made where it is missing.

    A process that finds the lock held waits for it. The lock ends with the process that holds it, however that ends.

    Args:
        work: the folder; whoever holds the lock may delete it.
        shared: whether others may hold the lock at the same time, if they share it too.
        who: what another holder is called.
        at: the folder that messages name; None for the output of a prep, which `work` lies in.

    Raises BadInput where the folder cannot be made.
    """
    file = _acquired(work, shared, who, at)
    try:
        yield
    finally:
        file.close()


_MOST_MISSING = 100
"""A folder that is missing so often after it was made cannot be made here, in /proc for instance."""


def _acquired(work: Path, shared: bool, who: str, at: Path | None) -> IO[bytes]:
    place, named = (work.parent, f"output: {work.parent}") if at is None else (at, f"{at}")
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    said = False
    missing = 0
    while True:
        try:
            mkdir_durably(work)
            file = (work / LOCK).open("a+b")  # NFS gives a shared lock on readable files only
        except FileNotFoundError as error:
            missing += 1
            if missing < _MOST_MISSING:  # the holder has deleted the folder just now
                continue
            raise BadInput(f"{named}: {error.strerror}") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise BadInput(f"{named}: {error.strerror}") from error
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not said:
                say(f"another {who} works in {place}; waiting until it ends")
                said = True
            fcntl.flock(file, kind)
        except OSError as error:
            say(f"no locks in {place} ({error.strerror}): take care that no other {who} works there")
            return file
        if _is_current(file, work / LOCK):
            return file
        file.close()  # the folder was deleted while this process waited


def _is_current(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
