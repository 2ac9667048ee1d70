"""The GPUs that a launcher promised its workers: without them a worker must not compute on a CPU."""

from __future__ import annotations

import os
import platform

from sharebert_common.errors import BadInput

GPUS_PER_NODE = "SHAREBERT_GPUS_PER_NODE"
"""Environment variable: the GPUs of each node, where a launcher asked for some."""


def refuse_without_gpu(local_rank: int, found: int) -> None:
    """Raise BadInput, naming this node, where GPUs were promised and there is none for this worker.

    Args:
        local_rank: number of this worker on its node; it takes the GPU of that number.
        found: how many GPUs PyTorch sees.
    """
    promised = os.environ.get(GPUS_PER_NODE)
    if promised and local_rank >= found:
        raise BadInput(
            f"gpus_per_node: {promised} GPUs were asked for, and PyTorch sees {found} on node {platform.node()}; look "
            "at `nvidia-smi` there, and leave the node out with `exclude`"
        )
