"""A check under torchrun before a training: each device computes, and an all-reduce over all of them is right.

    python -m torch.distributed.run … -m cluster.collective [FLOOR]

FLOOR is the lowest bus bandwidth in GB/s that is accepted (0, the default, accepts any). A rank alone has none.

Exit code 0 where all is well; else 1, and a line that names rank, node and device.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from sharebert_common.gpus import refuse_without_gpu

BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
"""Size of the all-reduce whose bandwidth is printed."""
TIMES = 5


def compute(device: torch.device) -> None:
    """A matrix product with a known result. Raises RuntimeError where the device gives another result, or none."""
    ones = torch.ones(256, 256, device=device)
    result = (ones @ ones).sum().item()
    if result != 256.0**3:
        raise RuntimeError(f"a product of ones gives {result}, not {256.0**3}")


def all_reduce(device: torch.device) -> float:
    """All-reduce a tensor of rank + 1. Returns the bus bandwidth in GB/s. Raises RuntimeError for a wrong sum.

    Bus bandwidth: bytes of the tensor · 2(n-1)/n / seconds, what each of n ranks sends and receives in a ring.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    values = torch.empty(BYTES[device.type] // 4, device=device)
    seconds = float("inf")
    for _ in range(TIMES):
        values.fill_(rank + 1)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = min(seconds, time.perf_counter() - began)
        if not bool((values == world_size * (world_size + 1) / 2).all()):
            raise RuntimeError(f"the all-reduce gives {values.min().item()} to {values.max().item()}")
    return bus_bandwidth(values.nbytes, world_size, seconds)


def bus_bandwidth(size: int, world_size: int, seconds: float) -> float:
    """GB/s that each of `world_size` ranks sends in a ring which all-reduces `size` bytes; 0 for a rank alone."""
    return size * 2 * (world_size - 1) / world_size / seconds / 1e9


def main(floor: float = 0.0) -> int:
    """Check the device of this rank, and all of them together; an exit code. `floor` is in GB/s."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        refuse_without_gpu(local_rank, torch.cuda.device_count() if device.type == "cuda" else 0)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        compute(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=120))
        bandwidth = all_reduce(device)
        if rank == 0:
            print(
                f"pre-flight: all-reduce of {BYTES[device.type] >> 20} MiB over {dist.get_world_size()} "
                f"{device.type} ranks: right, {bandwidth:.2f} GB/s",
                flush=True,
            )
        # Every rank has its own measurement; rank 0's decides, so that one line says it.
        if rank == 0 and bandwidth < floor and dist.get_world_size() > 1:  # a rank alone sends nothing
            raise RuntimeError(
                f"the all-reduce reaches {bandwidth:.2f} GB/s, below min_bandwidth ({floor:g} GB/s); with "
                "NCCL_DEBUG=INFO NCCL says which network it uses: NET/IB is InfiniBand, NET/Socket is TCP"
            )
        dist.destroy_process_group()
    except Exception as error:
        print(f"pre-flight: rank {rank} on {os.uname().nodename}, {device}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    code = main(float(sys.argv[1]) if len(sys.argv) > 1 else 0.0)
    sys.stdout.flush()
    if code:
        os._exit(code)  # NCCL's teardown can wait for ranks that will never come (pytorch#141510)
    sys.exit(code)
