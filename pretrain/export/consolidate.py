"""A training's newest whole checkpoint → an export, streamed and without DeepSpeed.

The weights go from the files of the ranks to the export's a piece at a time, whatever the size of the model.
Taken are a run of ours, a folder that DeepSpeed itself saved, or an export (for another form or dtype of it).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from exports.cards import sections_of
from exports.export import CARD, CONFIG, TOKENIZER, new_export, read_config, tensor_shapes, write_export_files
from exports.weights import read_metadata, stream_weights
from pretrain.checkpoint.format import Checkpoint, all_whole, found, read_manifest
from pretrain.export.deepspeed_folders import DeepSpeedMasters, is_deepspeed_folder
from pretrain.export.run_card import recipe_text, sections
from pretrain.export.weight_sources import CheckpointMasters, ExportMasters, Masters, Mean, pieces
from pretrain.run.folder import RunFolder
from sharebert import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = ("compact", "dense", "onnx")


@dataclass(frozen=True)
class Training:
    """What an export is made of."""

    masters: Masters
    config: ShareBertConfig
    tokenizer: Path | None
    sections: Mapping[str, str]
    """Of the model card."""
    provenance: Mapping[str, str]
    """Goes into the metadata of the safetensors files."""


def consolidate(
    source: Path,
    out: Path,
    *,
    form: str = "compact",
    head: bool = True,
    dtype: str = "fp32",
    average: int = 1,
    config: Path | None = None,
) -> Path:
    """Write the newest whole checkpoint of a training as an export.

    Args:
        source: a run, finished or not; a folder that DeepSpeed saved; or an export.
        out: folder of the export; one that is there is replaced, anything else refused.
        form: `compact`; `dense`, which stock transformers loads; or `onnx`, an ONNX file of the dense form.
        head: whether the MLM head goes along.
        dtype: fp32 (compact: bit for bit the masters), bf16 or fp16 (rounded).
        average: takes the mean of so many of a run's newest whole checkpoints.
        config: for a folder of DeepSpeed's, which has none: an export, a run or a config.json of the same model.

    Returns `out`. Raises BadInput, or ShareBertError from the export, naming the file.
    """
    if form not in FORMS or dtype not in DTYPES or average < 1:
        raise BadInput(f"form: one of {', '.join(FORMS)}; dtype: one of {', '.join(DTYPES)}; average: from 1")
    if form == "onnx" and dtype != "fp32":
        raise BadInput("--form onnx is written in fp32; leave --dtype away")
    out = Path(out)
    if out.resolve() == Path(source).resolve():
        raise BadInput(f"{out}: the export would replace what it is made of; choose another folder")
    training = _open(Path(source), average, config)
    if not head:
        training = dataclasses.replace(training, config=dataclasses.replace(training.config, mlm_head="none"))
    _refuse_other_shapes(training, source)
    if form == "compact":
        _write_compact(out, training, DTYPES[dtype])
    else:
        _write_other_form(out, training, DTYPES[dtype], form)
    return out


def _open(source: Path, average: int, config: Path | None) -> Training:
    if not source.is_dir():
        raise BadInput(f"{source}: no such folder")
    run = RunFolder(source)
    is_run = run.checkpoints.is_dir() or run.config.is_file()
    if is_run and config is None:
        return _of_run(run, average)
    if average != 1:
        raise BadInput(f"{source}: --average takes the checkpoints of a run, and this is none")
    if is_deepspeed_folder(source):
        return _of_deepspeed_folder(source, config)
    if config is not None:
        raise BadInput(f"{source}: --config is for a folder that DeepSpeed saved, and this is none")
    if (source / CONFIG).is_file():
        return _of_export(source)
    raise BadInput(f"{source}: no run, no export and no folder that DeepSpeed saved")


def _of_run(run: RunFolder, average: int) -> Training:
    whole = all_whole(run.checkpoints, lambda text: print(text, file=sys.stderr))
    taken = list(islice(whole, average))
    unfinished = sorted(run.checkpoints.glob(".step-*"))
    if not taken:
        writing = f"; {unfinished[-1].name} is not finished" if unfinished else ""
        raise BadInput(f"{run.checkpoints}: no whole checkpoint here yet{writing}")
    if len(taken) < average:
        raise BadInput(f"{run.checkpoints}: {len(taken)} whole checkpoints, --average asks for {average}")
    newest = taken[0]
    for folder in unfinished:
        if folder.name[1:14] > newest.folder.name:
            print(f"{folder}: not finished; taking the checkpoint of step {newest.step}", file=sys.stderr)
    for older in taken[1:]:
        if older.training["model"] != newest.training["model"]:
            raise BadInput(f"{older.folder}: of another model than {newest.folder}, so they have no mean")
    _refuse_other_tokenizer(run, newest)
    masters: list[Masters] = [CheckpointMasters(checkpoint) for checkpoint in taken]
    provenance = {
        "run": run.path.resolve().name,
        "step": ",".join(str(checkpoint.step) for checkpoint in reversed(taken)),
        "dataset": newest.training["loader"]["fingerprint"],
        "config": recipe_text(run),
    }
    return Training(
        masters[0] if average == 1 else Mean(masters),
        ShareBertConfig.from_dict(newest.training["model"]),
        run.tokenizer,
        sections(run, taken),
        provenance,
    )


def _of_deepspeed_folder(folder: Path, config: Path | None) -> Training:
    if config is None:
        raise BadInput(
            f"{folder}: saved by DeepSpeed, which keeps no config of the model; give --config, "
            "an export, a run or a config.json of the same model"
        )
    model, tokenizer = _model_of(config)
    masters = DeepSpeedMasters(folder)
    provenance = {
        "run": folder.resolve().name,
        "step": str(masters.step),
        "dataset": "unknown",
        "config": json.dumps(model.to_dict()),
    }
    text = f"Consolidated from a checkpoint that DeepSpeed saved after {masters.step:,} steps."
    return Training(masters, model, tokenizer, {"Training": text}, provenance)


def _model_of(path: Path) -> tuple[ShareBertConfig, Path | None]:
    """The model config, and the tokenizer where there is one, of an export, a run or a config.json."""
    run = RunFolder(path)
    if run.checkpoints.is_dir():
        for folder in found(run.checkpoints):
            return ShareBertConfig.from_dict(read_manifest(folder).training["model"]), run.tokenizer
        raise BadInput(f"{run.checkpoints}: no checkpoint, so no model config (--config)")
    folder = path if path.is_dir() else path.parent
    tokenizer = folder / TOKENIZER
    return read_config(folder if path.is_dir() else path), tokenizer if tokenizer.is_file() else None


def _of_export(folder: Path) -> Training:
    config, masters = read_config(folder), ExportMasters(folder)
    tokenizer, card = folder / TOKENIZER, folder / CARD
    return Training(
        masters,
        config,
        tokenizer if tokenizer.is_file() else None,
        sections_of(card.read_text(encoding="utf-8")) if card.is_file() else {},
        read_metadata(folder),
    )


def _write_compact(out: Path, training: Training, dtype: torch.dtype) -> None:
    shapes = tensor_shapes(training.config)
    with new_export(out) as folder:
        write_export_files(folder, training.config, training.tokenizer, training.sections)
        specs = {name: (dtype, shape) for name, shape in shapes.items()}
        stream_weights(folder, specs, pieces(training.masters, list(shapes)), training.provenance)


def _write_other_form(out: Path, training: Training, dtype: torch.dtype, form: str) -> None:
    """By way of a compact export in fp32, whose weights are then mapped from its file and not held in memory."""
    from exports.dense import check_fits
    from exports.dense_export import write_dense
    from exports.export import read_export
    from exports.onnx import write_onnx_export

    check_fits(training.config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        compact = Path(temporary) / "compact"
        _write_compact(compact, training, torch.float32)
        model = read_export(compact)
        if form == "onnx":
            write_onnx_export(out, model, tokenizer=training.tokenizer, sections=training.sections)
        else:
            write_dense(
                out,
                model,
                tokenizer=training.tokenizer,
                sections=training.sections,
                metadata=training.provenance,
                dtype=dtype,
            )


def _refuse_other_tokenizer(run: RunFolder, newest: Checkpoint) -> None:
    if not run.tokenizer.is_file():
        raise BadInput(f"{run.tokenizer}: missing")
    expected = newest.training["tokenizer_sha256"]
    if (found := file_sha256(run.tokenizer)) != expected:
        raise BadInput(f"{run.tokenizer}: sha256 {found}, the checkpoint was trained with {expected}")


def _refuse_other_shapes(training: Training, source: Path) -> None:
    for name, shape in tensor_shapes(training.config).items():
        given: Sequence[int] | None = training.masters.shapes.get(name)
        if given is None or list(given) != list(shape):
            there = "missing" if given is None else f"{list(given)} ({math.prod(given):,} values)"
            raise BadInput(f"{source}: '{name}' is {there}, the model of its config has {list(shape)}")
