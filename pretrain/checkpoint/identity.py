"""What may change between two attempts of a run, and what may not.

The model and the tokenizer may not, because the weights would mean something else. Datasets may, where
`data.may_change` allows it. Everything else in the recipe may, and each change is reported with both values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_prep.shards.reader import Dataset
from pretrain.checkpoint.format import Checkpoint
from sharebert import ShareBertConfig
from sharebert_common.errors import BadInput


def identity(model: ShareBertConfig, dataset: Dataset) -> dict[str, Any]:
    """What may not change within a run. (The seed may not either; it is in the loader's state.)"""
    return {
        "model": model.to_dict(),
        "tokenizer_sha256": dataset.manifest["tokenizer_sha256"],
        "vocab_size": dataset.vocab_size,
    }


def refuse_differences(found: Checkpoint, ours: Mapping[str, Any]) -> None:
    """Raise BadInput, with the two values, where the checkpoint was made with another `identity` than `ours`."""
    for key, saved, now in _differences(dict(found.training), dict(ours), only=ours):
        raise BadInput(
            f"{found.folder}: made with {key} {saved!r}, this recipe has {now!r}; "
            "restore the setting, or give the new run a directory of its own"
        )


def report_changes(config: Path, recipe: Mapping[str, Any], report: Callable[[str], None]) -> None:
    """Report every key whose value differs from that in `config`, the earlier attempt's recipe, if there is one."""
    try:
        before = OmegaConf.to_container(OmegaConf.load(config))
    except Exception:  # none yet, or one that is not readable: it will be written again
        return
    if isinstance(before, dict):
        for key, old, new in _differences(before, dict(recipe)):
            report(f"the recipe changed: {key} was {old!r}, is now {new!r}")


def _differences(
    old: Mapping[Any, Any], new: Mapping[Any, Any], prefix: str = "", only: Mapping[Any, Any] | None = None
) -> list[tuple[str, Any, Any]]:
    """Dotted key, old and new value of all leaves that differ. With `only`, those of its keys."""
    found = []
    for key in sorted(old.keys() | new.keys()) if only is None else sorted(only):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found
