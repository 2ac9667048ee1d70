"""Checkpoint format 1 by itself: whole or absent, for any number of ranks, without DeepSpeed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import open_writer

from pretrain.checkpoint import format as checkpoint
from pretrain.checkpoint.saving import RankSave
from pretrain.checkpoint.writer import CheckpointRecipe, CheckpointWriter
from pretrain.engine.fragments import STATES, Fragment
from sharebert_common.errors import BadInput

SHAPES = {"a.weight": [7, 5], "b.bias": [3], "c.weight": [11]}


def numel(name: str) -> int:
    return int(torch.tensor(SHAPES[name]).prod())


def state_of(name: str, state: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(STATES.index(state) * 100 + len(name))
    return torch.randn(numel(name), generator=generator)


def fragments_of(rank: int, world_size: int, fill: Callable[[str, str], torch.Tensor] = state_of) -> list[Fragment]:
    """Each parameter cut into `ranks` unequal pieces; later ranks own nothing of the smallest."""
    found = []
    for name in SHAPES:
        size = -(-numel(name) // world_size)
        start, end = min(rank * size, numel(name)), min((rank + 1) * size, numel(name))
        if start < end:
            tensors = {state: fill(name, state)[start:end].clone() for state in STATES}
            found.append(Fragment(name, start, end - start, tensors))
    return found


def write(
    folder: Path,
    step: int,
    world_size: int = 3,
    keep: int = 3,
    keep_every: int = 0,
    said: list[str] | None = None,
    resumed_from: int | None = None,
) -> None:
    """Save one checkpoint as `world_size` ranks do, in threads."""

    recipe = CheckpointRecipe(keep=keep, keep_every=keep_every, write_timeout_s=20)
    report = (said if said is not None else []).append
    writers = [
        open_writer(folder, rank, world_size, report, token=f"launch{step}", recipe=recipe)
        for rank in range(world_size)
    ]

    if resumed_from is not None:
        writers[0].branch_off(resumed_from)

    def one(rank: int) -> None:
        rng_state = {"cpu": torch.full((5,), rank, dtype=torch.uint8)}
        writers[rank].save(step, fragments_of(rank, world_size), SHAPES, rng_state, {"note": step})
        writers[rank].finish()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def assert_whole(found: checkpoint.Checkpoint, world_size: int) -> None:
    for rank in range(world_size):
        wanted = fragments_of(rank, world_size, lambda name, state: torch.full((numel(name),), -1.0))
        checkpoint.load_fragments(found, wanted)
        for s in wanted:
            for state in STATES:
                assert torch.equal(s.tensors[state], state_of(s.name, state)[s.start : s.start + s.length])


@pytest.mark.parametrize("readers", [1, 2, 3, 5, 16])
def test_any_number_of_ranks_reads_it(tmp_path: Path, readers: int) -> None:
    write(tmp_path, 10)
    found = checkpoint.newest_whole(tmp_path, pytest.fail)
    assert found is not None
    assert (found.step, found.world_size, found.training) == (10, 3, {"note": 10})
    assert_whole(found, readers)
    assert checkpoint.load_rng_state(found, 2)["cpu"].tolist() == [2] * 5
    assert torch.equal(checkpoint.read_whole(found, "a.weight"), state_of("a.weight", "weight").view(7, 5))


def test_it_holds_no_pickle_and_safetensors_reads_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write(tmp_path, 10)
    files = sorted(path.name for path in (tmp_path / "step-00000010").iterdir())
    assert files == ["manifest.json", *(f"rank-{rank:05d}.safetensors" for rank in range(3))]
    tensors = load_file(tmp_path / "step-00000010" / "rank-00000.safetensors")
    assert torch.equal(tensors["exp_avg/b.bias"], state_of("b.bias", "exp_avg")[:1])
    assert (tmp_path / "latest").read_text() == "step-00000010\n"


def damage_flip(folder: Path, rank: int = 1) -> None:
    path = folder / f"rank-{rank:05d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def damage_cut(folder: Path) -> None:
    path = folder / "rank-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_missing(folder: Path) -> None:
    (folder / "rank-00000.safetensors").unlink()


def damage_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_half_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:100])


def damage_flip_in_manifest(folder: Path) -> None:
    """Still JSON, and of the right form: another number."""
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"note": 20', '"note": 21'))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_flip_in_manifest, "manifest.json: damaged"),
        (damage_flip, "rank-00001.safetensors: damaged"),
        (damage_cut, "rank-00002.safetensors: .* bytes, .* were written"),
        (damage_missing, "rank-00000.safetensors: missing"),
        (damage_no_manifest, "manifest.json: missing"),
        (damage_half_manifest, "manifest.json: not a checkpoint manifest"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_taken(
    tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    damage(tmp_path / "step-00000020")
    said: list[str] = []
    found = checkpoint.newest_whole(tmp_path, said.append)
    assert found is not None
    assert found.step == 10
    (line,) = said
    with pytest.raises(BadInput, match=named):
        raise BadInput(line)
    write(tmp_path, 20)  # the run comes there again
    assert checkpoint.newest_whole(tmp_path, pytest.fail).step == 20  # type: ignore[union-attr]


def test_old_ones_go_and_chosen_ones_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        write(tmp_path, step, world_size=1, keep=2, keep_every=30)
    assert [folder.name for folder in checkpoint.found(tmp_path)] == [
        "step-00000060",
        "step-00000050",
        "step-00000030",
    ]


def test_a_rank_that_writes_nothing_leaves_no_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []
    recipe = CheckpointRecipe(write_timeout_s=0.2)
    write(tmp_path, 10)
    writer = open_writer(tmp_path, 0, 2, said.append, recipe=recipe)
    writer.save(20, fragments_of(0, 2), SHAPES, {}, {})
    writer.finish()
    assert [folder.name for folder in tmp_path.glob("*step*")] == ["step-00000010"]
    assert any("ranks [1] wrote no file" in line for line in said)
    assert "given up" in said[-1]


class FullDisk:
    """Writes by some ranks fail, as long as wanted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.name, self.full, self.refused = name, True, 0
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, handle: int) -> None:
        if self.full and self.name in str(Path(f"/proc/self/fd/{handle}").readlink()):
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fsync(handle)


def writer_of(folder: Path, rank: int, world_size: int, said: list[str], timeout_s: float = 20) -> CheckpointWriter:
    recipe = CheckpointRecipe(write_timeout_s=timeout_s)
    return open_writer(folder, rank, world_size, said.append, recipe=recipe)


def test_a_write_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    disk = FullDisk(monkeypatch, "rank-00000")
    writer = writer_of(tmp_path, 0, 1, said)
    writer.save(10, fragments_of(0, 1), SHAPES, {}, {})
    while disk.refused < 2:
        time.sleep(0.01)
    assert not checkpoint.found(tmp_path)
    disk.full = False
    assert writer.finish()
    assert checkpoint.newest_whole(tmp_path, pytest.fail).step == 10  # type: ignore[union-attr]
    assert said[0] == "checkpoint of step 10: [Errno 28] No space left on device; it is tried again in 0.5 s"


def test_a_newer_save_ends_the_trying_of_an_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's disk is full: rank 0, which waits for it, learns of it and waits no longer."""
    said: list[str] = []
    write(tmp_path, 10, world_size=2)
    disk = FullDisk(monkeypatch, "rank-00001")
    writers = [writer_of(tmp_path, rank, 2, said, timeout_s=300) for rank in range(2)]
    for rank in range(2):
        writers[rank].save(20, fragments_of(rank, 2), SHAPES, {}, {})
    while not disk.refused:
        time.sleep(0.01)
    threads = [
        threading.Thread(target=writers[rank].save, args=(30, fragments_of(rank, 2), SHAPES, {}, {}))
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert [folder.name for folder in checkpoint.found(tmp_path)] == ["step-00000010"]
    disk.full = False
    assert all(writer.finish() for writer in writers)
    assert [folder.name for folder in checkpoint.found(tmp_path)] == ["step-00000030", "step-00000010"]
    assert not list(tmp_path.glob(".step-*"))
    given_up = [line for line in said if "given up" in line]
    assert len(given_up) == 2
    assert "ranks [1] could not write" in given_up[1]


def test_a_rank_may_be_ahead_by_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 has written its part of two checkpoints before rank 0 has written its part of the first."""
    said: list[str] = []
    disk = FullDisk(monkeypatch, "rank-00000")
    first, second = (writer_of(tmp_path, rank, 2, said) for rank in range(2))
    first.save(10, fragments_of(0, 2), SHAPES, {}, {})
    for step in (10, 20):
        second.save(step, fragments_of(1, 2), SHAPES, {}, {})
        second.finish()
    disk.full = False
    first.finish()
    first.save(20, fragments_of(0, 2), SHAPES, {}, {})
    assert first.finish()
    assert [folder.name for folder in checkpoint.found(tmp_path)] == ["step-00000020", "step-00000010"]
    assert not list(tmp_path.glob(".step-*"))


def test_a_save_that_fails_to_the_end_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    FullDisk(monkeypatch, "rank-00000")
    writer = writer_of(tmp_path, 0, 1, said, timeout_s=0.2)
    writer.save(10, fragments_of(0, 1), SHAPES, {}, {})
    assert not writer.finish()
    assert not list(tmp_path.glob("*step*"))


def test_the_newest_whole_one_is_never_deleted(tmp_path: Path) -> None:
    """It stays where newer ones are damaged; these go when the run that resumed from it has a whole one again."""
    for step in (10, 20, 30):
        write(tmp_path, step, world_size=1)
    for step in (20, 30):
        (tmp_path / checkpoint.folder_name(step) / "rank-00000.safetensors").write_bytes(b"")
    assert checkpoint.newest_whole(tmp_path, [].append).step == 10  # type: ignore[union-attr]
    said: list[str] = []
    write(tmp_path, 15, world_size=1, keep=2, said=said, resumed_from=10)
    assert said == ["continuing from step 10; step-00000020, step-00000030 will make way for the next checkpoint"]
    assert [folder.name for folder in checkpoint.found(tmp_path)] == ["step-00000015", "step-00000010"]
    write(tmp_path, 20, world_size=1, keep=1)
    assert [folder.name for folder in checkpoint.found(tmp_path)] == ["step-00000020"]


def test_a_later_one_goes_only_where_the_run_said_so(tmp_path: Path) -> None:
    write(tmp_path, 30, world_size=1)
    write(tmp_path, 20, world_size=1, keep=1)
    assert [folder.name for folder in checkpoint.found(tmp_path)] == ["step-00000030", "step-00000020"]


def test_a_damaged_one_takes_no_place_of_those_that_are_kept(tmp_path: Path) -> None:
    for step in (10, 20):
        write(tmp_path, step, world_size=1, keep=2)
    damage_flip(tmp_path / "step-00000020", rank=0)
    said: list[str] = []
    write(tmp_path, 30, world_size=1, keep=2, said=said)
    assert [folder.name for folder in checkpoint.found(tmp_path)] == ["step-00000030", "step-00000010"]
    assert "rank-00000.safetensors: damaged" in said[0]


class BadDisk:
    """Reads below a folder fail, as often as wanted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, times: int) -> None:
        self.folder, self.left, self._open = folder, times, Path.open
        monkeypatch.setattr(Path, "open", lambda path, *given, **keys: self.open(path, *given, **keys))
        monkeypatch.setattr(checkpoint, "FIRST_PAUSE_S", 0.01)

    def open(self, path: Path, *given: Any, **keys: Any) -> Any:
        if self.left and self.folder in path.parents:
            self.left -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return self._open(path, *given, **keys)


def test_a_read_that_fails_for_a_moment_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    BadDisk(monkeypatch, tmp_path / "step-00000020", times=2)
    assert checkpoint.newest_whole(tmp_path, pytest.fail).step == 20  # type: ignore[union-attr]


def test_one_that_cannot_be_read_now_is_named_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    disk = BadDisk(monkeypatch, tmp_path / "step-00000020", times=1000)
    said: list[str] = []
    assert checkpoint.newest_whole(tmp_path, said.append).step == 10  # type: ignore[union-attr]
    assert "step-00000020/manifest.json: cannot be read now (Input/output error)" in said[0]
    write(tmp_path, 30, keep=1)
    write(tmp_path, 40, keep=2)
    assert [folder.name for folder in checkpoint.found(tmp_path)] == ["step-00000040", "step-00000030"]
    disk.left = 0


def test_where_none_can_be_read_a_run_does_not_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.newest_whole(tmp_path, pytest.fail) is None
    write(tmp_path, 10)
    write(tmp_path, 20)
    damage_cut(tmp_path / "step-00000010")
    manifest = tmp_path / "step-00000020" / "manifest.json"
    newer = json.loads(manifest.read_text()) | {"format": 2}
    manifest.write_text(json.dumps(newer))
    with pytest.raises(BadInput) as refused:
        checkpoint.newest_whole(tmp_path, [].append)
    for part in ("checkpoint format 2, this program reads 1", "were written", "checkpoint.restart_if_unreadable=true"):
        assert part in str(refused.value)
    assert checkpoint.newest_whole(tmp_path, [].append, or_none=True) is None


def failing_once(function: Callable[..., Any], fails: Callable[..., bool], *, afterwards: bool) -> Callable[..., Any]:
    """`function`, which raises EIO the first time that `fails` says so: before or after it did its work."""
    left, one_at_a_time = [1], threading.Lock()  # two ranks, each in a thread, may call it at once

    def wrapped(*given: Any, **keys: Any) -> Any:
        with one_at_a_time:
            now = bool(left and fails(*given))
            if now:
                left.clear()
        if now and not afterwards:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        result = function(*given, **keys)
        if now:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return result

    return wrapped


def is_folder(handle: int) -> bool:
    return Path(f"/proc/self/fd/{handle}").readlink().is_dir()


@pytest.mark.parametrize("afterwards", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ["first folder's fsync", "second folder's fsync", "rename", "unlink", "replace"])
def test_every_step_of_a_save_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, afterwards: bool
) -> None:
    """One call fails, before or after it did its work: the checkpoint is whole a moment later, on both ranks."""
    monkeypatch.setattr("pretrain.checkpoint.writer.FIRST_PAUSE_S", 0.01)
    match step.split()[-1]:
        case "fsync":
            parent = step.startswith("second")

            def fails(handle: int) -> bool:
                return is_folder(handle) and (Path(f"/proc/self/fd/{handle}").readlink() == tmp_path) is parent

            monkeypatch.setattr(os, "fsync", failing_once(os.fsync, fails, afterwards=afterwards))
        case name:

            def of_a_checkpoint(path: Path, *_: Any, **__: Any) -> bool:
                return "step-00000010" in str(path)

            wrapped = failing_once(getattr(Path, name), of_a_checkpoint, afterwards=afterwards)
            monkeypatch.setattr(Path, name, lambda *given, **keys: wrapped(*given, **keys))
    said: list[str] = []
    write(tmp_path, 10, world_size=2, said=said)
    assert len([line for line in said if "tried again" in line]) == 1, said
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "step-00000010"]
    found = checkpoint.newest_whole(tmp_path, pytest.fail)
    assert found is not None
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "manifest.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]


def test_a_save_that_is_given_up_puts_back_the_older_one_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older one is moved aside, and then the new folder cannot be renamed until the time is over."""
    write(tmp_path, 10, world_size=1)
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name.startswith(".step-00000010.") and target.name == "step-00000010" and not path.name.endswith("-0"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    said: list[str] = []
    writer = writer_of(tmp_path, 0, 1, said, timeout_s=0.5)
    writer.save(10, fragments_of(0, 1), SHAPES, {}, {})
    assert not writer.finish()
    assert "given up" in said[-1]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "step-00000010"]
    assert checkpoint.newest_whole(tmp_path, pytest.fail).training == {"note": 10}  # type: ignore[union-attr]


def test_a_file_that_is_in_a_manifest_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing the note of rank 1 failed after it was there; rank 0 has read it meanwhile, and removed it."""
    unlink, note = Path.unlink, "rank-00001.written.json"

    def failing(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith(f".{note}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", failing)
    save = RankSave(
        tmp_path, 10, "token-1", 1, 2, memoryview(b"data"), {}, {}, lambda: None, deadline=time.monotonic() + 9
    )
    save.make_folder()
    with pytest.raises(OSError, match="Input/output"):
        save.write_rank_file()
    unlink(save.partial / note)
    (save.partial / "manifest.json").touch()
    file = save.partial / checkpoint.rank_file(1)
    file.write_bytes(b"as the manifest says")
    save.write_rank_file()
    assert file.read_bytes() == b"as the manifest says"


def test_leftovers_of_a_dead_launch_never_count(tmp_path: Path) -> None:
    write(tmp_path, 10, world_size=1)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".step-00000020.dead")
    assert checkpoint.newest_whole(tmp_path, pytest.fail).step == 10  # type: ignore[union-attr]
    write(tmp_path, 30, world_size=1)
    assert not list(tmp_path.glob(".step-*"))
    (tmp_path / ".latest.123-456").touch()
    write(tmp_path, 40, world_size=1)
    assert not list(tmp_path.glob(".latest*"))


def test_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10)
    found = checkpoint.newest_whole(tmp_path, pytest.fail)
    assert found is not None
    tensors = {state: torch.zeros(40) for state in STATES}
    with pytest.raises(BadInput, match=r"holds 35 of the 40 elements of 'a.weight'"):
        checkpoint.load_fragments(found, [Fragment("a.weight", 0, 40, tensors)])
    manifest = json.loads((found.folder / "manifest.json").read_text())
    (found.folder / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(BadInput, match="checkpoint format 2, this program reads 1"):
        checkpoint.read_manifest(found.folder)


def test_the_folders_of_a_first_checkpoint_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new folder survives a power cut only once its name is flushed in the folder above it."""
    synced: set[str] = set()
    fsync = os.fsync

    def noting(handle: int) -> None:
        synced.add(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noting)
    run = tmp_path / "runs" / "run"
    write(run / "checkpoints", 10, world_size=1)
    assert {str(tmp_path), str(run.parent), str(run), str(run / "checkpoints")} <= synced


def test_one_that_cannot_be_read_makes_way_and_is_kept(tmp_path: Path) -> None:
    """Of a newer format, for instance: no later attempt of this run takes it, and nothing of it is lost."""
    write(tmp_path, 10, world_size=1)
    write(tmp_path, 40, world_size=1)
    manifest = tmp_path / "step-00000040" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    said: list[str] = []
    write(tmp_path, 20, world_size=1, said=said, resumed_from=10)
    assert [folder.name for folder in checkpoint.found(tmp_path)] == ["step-00000020", "step-00000010"]
    assert (tmp_path / "unreadable-step-00000040" / "rank-00000.safetensors").exists()
    assert "it is kept as unreadable-step-00000040" in said[-1]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A colleague's umask, for instance. (Path.glob takes such a folder for an empty one.)"""
    write(tmp_path, 10, world_size=1)

    def refused(path: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(BadInput, match=r"cannot be listed now \(Permission denied\)"):
        checkpoint.newest_whole(tmp_path, pytest.fail)
