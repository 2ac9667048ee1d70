"""What a long step saves in its scratch folder, so that it goes on there after it was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
    """What `save_state` wrote last; None: nothing."""
    return torch.load(path, weights_only=True) if path.is_file() else None
