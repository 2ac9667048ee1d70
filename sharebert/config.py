"""The sizes and choices of a model: the keys of its `config.json`, and their checks."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import Any

MODEL_TYPE = "sharebert"

CHOICES = {
    "sharing": ("veps", "eps", "layers", "none", "low_rank"),
    "mlm_head": ("untied", "tied", "none"),
    "attention_scale": ("authors", "standard"),
    "ffn_order": ("cycle", "sequence"),
}

KEPT = {"kept_heads": "num_attention_heads", "kept_columns": "intermediate_size"}
"""Keys of a pruned model: which parts of the generated matrices it uses, and the key that says how many there are."""

COMPRESSED = {*KEPT, "expanded_size", "rank", "ranks"}
"""Keys that only a compressed model has."""

OPTIONAL = {
    **dict.fromkeys(COMPRESSED),
    "branch_gain": None,
    "learned_branch_gains": False,
    "ffn_pairs": 1,
    "ffn_order": "cycle",
}
"""Keys that a `config.json` leaves out where they have these values, their defaults."""

MATRICES = ("query", "key", "value", "attention_output", "intermediate", "output", "pooler")
"""The matrices that layers share, by the names of `sharing.Weights`, and the pooler's."""

SIZES: dict[str, dict[str, int]] = {
    "sharebert-small": {"factor_size": 128, "num_hidden_layers": 12},
    "sharebert-base": {"factor_size": 384, "num_hidden_layers": 12},
    "sharebert-large": {"factor_size": 768, "num_hidden_layers": 6},
}
"""The published sizes: the keys in which they differ. All have H 2048, I 4096 and A 16."""


class ShareBertError(ValueError):
    """An input of the model or one of its files is wrong; the message is one line for a user."""


@dataclass(frozen=True)
class ShareBertConfig:
    """Sizes and choices of a ShareBERT. The defaults are sharebert-base.

    Raises ShareBertError if a value is wrong, or if the values do not fit together.
    """

    vocab_size: int = 30528
    """Rows V of the embedding. The config rounds it up to a multiple of `vocab_pad_multiple`, so the tokenizer may
    have fewer words, by less than that multiple."""
    vocab_pad_multiple: int = 8
    """V is rounded up to a multiple of this number."""
    factor_size: int = 384
    """Columns F of the embedding. `sharing: eps` needs F = H."""
    expanded_size: int | None = None
    """Width to which rows of E are multiplied, by `factor_expansion`, before the first norm and in a tied head: the
    factor size before it was lowered. None: rows of E are used as they are."""
    hidden_size: int = 2048
    """Width H of the residual stream."""
    num_hidden_layers: int = 12
    """Number L of layers."""
    num_attention_heads: int = 16
    """Number A of attention heads; it must divide H."""
    intermediate_size: int = 4096
    """Width I inside the feed-forward block."""
    max_position_embeddings: int = 128
    """Number P of positions: the largest length of a row, in tokens."""
    type_vocab_size: int = 2
    """Number of token types."""
    hidden_dropout_prob: float = 0.1
    """Dropout probability on the embedding and on the output of each block."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout probability on attention probabilities."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the weights of a new model."""
    sharing: str = "veps"
    """`veps`: the matrices of all layers are cut from the virtual matrix E·W_allᵀ + b_all; `eps`: from E itself.
    `layers`: all layers use one set of matrices, which are parameters; `none`: every layer has a set of its own;
    `low_rank`: all layers use one set, each matrix a product of two parameters of rank `rank`."""
    rank: int | None = None
    """Rank of the matrices with `sharing: low_rank`, and only there; a matrix has its smaller side at most."""
    ranks: Mapping[str, int] | None = field(default=None, hash=False)
    """Ranks of the matrices that have another one than `rank`, by names of `MATRICES`. None: all have `rank`."""
    mlm_head: str = "untied"
    """`untied`: the head has its own decoder [V, H]; `tied`: it uses E and a bias [V]; `none`: there is no head."""
    attention_scale: str = "authors"
    """Scores are multiplied by d^(-2/3) (`authors`) or d^(-1/2) (`standard`), d = H / heads."""
    branch_gain: float | None = None
    """What attention and feed-forward block add to the residual stream is multiplied by this. None: it is added as it
    is."""
    learned_branch_gains: bool = False
    """Each layer learns the two factors of its own, which start at `branch_gain`."""
    ffn_pairs: int = 1
    """Pairs of feed-forward matrices, [H, I] and [I, H], that are cut from the virtual matrix."""
    ffn_order: str = "cycle"
    """Which pair a layer uses. `cycle`: layer n, from 0, the pair n mod `ffn_pairs`; `sequence`: the first layers use
    the first pair, the next as many the second, and so on."""
    kept_heads: tuple[int, ...] | None = None
    """The attention heads that a pruned model uses, ascending, of `num_attention_heads` in the generated matrices.
    None: all. It is the same for all layers, because they share the matrices. With `sharing: low_rank` the products are
    those of the heads that are left, and the numbers say which of the model before they were."""
    kept_columns: tuple[int, ...] | None = None
    """The columns inside the feed-forward block that a pruned model uses, ascending, of `intermediate_size`. None:
    all."""

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if key not in {*KEPT, "ranks"} and (key not in OPTIONAL or value is not None):
                _check(key, value)
        if self.ffn_pairs > 1:
            self._check_pairs()
        if self.learned_branch_gains and self.branch_gain is None:
            raise ShareBertError("learned_branch_gains: needs branch_gain, the value at which they start")
        if (self.rank is not None) != (self.sharing == "low_rank"):
            raise ShareBertError(
                f"rank: is for sharing: low_rank, and needed there (got {self.rank} with {self.sharing})"
            )
        if self.expanded_size is not None and (self.sharing == "eps" or self.expanded_size < self.factor_size):
            raise ShareBertError(
                f"expanded_size: must be factor_size ({self.factor_size}) or more, and is not for sharing: eps "
                f"(got {self.expanded_size} with {self.sharing})"
            )
        rows = -(-self.vocab_size // self.vocab_pad_multiple) * self.vocab_pad_multiple
        object.__setattr__(self, "vocab_size", rows)  # the dataclass is frozen
        if self.hidden_size % self.num_attention_heads:
            raise ShareBertError(
                f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size ({self.hidden_size})"
            )
        if self.sharing == "eps" and self.factor_size != self.hidden_size:
            raise ShareBertError(
                f"sharing: eps cuts the layers from the embedding itself, so factor_size ({self.factor_size}) "
                f"must equal hidden_size ({self.hidden_size})"
            )
        for key, of in KEPT.items():
            if getattr(self, key) is not None:
                object.__setattr__(self, key, self._kept(key, getattr(self, of), of))
        if self.ranks is not None:
            object.__setattr__(self, "ranks", self._checked_ranks(self.ranks))
        square, wide = self.square_columns, self.wide_columns
        needed = 5 * square + 2 * self.ffn_pairs * wide
        if self.generates and self.ffn_pairs > 1 and needed > self.hidden_size:
            raise ShareBertError(
                f"ffn_pairs: {self.ffn_pairs} pairs take 5h + {2 * self.ffn_pairs}f = {needed} columns of the virtual "
                f"matrix, which has H = {self.hidden_size}, with h = ⌈H²/V⌉ = {square} and f = ⌈H·I/V⌉ = {wide} for V "
                f"= {self.vocab_size} words; take a larger vocabulary, smaller H and I, or fewer pairs"
            )
        if self.generates and needed > self.hidden_size:
            raise ShareBertError(
                f"vocab_size {self.vocab_size} is too small for hidden_size H = {self.hidden_size} and "
                f"intermediate_size I = {self.intermediate_size}: with h = ⌈H²/V⌉ = {square} and f = ⌈H·I/V⌉ = {wide} "
                f"columns, 5h + 2f = {5 * square + 2 * wide} > H = {self.hidden_size}; take a larger vocabulary "
                f"(about 5H + 2I = {5 * self.hidden_size + 2 * self.intermediate_size} words) or smaller H and I"
            )

    def _check_pairs(self) -> None:
        if not self.generates:
            raise ShareBertError(f"ffn_pairs: is for sharing: veps or eps, this model has {self.sharing}")
        if self.ffn_pairs > self.num_hidden_layers:
            raise ShareBertError(
                f"ffn_pairs: {self.ffn_pairs} pairs for {self.num_hidden_layers} layers; give as many pairs as layers "
                "at most"
            )
        for key in KEPT:
            if getattr(self, key) is not None:
                raise ShareBertError(f"{key}: is for models with one feed-forward pair (ffn_pairs: {self.ffn_pairs})")

    def _checked_ranks(self, given: object) -> dict[str, int] | None:
        """The ranks that are other ones than `rank`, checked; None where there are none."""
        if self.rank is None:
            raise ShareBertError(f"ranks: is for sharing: low_rank (this model has {self.sharing})")
        if not isinstance(given, Mapping):
            raise ShareBertError(f"ranks: must be a mapping of names of matrices to ranks (got {given!r})")
        for name, rank in given.items():
            if name not in MATRICES:
                raise ShareBertError(f"ranks: no matrix '{name}'; names are {', '.join(MATRICES)}")
            _check(f"ranks.{name}", rank)
            if rank >= (side := min(self.matrix_shape(name))):
                raise ShareBertError(f"ranks.{name}: {rank} is not below {side}, the smaller side of the matrix")
        return {name: rank for name, rank in given.items() if rank != self.rank} or None

    def _kept(self, key: str, count: int, of: str) -> tuple[int, ...]:
        """The numbers of `kept_heads` or `kept_columns`, checked."""
        given = getattr(self, key)
        if not isinstance(given, (list, tuple)) or not all(type(n) is int and 0 <= n < count for n in given):
            raise ShareBertError(f"{key}: must be a list of whole numbers from 0 to {of} - 1 = {count - 1}")
        if not given or list(given) != sorted(set(given)):
            raise ShareBertError(f"{key}: must be ascending, with one number or more")
        if not self.generates and (key, self.sharing) != ("kept_heads", "low_rank"):
            raise ShareBertError(f"{key}: is for sharing: veps or eps, this model has {self.sharing}")
        return tuple(given)

    @property
    def generates(self) -> bool:
        """Whether the matrices of layers are cut from the virtual matrix. Otherwise they are parameters."""
        return self.sharing in ("veps", "eps")

    @property
    def altered(self) -> bool:
        """Whether parts of the generated matrices are not used, layers differ in their matrices, or rows of E are
        expanded."""
        return self.ffn_pairs > 1 or any(getattr(self, key) is not None for key in COMPRESSED)

    @property
    def row_size(self) -> int:
        """Width of a row of E as the first norm and a tied head use it: F, unless F was lowered."""
        return self.expanded_size or self.factor_size

    @property
    def head_size(self) -> int:
        """d, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def heads(self) -> int:
        """Attention heads that the model uses."""
        return self.num_attention_heads if self.kept_heads is None else len(self.kept_heads)

    @property
    def attention_size(self) -> int:
        """Width of queries, keys and values: heads · d. H, unless heads were pruned."""
        return self.heads * self.head_size

    @property
    def inner_size(self) -> int:
        """Width inside the feed-forward block: I, unless columns were pruned."""
        return self.intermediate_size if self.kept_columns is None else len(self.kept_columns)

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """[in, out] of a matrix with a name of `MATRICES`, as layers use it."""
        hidden, attended, inner = self.hidden_size, self.attention_size, self.inner_size
        return {
            "attention_output": (attended, hidden),
            "intermediate": (hidden, inner),
            "output": (inner, hidden),
            "pooler": (hidden, hidden),
        }.get(name, (hidden, attended))

    def rank_of(self, name: str) -> int:
        """Rank of a matrix with a name of `MATRICES`, with `sharing: low_rank`."""
        assert self.rank is not None
        return min((self.ranks or {}).get(name, self.rank), *self.matrix_shape(name))

    def ffn_pair(self, layer: int) -> int:
        """The number, from 0, of the feed-forward pair that a layer uses; layers are counted from 0."""
        if self.ffn_order == "cycle":
            return layer % self.ffn_pairs
        return layer * self.ffn_pairs // self.num_hidden_layers

    @property
    def square_columns(self) -> int:
        """h = ⌈H²/V⌉, the columns of the virtual matrix that one [H, H] matrix takes."""
        return -(-self.hidden_size * self.hidden_size // self.vocab_size)

    @property
    def wide_columns(self) -> int:
        """f = ⌈H·I/V⌉, the columns of the virtual matrix that one [H, I] or [I, H] matrix takes."""
        return -(-self.hidden_size * self.intermediate_size // self.vocab_size)

    @property
    def score_scale(self) -> float:
        """The factor on attention scores, before softmax."""
        return float(self.head_size) ** (-2 / 3 if self.attention_scale == "authors" else -1 / 2)

    def to_dict(self) -> dict[str, Any]:
        """The keys of `config.json`, including `model_type`; those in `OPTIONAL` where they are not the default."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"model_type": MODEL_TYPE} | {
            key: v for key, v in values.items() if key not in OPTIONAL or v != OPTIONAL[key]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShareBertConfig:
        """The config with the keys `values` of a `config.json`; a key that is missing has its default.

        Raises ShareBertError for an unknown key (the message names the nearest known one), another `model_type` or a
        wrong value.
        """
        if values.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ShareBertError(f"model_type: '{values['model_type']}' is another model, not '{MODEL_TYPE}'")
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known and key != "model_type":
                match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                raise ShareBertError(f"{key}: unknown key" + (f"; did you mean '{match[0]}'?" if match else ""))
        return cls(**{key: value for key, value in values.items() if key != "model_type"})


def _check(key: str, value: object) -> None:
    """Check the type and range of one value, or that it is one of the choices."""
    if key in CHOICES:
        if value not in CHOICES[key]:
            raise ShareBertError(f"{key}: must be one of {', '.join(CHOICES[key])} (got {value!r})")
    elif key in {"hidden_dropout_prob", "attention_probs_dropout_prob"}:
        if not _is_number(value) or not 0 <= value < 1:  # type: ignore[operator]
            raise ShareBertError(f"{key}: must be a probability, 0 or more and below 1 (got {value!r})")
    elif key in {"layer_norm_eps", "initializer_range", "branch_gain"}:
        if not _is_number(value) or not value > 0:  # type: ignore[operator]
            raise ShareBertError(f"{key}: must be a number above 0 (got {value!r})")
    elif key == "learned_branch_gains":
        if not isinstance(value, bool):
            raise ShareBertError(f"{key}: must be true or false (got {value!r})")
    elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ShareBertError(f"{key}: must be a whole number, 1 or more (got {value!r})")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
