"""The recipe of `sharebert compress`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt
from pydantic.dataclasses import dataclass

from compress.shape_times import batch_shape
from scoring.recipe import EvaluateRecipe
from sharebert_common.recipe import STRICT, describe


@dataclass(config=STRICT, kw_only=True)
class RowsRecipe:
    """Rows of a dataset that `sharebert prep` made."""

    dataset: str | None = None
    """Folder of the dataset; its tokenizer must be the model's."""
    rows: PositiveInt = 1024
    """How many rows are used."""


@dataclass(config=STRICT, kw_only=True)
class ReportRecipe:
    """What the report measures, beside what it always does."""

    latency: list[Annotated[str, AfterValidator(batch_shape)]] = field(
        default_factory=lambda: ["1x16", "1x128", "32x128"]
    )
    """Batches that are timed, as rows x tokens; an empty list times none."""
    repeats: PositiveInt = 10
    """A latency is the median of this many calls."""
    threads: PositiveInt = 1
    """Threads of a timed call."""
    references: list[str] = field(default_factory=list)
    """Further models to measure beside: folders, and with a task `tfidf`, `majority`, `random:FOLDER` (its shape with
    new weights), `static:FOLDER` or `static-int8:FOLDER` (a vector for each word, made from its model)."""


def _with_path(task: Any) -> Any:
    """`data: FOLDER` inside `task` means `data: {path: FOLDER}`, as in a recipe of `evaluate`."""
    if isinstance(task, dict) and isinstance(task.get("data"), str):
        return {**task, "data": {"path": task["data"]}}
    return task


@dataclass(config=STRICT, kw_only=True)
class CompressRecipe:
    """Steps from one model to the next, and what is measured after each."""

    SHORTHAND: ClassVar[dict[str, str]] = {"calibration": "dataset", "validation": "dataset"}

    steps: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    """The steps in their order, each a name or a name with its keys: [trim, {quantise: {bits: 8}}]."""
    calibration: RowsRecipe = field(default_factory=RowsRecipe)
    """Rows of a train split for steps that look at activations; a plain value means calibration.dataset."""
    validation: RowsRecipe = field(default_factory=RowsRecipe)
    """Held-out rows for the masked-language-model loss; a plain value means validation.dataset."""
    teacher: str | None = None
    """Folder of the model that steps named `distil` learn from: an export, or a Hugging Face encoder."""
    task: Annotated[EvaluateRecipe | None, BeforeValidator(_with_path)] = None
    """A task that every model is fine-tuned and scored on: the keys of `sharebert evaluate`; none: no task."""
    report: ReportRecipe = field(default_factory=ReportRecipe)
    """What the report measures."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides every random choice of the steps."""
    keep_steps: bool = False
    """Keep the result of every step in OUT.steps; otherwise it is removed once OUT is whole."""


def describe_all() -> str:
    """All keys, then all steps with theirs, for `--help`."""
    from compress.steps import describe_steps

    return f"{describe(CompressRecipe)}\n\nsteps:\n{describe_steps()}"
