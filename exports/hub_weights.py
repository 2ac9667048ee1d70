"""Weights of folders of Hugging Face: all that the config asks for, and of the sizes that it says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch

from sharebert_common.errors import BadInput

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""For every `from_pretrained`. With `trust_remote_code` None, transformers would ask on the terminal."""

New = Literal["nothing", "pooler", "head"]
"""Which parameters of a model may start at random: none; the pooler's, because nobody reads it; or also the head's,
because it is to be trained."""


def load_hub_model(auto_class: Any, folder: Path, new: New, **options: Any) -> tuple[Any, frozenset[str]]:
    """The model that `auto_class` of transformers loads from a folder, in fp32, without remote code.

    Args:
        auto_class: such as `AutoModelForMaskedLM`.
        folder: of the model.
        new: which parameters may be missing, or be of another size, among the folder's weights.
        options: further arguments of `from_pretrained`.

    Returns the model, and the names of its parameters that the folder does not hold and that started at random.
    Raises BadInput, naming the folder: it cannot be loaded, or another parameter is missing or of another size.
    """
    with naming_folder(folder):
        model, found = auto_class.from_pretrained(
            folder,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are looked at below
            output_loading_info=True,
            **LOCAL,
            **options,
        )
    prefix = model.base_model_prefix
    sizes = {name: (tuple(theirs), tuple(ours)) for name, theirs, ours in found["mismatched_keys"]}
    for name in sorted({*found["missing_keys"], *sizes}):
        if not _may_start_anew(name, new, prefix if hasattr(model, prefix) else ""):
            what = (
                "is {} among its weights, and {} by config.json".format(*map(list, sizes[name]))
                if name in sizes
                else "is not among its weights"
            )
            raise BadInput(f"{folder}: '{name}' {what}; are the weights those of config.json?")
    return model, frozenset({*found["missing_keys"], *sizes})


def _may_start_anew(name: str, new: New, prefix: str) -> bool:
    """Whether a parameter may be new. `prefix` is what the encoder is called in a model with a head; else empty."""
    in_encoder = not prefix or name.startswith(f"{prefix}.")
    if not in_encoder:
        return new == "head"
    return new != "nothing" and name.removeprefix(f"{prefix}." if prefix else "").startswith("pooler.")


@contextmanager
def naming_folder(folder: Path) -> Iterator[None]:
    """Errors of transformers and safetensors for the files of a folder become one line inside, which names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (EOFError, UnpicklingError) as error:  # of a .bin file; torch's words advise to load it unsafely
        raise BadInput(f"{folder}: its weights are damaged or cut short") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadInput(f"{folder}: cannot be loaded as a Hugging Face encoder ({cause})") from error
