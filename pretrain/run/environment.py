"""What an attempt ran on, for `environment.json`: commit, versions, hardware, and how the ranks communicate."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("sharebert", "torch", "deepspeed", "numpy", "safetensors", "tokenizers", "tensorboard", "triton")

VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "MKL_NUM_THREADS", "CUDA_", "DS_ACCELERATOR",
             "MASTER_", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "SLURM_JOB_ID", "SLURM_JOB_NODELIST")  # fmt: skip
"""Prefixes of the environment variables that are recorded. All others may be secrets and are not recorded."""


def environment(device: torch.device, hosts: list[str]) -> dict[str, Any]:
    """JSON values. `hosts` has the name of each rank's machine."""
    return {
        "time": time.time(),
        "hosts": hosts,
        "ranks": len(hosts),
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "name": cpu_name(),
            "count": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "threads": torch.get_num_threads(),
        },
        "device": str(device),
        "gpu": _gpu(device),
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith(VARIABLES)},
    }


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "nccl": list(torch.cuda.nccl.version()),
    }


def cpu_name() -> str:
    """The name of this machine's processor; where the system does not say it, that of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source checkout that this code runs from, if it is one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None
