"""Compile every Triton kernel for GPUs that this machine need not have; prints a JSON line for each.

    python compile_kernels.py 80 90 100

A line is {"kernel", "architecture", "dtype", "registers", "spills": bytes}, from ptxas -v on the PTX that Triton makes.
It does not work under TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from sharebert import kernels_triton_gelu as gelu
from sharebert import kernels_triton_loss as loss
from sharebert import kernels_triton_norm as norm
from sharebert import kernels_triton_slab as slab

HIDDEN = 2048
"""Hidden size of the published sizes."""


def kernels(dtype: str) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, types of its pointers, constants, warps), as the wrappers launch them for a model in `dtype`."""
    block, warps = norm.block_and_warps(HIDDEN)
    half = f"*{dtype}"
    common = {"HAS_BRANCH": True, "DROPOUT": True, "SUMS": tl.float32, "BLOCK": block}
    sums = {"means": "*fp32", "deviations": "*fp32", "seed": "*i64"}
    yield norm.add_dropout_norm_forward, {"*": half} | sums, common, warps
    gradients = {"grad_weight": "*fp32", "grad_bias": "*fp32"}
    yield norm.add_dropout_norm_backward, {"*": half} | sums | gradients, common | {"HAS_GRAD_SUMMED": True}, warps
    tile = {"SUMS": tl.float32, "ROWS": gelu.ROWS, "COLUMNS": gelu.COLUMNS}
    yield gelu.bias_gelu_forward, {"*": half}, tile, gelu.WARPS
    yield gelu.bias_gelu_backward, {"*": half, "grad_bias": "*fp32"}, tile, gelu.WARPS
    outputs = {"labels": "*i64", "loss_weights": "*fp32", "losses": "*fp32", "hits": "*fp32"}
    constants = {"HAS_BIAS": True, "WITH_GRADIENT": True, "SUMS": tl.float32, "COLUMNS": loss.COLUMNS}
    yield loss.cross_entropy_rows, {"*": half} | outputs, constants, loss.WARPS
    yield slab.cut_kernel, {"*": half}, {"TILE": slab.TILE}, slab.WARPS
    yield slab.fill_kernel, {"*": half, "gradient": "*fp32"}, {"TILE": slab.TILE}, slab.WARPS


SCALARS = {"eps": "fp32", "keep_scale": "fp32", "threshold": "i64"}
COUNTS = ("stream_stride", "branch_stride", "summed_stride", "grad_stride", "x_stride", "rows", "width")
SLAB = ("slab_width", "left", "columns", "count", "total")
"""Counts of the kernels of a slab. Only the slab's width is a multiple of 16 bytes."""


def signature_of(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """The type of each argument, as Triton spells them."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in COUNTS or name in SLAB:
            return "i32"
        return SCALARS.get(name) or pointers.get(name, pointers["*"])

    return {name: kind(name) for name in kernel.arg_names}


def multiples_of_16(signature: dict[str, str]) -> dict[tuple[int], list[list[Any]]]:
    """The arguments that are multiples of 16 at a real launch: pointers, strides and widths. Triton uses this."""
    aligned = [
        kind.startswith("*") or (name in COUNTS and name != "rows") or name == "slab_width"
        for name, kind in signature.items()
    ]
    return {(place,): [["tt.divisibility", 16]] for place, yes in enumerate(aligned) if yes}


def ptxas_report(ptx: str, architecture: int, folder: Path) -> dict[str, int]:
    """Registers a thread, and bytes spilled."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    command = [
        get_ptxas(architecture).path,
        "-v",
        f"--gpu-name={target[1]}",
        str(file),
        "-o",
        str(folder / "kernel.cubin"),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert "registers" in said, said
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    registers = re.findall(r"Used (\d+) registers", said)
    return {"registers": max(map(int, registers)), "spills": sum(map(int, spills))}


def main(architectures: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures:
            for dtype in ("bf16", "fp16", "fp32"):
                for kernel, pointers, constants, warps in kernels(dtype):
                    signature = signature_of(kernel, pointers, constants)
                    source = ASTSource(kernel, signature, constants, multiples_of_16(signature))
                    target = GPUTarget("cuda", architecture, 32)
                    compiled = triton.compile(source, target=target, options={"num_warps": warps})
                    found = {"kernel": kernel.__name__, "architecture": architecture, "dtype": dtype}
                    print(json.dumps(found | ptxas_report(compiled.asm["ptx"], architecture, Path(folder))), flush=True)


if __name__ == "__main__":
    main([int(architecture) for architecture in sys.argv[1:]])
