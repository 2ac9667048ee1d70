"""The recipe of `sharebert evaluate`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt
from pydantic.dataclasses import dataclass

from sharebert_common.recipe import STRICT


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


@dataclass(config=STRICT, kw_only=True)
class DataConfig:
    """Where a task's rows come from, and which columns count. GLUE's tasks need none of the names."""

    path: str | None = None
    """Folder with {train,dev,test}.{tsv,csv,parquet,jsonl}, or one labelled file; none: nyu-mll/glue on the hub."""
    text: Annotated[list[str], BeforeValidator(_as_list), Field(max_length=2)] = field(default_factory=list)
    """The column of the text, or the two of a pair of texts."""
    label: str | None = None
    """The column of the label."""
    labels: list[str] = field(default_factory=list)
    """All labels in their order; by default those of the train rows, sorted."""
    regression: bool = False
    """Of a task of your own: labels are numbers to be predicted."""
    header: list[str] = field(default_factory=list)
    """Names of the columns, for files whose first line does not name them."""
    train_rows: PositiveInt | None = None
    """Fine-tune on so many rows of train, drawn once, the same for every model and seed; none: all."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Where the data is one file: the share of its rows that becomes dev."""


@dataclass(config=STRICT, kw_only=True)
class FineTuneConfig:
    """How an encoder is fine-tuned. The defaults are those of ShareBERT's authors."""

    epochs: PositiveInt = 5
    """Passes over train."""
    batch: PositiveInt = 64
    """Rows a step."""
    lr: Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(_as_list), Field(min_length=1)] = field(
        default_factory=lambda: [5e-5]
    )
    """Learning rate. Of several, the one that is best on dev with the first seed is used with the others."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps over which the rate rises from 0; at most half of all."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """Of the polynomial by which the rate then falls to 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """On all but biases and LayerNorms."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 for any."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Tokens of a row; what is longer is cut."""
    pooling: Literal["pooler", "mean"] = "pooler"
    """What a ShareBERT classifies by: the pooler of the first position, or the mean over all positions."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of the encoder while it is fine-tuned; none: as its config says."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products."""


@dataclass(config=STRICT, kw_only=True)
class EvaluateRecipe:
    """Fine-tune on a task and score."""

    SHORTHAND: ClassVar[dict[str, str]] = {"data": "path"}

    task: str
    """A task of GLUE, or a name for your own."""
    data: DataConfig = field(default_factory=DataConfig)
    """Its rows; a plain value means data.path."""
    finetune: FineTuneConfig = field(default_factory=FineTuneConfig)
    """How encoders are fine-tuned."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_as_list), Field(min_length=1)] = field(
        default_factory=lambda: [1, 2, 3, 4, 5]
    )
    """One fine-tuning each: of the classifier's first weights, the order of rows and dropout."""
    output: str = "scores"
    """Folder for results; a task's are in a folder of its name."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
