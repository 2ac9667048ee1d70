"""The data sheets of GPUs: peak rate, memory, bandwidth; and which of them a device's name means.

Sources: the makers' data sheets. NVIDIA: "A100 Tensor Core GPU" (40 and 80 GB), "H100 Tensor Core GPU" (SXM, PCIe,
NVL), "H200 Tensor Core GPU", "DGX B200" (divided by 8), "GB200 NVL72" (divided by 72), "A10", "A40", "L4", "L40S",
"RTX A4000", "RTX 6000 Ada Generation", "V100". AMD: "Instinct MI300X". Where a sheet gives the rate with sparsity, half
of it stands here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sharebert_common.errors import BadInput, nearest


class Gpu(NamedTuple):
    """One kind of GPU."""

    title: str
    """Its name for people."""
    peak_flops: float
    """Dense bf16 FLOP/s (V100: fp16, it has no bf16)."""
    memory_bytes: float
    """Memory."""
    bandwidth: float
    """Bytes/s of its memory."""
    names: str
    """Regular expression that the whole device name of the driver matches, in lower case."""


GPUS = {
    "b200": Gpu("B200", 2.25e15, 180e9, 8e12, r"nvidia b200( .*)?"),
    "gb200": Gpu("GB200", 2.5e15, 186e9, 8e12, r"nvidia gb200( .*)?"),
    "h100": Gpu("H100 SXM", 989e12, 80e9, 3.35e12, r"nvidia h100( 80gb hbm3| sxm5?.*)?"),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 80e9, 2.0e12, r"nvidia h100 pcie"),
    "h100-nvl": Gpu("H100 NVL", 835e12, 94e9, 3.9e12, r"nvidia h100 nvl"),
    "h200": Gpu("H200", 989e12, 141e9, 4.8e12, r"nvidia h200( nvl)?"),
    "a100": Gpu("A100 80 GB", 312e12, 80e9, 2.039e12, r"nvidia a100[- ](sxm4[- ]|pcie[- ])?80gb( pcie)?"),
    "a100-40": Gpu("A100 40 GB", 312e12, 40e9, 1.555e12, r"(nvidia )?a100[- ](sxm4[- ]|pcie[- ])?40gb( pcie)?"),
    "a10": Gpu("A10", 125e12, 24e9, 600e9, r"nvidia a10"),
    "a40": Gpu("A40", 149.7e12, 48e9, 696e9, r"nvidia a40"),
    "a4000": Gpu("RTX A4000", 76.7e12, 16e9, 448e9, r"nvidia rtx a4000"),
    "l4": Gpu("L4", 121e12, 24e9, 300e9, r"nvidia l4"),
    "l40s": Gpu("L40S", 362e12, 48e9, 864e9, r"nvidia l40s"),
    "rtx6000-ada": Gpu("RTX 6000 Ada", 364.2e12, 48e9, 960e9, r"nvidia rtx 6000 ada generation"),
    "v100": Gpu("V100", 125e12, 32e9, 900e9, r"(nvidia |tesla )+v100.*"),
    "mi300x": Gpu("MI300X", 1307.4e12, 192e9, 5.3e12, r"amd instinct mi300x.*"),
}
"""Known GPUs, by the name that `--gpu` takes."""


def gpu_of(name: str) -> Gpu:
    """The GPU of this name. Raises BadInput, naming the nearest one."""
    known = GPUS.get(name.lower())
    if known is None:
        raise BadInput(f"--gpu: no '{name}' known{nearest(name, GPUS)} (known: {', '.join(GPUS)})")
    return known


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that the driver calls `device_name`, such as "NVIDIA A40"; None where it is not in the table."""
    name = device_name.lower().strip()
    return next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.names, name)), None)
