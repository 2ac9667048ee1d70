"""All steps by their names in a recipe. A new step is one class, and its name here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.dense.awq import Awq
from compress.dense.onnx_int8 import OnnxInt8
from compress.dense.to_dense import ToDense
from compress.dense.to_onnx import ToOnnx
from compress.distil import Distil
from compress.low_rank.factor_step import LowerFactor
from compress.low_rank.pc_lora_step import PcLora
from compress.low_rank.step import LowRankStep
from compress.prune.hidden_step import PruneHidden
from compress.prune.latency_step import PruneToLatency
from compress.prune.structure_step import PruneStructure
from compress.prune.weights_step import PruneWeights
from compress.quantise.step import Quantise
from compress.step import Step
from compress.trim import Trim
from sharebert_common.errors import BadInput, nearest
from sharebert_common.recipe import describe, parse

STEPS: dict[str, type[Any]] = {
    "distil": Distil,
    "trim": Trim,
    "lower_factor": LowerFactor,
    "low_rank": LowRankStep,
    "pc_lora": PcLora,
    "prune_structure": PruneStructure,
    "prune_to_latency": PruneToLatency,
    "prune_weights": PruneWeights,
    "prune_hidden": PruneHidden,
    "quantise": Quantise,
    "dense": ToDense,
    "awq": Awq,
    "onnx": ToOnnx,
    "onnx_int8": OnnxInt8,
}


def step_of(given: Any, where: str) -> tuple[str, Step]:
    """Name and step of an entry of `steps`: a name, or a mapping of one name to its keys.

    Raises BadInput, naming `where`: another form of entry, an unknown step or key.
    """
    entry = {given: {}} if isinstance(given, str) else given
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise BadInput(f"{where}: a step is a name, or one name with its keys, such as 'quantise: {{bits: 8}}'")
    ((name, keys),) = entry.items()
    if name not in STEPS:
        raise BadInput(f"{where}: no step '{name}'{nearest(str(name), STEPS)} (there are: {', '.join(STEPS)})")
    if not isinstance(keys or {}, Mapping):
        raise BadInput(f"{where}.{name}: its keys are a mapping, not {keys!r}")
    return name, parse(STEPS[name], keys or {}, f"{where}.{name}")


def all_steps(given: Sequence[Any]) -> list[tuple[str, Step]]:
    """Name and step of each entry of `steps`. Raises BadInput as `step_of` does."""
    return [step_of(entry, f"steps.{number}") for number, entry in enumerate(given)]


def describe_steps() -> str:
    """Every step with its keys, for `--help`."""
    parts = []
    for name, step in STEPS.items():
        summary = " ".join(str(step.__doc__).split("\n\n")[0].split())
        keys = "\n".join(f"  {line}" for line in describe(step).splitlines())
        parts.append(f"  {name}: {summary}\n{keys}")
    return "\n".join(parts)
