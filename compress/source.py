"""What a folder holds: which form of a model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from compress.step import FormName, Source
from exports.bert_attention import has_mlm_head
from exports.dense import MODEL_TYPE as DENSE
from exports.hub_weights import LOCAL, load_hub_model, naming_folder
from exports.onnx import FILE as ONNX_FILE
from exports.read import read_config
from scoring.architecture import Inputs, read_model_type
from sharebert.config import MODEL_TYPE
from sharebert_common.errors import BadInput

JSON, TABLE, PICTURE, BOARD = "report.json", "REPORT.md", "report.png", "tensorboard"
OF_A_REPORT = (JSON, TABLE, PICTURE, BOARD)
"""What a folder holds that is about its model, not of it: files of a report, and a folder of curves."""


WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.onnx", "*.onnx.data", "*.h5", "*.msgpack", "*.ot")
"""Names of files with weights, in this project's forms and in folders of Hugging Face."""


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


def config_of(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model's folder."""
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def pad_id(folder: Path) -> int:
    """The id of the padding token of the model in `folder`; 0 where its `config.json` names none."""
    return int(config_of(folder).get("pad_token_id") or 0)


def positions_of(folder: Path) -> int | None:
    """The longest row that the model in `folder` takes, in tokens; None where there is no limit."""
    if open_source(folder).form == "compact":
        return read_config(folder).max_position_embeddings
    from transformers import AutoConfig, AutoModel

    with naming_folder(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        return Inputs.of(AutoModel.from_config(config), config).positions


def has_class(folder: Path, *endings: str) -> bool:
    """Whether a class that `config.json` names ends in one of `endings`, as `ForMaskedLM`."""
    return any(name.endswith(endings) for name in config_of(folder).get("architectures") or [])


def is_masked_lm(folder: Path) -> bool:
    """Whether the model in `folder` has a masked-language-model head."""
    return has_mlm_head(config_of(folder))


def is_classifier(folder: Path) -> bool:
    """Whether the `config.json` of a folder names a classifier of texts."""
    return has_class(folder, "ForSequenceClassification")


def open_hub_model(folder: Path, head: str = "", **options: Any) -> Any:
    """The model that plain transformers loads from `folder`, in fp32, in evaluation mode.

    Args:
        folder: a dense export, or the folder of any encoder of Hugging Face.
        head: of the class, as `MaskedLM` or `SequenceClassification`; empty: the encoder alone.
        options: further arguments of `from_pretrained`.

    A pooler that the folder lacks is left out. Raises BadInput, naming the folder: transformers cannot load it, or
    another parameter is missing, or of another size than `config.json` says.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()  # a model's other heads are left out on purpose
    transformers.utils.logging.disable_progress_bar()
    auto_class = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model, missing = load_hub_model(auto_class, folder, "nothing" if head else "pooler", **options)
    if missing:
        model.pooler = None  # it would be one of random numbers
    return model.eval()


def copy_model(folder: Path, out: Path, *without: str) -> None:
    """Copy the files of a model, but not those of a report, nor those whose name matches a pattern of `without`.

    A folder like `2_Dense` is a further module of sentence-transformers: its weights are no other form of the model's.
    """

    def left_out(where: str, names: list[str]) -> set[str]:
        module = Path(where) != folder and re.match(r"\d+_", Path(where).name)
        return shutil.ignore_patterns(*OF_A_REPORT, *(() if module else without))(where, names)

    shutil.copytree(folder, out, dirs_exist_ok=True, ignore=left_out)
