"""What the table of a comparison says about a row, and about a training that is only planned."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Line:
    """One row of the table. What is not there yet is None, or missing in a mapping."""

    name: str
    made: str
    """What it is made from and how, as the recipe says."""
    source: str | None = None
    """The row that it is made of; None for a row that is trained."""
    state: str = ""
    """What is still to be done; empty where everything is there."""
    parameters: int | None = None
    """Learned numbers of the model, with its tied head."""
    bytes: int | None = None
    """Of the files with weights."""
    loss: float | None = None
    """Masked-LM loss on the validation rows, in nats."""
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    """Runtime → rows x tokens → median milliseconds."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Task → the mean of its dev metrics, one value a seed."""
    tokens: int | None = None
    """Tokens of all trainings on the way: pretraining, and steps that train."""
    flops: float | None = None
    """FLOPs of the pretraining and of `distil`, without those of teachers."""
    score: float | None = None
    """Mean over the tasks, where all of them have all seeds."""
    of_reference: float | None = None
    """The same, divided by that of the reference."""
    of_source: float | None = None
    """The same, divided by that of the row it was made of."""
    parameters_of_reference: float | None = None
    """Parameters, divided by those of the reference."""


@dataclass(frozen=True)
class Planned:
    """What a training at its real size would cost. An estimate: nothing was run."""

    name: str
    parameters: int
    """Without the masked-language-model head."""
    tokens: int
    flops: float
    gpu_hours: float
    utilisation: float
    """Share of the GPUs' peak that the hours assume."""
