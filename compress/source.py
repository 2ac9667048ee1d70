"""What a folder holds: which form of a model."""

from __future__ import annotations

from pathlib import Path

from compress.step import FormName, Source
from exports.dense import MODEL_TYPE as DENSE
from exports.onnx import FILE as ONNX_FILE
from scoring.architecture import read_model_type
from sharebert.config import MODEL_TYPE
from sharebert_common.errors import BadInput


def open_source(folder: Path) -> Source:
    """The model in `folder`. Raises BadInput, naming it, where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    kind = read_model_type(folder)
    return Source(folder, _form(folder, kind))


def _form(folder: Path, model_type: str | None) -> FormName:
    if (folder / ONNX_FILE).is_file():
        return "onnx"
    if model_type == MODEL_TYPE:
        return "compact"
    return "dense" if model_type == DENSE else "hub"
