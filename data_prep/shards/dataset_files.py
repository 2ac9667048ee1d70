"""Where the files of a dataset come from: the interface, and the plain case of a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Protocol

from sharebert_common.errors import BadInput

OPEN_SHARDS = 64  # a map keeps its file open, and a process may have 1,024 files and 65,530 maps


class DatasetFiles(Protocol):
    """Where the files of a dataset come from."""

    folder: Path
    """Where they are on this machine."""
    open_shards: int
    """How many shards a reader may hold open."""

    def open(self, name: str) -> BinaryIO:
        """Open a shard or the tokenizer. Raises BadInput where that fails."""


class LocalFiles:
    """Files of a dataset that are read where they are."""

    open_shards = OPEN_SHARDS

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, name: str) -> BinaryIO:
        """See `DatasetFiles`."""
        try:
            return (self.folder / name).open("rb")
        except OSError as error:
            raise BadInput(f"{self.folder / name}: cannot be read ({error.strerror}); copy it again") from error
