"""The keys `distill` of a train recipe, and what they resolve to."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as recipe_dataclass

from exports.bert_attention import has_mlm_head
from exports.distill_losses import LayerPairs, layer_pairs, without_embeddings
from exports.read import read_config
from exports.tokenizer import load_tokenizer
from sharebert import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

Weight = Annotated[float, Field(ge=0)]

LOSSES = ("logits", "hidden", "cosine", "attention", "attention_kl", "relations")
"""The losses with a teacher."""

NAMES = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
"""Keys of a config, and how DistilBERT calls them."""

COUNT_FROM_PADDING = (
    "roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "data2vec-text", "mpnet", "longformer", "xmod",
    "roberta-prelayernorm",
)  # fmt: skip
"""Kinds of models whose first position is that behind the id of padding."""


@recipe_dataclass(config=STRICT, kw_only=True)
class DistillRecipe:
    """Learning from a teacher. The loss is the sum of the losses below times their weights, a mean over positions."""

    teacher: str | None = None
    """Folder of the teacher, which stays as it is: an export, or a Hugging Face encoder with the same vocabulary."""
    mlm: Weight = 1.0
    """Weight of the cross-entropy of the masked words."""
    logits: Weight = 0.0
    """Weight of T²·KL between the distributions over words at masked positions (Hinton et al., 2015)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T, by which both logits are divided."""
    hidden: Weight = 0.0
    """Weight of the mean squared difference between the teacher's hidden states and a learned projection of the
    student's, for each pair of `layers` (TinyBERT)."""
    project: bool = True
    """Whether `hidden` has the learned projection; false: the states are compared as they are, and widths must be equal
    (MobileBERT)."""
    cosine: Weight = 0.0
    """Weight of 1 - cosine between hidden states, for each pair of `layers`; widths must be equal (DistilBERT)."""
    attention: Weight = 0.0
    """Weight of the mean squared difference of attention scores before softmax, for each pair of `layers`; numbers of
    heads must be equal (TinyBERT)."""
    attention_kl: Weight = 0.0
    """Weight of the KL between attention probabilities, for each pair of `layers`; numbers of heads must be equal
    (MobileBERT)."""
    relations: Weight = 0.0
    """Weight of the KL between the relations of queries, keys and values, for the last pair of `layers` (MiniLMv2)."""
    relation_heads: Annotated[int, Field(ge=1)] | None = None
    """Into how many heads both models' vectors are regrouped for relations; none: the student's heads."""
    layers: list[tuple[int, int]] | None = None
    """Pairs of a student's and a teacher's layer, from 1 (0: the embeddings, which count for `hidden` and `cosine`
    alone); none: each of the student's layers i with the teacher's layer i · teacher's layers / student's layers."""
    cache: str | None = None
    """Folder of the teacher's outputs, made by `sharebert cache-teacher`; training reads them and loads no teacher.
    none: the teacher runs in each step."""
    repeat_cache: bool = False
    """Allow a run with more rows than `cache` holds: it then trains on the cached rows again, with the same masks."""

    @property
    def uses_projections(self) -> bool:
        """Whether queries, keys and values are needed."""
        return bool(self.attention or self.attention_kl or self.relations)

    @property
    def weights(self) -> dict[str, float]:
        """The losses with a teacher that have a weight."""
        return {name: weight for name in LOSSES if (weight := getattr(self, name))}


@dataclass(frozen=True)
class DistillPlan:
    """A recipe that was checked against its two models."""

    recipe: DistillRecipe
    teacher: Path
    width: int
    """Of the teacher's hidden states."""
    words: int
    """Of the vocabulary; either model may have more rows."""
    layers: LayerPairs
    relation_heads: int

    @property
    def state_layers(self) -> list[int]:
        """The teacher's layers whose hidden states are needed."""
        wanted = self.recipe.hidden or self.recipe.cosine
        return sorted({theirs for _, theirs in self.layers}) if wanted else []

    @property
    def projection_pairs(self) -> LayerPairs:
        """The pairs of layers whose queries and keys are needed; with relations, the last pair's values too."""
        if self.recipe.attention or self.recipe.attention_kl:
            return without_embeddings(self.layers)
        return self.layers[-1:] if self.recipe.relations else ()

    @property
    def projection_layers(self) -> list[int]:
        """The teacher's layers of these pairs."""
        return sorted({theirs for _, theirs in self.projection_pairs})


@dataclass(frozen=True)
class _Shape:
    width: int
    layers: int
    heads: int
    has_mlm_head: bool
    positions: int
    words: int
    """Rows of the word embeddings."""
    vectors: int
    """Width of the queries, keys and values of all heads together; of MobileBERT less than `width`."""


def plan_distillation(
    recipe: DistillRecipe, student: ShareBertConfig, tokenizer: Path, seq_len: int
) -> DistillPlan | None:
    """Check a recipe against the models and the dataset's tokenizer and row length; None where there is no teacher.

    Raises BadInput, naming the key.
    """
    if recipe.teacher is None:
        for name in recipe.weights:
            raise BadInput(f"distill.{name}: has a weight, but distill.teacher is not given")
        if recipe.cache is not None:
            raise BadInput("distill.cache: distill.teacher is not given; name the teacher that the cache was made with")
        for field in fields(DistillRecipe):
            if getattr(recipe, field.name) != field.default:
                raise BadInput(f"distill.{field.name}: does nothing without distill.teacher, which is not given")
        return None
    if not recipe.weights:
        raise BadInput(f"distill.teacher: no loss with it has a weight; give one of {', '.join(LOSSES)}")
    teacher = Path(recipe.teacher)
    theirs, ours = _shape_of(teacher), _shape(student)
    words = _words(teacher, tokenizer)
    if theirs.words < words:
        raise BadInput(
            f"distill.teacher: {teacher} has {theirs.words} word embeddings, and its vocabulary {words} words"
        )
    if theirs.positions < seq_len:
        raise BadInput(
            f"distill.teacher: {teacher} has {theirs.positions} positions, and the dataset rows of {seq_len} tokens"
        )
    if recipe.logits and not theirs.has_mlm_head:
        raise BadInput(f"distill.logits: {teacher} has no MLM head; use distill.relations or distill.hidden")
    if recipe.cosine and theirs.width != ours.width:
        raise BadInput(
            f"distill.cosine: the teacher's width is {theirs.width}, the student's {ours.width}; use distill.hidden"
        )
    if recipe.hidden and not recipe.project and theirs.width != ours.width:
        raise BadInput(
            f"distill.project: the teacher's width is {theirs.width}, the student's {ours.width}; it must be true"
        )
    for name in ("attention", "attention_kl"):
        if name in recipe.weights and theirs.heads != ours.heads:
            raise BadInput(
                f"distill.{name}: the teacher has {theirs.heads} heads, the student {ours.heads}; use distill.relations"
            )
    heads = recipe.relation_heads or ours.heads
    for name, shape in (("teacher", theirs), ("student", ours)) if recipe.relations else ():
        if shape.vectors % heads:
            raise BadInput(f"distill.relation_heads: {heads} do not divide the {name}'s width {shape.vectors}")
    return DistillPlan(recipe, teacher, theirs.width, words, _layers(recipe, ours, theirs), heads)


def _layers(recipe: DistillRecipe, ours: _Shape, theirs: _Shape) -> LayerPairs:
    pairs = layer_pairs(recipe.layers, (ours.layers, theirs.layers), "distill.layers")
    if recipe.uses_projections and pairs[-1] not in without_embeddings(pairs):
        raise BadInput(
            "distill.layers: attention and relations need queries and keys, and embeddings (0) have none; name a pair "
            "of layers last"
        )
    return pairs


def _shape(config: ShareBertConfig) -> _Shape:
    return _Shape(
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.mlm_head != "none",
        config.max_position_embeddings,
        config.vocab_size,
        config.hidden_size,
    )


def _shape_of(teacher: Path) -> _Shape:
    values = read_teacher_config(teacher)
    if values.get("model_type") == "sharebert":
        return _shape(read_config(teacher))
    try:
        width, layers, heads = (int(values[other if other in values else name]) for name, other in NAMES.items())
        # RoBERTa counts positions from the id of padding on.
        before = int(values.get("pad_token_id") or 0) + 1 if values["model_type"] in COUNT_FROM_PADDING else 0
        return _Shape(
            width,
            layers,
            heads,
            has_mlm_head(values),
            int(values["max_position_embeddings"]) - before,
            int(values["vocab_size"]),
            int(values.get("true_hidden_size", width)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"distill.teacher: {teacher / 'config.json'}: no encoder like BERT ({error})") from error


def read_teacher_config(teacher: Path) -> dict[str, Any]:
    """The teacher's `config.json`. Raises BadInput, naming the file."""
    file = teacher / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"distill.teacher: {file}: not readable ({error})") from error
    if not isinstance(values, dict):
        raise BadInput(f"distill.teacher: {file}: not a mapping of keys to values")
    return values


def _words(teacher: Path, tokenizer: Path) -> int:
    """How many words the vocabulary has. Raises BadInput where a word has another id in the teacher's vocabulary."""
    theirs, ours = (load_tokenizer(file).get_vocab() for file in (teacher / "tokenizer.json", tokenizer))
    different = [word for word, number in ours.items() if theirs.get(word) != number]
    if different or len(theirs) != len(ours):
        example = f", '{different[0]}' for one" if different else ""
        raise BadInput(
            f"distill.teacher: {teacher} has another vocabulary than the dataset ({len(different)} of {len(ours)} "
            f"words have other ids{example}): prepare the dataset with tokenizer.path={teacher / 'tokenizer.json'}"
        )
    return max(ours.values()) + 1
