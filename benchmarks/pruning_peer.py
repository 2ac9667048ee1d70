"""Masked-LM loss and time of a trained model that lost half of its parts: this project's steps, and torch-pruning.

    python -m benchmarks.pruning_peer EXPORT DATASET [--rows 1024] [--calibration 2048] [--timed 32x32] [--save FOLDER]

EXPORT is compact. Two cuts, without training after either:

- half of the heads and feed-forward columns: `prune_structure` on the compact form, torch-pruning on the dense one;
- the same and half of the hidden size: `prune_hidden` and torch-pruning on the dense form.

torch-pruning ranks parts by magnitude, and by its Taylor importance with gradients of the calibration rows. The loss is
that of the report of `sharebert compress`. The time is of the encoder alone, in PyTorch: milliseconds of the processor
in one thread for a batch of rows x tokens, the least of several calls in which all models take turns, and the part of
the whole model in the same form. With --save, models with the smaller hidden size stay in FOLDER, for `sharebert
evaluate`. Needs `pip install torch-pruning==1.6.1`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.dense_peers import loss
from compress.calibrate import Batch, batches
from compress.prune.hidden_step import PruneHidden
from compress.prune.structure_step import PruneStructure
from compress.recipe import CompressRecipe, RowsRecipe
from compress.shape_times import random_words
from compress.source import WEIGHTS, config_of, copy_model, open_hub_model, open_source
from compress.tools import RecipeTools, masked_lm_loss
from exports.dense import Dense
from exports.files import CONFIG, write_json
from exports.forms import write_export
from exports.read import load_model, read_export
from exports.weight_files import read_metadata, read_weights, write_weights
from exports.weight_source import TensorWeights

ROUNDS = 20
"""Calls of each model that are timed."""

TORCH_PRUNING = "torch-pruning"


class Row(NamedTuple):
    """A model of the table."""

    name: str
    form: str
    loss: float
    encoder: Callable[[Tensor], Any]


def half_of(folder: Path, importance: str, rows: list[Batch], hidden: bool) -> Any:
    """The dense model in `folder` after torch-pruning took half of the heads and columns, and of the hidden size.

    Args:
        folder: a dense export with a masked-language-model head.
        importance: magnitude or taylor.
        rows: whose gradients the Taylor importance uses.
        hidden: whether the hidden size is halved too.
    """
    import torch_pruning

    model = open_hub_model(folder, "MaskedLM", attn_implementation="eager")
    layers, head = model.bert.encoder.layer, model.cls.predictions
    attentions = [layer.attention.self for layer in layers]
    products = ("query", "key", "value")
    heads = {getattr(own, name): own.num_attention_heads for own in attentions for name in products}
    if importance == "taylor":
        for batch in rows:
            logits = model(input_ids=batch.tokens, attention_mask=batch.visible).logits
            chosen = batch.labels >= 0
            F.cross_entropy(logits[chosen], batch.labels[chosen], reduction="sum").backward()
    ranked = {"magnitude": torch_pruning.importance.GroupMagnitudeImportance}
    ranked["taylor"] = torch_pruning.importance.GroupTaylorImportance
    words = rows[0].tokens[:1]
    stays = [head.decoder] if hidden else [head.decoder, head.transform, model.bert.embeddings]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a bias that no layer holds; it is that of the words, and stays
        pruner = torch_pruning.pruner.BasePruner(
            model,
            {"input_ids": words, "attention_mask": torch.ones_like(words)},
            importance=ranked[importance](),
            pruning_ratio=0.5,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=0.5,
            ignored_layers=stays,
            output_transform=lambda output: output.logits,
        )
        pruner.step()
    for own in attentions:  # torch-pruning does not know these numbers of transformers' classes
        own.num_attention_heads, own.all_head_size = pruner.num_heads[own.query], own.query.out_features
    model.zero_grad()
    return model


def save_smaller(model: Any, source: Path, out: Path) -> None:
    """Write a model of a smaller hidden size as transformers loads it; other files are those of `source`."""
    layer = model.bert.encoder.layer[0]
    names = set(read_weights(source))
    copy_model(source, out, *WEIGHTS)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name in names}
    write_weights(out, TensorWeights(tensors), read_metadata(source))
    changed = {
        "hidden_size": model.bert.embeddings.word_embeddings.embedding_dim,
        "num_attention_heads": layer.attention.self.num_attention_heads,
        "intermediate_size": layer.intermediate.dense.out_features,
    }
    write_json(out / CONFIG, config_of(source) | changed)


def milliseconds(rows: list[Row], shape: str, vocab_size: int) -> list[float]:
    """Of the processor, for one call of each encoder; see the top of this file."""
    count, length = map(int, shape.split("x"))
    words = random_words(vocab_size, count, length)
    times: list[list[float]] = [[] for _ in rows]
    with torch.no_grad():
        for number in range(ROUNDS + 2):
            for row, own in zip(rows, times, strict=True):
                begin = time.process_time()
                row.encoder(words)
                if number > 1:  # the first call of a compact model makes its matrices, which are kept
                    own.append(1000 * (time.process_time() - begin))
    return list(map(min, times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=2048)
    parser.add_argument("--timed", default="32x32")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    validation = RowsRecipe(dataset=args.dataset, rows=args.rows)
    recipe = CompressRecipe(steps=["dense"], calibration=RowsRecipe(dataset=args.dataset, rows=args.calibration))
    with tempfile.TemporaryDirectory() as scratch:
        place = args.save or Path(scratch)
        dense, structure, smaller = place / "dense", Path(scratch) / "structure", place / "prune_hidden"
        write_export(read_export(args.export), dense, Dense())
        tools = RecipeTools(recipe, args.export, Path(scratch), lambda line: None)
        calibration = batches(tools.calibration(), args.export / "tokenizer.json", tools.seed)
        PruneStructure(heads=0.5, columns=0.5).apply(open_source(args.export), tools, structure)
        PruneHidden(hidden=0.5, columns=0.5).apply(open_source(dense), tools, smaller)

        def compact(name: str, folder: Path) -> Row:
            encoder = load_model(folder).sharebert
            found = masked_lm_loss(folder, validation)
            assert found is not None
            return Row(name, "compact", found, lambda words: encoder(words, pool=False))

        def stock(name: str, model: Any) -> Row:
            return Row(name, "dense", loss(model, validation, dense), lambda words: model.bert(input_ids=words))

        def saved(name: str, folder: Path) -> Row:
            return stock(name, open_hub_model(folder, "MaskedLM"))

        rows = [compact("whole", args.export), saved("whole", dense)]
        rows.append(compact("heads and columns: prune_structure", structure))
        for importance in ("magnitude", "taylor"):
            model = half_of(dense, importance, calibration, hidden=False)
            rows.append(stock(f"heads and columns: {TORCH_PRUNING}, {importance}", model))
        rows.append(saved("and hidden size: prune_hidden", smaller))
        for importance in ("magnitude", "taylor"):
            folder = place / f"{TORCH_PRUNING}-{importance}"
            save_smaller(half_of(dense, importance, calibration, hidden=True), dense, folder)
            rows.append(saved(f"and hidden size: {TORCH_PRUNING}, {importance}", folder))
        times = milliseconds(rows, args.timed, read_export(args.export).config.vocab_size)
        whole = {row.form: own for row, own in zip(rows[:2], times[:2], strict=True)}
        print(f"| half of | form | MLM loss | ms, {args.timed} | of the whole |\n|---|---|---:|---:|---:|")
        for row, own in zip(rows, times, strict=True):
            print(f"| {row.name} | {row.form} | {row.loss:.4f} | {own:.2f} | {own / whole[row.form]:.3f} |")


if __name__ == "__main__":
    main()
