"""Faults below Python: chosen calls of the C library fail, and power cuts are replayed.

`failing_calls.c` is loaded into the processes under test. It reads these environment variables:

    FAILING_CALLS       a file with a line `CALL ERRNO COUNT PART` for each rule: the next COUNT calls fail with ERRNO
                        on paths in which PART occurs. All processes count together; rules may change at any time
    CALLS_TRACE         a folder: its file `log` gets a line for each call that changes a name or flushes it, and each
                        file that is flushed is copied there
    CALLS_TRACE_UNDER   the folder whose paths are noted
    CLOCK_SHIFT_S       seconds that the clock of the wall is ahead; negative for behind

Calls: open, read, fsync (with fdatasync), rename, link, unlink (with rmdir), mkdir, listdir, stat.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

SOURCE = Path(__file__).with_suffix(".c")


class NoCompiler(RuntimeError):
    """There is no C compiler here, or it cannot build a shared library."""


def compile_shim(folder: Path) -> Path:
    """Compile the C source into `folder`. Returns the library. Raises NoCompiler."""
    library = folder / "failing_calls.so"
    compiler = shutil.which("cc")
    if compiler is None:
        raise NoCompiler("no C compiler `cc` on this machine")
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise NoCompiler(f"cc cannot build it: {done.stderr[-500:]}")
    return library


@dataclass
class FailingCalls:
    """Rules for processes that are started with `environment`."""

    library: Path
    rules: Path
    """The file of rules."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a process needs."""
        return {"LD_PRELOAD": str(self.library), "FAILING_CALLS": str(self.rules)}

    def fail(self, call: str, number: int, path_part: str, times: int = 999_999) -> None:
        """From now on, the next `times` calls of `call` fail with errno `number` where `path_part` is in the path."""
        with self.rules.open("a", encoding="utf-8") as out:
            out.write(f"{call} {number} {times:06d} {path_part}\n")

    def left(self) -> int:
        """How many calls are still to fail."""
        lines = self.rules.read_text(encoding="utf-8").splitlines() if self.rules.exists() else []
        return sum(int(line.split(" ", 3)[2]) for line in lines)

    def stop(self) -> None:
        """No call fails any more."""
        self.rules.unlink(missing_ok=True)


@dataclass
class File:
    """A file of the model, with the bytes that are on the disk for sure."""

    synced: bytes = b""


@dataclass
class Folder:
    """A folder of the model: its names now, and those that are on the disk for sure."""

    now: dict[str, Node] = field(default_factory=dict)
    synced: dict[str, Node] = field(default_factory=dict)


Node: TypeAlias = File | Folder


def read_tree(path: Path) -> Node:
    """A file or folder whose content is on the disk, all of it."""
    if not path.is_dir():
        return File(path.read_bytes())
    entries = {child.name: read_tree(child) for child in path.iterdir()}
    return Folder(entries, dict(entries))


class CrashStates:
    """What a disk may hold after a power cut, at each moment of a trace.

    A name is sure to be there once its folder was flushed after it was made; the bytes of a file are those of its last
    flush. Two states for each moment: `least` has only the names that are sure; `ordered` has all of them, as a file
    system with a journal that was written just before the cut. Both hold of each file only the bytes that were flushed.
    """

    def __init__(self, before: Node, trace: Path, root: Path) -> None:
        """`before`: from `read_tree(root)` before the calls; `trace`, `root`: CALLS_TRACE and CALLS_TRACE_UNDER."""
        assert isinstance(before, Folder)
        self._disk, self._trace, self._root = before, trace, root

    def __iter__(self) -> Iterator[tuple[str, Folder, bool]]:
        """Yields (what was called last, the disk, whether only the sure names count), for `write_tree`."""
        for line in (self._trace / "log").read_text(encoding="utf-8").splitlines():
            call, path, other = line.split("\t")
            self._apply(call, Path(path), other)
            for least in (True, False):
                yield f"{call} {path} {other}", self._disk, least

    def _apply(self, call: str, path: Path, other: str) -> None:
        parent, name = self._parent(path)
        match call:
            case "create":
                parent.now[name] = File()
            case "truncate":
                self._file(path).synced = b""
            case "mkdir":
                parent.now[name] = Folder()
            case "unlink":
                del parent.now[name]
            case "rename":
                target, new = self._parent(Path(other))
                target.now[new] = parent.now.pop(name)
            case "link":
                target, new = self._parent(Path(other))
                target.now[new] = parent.now[name]
            case "sync" if other:
                self._file(path).synced = (self._trace / other).read_bytes()
            case "sync":
                folder = self._folder(path)
                folder.synced = dict(folder.now)

    def _folder(self, path: Path) -> Folder:
        node: Node = self._disk
        for part in path.relative_to(self._root).parts:
            assert isinstance(node, Folder)
            node = node.now[part]
        assert isinstance(node, Folder)
        return node

    def _parent(self, path: Path) -> tuple[Folder, str]:
        return (self._disk, "") if path == self._root else (self._folder(path.parent), path.name)

    def _file(self, path: Path) -> File:
        parent, name = self._parent(path)
        node = parent.now[name]
        assert isinstance(node, File)
        return node


def write_tree(node: Node, path: Path, least: bool) -> None:
    """Write a state of the model to `path`, which must not exist."""
    if isinstance(node, File):
        path.write_bytes(node.synced)
        return
    path.mkdir()
    for name, child in (node.synced if least else node.now).items():
        write_tree(child, path / name, least)


def tracing(library: Path, trace: Path, root: Path) -> dict[str, str]:
    """The variables of a process whose calls under `root` are noted in the new folder `trace`."""
    trace.mkdir()
    return {"LD_PRELOAD": str(library), "CALLS_TRACE": str(trace), "CALLS_TRACE_UNDER": os.fspath(root.resolve())}
