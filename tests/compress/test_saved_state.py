"""What a long step saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.saved_state import save_state, saved_state
from sharebert_common.errors import BadInput


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "list"])
def test_a_damaged_file_is_named_in_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    assert saved_state(path) is None
    save_state(path, {"step": 3, "weights": torch.arange(1000)})
    assert saved_state(path)["step"] == 3  # type: ignore[index]
    if damage == "list":
        torch.save([1, 2, 3], path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:900], "empty": b"", "text": b"no state\n"}[damage])
    with pytest.raises(BadInput) as raised:
        saved_state(path)
    line = str(raised.value)
    assert line.startswith(f"{path}: damaged (")
    assert line.endswith("); remove it, and the step does that part again")
    assert "\n" not in line
    path.unlink()
    assert saved_state(path) is None
