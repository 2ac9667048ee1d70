"""Find the files that a path, a folder, a glob or a URL of these names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sharebert_common.remote_files import file_system, is_url, retry, size_bytes


@dataclass(frozen=True)
class FoundFile:
    """One file: `name` without the machine's own folders, `location` that opens it, size, time of change or ETag."""

    name: str
    location: str
    bytes: int
    changed: str


def find(pattern: str) -> list[FoundFile]:
    """The files of a path, a folder (all below it), a glob or a URL of these, sorted by name, without hidden ones."""
    fs, path = file_system(pattern)
    path = path.rstrip("/")
    magic = [i for i, piece in enumerate(path.split("/")) if set(piece) & set("*?[")]
    if magic:
        base = "/".join(path.split("/")[: magic[0]])
        found = retry(lambda: fs.glob(path, detail=True), pattern)
    else:
        base = path.rpartition("/")[0]
        try:
            info = retry(lambda: fs.info(path), pattern)
        except FileNotFoundError:
            return []
        found = {path: info} if info["type"] != "directory" else retry(lambda: fs.find(path, detail=True), pattern)
    files = []
    for location, info in found.items():
        name = location[len(base) :].lstrip("/")
        if info.get("islink") and Path(location).is_file():
            info = fs.info(str(Path(location).resolve()))
        if info["type"] == "file" and not any(part.startswith(".") for part in PurePosixPath(name).parts):
            changed = str(info.get("mtime") or info.get("ETag") or info.get("etag") or info.get("LastModified") or "")
            place = fs.unstrip_protocol(location) if is_url(pattern) else location
            files.append(FoundFile(name, place, size_bytes(info), changed))
    return sorted(files, key=lambda file: file.name)
