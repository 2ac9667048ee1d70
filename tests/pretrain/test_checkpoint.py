"""Checkpoint format 1 by itself: whole or absent, for any number of ranks, without DeepSpeed."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain import checkpoint
from pretrain.checkpoint import Checkpointer, CheckpointRecipe
from pretrain.slices import STATES, Slice
from sharebert_recipe import BadInput

SHAPES = {"a.weight": [7, 5], "b.bias": [3], "c.weight": [11]}


def numel(name: str) -> int:
    return int(torch.tensor(SHAPES[name]).prod())


def state_of(name: str, state: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(STATES.index(state) * 100 + len(name))
    return torch.randn(numel(name), generator=generator)


def slices_of(rank: int, ranks: int, fill: Callable[[str, str], torch.Tensor] = state_of) -> list[Slice]:
    """Each parameter cut into `ranks` unequal pieces; later ranks own nothing of the smallest."""
    found = []
    for name in SHAPES:
        size = -(-numel(name) // ranks)
        start, end = min(rank * size, numel(name)), min((rank + 1) * size, numel(name))
        if start < end:
            tensors = {state: fill(name, state)[start:end].clone() for state in STATES}
            found.append(Slice(name, start, end - start, tensors))
    return found


def write(
    folder: Path, step: int, ranks: int = 3, keep: int = 3, keep_every: int = 0, said: list[str] | None = None
) -> None:
    """Save one checkpoint as `ranks` ranks do, in threads."""

    def one(rank: int) -> None:
        recipe = CheckpointRecipe(keep=keep, keep_every=keep_every, write_timeout_s=20)
        report = (said if said is not None else []).append
        saver = Checkpointer(folder, recipe, rank, ranks, token=f"launch{step}", report=report)
        generators = {"cpu": torch.full((5,), rank, dtype=torch.uint8)}
        saver.save(step, slices_of(rank, ranks), SHAPES, generators, {"note": step})
        saver.finish()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def assert_whole(found: checkpoint.Checkpoint, ranks: int) -> None:
    for rank in range(ranks):
        wanted = slices_of(rank, ranks, lambda name, state: torch.full((numel(name),), -1.0))
        checkpoint.load(found, wanted)
        for s in wanted:
            for state in STATES:
                assert torch.equal(s.tensors[state], state_of(s.name, state)[s.start : s.start + s.length])


@pytest.mark.parametrize("readers", [1, 2, 3, 5, 16])
def test_any_number_of_ranks_reads_it(tmp_path: Path, readers: int) -> None:
    write(tmp_path, 10)
    found = checkpoint.newest_whole(tmp_path, pytest.fail)
    assert found is not None
    assert (found.step, found.ranks, found.training) == (10, 3, {"note": 10})
    assert_whole(found, readers)
    assert checkpoint.load_generators(found, 2)["cpu"].tolist() == [2] * 5
    assert torch.equal(checkpoint.read_whole(found, "a.weight"), state_of("a.weight", "weight").view(7, 5))


def test_it_holds_no_pickle_and_safetensors_reads_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write(tmp_path, 10)
    files = sorted(path.name for path in (tmp_path / "step-00000010").iterdir())
    assert files == ["manifest.json", *(f"rank-{rank:05d}.safetensors" for rank in range(3))]
    tensors = load_file(tmp_path / "step-00000010" / "rank-00000.safetensors")
    assert torch.equal(tensors["exp_avg/b.bias"], state_of("b.bias", "exp_avg")[:1])
    assert (tmp_path / "latest").read_text() == "step-00000010\n"


def damage_flip(folder: Path) -> None:
    path = folder / "rank-00001.safetensors"
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


@pytest.mark.parametrize(
    ("damage", "named"),
    [
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


def test_a_checkpoint_with_sha256_is_verified_too(tmp_path: Path) -> None:
    """The first checkpoints have it."""
    write(tmp_path, 10)
    folder = tmp_path / "step-00000010"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        del entry["xxh3"]
        entry["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.verify(checkpoint.read_manifest(folder))
    manifest["files"]["rank-00001.safetensors"]["sha256"] = "0"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match=r"rank-00001.safetensors: damaged"):
        checkpoint.verify(checkpoint.read_manifest(folder))


def test_old_ones_go_and_chosen_ones_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        write(tmp_path, step, ranks=1, keep=2, keep_every=30)
    assert [folder.name for folder in checkpoint.found(tmp_path)] == [
        "step-00000060",
        "step-00000050",
        "step-00000030",
    ]


def test_a_rank_that_writes_nothing_leaves_no_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []
    recipe = CheckpointRecipe(write_timeout_s=0.2)
    write(tmp_path, 10)
    saver = Checkpointer(tmp_path, recipe, rank=0, ranks=2, token="x", report=said.append)
    saver.save(20, slices_of(0, 2), SHAPES, {}, {})
    saver.finish()
    assert [folder.name for folder in tmp_path.glob("*step*")] == ["step-00000010"]
    assert any("ranks [1] wrote no file" in line for line in said)
    assert "given up" in said[-1]


def test_leftovers_of_a_dead_launch_never_count(tmp_path: Path) -> None:
    write(tmp_path, 10, ranks=1)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".step-00000020.dead")
    assert checkpoint.newest_whole(tmp_path, pytest.fail).step == 10  # type: ignore[union-attr]
    write(tmp_path, 30, ranks=1)
    assert not list(tmp_path.glob(".step-*"))


def test_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10)
    found = checkpoint.newest_whole(tmp_path, pytest.fail)
    assert found is not None
    tensors = {state: torch.zeros(40) for state in STATES}
    with pytest.raises(BadInput, match=r"holds 35 of the 40 elements of 'a.weight'"):
        checkpoint.load(found, [Slice("a.weight", 0, 40, tensors)])
    manifest = json.loads((found.folder / "manifest.json").read_text())
    (found.folder / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(BadInput, match="checkpoint format 2, this program reads 1"):
        checkpoint.read_manifest(found.folder)
