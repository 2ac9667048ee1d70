"""One flipped bit in a shard ends a training with the file's name, whichever rank has that shard."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from data_prep.shards.reader import open_dataset
from pretrain.faults.shard_check import ShardCheck
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
    assert [outcome(ShardCheck([opened], rank, world_size)) for rank in range(world_size)] == [None] * world_size
    for number, name in enumerate(names):
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        found = [outcome(ShardCheck([opened], rank, world_size)) for rank in range(world_size)]
        assert [rank for rank, text in enumerate(found) if text] == [number % world_size]
        assert f"{copy / name}: damaged" in str(found[number % world_size])
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
