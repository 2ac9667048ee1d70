"""What a report says about one model: counts and bytes, loss, score, latency, memory."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress import latency
from compress.as_is import score_as_is
from compress.dense.onnx_int8 import TRANSPOSED
from compress.dense.pack_quantised import unpacked
from compress.recipe import CompressRecipe
from compress.source import config_of, is_classifier, open_source
from compress.static import STATIC, STATIC_INT8, static_scores
from compress.tools import UnfitRows, masked_lm_loss
from exports.compact import stored_weights
from exports.onnx import FILE as ONNX_FILE
from exports.read import read_export
from exports.weight_files import read_weights, safetensors_files
from exports.weight_source import whole
from scoring.encoders import RANDOM
from scoring.recipe import PROBE
from scoring.report import read_results
from scoring.score import BASELINES, evaluate
from sharebert_common.errors import BadInput

GZIP_LEVEL = 6

OF_A_FOLDER = (RANDOM, STATIC, STATIC_INT8)
"""What a reference begins with that is made from the model in the folder after it."""

QUANTISED, QUANTISER_PARTS = "_quantized", ("_scale", "_zero_point")
"""What ONNX Runtime's quantiser appends to the name of a tensor: for its codes, and for what they are read with."""


@dataclass(kw_only=True)
class Measured:
    """One row of a report."""

    name: str
    folder: str
    form: str
    parameters: int | None = None
    """Learned numbers that the model needs, quantised ones as one each."""
    nonzeros: int | None = None
    bytes: int | None = None
    """Of the files that the weights are read from."""
    gzip_bytes: int | None = None
    """Of the same files, compressed by gzip at level 6."""
    loss: float | None = None
    """Masked-language-model loss on the validation rows, in nats; none without such a head or such rows."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """"split metric" of the task → one value a seed."""
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    """Runtime → rows x tokens → median milliseconds."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Runtime → peak memory of a process that loads the model and runs the shapes."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What the step says about itself, or why something could not be measured."""

    @property
    def headline(self) -> tuple[float, float] | None:
        """Mean and standard deviation over seeds of the mean of all metrics on the dev splits."""
        dev = [values for name, values in self.scores.items() if not name.startswith("test ")]
        if not dev:
            return None
        by_seed = [mean(values) for values in zip(*dev, strict=True)]
        return mean(by_seed), stdev(by_seed) if len(by_seed) > 1 else 0.0


def measure(name: str, folder: Path, recipe: CompressRecipe, results: Path, notes: dict[str, Any]) -> Measured:
    """Measure the model in `folder`; the results of the task go into `results`."""
    source = open_source(folder)
    row = Measured(name=name, folder=str(folder), form=source.form, notes=dict(notes))
    row.parameters, row.nonzeros = counts(folder)
    row.bytes, row.gzip_bytes = sizes(folder)
    if recipe.validation.dataset is not None:
        try:
            row.loss = masked_lm_loss(folder, recipe.validation)
        except UnfitRows as error:  # of a reference: the source was checked before the first step
            row.notes["no loss"] = str(error)
    if recipe.task is not None:
        if is_classifier(folder) and recipe.task.task != PROBE:
            row.scores = score_as_is(folder, source.form, recipe.task)
        elif source.form == "onnx":
            row.notes["no score"] = "an ONNX file cannot be fine-tuned; compress a fine-tuned classifier to score it"
        else:
            row.scores = score(str(folder), recipe, results)
    if recipe.report.latency:
        for runtime in latency.runtimes(source.form):
            try:
                found = latency.measure(
                    folder, runtime, recipe.report.latency, recipe.report.threads, recipe.report.repeats
                )
            except BadInput as error:
                row.notes[f"not timed in {runtime}"] = str(error)
                continue
            row.latency_ms[runtime], row.peak_bytes[runtime] = found["ms"], found["peak_bytes"]
    return row


def measure_baseline(name: str, recipe: CompressRecipe, results: Path) -> Measured:
    """A row for a reference that exists only once it was fitted to the task; see `needs_task`."""
    if name.startswith((STATIC, STATIC_INT8)):
        scores, parameters, size = static_scores(name, recipe)
        return Measured(name=name, folder="", form="baseline", scores=scores, parameters=parameters, bytes=size)
    row = Measured(name=name, folder="", form="baseline", scores=score(name, recipe, results))
    (result,) = [result for result in read_results(results / _task_name(recipe)) if result.model == name]
    row.parameters, row.bytes = result.parameters, result.bytes
    return row


def is_baseline(name: str) -> bool:
    """Whether a reference is a model without a folder."""
    return name in BASELINES


def needs_task(name: str) -> bool:
    """Whether a reference is made by fitting it to the task: `tfidf`, `majority`, or one that begins as below."""
    return is_baseline(name) or name.startswith(OF_A_FOLDER)


def score(model: str, recipe: CompressRecipe, results: Path) -> dict[str, list[float]]:
    """Fine-tune and score as `sharebert evaluate` does; "split metric" → one value a seed."""
    import dataclasses

    assert recipe.task is not None
    evaluate(dataclasses.replace(recipe.task, output=str(results)), [model])
    (result,) = [result for result in read_results(results / _task_name(recipe)) if result.model == model]
    return result.flat()


def _task_name(recipe: CompressRecipe) -> str:
    from scoring.report import file_name

    assert recipe.task is not None
    return file_name(recipe.task.task)


def counts(folder: Path) -> tuple[int, int]:
    """Parameters and how many of them are not zero."""
    tensors = tensors_of(folder)
    return sum(t.numel() for t in tensors), sum(int(torch.count_nonzero(t)) for t in tensors)


def tensors_of(folder: Path) -> list[Tensor]:
    """All parameters of the model in `folder`, those of a trimmed or packed export as their values."""
    form = open_source(folder).form
    if form == "compact":
        stored = stored_weights(read_export(folder))
        return [whole(stored, name) for name in stored.specs]
    if form == "onnx":
        import onnx

        graph = onnx.load(str(folder / ONNX_FILE)).graph
        initializers = {tensor.name: tensor for tensor in graph.initializer}
        arrays = [
            onnx.numpy_helper.to_array(tensor)
            for name, tensor in initializers.items()
            if _is_learned(name, initializers)
        ]
        return [torch.from_numpy(array.copy()) for array in arrays if array.size > 1 and array.dtype != np.int64]
    return [
        tensor for tensor in unpacked(config_of(folder), read_weights(folder)).values() if tensor.is_floating_point()
    ]


def _is_learned(name: str, stored: Collection[str]) -> bool:
    """Whether a stored tensor of an ONNX file is a parameter: no scale of a quantised one, and no second copy."""
    for ending in QUANTISER_PARTS:
        if name.endswith(ending) and {name.removesuffix(ending) + end for end in ("", QUANTISED)} & set(stored):
            return False
    plain = name.removesuffix(QUANTISED)
    original = plain.removesuffix(TRANSPOSED)
    return plain == original or not {original, original + QUANTISED} & set(stored)


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of the files that the weights are read from, and of the same files after gzip."""
    onnx = open_source(folder).form == "onnx"
    files = sorted(folder.glob(f"{ONNX_FILE}*")) if onnx else safetensors_files(folder)  # not a second copy beside them
    return sum(path.stat().st_size for path in files), sum(map(_gzipped, files))


def _gzipped(path: Path) -> int:
    packer, total = zlib.compressobj(GZIP_LEVEL, wbits=31), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total += len(packer.compress(block))
    return total + len(packer.flush())


def same(ours: float | None, theirs: float | None) -> bool:
    """Whether two values of a report are the same number."""
    if ours is None or theirs is None:
        return ours is theirs
    return math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=0.0)
