"""A training's newest whole checkpoint → an export, streamed and without DeepSpeed.

The weights go from the files of the ranks to those of the export a piece at a time, whatever the size of the model.
The source is a run of this project, a folder that DeepSpeed itself saved, or an export (for another form or dtype).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from exports.export import Export, tensor_shapes
from exports.files import CONFIG, TOKENIZER
from exports.forms import FORMS, Form, write_export
from exports.kinds import pretrained_kind
from exports.packed import is_pruned
from exports.read import read_config, read_export
from exports.weight_source import MeanWeights, SelectedWeights, WeightSource
from pretrain.checkpoint.format import Checkpoint, all_whole, found, read_manifest
from pretrain.export.checkpoint_weights import CheckpointWeights
from pretrain.export.deepspeed_folders import DeepSpeedWeights, is_deepspeed_folder
from pretrain.export.run_card import recipe_text, sections
from pretrain.run.folder import RunFolder
from sharebert import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def consolidate(
    source: Path,
    out: Path,
    *,
    form: str = "compact",
    head: bool = True,
    dtype: str = "fp32",
    average: int = 1,
    ema: bool = False,
    config: Path | None = None,
    opset: int | None = None,
) -> Path:
    """Write the newest whole checkpoint of a training as an export.

    Args:
        source: a run, finished or not; a folder that DeepSpeed saved; or an export.
        out: folder of the export; an export that is there is replaced, anything else is refused.
        form: `compact`; `dense`, which plain transformers loads; or `onnx`, an ONNX file of the dense form.
        head: whether the MLM head (or the classifier of an export) goes along.
        dtype: fp32 (compact: the fp32 master weights bit for bit), bf16 or fp16 (rounded).
        average: the number of a run's newest whole checkpoints whose mean is taken.
        ema: take the moving average of the weights that a run with `optimizer.ema` keeps, in place of the weights.
        config: for a folder that DeepSpeed saved: an export, a run or a config.json of the same model.
        opset: version of ONNX's operators; None for the usual one.

    Returns `out`. Raises BadInput, naming the file.
    """
    if form not in FORMS or dtype not in DTYPES or average < 1:
        raise BadInput(f"form: one of {', '.join(FORMS)}; dtype: one of {', '.join(DTYPES)}; average: from 1")
    chosen = _form(form, dtype, opset)
    out = Path(out)
    if out.resolve() == Path(source).resolve():
        raise BadInput(f"{out}: the export would replace its own source; choose another folder")
    export = _open(Path(source), average, config, ema=ema)
    write_export(export if head else export.without_head(), out, chosen)
    return out


def _form(name: str, dtype: str, opset: int | None) -> Form:
    """The form with the choices that it has. Raises BadInput for a choice that it lacks."""
    form: Any = FORMS[name]
    choices = {field.name for field in dataclasses.fields(form)}
    if "dtype" not in choices and dtype != "fp32":
        raise BadInput(f"--form {name} is written in fp32; leave --dtype away")
    if "opset" not in choices and opset is not None:
        raise BadInput(f"--form {name} has no operators of ONNX; leave --opset away")
    given = {"dtype": DTYPES[dtype], "opset": opset}
    chosen: Form = form(**{key: value for key, value in given.items() if key in choices and value is not None})
    return chosen


def _open(source: Path, average: int, config: Path | None, *, ema: bool) -> Export:
    if not source.is_dir():
        raise BadInput(f"{source}: no such folder")
    run = RunFolder(source)
    is_run = run.checkpoints.is_dir() or run.config.is_file()
    if is_run and config is None:
        return _of_run(run, average, ema=ema)
    if ema:
        raise BadInput(f"{source}: --ema takes the checkpoint of a run, and this is no run")
    if average != 1:
        raise BadInput(f"{source}: --average takes the checkpoints of a run, and this is no run")
    if is_deepspeed_folder(source):
        return _of_deepspeed_folder(source, config)
    if config is not None:
        raise BadInput(f"{source}: --config is for a folder that DeepSpeed saved, and this is none")
    if (source / CONFIG).is_file():
        return read_export(source)
    raise BadInput(f"{source}: not a run, not an export, and not a folder that DeepSpeed saved")


def _of_run(run: RunFolder, average: int, *, ema: bool) -> Export:
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
            raise BadInput(f"{older.folder}: of another model than {newest.folder}, so they have no mean (--average)")
    _refuse_other_tokenizer(run, newest)
    weights: list[WeightSource] = [CheckpointWeights(checkpoint, ema=ema) for checkpoint in taken]
    provenance = {
        "run": run.path.resolve().name,
        "step": ",".join(str(checkpoint.step) for checkpoint in reversed(taken)),
        "dataset": newest.training["loader"]["fingerprint"],
        "config": recipe_text(run),
    }
    export = _pretrained(
        run.path,
        ShareBertConfig.from_dict(newest.training["model"]),
        weights[0] if average == 1 else MeanWeights(weights),
        run.tokenizer,
        sections(run, taken, ema=ema),
        provenance,
    )
    return dataclasses.replace(export, other_keys={"sparse": sparse}) if (sparse := _sparse(run, export)) else export


def _sparse(run: RunFolder, export: Export) -> list[str]:
    """Names of the tensors to store as sparse: where a run with `model.keep_zeros` kept zeros."""
    recipe = yaml.safe_load(recipe_text(run)) or {}
    if not recipe.get("model", {}).get("keep_zeros"):
        return []
    return sorted(name for name in export.weights.specs if is_pruned(name))


def _of_deepspeed_folder(folder: Path, config: Path | None) -> Export:
    if config is None:
        raise BadInput(
            f"{folder}: saved by DeepSpeed, which keeps no config of the model; give --config: "
            "an export, a run or a config.json of the same model"
        )
    model, tokenizer = _model_of(config)
    weights = DeepSpeedWeights(folder)
    provenance = {
        "run": folder.resolve().name,
        "step": str(weights.step),
        "dataset": "unknown",
        "config": json.dumps(model.to_dict()),
    }
    text = f"Consolidated from a checkpoint that DeepSpeed saved after {weights.step:,} steps."
    return _pretrained(folder, model, weights, tokenizer, {"Training": text}, provenance)


def _pretrained(
    source: Path,
    config: ShareBertConfig,
    weights: WeightSource,
    tokenizer: Path | None,
    card_sections: Mapping[str, str],
    provenance: Mapping[str, str],
) -> Export:
    """An export with the weights of `source` in the model's order. A headless `config` leaves an MLM head out."""
    selected = SelectedWeights(weights, list(tensor_shapes(config)))
    export = Export(config, pretrained_kind(config), selected, tokenizer, card_sections, provenance)
    export.check(str(source))
    return export


def _model_of(path: Path) -> tuple[ShareBertConfig, Path | None]:
    """The model config, and the tokenizer where there is one, of an export, a run or a config.json."""
    run = RunFolder(path)
    if run.checkpoints.is_dir():
        for folder in found(run.checkpoints):
            return ShareBertConfig.from_dict(read_manifest(folder).training["model"]), run.tokenizer
        raise BadInput(f"{run.checkpoints}: no checkpoint, so --config finds no model config here")
    folder = path if path.is_dir() else path.parent
    tokenizer = folder / TOKENIZER
    return read_config(folder if path.is_dir() else path), tokenizer if tokenizer.is_file() else None


def _refuse_other_tokenizer(run: RunFolder, newest: Checkpoint) -> None:
    if not run.tokenizer.is_file():
        raise BadInput(f"{run.tokenizer}: missing")
    expected = newest.training["tokenizer_sha256"]
    if (found := file_sha256(run.tokenizer)) != expected:
        raise BadInput(f"{run.tokenizer}: sha256 {found}, the checkpoint was trained with {expected}")
