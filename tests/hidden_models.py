"""Dense exports and classifiers for tests of `prune_hidden`, and what the step makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compress_models import tiny_export
from torch import Tensor

from compress.calibrate import Batch, batches
from compress.prune.hidden_step import PruneHidden, labels_of, sizes_of
from exports.dense import Dense, read_dense
from exports.dense_model import DenseBert
from exports.forms import write_export
from exports.read import read_export


def tools(rows: int = 40, seed: int = 2) -> Any:
    tokens = torch.randint(5, 250, (rows, 12), generator=torch.Generator().manual_seed(seed))
    tokens[::3, 9:] = 0
    return SimpleNamespace(calibration=lambda: tokens, seed=0, say=lambda line: None)


def dense_folder(folder: Path, **changes: Any) -> Path:
    """A dense export of hidden size 24 with 3 heads of 8."""
    write_export(read_export(tiny_export(folder.parent / f"{folder.name}-compact", **changes)), folder, Dense())
    return folder


def classifier_folder(folder: Path, labels: int = 2) -> Path:
    """The encoder of `dense_folder` with a classifier, as transformers saves it."""
    from transformers import MegatronBertForSequenceClassification

    dense = dense_folder(folder.parent / f"{folder.name}-dense")
    torch.manual_seed(0)
    MegatronBertForSequenceClassification.from_pretrained(dense, num_labels=labels).save_pretrained(folder)
    shutil.copy(dense / "tokenizer.json", folder)
    return folder


def lively(folder: Path) -> DenseBert:
    """The model in `folder` with norms that change what they read, and other matrices in each layer, in float64."""
    model = read_dense(folder, sizes_of(folder), labels_of(folder)).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        else:
            tensor *= torch.exp(0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    head = model.cls.predictions if model.cls is not None else None
    if head is not None:
        head.bias.copy_(head.decoder.bias)
    return model


def rows_of(folder: Path, rows: int = 40) -> list[Batch]:
    return batches(tools(rows).calibration(), folder / "tokenizer.json", 0)


def masked(rows: int = 3) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(5, 250, (rows, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    return tokens, mask


def pruned(folder: Path, model: DenseBert, rows: int = 40, **keys: Any) -> DenseBert:
    step, config = PruneHidden(**keys), sizes_of(folder)
    return step.pruned(model, config, step.sizes(config), rows_of(folder, rows), tools())[0]
