"""The step `prune_hidden`: a smaller hidden size of a dense model, with fewer heads and feed-forward columns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic.dataclasses import dataclass

from compress.encoder_loss import rows_of
from compress.prune.amount import Amount, amount
from compress.prune.dense_parts import channel_magnitudes, gradients, survey
from compress.prune.dense_slices import sliced
from compress.prune.directions import along, components, largest, strongest
from compress.prune.reconstruct import reconstruct
from compress.source import WEIGHTS, config_of, copy_model, is_classifier, is_masked_lm
from compress.step import FormName, NeedsNoRows, Source, Tools
from exports.dense import read_dense
from exports.dense_model import DenseBert
from exports.export import BERT_KEYS
from exports.files import CARD, CONFIG, write_json
from exports.weight_files import read_metadata, read_weights, write_weights
from exports.weight_source import TensorWeights
from scoring.architecture import read_labels
from sharebert.config import ShareBertConfig, ShareBertError
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

CARD_SECTION = """

## Pruned

The hidden size is {hidden}, with {heads} attention heads and {columns} columns in the feed-forward blocks. Sizes,
scores and differences above are those of the model before. Heads and the pooler take the hidden states
as they are; these are those of the model before in other directions, without the factors of its last LayerNorm.
"""


class Sizes(NamedTuple):
    """What stays."""

    hidden: int
    heads: int
    columns: int


@dataclass(config=STRICT, kw_only=True, frozen=True)
class PruneHidden(NeedsNoRows):
    """Make the hidden size of a dense export smaller, and heads and feed-forward columns fewer.

    The result is a dense export that stock transformers loads. Layers keep heads and columns of their own.
    """

    hidden: Amount | None = None
    """The new hidden size: a number, or a share below 1; none: heads · head size. It must be a multiple of the head
    size, because stock megatron_bert needs heads · head size = hidden size."""
    heads: Amount | None = None
    """Attention heads that stay in each layer: a number, or a share below 1; none: as many as the hidden size needs."""
    columns: Amount | None = None
    """Columns of the feed-forward block that stay in each layer: a number, or a share below 1; none: all."""
    method: Literal["sp3", "magnitude"] = "sp3"
    """What stays of the residual stream. sp3: its principal directions on calibration rows; magnitude: the channels
    with the largest weights."""
    components: Literal["variance", "fisher"] = "variance"
    """Which principal directions stay with `sp3`. variance: those that hold most of the stream; fisher: those without
    which the loss grows most, by squared gradients of factors on them."""
    least_squares: bool = True
    """Make all matrices of the layers and of the head anew, one after the other, so that outputs on calibration rows
    stay near."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return True

    def check(self, source: Source) -> None:
        """See `Step.check`."""
        if source.form == "hub":
            raise BadInput(
                "prune_hidden: takes a dense export (megatron_bert), whose LayerNorms stand before the blocks; "
                f"{source.folder} is of the model type {config_of(source.folder).get('model_type')}"
            )
        self.check_ahead(source.form, None)
        self.sizes(sizes_of(source.folder))

    def check_ahead(self, form: FormName, config: ShareBertConfig | None) -> None:
        """See `Step.check_ahead`."""
        self.result_form(form)
        if self.method == "magnitude" and self.components == "fisher":
            raise BadInput("prune_hidden.components: fisher is for method: sp3; magnitude keeps channels")
        if config is not None:
            self.sizes(config)

    def result_config(self, config: ShareBertConfig) -> ShareBertConfig:
        """See `Step.result_config`."""
        return dataclasses.replace(config, **self.changes(config))

    def changes(self, config: ShareBertConfig) -> dict[str, Any]:
        """Keys of `config.json` that are other ones in the result."""
        hidden, heads, columns = self.sizes(config)
        return {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": columns}

    def result_form(self, source: FormName) -> FormName:
        """See `Step.result_form`."""
        if source == "compact":
            raise BadInput("prune_hidden: takes a dense export, this one is compact; put the step dense before it")
        if source != "dense":
            raise BadInput(f"prune_hidden: takes a dense export, this one is {source}")
        return source

    def sizes(self, config: ShareBertConfig) -> Sizes:
        """What stays of a model. Raises BadInput: more than there is, or heads that do not fill the hidden size."""
        if (self.hidden, self.heads, self.columns) == (None, None, None):
            raise BadInput("prune_hidden: nothing to remove; give hidden, heads or columns")
        size = config.head_size
        columns = amount("prune_hidden.columns", self.columns, config.intermediate_size)
        heads = None if self.heads is None else amount("prune_hidden.heads", self.heads, config.num_attention_heads)
        hidden = amount("prune_hidden.hidden", self.hidden, config.hidden_size)
        if self.hidden is None and heads is not None:
            hidden = heads * size
        if hidden % size:
            raise BadInput(f"prune_hidden.hidden: {hidden} is no multiple of the head size, {size}")
        if heads is not None and heads * size != hidden:
            raise BadInput(
                f"prune_hidden.heads: {heads} heads of size {size} make {heads * size}, and hidden is {hidden}; "
                "megatron_bert needs heads · head size = hidden size"
            )
        if hidden < 2:
            raise BadInput("prune_hidden.hidden: must be 2 or more")
        return Sizes(hidden, hidden // size, columns)

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        config = sizes_of(source.folder)
        sizes = self.sizes(config)
        head = "SequenceClassification" if is_classifier(source.folder) else "MaskedLM"
        model = read_dense(source.folder, config, labels_of(source.folder)).requires_grad_(False)
        rows = rows_of(tools.calibration(), source.folder, head, tools.seed)
        small, notes = self.pruned(model, config, sizes, rows, tools)
        copy_model(source.folder, out, *WEIGHTS)
        before = read_weights(source.folder)
        tensors = {name: tensor.to(before[name].dtype) for name, tensor in small.named_parameters()}
        write_weights(out, TensorWeights(tensors), read_metadata(source.folder))
        write_json(out / CONFIG, config_of(source.folder) | self.changes(config))
        if (out / CARD).is_file():
            text = (out / CARD).read_text(encoding="utf-8")
            (out / CARD).write_text(text.rstrip() + CARD_SECTION.format(**sizes._asdict()), "utf-8")
        return sizes._asdict() | notes

    def pruned(
        self, model: DenseBert, config: ShareBertConfig, sizes: Sizes, rows: list[Any], tools: Tools
    ) -> tuple[DenseBert, dict[str, Any]]:
        """The smaller model, and what the report says about it."""
        found = survey(model, rows)
        axes = components(found.moments)
        scores = gradients(model, rows, tools.seed, axes if self.components == "fisher" else axes[:, :0])
        if self.method == "magnitude":
            directions = largest(channel_magnitudes(model), sizes.hidden)
        elif self.components == "fisher":
            directions = along(axes[:, scores.kept_components(sizes.hidden - 1)])
        else:
            directions = along(axes[:, : sizes.hidden - 1])
        kept = scores.kept(sizes.heads, sizes.columns)
        head_rows = None if found.head_channels is None else strongest(found.head_channels, sizes.hidden)
        small = sliced(model, config, directions, kept, head_rows)
        if self.least_squares:
            reconstruct(model, small, directions, kept, head_rows, rows, tools.say)
        held = torch.trace(directions.up @ found.moments @ directions.down) / torch.trace(found.moments)
        return small, {"part of the stream": round(held.item(), 4)}


def labels_of(folder: Path) -> int:
    """The number of labels of the classifier in `folder`; 0 where it is none."""
    return len(read_labels(folder)) if is_classifier(folder) else 0


def sizes_of(folder: Path) -> ShareBertConfig:
    """The sizes of the dense model in `folder`, as the config of a model that has matrices for every layer.

    Raises BadInput: it is quantised, has another head or activation, or a key is missing or wrong.
    """
    found = config_of(folder)
    if "quantization_config" in found:
        raise BadInput(f"prune_hidden: {folder} is quantised; prune it before")
    if found.get("hidden_act", "gelu") != "gelu":
        raise BadInput(f"prune_hidden: takes models with hidden_act: gelu, {folder} has {found['hidden_act']}")
    named = found.get("architectures") or []
    if named not in ([f"MegatronBert{name}"] for name in ("Model", "ForMaskedLM", "ForSequenceClassification")):
        raise BadInput(
            f"prune_hidden: takes a MegatronBertModel, one ForMaskedLM or one ForSequenceClassification, {folder} is "
            f"{', '.join(named) or 'neither'}"
        )
    head = "untied" if is_masked_lm(folder) else "none"
    fixed = {"sharing": "none", "vocab_pad_multiple": 1, "attention_scale": "standard", "mlm_head": head}
    try:
        return ShareBertConfig.from_dict({key: found[key] for key in ("vocab_size", *BERT_KEYS)} | fixed)
    except KeyError as error:
        raise BadInput(f"{folder}: config.json has no {error.args[0]}") from error
    except ShareBertError as error:
        raise BadInput(f"{folder}: config.json: {error}") from error
