"""What a long step saves in its scratch folder, so that it goes on there after it was killed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sharebert_common.errors import BadInput
from sharebert_common.files import flush, make_folders


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values to `path`: a reader finds the state before or this one, never a part of it, also
    after a power cut."""
    make_folders(path.parent)
    temporary = path.with_name(f"{path.name}.writing")
    torch.save(state, temporary)
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def saved_state(path: Path) -> dict[str, Any] | None:
    """What `save_state` wrote last; None: nothing. Raises BadInput, naming the file, where it is damaged."""
    if not path.is_file():
        return None
    with naming_damage(path):
        return dict(torch.load(path, weights_only=True))


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """What goes wrong inside, while a file of the scratch folder is read, becomes BadInput that names it."""
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # torch advises to run what the file holds
            reason = "it holds no saved state"
        raise BadInput(f"{path}: damaged ({reason}); remove it, and the step does that part again") from error
