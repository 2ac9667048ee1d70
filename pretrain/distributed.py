"""The process group: which rank this process is, and the collectives that are not DeepSpeed's."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from sharebert_common.errors import BadInput
from sharebert_common.gpus import refuse_without_gpu

T = TypeVar("T")

GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that describe a process group; torchrun sets them all."""

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""The values in a process that is alone."""

_UNSET = (
    "start the processes of a group with torchrun, or, to train in one process, run "
    f"`unset {' '.join(GROUP_VARIABLES)} LOCAL_RANK LOCAL_WORLD_SIZE` first"
)

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


class Refused(BadInput):
    """Bad input that every rank knows of, so that one line is enough."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0


def join(timeout_s: float) -> World:
    """Join the process group that torchrun's environment describes, or make one of this process alone.

    Collectives on CPU tensors go over gloo, those on CUDA tensors over NCCL. Where all ranks are on this
    machine both listen on its loopback interface, unless their variables say otherwise. A collective that a rank does
    not join within `timeout_s` ends the group.

    Raises BadInput where the environment has only some of torchrun's variables, or values that are none: WORLD_SIZE
    alone, left over from another program, would let this process train on a part of each batch. Also where a launcher
    asked for GPUs and there is none for this process.
    """
    _refuse_partial_group()
    rank, world_size, local_rank = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not rank < world_size:
        raise BadInput(f"the environment sets RANK={rank} and WORLD_SIZE={world_size}; {_UNSET}")
    cuda = torch.cuda.is_available()
    refuse_without_gpu(local_rank, torch.cuda.device_count() if cuda else 0)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    on_one_machine = _number("LOCAL_WORLD_SIZE", 1) == world_size
    if on_one_machine:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, LOOPBACK)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "MASTER_ADDR" in os.environ:
        _number("MASTER_PORT")
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        # A rank of an earlier attempt must not join this one, if both use the same port.
        prefix = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        if on_one_machine:
            # torchrun keeps one store over its restarts of the workers, where gloo would find addresses of dead ranks.
            prefix += f"-attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store = dist.PrefixStore(prefix, store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        os.environ.update(ALONE)  # DeepSpeed asks for them
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(rank, world_size, local_rank, device)


def _refuse_partial_group() -> None:
    """LOCAL_RANK as well: a launcher sets it for each process, and without it the others are leftovers."""
    names = (*GROUP_VARIABLES, "LOCAL_RANK")
    given = [name for name in names if os.environ.get(name, ALONE.get(name)) != ALONE.get(name)]
    needed = GROUP_VARIABLES if os.environ.get("WORLD_SIZE", "1") == "1" else names
    missing = [name for name in needed if name not in os.environ]
    if given and missing:
        raise BadInput(f"the environment sets {', '.join(given)}, but not {', '.join(missing)}; {_UNSET}")


def _number(name: str, default: int | None = None) -> int:
    """The number in an environment variable that describes the group."""
    text = os.environ.get(name, ALONE.get(name, "") if default is None else str(default))
    if not (text.isascii() and text.isdigit()):
        raise BadInput(f"the environment sets {name} to {text!r}, which is no number; {_UNSET}")
    return int(text)


def set_timeout(timeout_s: float) -> None:
    """Give every process group the timeout of a collective, also those that DeepSpeed made with torch's default."""
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def leave() -> None:
    """Leave the process group, if this process is in one, after all ranks came to a common end.

    After an error that is not Refused it must not be called, BadInput included: NCCL's teardown waits for ranks that
    may never come (pytorch#141510).
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_now(code: int) -> NoReturn:
    """End this process without shutting the interpreter down. Everything must be closed by then.

    Threads that gloo and DeepSpeed leave behind can abort a finished process while it shuts down (seen: exit code -6
    at the end of a training), and torchrun takes that for a crash.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def broadcast_from_main(value: str) -> str:
    """Rank 0's `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_agree(good: bool) -> bool:
    """Whether `good` holds on every rank."""
    flag = torch.tensor([int(good)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def first_text(text: str | None) -> str | None:
    """The text of the lowest rank that has one, on every rank; None where none has."""
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return next((text for text in texts if text is not None), None)


def smallest(value: T | None) -> T | None:
    """The smallest `value` of all ranks that have one, on every rank; None where none has."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return min((value for value in values if value is not None), default=None)  # type: ignore[type-var]


@contextmanager
def refused_by_all() -> Iterator[None]:
    """A BadInput that ends the block on some rank becomes Refused, a BadInput, on every rank.

    The message is that of the lowest such rank. Leaving the block is a collective; any other error leaves it at once.
    """
    message = None
    try:
        yield
    except BadInput as error:
        message = str(error)
    first = first_text(message)
    if first is not None:
        raise Refused(first)


def hosts() -> list[str]:
    """The name of each rank's machine, on every rank."""
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, platform.node())
    return names


def all_reduce_async(*numbers: int) -> Callable[[], list[int]]:
    """Start to sum each of `numbers` over all ranks. The function that is returned waits for the sums.

    The sums are made on the hosts, so that neither the device nor a read from it waits.
    """
    total = torch.tensor(numbers, dtype=torch.int64)
    work = dist.all_reduce(total, async_op=True)

    def wait() -> list[int]:
        work.wait()
        return [int(number) for number in total.tolist()]

    return wait


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts`, for a generator of torch or NumPy."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def share_of(total: int, rank: int, world_size: int) -> range:
    """The contiguous share of `total` items that `rank` takes; shares differ by at most one."""
    return range(total * rank // world_size, total * (rank + 1) // world_size)
