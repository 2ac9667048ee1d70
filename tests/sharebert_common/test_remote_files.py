"""Files at a path and at a URL are read in the same way."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from sharebert_common.errors import BadInput
from sharebert_common.remote_files import read_ends


@pytest.mark.parametrize(
    ("content", "ends"),
    [(b"", b""), (b"abc", b"abc"), (b"abcd", b"abcd"), (b"abcdef", b"abcdef"), (b"abcdefghij", b"abcdghij")],
)
def test_both_ends_of_a_file(tmp_path: Path, content: bytes, ends: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    fsspec.filesystem("memory").pipe("/ends", content)
    assert read_ends(str(tmp_path / "file"), 4) == ends
    assert read_ends("memory://ends", 4) == ends


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="none: cannot be read"):
        read_ends(str(tmp_path / "none"), 4)
