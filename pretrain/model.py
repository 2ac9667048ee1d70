"""The model of a train recipe: a size by name, the keys of config.json, or an export to start from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as recipe_dataclass

from data_prep.shards.reader import Dataset
from exports.fake_quantise import QuantiseRecipe
from exports.tokenizer import training_tokenizer_sha256
from pretrain.distill.recipe import DistillPlan
from pretrain.distill.student import NOT_EXPORTED, DistilledForMaskedLM
from pretrain.engine.fake_quantise import FakeQuantisedForMaskedLM
from pretrain.engine.zeros import keep_zeros
from sharebert import SIZES, ShareBertConfig, ShareBertError, ShareBertForMaskedLM, initialize
from sharebert.kernels import FLEX_FROM, flex_serves
from sharebert_common.errors import BadInput, nearest
from sharebert_common.recipe import STRICT


@recipe_dataclass(config=STRICT, kw_only=True)
class ModelRecipe:
    """What is trained. A key of config.json that is not given is that of `init_from`, of `size`, or the default."""

    size: str | None = None
    """A published size: sharebert-small, sharebert-base or sharebert-large."""
    init: Literal["variance", "authors"] = "variance"
    """How the weights start: `authors` as in their code; `variance` so that the generated weights have standard
    deviation `initializer_range`."""
    init_scale: Annotated[float, Field(gt=0)] | None = None
    """The generated weights start with standard deviation init_scale / √H, with either `init`, so that a value tuned
    at a small width H holds at a large one. Without it, `init` alone decides: `authors` amounts to 0.20, 0.35 and 0.50
    in the sizes small, base and large, `variance` to 0.90. (A start for generated weights needs a rule of its own:
    Chang et al., "Principled Weight Initialization for Hypernetworks", ICLR 2020.)"""
    init_from: str | None = None
    """Folder of an export whose weights the model starts with."""
    keep_zeros: bool = False
    """Weights of E, of W_all and of the layers' own matrices that are zero at the start stay zero, as after the
    compression step `prune_weights`; those that it made equal in a column stay equal, where the file of `init_from` is
    sparse. Not with ZeRO 3, nor with Muon."""
    vocab_size: int | None = None
    """Rows V of the embedding. Without it, the words of the dataset's tokenizer."""
    vocab_pad_multiple: int | None = None
    """V is rounded up to a multiple of this."""
    factor_size: int | None = None
    """Columns F of the embedding. With `sharing: eps`, F = H."""
    hidden_size: int | None = None
    """Width H of the residual stream."""
    num_hidden_layers: int | None = None
    """Layers L."""
    num_attention_heads: int | None = None
    """Attention heads A of a layer."""
    intermediate_size: int | None = None
    """Width I inside the feed-forward block."""
    max_position_embeddings: int | None = None
    """Positions P. Without it, the length of the dataset's rows."""
    type_vocab_size: int | None = None
    """Token types."""
    hidden_dropout_prob: float | None = None
    """Dropout on the embedding and on what each block adds to the residual stream."""
    attention_probs_dropout_prob: float | None = None
    """Dropout on attention probabilities."""
    layer_norm_eps: float | None = None
    """Added to the variance in LayerNorms."""
    initializer_range: float | None = None
    """Standard deviation of the weights at the start."""
    sharing: str | None = None
    """Where layers take their matrices from: `veps` the virtual matrix E·W_allᵀ + b_all, `eps` E itself; `layers` one
    set of parameters for all layers, `none` parameters of their own: the peers to compare with, not with ZeRO 3."""
    mlm_head: str | None = None
    """`untied`: a decoder of its own, [V, H]; `tied`: E and a bias [V]."""
    attention_scale: str | None = None
    """Attention scores are multiplied by d^(-2/3) (`authors`) or d^(-1/2) (`standard`), d = H / A."""
    branch_gain: float | None = None
    """Factor on what a layer's two branches, attention and feed-forward block, add to the residual stream, 1/√(2L) for
    instance; none: they are added as they are. A dense export has it in its matrices. (1/L was the best for layers that
    share matrices in arXiv 2606.18524.)"""
    learned_branch_gains: bool | None = None
    """Each layer learns its two factors, which start at `branch_gain`. The optimizer does not decay them."""
    ffn_pairs: int | None = None
    """Pairs of feed-forward matrices that layers use in turn, cut from columns of the virtual matrix that are free
    otherwise: 5h + 2f·ffn_pairs ≤ H, with h = ⌈H²/V⌉ and f = ⌈H·I/V⌉. A further pair costs no parameter. With
    `sharing: veps` or `eps`."""
    ffn_order: str | None = None
    """Which pair a layer uses: `cycle`, 1 2 1 2, or `sequence`, 1 1 2 2 (the names of Takase and Kiyono, "Lessons on
    Parameter Sharing across Layers in Transformers", SustaiNLP 2023)."""

    def config_keys(self) -> dict[str, Any]:
        """The keys of config.json that were given."""
        given = asdict(self)  # type: ignore[call-overload]
        return {key: given[key] for key in ShareBertConfig.__dataclass_fields__ if given.get(key) is not None}


FUNCTION_KEYS = (
    "attention_scale",
    "branch_gain",
    "ffn_order",
    "ffn_pairs",
    "layer_norm_eps",
    "num_attention_heads",
    "num_hidden_layers",
)
"""Keys of config.json that change what the same weights compute, and that no shape shows."""


@dataclass(frozen=True)
class ModelChoice:
    """A resolved `model` of a train recipe."""

    config: ShareBertConfig
    init: str
    """How the weights start: `variance` or `authors`."""
    init_from: Path | None
    """An export whose weights are taken instead."""
    init_scale: float | None = None
    """The generated weights start with standard deviation init_scale / √H; None where `init` alone decides."""
    keep_zeros: bool = False
    """Weights that are zero at the start stay zero, and those that fill a column equal; see `ModelRecipe`."""


def choose_model(recipe: ModelRecipe, vocab_size: int | None, seq_len: int | None) -> ModelChoice:
    """Resolve the `model` of a recipe for a dataset.

    Args:
        recipe: its keys win over those of `init_from` and of the size.
        vocab_size: words of the dataset's tokenizer, the model's vocabulary where the recipe gives none; None where
            there is no dataset.
        seq_len: of the dataset's rows, the model's positions where the recipe gives none; None likewise.

    Raises BadInput: an unknown size, sizes that do not fit each other or the dataset, an `init_from` that is no export,
    or whose weights belong to another function.
    """
    size = recipe.size
    if size is not None and size not in SIZES:
        raise BadInput(f"model.size: no size '{size}'{nearest(size, SIZES)} (sizes: {', '.join(SIZES)})")
    init_from = Path(recipe.init_from) if recipe.init_from else None
    of_dataset = {"vocab_size": vocab_size, "max_position_embeddings": seq_len}
    before = None
    try:
        base: dict[str, Any] = {key: value for key, value in of_dataset.items() if value is not None}
        if init_from is not None:
            from exports.read import read_config

            before = read_config(init_from)
            base = before.to_dict()
        config = ShareBertConfig.from_dict(base | SIZES.get(size or "", {}) | recipe.config_keys())
    except (ShareBertError, BadInput) as error:
        raise BadInput(f"model: {error}") from error
    for key in FUNCTION_KEYS if before is not None else ():
        given, theirs = getattr(config, key), getattr(before, key)
        if given != theirs:
            wanted = "null" if theirs is None else theirs
            raise BadInput(
                f"model.{key}: {given}, but the weights of {init_from} belong to {theirs}; give model.{key}={wanted}"
            )
    if config.mlm_head == "none":
        raise BadInput("model.mlm_head: none cannot be pretrained; use untied or tied")
    if vocab_size is not None and config.vocab_size < vocab_size:
        raise BadInput(f"model.vocab_size: {config.vocab_size}, and the dataset's tokenizer has {vocab_size} words")
    if seq_len is not None and config.max_position_embeddings < seq_len:
        raise BadInput(
            f"model.max_position_embeddings: {config.max_position_embeddings}, "
            f"and the dataset's rows have {seq_len} tokens"
        )
    return ModelChoice(config, recipe.init, init_from, recipe.init_scale, recipe.keep_zeros)


def refuse_other_tokenizer(choice: ModelChoice, dataset: Dataset) -> None:
    """Raise BadInput where the export to start from was trained with another tokenizer than the dataset's."""
    theirs = choice.init_from / "tokenizer.json" if choice.init_from else None
    if theirs is not None and theirs.is_file():  # an export need not have one
        found, ours = training_tokenizer_sha256(theirs), dataset.manifest["tokenizer_sha256"]
        if found != ours:
            raise BadInput(
                f"model.init_from: {theirs} has sha256 {found}, the tokenizer of {dataset.path} has {ours}: "
                "prepare the dataset with the export's tokenizer"
            )


def refuse_dropout_within_documents(choice: ModelChoice, seq_len: int, device: torch.device) -> None:
    """Raise BadInput where attention within documents would have to run with dropout in FlexAttention."""
    dropout = choice.config.attention_probs_dropout_prob
    if dropout and flex_serves(device, seq_len):
        raise BadInput(
            f"model.attention_probs_dropout_prob: {dropout:g}, but on CUDA data.within_documents has no dropout "
            f"on attention probabilities in rows of {FLEX_FROM} tokens or more: set it to 0"
        )


def build_model(
    choice: ModelChoice, seed: int, quantise: QuantiseRecipe | None = None, distill: DistillPlan | None = None
) -> ShareBertForMaskedLM:
    """The model with its weights at the start, the same on every rank.

    With `quantise`, it is trained rounded; with `distill`, it makes the losses between it and a teacher.

    Raises BadInput where `init_from` is no export, or has another shape.
    """
    if distill is not None:
        model: ShareBertForMaskedLM = DistilledForMaskedLM(choice.config, distill)
    elif quantise is not None and quantise.bits is not None:
        model = FakeQuantisedForMaskedLM(choice.config, quantise)
    else:
        model = ShareBertForMaskedLM(choice.config)
    initialize(model, choice.init, seed, choice.init_scale)
    if choice.init_from is not None:
        _take_weights(model, choice.init_from)
    if choice.keep_zeros:
        from exports.read import sparse_names

        keep_zeros(model, sparse_names(choice.init_from) if choice.init_from is not None else ())
    return model


def _take_weights(model: ShareBertForMaskedLM, export: Path) -> None:
    """Copy an export's weights. Where the model has more positions, those that the export lacks keep their start."""
    from exports.read import load_model

    try:
        source = dict(load_model(export).named_parameters())
    except BadInput as error:
        raise BadInput(f"model.init_from: {error}") from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(NOT_EXPORTED):
                continue
            given = source.get(name)
            longer = name.endswith("position_embeddings.weight") and given is not None
            if given is None or (given.shape != parameter.shape and not (longer and len(given) <= len(parameter))):
                shape = None if given is None else list(given.shape)
                raise BadInput(
                    f"model.init_from: {export}: '{name}' is {shape}, this model has {list(parameter.shape)}"
                )
            parameter[: len(given)] = given
            del source[name]
    if source:
        raise BadInput(
            f"model.init_from: {export}: has '{next(iter(source))}', which this model has not; leave out the keys of "
            "model that differ from the export's"
        )


def compile_layers(model: ShareBertForMaskedLM, backend: str = "inductor") -> None:
    """Run the layers through torch.compile, each alone: they share their code and have parameters of their own.

    Shapes are those of a micro-batch and never change. There is one graph for training and one for evaluation, and in
    each case another one for the first layer, which has no branch to add.
    """
    for layer in model.sharebert.layers:
        layer.compile(dynamic=False, backend=backend)
