"""Files and folders that are whole or absent, and checksums."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sharebert_common.errors import BadInput

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Write `content` to `path`: a reader sees the old file or the new one, never a part; nor does a crash leave one.

    Args:
        path: of the file.
        content: the whole of it; a text as UTF-8.
        durable: survive a power cut, not only the end of the process; this waits for the disk, some 10 ms.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with temporary.open("wb") as out:
            out.write(content if isinstance(content, bytes) else content.encode())
            if durable:
                out.flush()
                os.fsync(out.fileno())
        temporary.replace(path)
        if durable:
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what a process left that was killed in `write_atomically(path, …)`. No other process may write it now."""
    for leftover in path.parent.glob(f".{path.name}.*-*"):
        leftover.unlink(missing_ok=True)


@contextmanager
def whole_or_absent_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, which takes the place of `out` when the block ends without an error.

    What is in `out` then is replaced; the caller decides whether it may be. The order survives a power cut: all
    files and folders are flushed to the disk, the old folder is moved aside, the new one moved into place, the
    parent flushed, and only then the old one is deleted. Leftovers of writers that were killed on this host are
    removed first; if one was killed between the two moves, the old folder is put back.

    Raises BadInput where `out` cannot be made, or its disk is full.
    """
    out = Path(out)
    out = out.resolve() if out.is_symlink() else out
    try:
        mkdir_durably(out.parent)
        _clean_leftovers(out)
        folder = out.with_name(f".{out.name}.{socket.gethostname()}.{secrets.token_hex(4)}")
        folder.mkdir()  # with the mode that the umask leaves; a folder of tempfile would be for its owner alone
    except OSError as error:
        raise BadInput(f"{out}: cannot be made ({error.strerror}: {error.filename})") from error
    lock = _lock(folder)
    try:
        yield folder
        flush_tree(folder)
        _replace_folder(folder, out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise BadInput(f"{out}: cannot be written ({error.strerror}); nothing was left there") from error
        raise
    finally:
        _unlock(lock)


def flush_tree(folder: Path) -> None:
    """Flush all files and folders under `folder`, and `folder` itself, to the disk; this waits for the disk."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            flush(Path(parent, name))
        flush(Path(parent))


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; this waits for the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(opened)


_OLD = ".old"
"""Ends the name of a folder that is being replaced."""


def _replace_folder(folder: Path, out: Path) -> None:
    if not out.exists():
        folder.replace(out)
        flush(out.parent)
        return
    old = folder.with_name(f"{folder.name}{_OLD}")
    lock = _lock(out)  # another writer's clean-up leaves a locked folder alone
    try:
        out.replace(old)
        try:
            folder.replace(out)
        except OSError:
            old.replace(out)
            raise
        flush(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        _unlock(lock)


_DEAD_S = 60.0
"""A folder that another host moved aside this long ago, with none in its place since, was left by a dead writer."""


def _clean_leftovers(out: Path) -> None:
    """Remove the temporary folders of `out` whose writers are dead for sure: made on this host, and not locked.

    An old folder that was moved aside is put back where there is none in its place, also one of another host. Whether
    its writer is alive, a lock may not tell there; but a writer needs a moment between its two moves.
    """
    pattern = glob.escape(f".{out.name}.{socket.gethostname()}.") + "*"
    ours = sorted(out.parent.glob(pattern), reverse=True)  # an `.old` folder before the one that replaces it
    theirs = [left for left in sorted(out.parent.glob(glob.escape(f".{out.name}.") + f"*{_OLD}")) if left not in ours]
    for left in [*ours, *theirs]:
        lock = _lock(left)
        if lock is None:
            continue
        try:
            if left.suffix == _OLD and not out.exists():
                if left in ours or time.time() - left.stat().st_ctime > _DEAD_S:
                    left.replace(out)
                    flush(out.parent)
            elif left in ours:
                shutil.rmtree(left, ignore_errors=True)
        finally:
            _unlock(lock)


def _lock(folder: Path) -> int | None:
    """A lock on a folder, which ends with this process; None where another process has it, or there are no locks."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        return None
    return opened


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def make_folders(folder: Path) -> None:
    """Make a folder that a user named, and its parents, unless they exist, and flush the new names to the disk.

    Raises BadInput, naming the folder, where it cannot be made: below a file, in /proc, on a full disk.
    """
    try:
        mkdir_durably(folder)
    except OSError as error:
        raise BadInput(
            f"{folder}: cannot be made ({error.strerror}: {error.filename}); choose another folder"
        ) from error


def mkdir_durably(folder: Path) -> None:
    """What `make_folders` does, for those who say by themselves what is wrong. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return sha256(file)


def sha256(file: BinaryIO) -> str:
    """SHA-256 of what is left of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
