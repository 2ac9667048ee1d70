"""One flipped bit in a shard ends a training with the file's name, whichever rank has that shard."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from data_prep.shards import reader
from data_prep.shards.reader import open_dataset
from pretrain.faults.shard_check import ShardCheck
from pretrain.run import folder
from sharebert_common.errors import BadInput


def outcome(check: ShardCheck) -> str | None:
    """What the check found, once it is through."""
    deadline = time.monotonic() + 60
    with check:
        while check._thread.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            check.raise_damage()
        except BadInput as damage:
            return str(damage)
    return None


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_flipped_bit_is_found_by_the_rank_that_has_the_shard(dataset: Path, tmp_path: Path, world_size: int) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    opened = open_dataset(copy)
    names = opened.files_to_verify()
    assert len(names) > world_size
    assert [outcome(ShardCheck([opened], rank, world_size, print)) for rank in range(world_size)] == [None] * world_size
    for number, name in enumerate(names):
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        found = [outcome(ShardCheck([opened], rank, world_size, print)) for rank in range(world_size)]
        assert [rank for rank, text in enumerate(found) if text] == [number % world_size]
        assert f"{copy / name}: damaged" in str(found[number % world_size])
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)


def test_a_shard_that_cannot_be_read_hides_no_other(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    opened = open_dataset(copy)
    first, second, last = (opened.files_to_verify()[number] for number in (0, 1, -1))
    data = bytearray((copy / last).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / last).write_bytes(data)
    read, left = reader.sha256, {first: 99, second: 1}

    def failing(file: BinaryIO) -> str:
        name = str(Path(file.name).relative_to(copy))
        if left.get(name, 0):
            left[name] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file)

    monkeypatch.setattr(reader, "sha256", failing)
    monkeypatch.setattr(folder, "OUTAGE_S", 0.25)
    said: list[str] = []
    assert f"{copy / last}: damaged" in str(outcome(ShardCheck([opened], 0, 1, said.append)))
    assert said == [f"{copy / first}: cannot be read (Input/output error); its checksum is not compared"]
    assert left[second] == 0, "it was read again"


def test_a_shard_that_cannot_be_opened_now_is_not_damaged(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    opened = open_dataset(copy)
    name = opened.files_to_verify()[0]
    (copy / name).unlink()
    assert f"{copy / name}: cannot be read (No such file" in str(outcome(ShardCheck([opened], 0, 1, print)))
    (copy / name).symlink_to(name.rpartition("/")[2])  # to itself: opening it fails in another way
    monkeypatch.setattr(folder, "OUTAGE_S", 0.25)
    said: list[str] = []
    assert outcome(ShardCheck([opened], 0, 1, said.append)) is None
    assert len(said) == 1
