from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import direct_io
from pretrain.checkpoint.direct_io import BLOCK_BYTES, write_direct

MEMORY = torch.arange(20 * BLOCK_BYTES, dtype=torch.int64).to(torch.uint8)
START = -MEMORY.data_ptr() % BLOCK_BYTES


def data(size: int, start: int = START) -> memoryview:
    return MEMORY[start : start + size].numpy().data


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "CHUNK_BYTES", 2 * BLOCK_BYTES)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, 5 * BLOCK_BYTES, 5 * BLOCK_BYTES + 7])
@pytest.mark.parametrize("start", [START, START + 8], ids=["aligned", "not aligned"])
def test_the_file_is_the_data(tmp_path: Path, size: int, start: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(9 * BLOCK_BYTES))  # of an attempt before
    write_direct(file, data(size, start))
    assert file.read_bytes() == bytes(data(size, start))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT])
def test_direct_writes_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The file system has none, or the kernel cannot pin the memory."""

    def refuse(handle: int, part: memoryview) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", refuse)
    write_direct(tmp_path / "file", data(3 * BLOCK_BYTES + 5))
    assert (tmp_path / "file").read_bytes() == bytes(data(3 * BLOCK_BYTES + 5))


def test_after_a_short_write_the_rest_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, part: write(handle, part[:BLOCK_BYTES]))
    write_direct(tmp_path / "file", data(5 * BLOCK_BYTES + 5))
    assert (tmp_path / "file").read_bytes() == bytes(data(5 * BLOCK_BYTES + 5))


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, part: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_direct(tmp_path / "file", data(BLOCK_BYTES))
