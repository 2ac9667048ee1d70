"""Write to disk: arrays, and folders that survive a power cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharebert_common.files import flush


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an `.npy` file. `np.save` does the same, but on a full disk its error does not say so."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def flush_below(folder: Path) -> None:
    """Wait until all files and folders below a folder are on the disk, and the folder itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)
