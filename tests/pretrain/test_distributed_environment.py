"""The process group: the environment that describes it, its timeout, and how a process leaves it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import pretrain.train
from pretrain import distributed
from pretrain.__main__ import launch
from sharebert_common.errors import BadInput

GROUP = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "left",
    [
        ("WORLD_SIZE",),
        ("RANK",),
        ("MASTER_ADDR",),
        ("RANK", "WORLD_SIZE"),
        ("MASTER_ADDR", "MASTER_PORT"),
        tuple(GROUP),
    ],
)
def test_variables_left_in_the_environment_are_refused(left: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*GROUP, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in left:
        monkeypatch.setenv(name, GROUP[name])
    with pytest.raises(BadInput, match=f"sets {', '.join(left)}, but not .*run `unset RANK"):
        distributed.join(1.0)


def test_a_worker_that_was_promised_a_gpu_does_not_train_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {**GROUP, "LOCAL_RANK": "1", "SHAREBERT_GPUS_PER_NODE": "2"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal = f"gpus_per_node: 2 GPUs were asked for, and PyTorch sees 0 on node {platform.node()}"
    with pytest.raises(BadInput, match=refusal):
        distributed.join(1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match=refusal.replace("sees 0", "sees 1")):
        distributed.join(1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", ""),
        ("WORLD_SIZE", "abc"),
        ("RANK", "-1"),
        ("LOCAL_RANK", "²"),
        ("RANK", "4"),
        ("WORLD_SIZE", "0"),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", ""),
    ],
)
def test_values_that_are_no_numbers_are_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, whole in {**GROUP, "LOCAL_RANK": "0", name: value}.items():
        monkeypatch.setenv(key, whole)
    with pytest.raises(BadInput, match=f"the environment sets .*{name}.*{value}"):
        distributed.join(1.0)


def test_what_says_that_a_process_is_alone_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)
    for name, value in distributed.ALONE.items():
        monkeypatch.setenv(name, value)
    try:
        assert distributed.join(1.0).world_size == 1
    finally:
        distributed.leave()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in distributed.ALONE.items():  # `join` sets them; take them back after the test
        monkeypatch.setenv(name, value)
    yield
    distributed.leave()


@pytest.mark.usefixtures("alone")
def test_the_timeout_of_every_group() -> None:
    distributed.join(60.0)
    dist.new_group([0])  # as DeepSpeed does
    distributed.set_timeout(77.0)
    backends = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
    assert [backend.options._timeout for backend in backends] == [datetime.timedelta(seconds=77)] * 2


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("error", "code", "teardowns"),
    [
        (OSError("a disk is full"), 1, 0),
        (BadInput("a shard is damaged"), 2, 0),
        (distributed.Refused("all ranks know"), 2, 1),
    ],
)
def test_after_an_error_of_one_rank_nothing_waits_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, teardowns: int
) -> None:
    """NCCL's teardown would: it must not begin, unless all ranks come to it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {tmp_path}/run\ndata: {{dataset: {tmp_path}, global_batch: 1, micro_batch: 1}}\n")

    def broken(*_: object) -> int:
        raise error

    began: list[None] = []
    monkeypatch.setattr(pretrain.train, "train", broken)
    with monkeypatch.context() as teardown:
        teardown.setattr(dist, "destroy_process_group", lambda: began.append(None))
        assert launch(str(recipe), [], debug=False) == code
    assert len(began) == teardowns
    assert dist.is_initialized()


def test_the_refusal_reaches_the_user_whatever_the_rank(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {tmp_path}/run\ndata: {{dataset: {tmp_path}, global_batch: 1, micro_batch: 1}}\n")
    command = [sys.executable, "-m", "pretrain", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"RANK": "3"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: the environment sets RANK, but not WORLD_SIZE")


@pytest.mark.parametrize("left", [{"RANK": ""}, {"RANK": "x", "WORLD_SIZE": "abc"}])
def test_what_is_no_number_is_one_line(left: dict[str, str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {tmp_path}/run\ndata: {{dataset: {tmp_path}, global_batch: 1, micro_batch: 1}}\n")
    command = [sys.executable, "-m", "pretrain", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | left)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the environment sets RANK")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["sharebert", "data_prep", "scoring", "exports"])
def test_a_folder_in_the_working_directory_hides_no_package(name: str, tmp_path: Path) -> None:
    """Such as the clone, seen from its parent."""
    (tmp_path / name).mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stepz: 3\n")
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", str(recipe)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert done.returncode == 2, done.stderr
    assert "stepz: unknown key" in done.stderr
