"""A run's newest whole checkpoint → an export. Needs nothing but the run directory, and no DeepSpeed.

The weights go from the ranks' files to `model.safetensors` one tensor at a time: memory holds the largest
tensor, never the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from pretrain.checkpoint import Checkpoint, newest_whole, read_whole
from pretrain.run_folder import RunFolder
from pretrain.tensor_file import lay_out
from sharebert import ShareBertConfig
from sharebert.export import new_export, tensor_shapes, write_export_files
from sharebert.weights import checksum, plan_files, write_index
from sharebert_recipe import BadInput

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def consolidate(run_folder: Path, out: Path, *, head: bool = True, dtype: str = "fp32") -> Path:
    """Write the newest whole checkpoint of a run as an export.

    Args:
        run_folder: of the run, finished or not.
        out: folder of the export; one that is there is replaced, anything else refused.
        head: whether the MLM head goes along.
        dtype: fp32 (bit for bit the masters), bf16 or fp16 (rounded).

    Returns `out`. Raises BadInput, or ShareBertError from the export, naming the file.
    """
    run = RunFolder(run_folder)
    newest = _newest(run)
    _refuse_other_tokenizer(run, newest)
    config = ShareBertConfig.from_dict(newest.training["model"])
    if not head:
        config = dataclasses.replace(config, mlm_head="none")
    shapes = tensor_shapes(config)
    _refuse_other_shapes(newest, shapes)
    provenance = {
        "run": run.path.resolve().name,
        "step": str(newest.step),
        "dataset": newest.training["loader"]["fingerprint"],
    }
    with new_export(Path(out)) as folder:
        write_export_files(folder, config, run.tokenizer, {"Training": _training_section(run, newest)})
        sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, shape in shapes.items()}
        files = plan_files(sizes)
        for file, names in files.items():
            write_streamed(
                folder / file,
                {name: shapes[name] for name in names},
                lambda name: read_whole(newest, name),
                DTYPES[dtype],
                provenance,
            )
        write_index(folder, files, sum(sizes.values()))
    return Path(out)


def write_streamed(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file one tensor after another, as an export has it: with a checksum of each.

    Args:
        path: of the file.
        shapes: every tensor's shape, in the order in which they lie in the file.
        read: gives a tensor by name, on the CPU; it is dropped before the next is asked for.
        dtype: of all tensors in the file; values are rounded to it.
        metadata: goes into the header, with `format` and `crc32`.
    """
    sums = dict.fromkeys(shapes, "00000000")
    specs = {name: (dtype, shape) for name, shape in shapes.items()}

    def layout_now() -> bytes:
        return lay_out(specs, {"format": "pt", **metadata, "crc32": json.dumps(sums)}).header

    with path.open("wb") as out:
        out.write(layout_now())
        for name in shapes:
            tensor = read(name).to(dtype).contiguous()
            sums[name] = checksum(tensor)
            out.write(tensor.view(-1).view(torch.uint8).numpy().data)
        out.seek(0)
        out.write(layout_now())  # as long as before: a checksum always has eight digits
        out.flush()
        os.fsync(out.fileno())


def _newest(run: RunFolder) -> Checkpoint:
    if not run.path.is_dir():
        raise BadInput(f"{run.path}: no such run")
    newest = newest_whole(run.checkpoints, lambda text: print(text, file=sys.stderr))
    if newest is None:
        raise BadInput(f"{run.checkpoints}: no whole checkpoint here yet")
    return newest


def _refuse_other_tokenizer(run: RunFolder, newest: Checkpoint) -> None:
    expected = newest.training["tokenizer_sha256"]
    if not run.tokenizer.is_file():
        raise BadInput(f"{run.tokenizer}: missing")
    found = hashlib.sha256(run.tokenizer.read_bytes()).hexdigest()
    if found != expected:
        raise BadInput(f"{run.tokenizer}: sha256 {found}, the checkpoint was trained with {expected}")


def _refuse_other_shapes(newest: Checkpoint, shapes: Mapping[str, Sequence[int]]) -> None:
    for name, shape in shapes.items():
        found = newest.manifest["shapes"].get(name)
        if found != list(shape):
            raise BadInput(f"{newest.folder}: '{name}' is {found}, the model of its manifest has {list(shape)}")


def _training_section(run: RunFolder, newest: Checkpoint) -> str:
    recipe = run.config.read_text(encoding="utf-8") if run.config.is_file() else "(not recorded)\n"
    return (
        f"Pretrained with masked language modelling for {newest.step:,} steps "
        f"({newest.training['loader']['rows_consumed']:,} rows) on the dataset with fingerprint "
        f"`{newest.training['loader']['fingerprint']}`. The recipe:\n\n```yaml\n{recipe}```"
    )
