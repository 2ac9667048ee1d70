"""The results of the steps, kept beside OUT until it is whole, so that a command that was killed goes on.

OUT.steps/1-trim/        the model, whole or absent
OUT.steps/1-trim.json    written last: step, keys, what it was made from, checksums of its files, what it noted
OUT.steps/1-trim.work/   intermediate files of a step that has not ended
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256, make_folders, write_atomically

OF = "identity.json"
"""The file among intermediate files that says what they belong to."""


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model's folder, by its path inside; TensorBoard's and Python's own are left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def digest(sums: dict[str, str]) -> str:
    """One checksum of all files."""
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class StepFolder:
    """The place of one step's result."""

    parent: Path
    name: str

    @property
    def model(self) -> Path:
        """The folder of the result."""
        return self.parent / self.name

    @property
    def scratch(self) -> Path:
        """The folder of intermediate files; it exists while the step runs, and after the process died in it."""
        return self.parent / f"{self.name}.work"

    @property
    def _record(self) -> Path:
        return self.parent / f"{self.name}.json"

    def result(self, identity: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
        """The record of a whole result that `identity` made, or None where the step must run.

        A result that is damaged, or was made otherwise, is removed, with a line. Raises BadInput where a folder is in
        its place that no step made.
        """
        if not self._record.is_file():
            if self.model.exists() and not (self.scratch / OF).is_file():  # `open` writes it before the model is made
                raise BadInput(f"{self.model}: exists and was not made here; move it away, its place is needed")
            shutil.rmtree(self.model, ignore_errors=True)
            self._keep_scratch_of(identity)
            return None
        try:
            record: dict[str, Any] = json.loads(self._record.read_text(encoding="utf-8"))
            why = "" if record["identity"] == identity else "it was made from another source, or with other keys"
            why = why or ("" if checksums(self.model) == record["files"] else "its files are damaged")
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"its record is damaged ({error})"
        if not why:
            return record
        say(f"{self.model}: {why}; the step is run again")
        self.remove()
        return None

    def _keep_scratch_of(self, identity: dict[str, Any]) -> None:
        """Remove intermediate files that another source or other keys made."""
        try:
            same = json.loads((self.scratch / OF).read_text(encoding="utf-8")) == identity
        except (OSError, ValueError):
            same = False
        if not same:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def open(self, identity: dict[str, Any]) -> None:
        """Make the folder of intermediate files."""
        make_folders(self.scratch)
        write_atomically(self.scratch / OF, json.dumps(identity) + "\n")

    def finish(self, identity: dict[str, Any], notes: dict[str, Any]) -> dict[str, Any]:
        """Note that the result is whole; its record."""
        record = {"identity": identity, "files": checksums(self.model), "notes": notes}
        write_atomically(self._record, json.dumps(record, indent=1) + "\n")
        shutil.rmtree(self.scratch, ignore_errors=True)
        return record

    def remove(self) -> None:
        """Remove the result and its record, the record first; a folder of intermediate files says whose it was."""
        if self.model.exists():
            self.open({})
        self._record.unlink(missing_ok=True)
        shutil.rmtree(self.model, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
