"""The recipe of `sharebert evaluate`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt
from pydantic.dataclasses import dataclass

from exports.fake_quantise import QuantiseRecipe
from sharebert_common.recipe import STRICT

BLIMP = "blimp"
"""The task that is scored without fine-tuning."""

PROBE = "probe"
"""The task that reads the layers of a frozen model."""

FACTORS, GENERATED = "factors", "generated"
"""What `finetune.lora.targets` may name in a ShareBERT."""


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("one of them stands there twice; a spread needs different ones")
    return seeds


Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_different)]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _word(value: Any) -> Any:
    """YAML reads `no` as a boolean and `0` as a number: say so, and how to write the word."""
    kind = {bool: "true or false", int: "a number", float: "a number", type(None): "null"}.get(type(value))
    if kind:
        raise ValueError(
            f"YAML reads this as {kind} ({value}); quote it if it is a word: key: ['yes', 'no'] in a recipe, "
            """'key=["yes","no"]' on the command line"""
        )
    return value


def _optional_word(value: Any) -> Any:
    return value if value is None else _word(value)


Weight = Annotated[float, Field(ge=0)]

Word = Annotated[str, BeforeValidator(_word)]
"""A text that YAML may read as something else."""


@dataclass(config=STRICT, kw_only=True)
class AugmentRecipe:
    """Copies of the train rows in which a masked language model replaced words (TinyBERT, Jiao et al., 2020)."""

    model: str | None = None
    """Folder of the masked language model: an export or a Hugging Face model with an MLM head; none: no copies."""
    copies: PositiveInt = 20
    """Most copies of each row. A copy equal to the row or to another copy is left out."""
    probability: Annotated[float, Field(gt=0, le=1)] = 0.4
    """The probability with which a word of a copy is replaced."""
    candidates: PositiveInt = 15
    """A word is replaced by one of this many words, the likeliest at its place when it is masked."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides which words are replaced by which; the same copies for every model and every seed of `seeds`."""
    most_rows: PositiveInt = 1_000_000
    """More rows than this, copies included, are refused: they and their tokens are in memory."""


@dataclass(config=STRICT, kw_only=True)
class TaskDataRecipe:
    """Where the rows of a task come from, and which columns are used. GLUE's tasks know their columns."""

    path: str | None = None
    """A folder with {train,dev,test}.{tsv,csv,parquet,jsonl} (blimp: its .jsonl files), or one file (probe: of text);
    none: the hub."""
    text: Annotated[list[Word], BeforeValidator(_as_list), Field(max_length=2)] = field(default_factory=list)
    """The column of the text, or the two columns of a pair of texts."""
    label: Annotated[str | None, BeforeValidator(_optional_word)] = None
    """The column of the label."""
    labels: list[Word] = field(default_factory=list)
    """All labels in their order; by default the labels that occur in train, sorted."""
    regression: bool = False
    """The labels of your own task are numbers to predict, not classes."""
    header: list[Word] = field(default_factory=list)
    """The names of all columns, for files without a header line."""
    train_rows: PositiveInt | None = None
    """Fine-tune on this many train rows, drawn once, the same for every model and seed; none: on all rows."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What happens to rows that cannot be read or have no text or label: refuse the first, or skip and count all."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of the rows that becomes dev, where the data is one file."""
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    """Further train rows, made by a masked language model."""


@dataclass(config=STRICT, kw_only=True)
class TaskDistillRecipe:
    """Learning from a classifier that was fine-tuned on the task. The loss is the sum of the losses below times their
    weights."""

    teacher: str | None = None
    """Folder of the teacher: one that `evaluate --save` wrote, or any Hugging Face classifier with the task's labels;
    none: no teacher."""
    labels: Weight = 1.0
    """Weight of the loss of the true labels."""
    logits: Weight = 1.0
    """Weight of T²·KL between the distributions over labels (Hinton et al., 2015); for regression, of the squared
    difference of the scores."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T, by which both logits are divided."""
    hidden: Weight = 0.0
    """Weight of the mean squared difference between the teacher's hidden states and a learned projection of the
    student's, for each pair of `layers` (TinyBERT). It needs the student's tokenizer."""
    attention: Weight = 0.0
    """Weight of the mean squared difference of attention scores before softmax, for each pair of `layers` (TinyBERT).
    It needs the student's tokenizer and number of heads."""
    layers: list[tuple[int, int]] | None = None
    """Pairs of a student's and a teacher's layer, from 1 (0: the embeddings, which count for `hidden` alone); none:
    each of the student's layers i with the teacher's layer i · teacher's layers / student's layers."""

    @property
    def uses_layers(self) -> bool:
        """Whether outputs of layers are needed."""
        return bool(self.hidden or self.attention)


@dataclass(config=STRICT, kw_only=True)
class LoraRecipe:
    """Training an update of a low rank for each target, and the classifier; all else is fixed. The result holds the
    merged matrices."""

    rank: PositiveInt | None = None
    """The rank of each update, at most the smaller side of its matrix; none: all weights are trained."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """An update is multiplied by alpha / rank; none: by 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the inputs of the updates; for Hugging Face encoders alone."""
    targets: Annotated[list[Word], BeforeValidator(_as_list)] = field(default_factory=list)
    """What gets updates. A ShareBERT: `factors` (E and W_all; the default) or `generated` (the matrices made from
    them). Other encoders: names of linear layers and embeddings, or their last parts; none: all linear layers."""
    kind: Literal["lora", "dora"] = "lora"
    """lora: the sum of matrix and update; dora: its columns have learned lengths as well."""

    @property
    def scale(self) -> float:
        """The factor on each update."""
        assert self.rank is not None
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(config=STRICT, kw_only=True)
class FineTuneRecipe:
    """How an encoder is fine-tuned. The defaults are the settings of ShareBERT's authors."""

    epochs: PositiveInt = 5
    """The number of passes over train."""
    batch: PositiveInt = 64
    """Rows in one step."""
    lr: Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(_as_list), Field(min_length=1)] = field(
        default_factory=lambda: [5e-5]
    )
    """The learning rate, or a list to sweep: all seeds use the rate that is best on dev with the first seed."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps in which the learning rate rises from 0; at most half of all steps."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """The power of the polynomial by which the learning rate falls to 0 after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of all parameters but biases and LayerNorms."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """The gradient is clipped to this norm; 0: no clipping."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Tokens in a row; longer rows are cut."""
    pooling: Literal["pooler", "mean"] = "pooler"
    """What a ShareBERT classifies by: the pooler of the first position, or the mean over all positions."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """All dropout rates of the encoder during fine-tuning; none: as in its config."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The precision of matrix products in training; predictions are in fp32."""
    quantise: QuantiseRecipe = field(default_factory=QuantiseRecipe)
    """Quantisation-aware fine-tuning of a ShareBERT: training and scores use the matrices as the compression step
    `quantise` with these keys and `rounding: nearest` will store them."""
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    """Training updates of a low rank in place of all weights."""
    distill: TaskDistillRecipe = field(default_factory=TaskDistillRecipe)
    """Learning from a teacher as well."""


@dataclass(config=STRICT, kw_only=True)
class BlimpRecipe:
    """How BLiMP is scored."""

    pairs: PositiveInt | None = None
    """Score this many pairs of each of the 67 paradigms, drawn once, the same for every model; none: all 1,000."""


@dataclass(config=STRICT, kw_only=True)
class ProbeRecipe:
    """How much text the layers of a model are probed with."""

    rows: Annotated[int, Field(ge=2)] = 2000
    """Rows of text, with those of dev. Memory holds up to four copies of words · (layers + 1) · hidden size numbers."""
    words: Annotated[int, Field(ge=2)] = 20
    """Words of a row."""


@dataclass(config=STRICT, kw_only=True)
class EvaluateRecipe:
    """Fine-tune on a task and score; or take models as they are: score them on BLiMP, or probe their layers."""

    SHORTHAND: ClassVar[dict[str, str]] = {"data": "path"}

    task: Word
    """A task of GLUE, a name for a task of your own, blimp or probe."""
    data: TaskDataRecipe = field(default_factory=TaskDataRecipe)
    """The rows of the task; a plain value means data.path."""
    finetune: FineTuneRecipe = field(default_factory=FineTuneRecipe)
    """How encoders are fine-tuned."""
    blimp: BlimpRecipe = field(default_factory=BlimpRecipe)
    """How BLiMP is scored."""
    probe: ProbeRecipe = field(default_factory=ProbeRecipe)
    """How layers are probed."""
    seeds: Annotated[Seeds, BeforeValidator(_as_list)] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """One fine-tuning a seed: it decides the start of the classifier, the order of rows, and dropout."""
    output: str = "scores"
    """The folder for results; each task has a folder of its name in it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to use; auto: CUDA if there is a GPU, else the CPU."""
