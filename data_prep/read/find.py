"""Find the files that a path, a folder, a glob or a URL of these names.

What is found is either returned or left out with a notice: nothing disappears without a word.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sharebert_common.remote_files import file_system, is_url, retry, size_bytes

_MAGIC = set("*?[")
_NOTICES_EACH = 5


@dataclass(frozen=True)
class FoundFile:
    """One file: `name` without the machine's own folders, `location` that opens it, size, time of change or ETag."""

    name: str
    location: str
    bytes: int
    changed: str


@dataclass
class LeftOut:
    """What was found and left out, by reason."""

    paths: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        """Leave out a path."""
        self.paths.setdefault(reason, []).append(path)

    def lines(self) -> Iterator[str]:
        """A line for each reason, with the first of its paths."""
        for reason, paths in self.paths.items():
            more = f" and {len(paths) - _NOTICES_EACH} more" if len(paths) > _NOTICES_EACH else ""
            yield f"left out ({reason}): {', '.join(paths[:_NOTICES_EACH])}{more}"


def find(pattern: str, left_out: LeftOut) -> list[FoundFile]:
    """The files of a path, a folder (all below it), a glob or a URL of these, sorted by name.

    A path that exists is taken as it is, with any `*`, `?` and `[` in its name. Folders that a glob matches are
    read too, and so are links to files and folders. Left out: hidden files, broken links, what is neither file nor
    folder.
    """
    found = _find_remote(pattern, left_out) if is_url(pattern) else _find_local(pattern, left_out)
    return sorted({file.location: file for file in found}.values(), key=lambda file: file.name)


def state_of(location: str) -> tuple[int, str]:
    """(bytes, time of change or ETag) of a file as it is now. Raises OSError where it is gone."""
    if is_url(location):
        fs, path = file_system(location)
        info = retry(lambda: fs.info(path), location)
        return size_bytes(info), _changed(info)
    state = Path(location).stat()
    return state.st_size, str(state.st_mtime)


def _find_local(pattern: str, left_out: LeftOut) -> Iterator[FoundFile]:
    path = Path(os.path.abspath(Path(pattern).expanduser()))  # noqa: PTH100  (`Path.absolute` keeps "..")
    if os.path.lexists(path):
        yield from _below(path, path.parent, left_out, set())
        return
    base = path
    while not os.path.lexists(base):
        base = base.parent
    rest = path.relative_to(base)
    if set(str(rest)) & _MAGIC:
        for match in sorted(glob.glob(f"{glob.escape(str(base))}/{rest}", recursive=True)):  # noqa: PTH207  (`Path.glob` follows no links)
            if rest.name != "**" or not Path(match).is_dir():  # `**` matches the files in a folder too
                yield from _below(Path(match), base, left_out, set())


def _below(path: Path, base: Path, left_out: LeftOut, above: set[str]) -> Iterator[FoundFile]:
    """The files of a path, which is a file or a folder; `above` are the real folders that lead to it."""
    try:
        state = path.stat()
        if stat.S_ISREG(state.st_mode):
            yield FoundFile(str(path.relative_to(base)), str(path), state.st_size, str(state.st_mtime))
        elif not stat.S_ISDIR(state.st_mode):
            left_out.add("neither a file nor a folder", str(path))
        elif (real := os.path.realpath(path)) in above:
            left_out.add("a link to a folder above it", str(path))
        else:
            for inner in sorted(path.iterdir()):
                if inner.name.startswith("."):
                    left_out.add("hidden", str(inner))
                else:
                    yield from _below(inner, base, left_out, above | {real})
    except OSError as error:
        left_out.add("a broken link" if path.is_symlink() else f"cannot be read: {error.strerror}", str(path))


def _find_remote(pattern: str, left_out: LeftOut) -> Iterator[FoundFile]:
    fs, path = file_system(pattern)
    path = path.rstrip("/")
    try:
        matches = {path: retry(lambda: fs.info(path), pattern)}
        base = path.rpartition("/")[0]
    except FileNotFoundError:
        magic = [i for i, piece in enumerate(path.split("/")) if set(piece) & _MAGIC]
        if not magic:
            return
        base = "/".join(path.split("/")[: magic[0]])
        matches = retry(lambda: fs.glob(path, detail=True), pattern)
    found: dict[str, Any] = {}
    for place, info in matches.items():
        if info["type"] != "directory":
            found[place] = info
        elif not path.endswith("**"):  # which matches the files in a folder too
            found |= retry(lambda folder=place: fs.find(folder, detail=True), pattern)  # type: ignore[misc]
    for place, info in found.items():
        name, location = place[len(base) :].lstrip("/"), fs.unstrip_protocol(place)
        if any(part.startswith(".") for part in PurePosixPath(name).parts):
            left_out.add("hidden", location)
        elif info["type"] != "file":
            left_out.add("neither a file nor a folder", location)
        else:
            yield FoundFile(name, location, size_bytes(info), _changed(info))


def _changed(info: dict[str, Any]) -> str:
    return str(info.get("mtime") or info.get("ETag") or info.get("etag") or info.get("LastModified") or "")
