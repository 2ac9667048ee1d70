"""The compact form: the learned parameters, and the code of the model.

    EXPORT/model.safetensors (index + files where large)  config.json  tokenizer.json  tokenizer_config.json
    README.md (the model card)  and the files of sharebert/, byte for byte

With the code in the folder, `AutoModel.from_pretrained(EXPORT, trust_remote_code=True)` works where this project is
not installed.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import sharebert
from exports.cards import model_card
from exports.export import Export
from exports.files import CARD, CONFIG, write_json
from exports.tokenizer import write_tokenizer
from exports.weight_files import write_weights
from exports.weight_source import TensorWeights, WeightSource, all_tensors, whole
from sharebert.config import MODEL_TYPE
from sharebert.sparse import sparse_parts
from sharebert.stored import stored_tensors
from sharebert.virtual import used_rows

AUTO_MAP = {
    "AutoConfig": "hub.ShareBertHubConfig",
    "AutoModel": "hub.ShareBertModel",
    "AutoModelForMaskedLM": "hub.ShareBertForMaskedLM",
    "AutoModelForMultipleChoice": "hub.ShareBertForMultipleChoice",
    "AutoModelForQuestionAnswering": "hub.ShareBertForQuestionAnswering",
    "AutoModelForSequenceClassification": "hub.ShareBertForSequenceClassification",
    "AutoModelForTokenClassification": "hub.ShareBertForTokenClassification",
}
"""Where the Auto classes of transformers find the code, in the export's own files."""


def stored_weights(export: Export) -> WeightSource:
    """What the file holds: all tensors, or, of a trimmed model, those that are not zero by construction."""
    if not export.other_keys.get("trimmed"):
        return export.weights
    tensors = all_tensors(export.weights)
    pooler = bool(export.other_keys.get("trimmed_pooler", True))
    return TensorWeights(stored_tensors(tensors, used_rows(export.config, pooler=pooler), pooler=pooler))


@dataclass(frozen=True)
class Compact:
    """The learned parameters as they are."""

    dtype: torch.dtype | None = None
    """Of the tensors written; None keeps the dtypes of the weights."""
    model_type: ClassVar[str] = MODEL_TYPE

    def check(self, export: Export) -> None:
        """Every model has this form."""

    def weights(self, export: Export) -> WeightSource:
        """What the files hold: tensors that the export calls sparse as a mask and the numbers that it keeps."""
        kept, sparse = stored_weights(export), export.other_keys.get("sparse")
        if not sparse:
            return kept
        tensors: dict[str, Tensor] = {}
        for name in kept.specs:
            tensor = whole(kept, name)
            if name in sparse:
                tensors |= sparse_parts(name, tensor if self.dtype is None else tensor.to(self.dtype))
            else:
                tensors[name] = tensor
        return TensorWeights(tensors)

    def further_keys(self) -> dict[str, Any]:
        """Keys of `config.json` that say how the weights are stored."""
        return {}

    def write(self, export: Export, folder: Path) -> None:
        """See `Form.write`. The weights are streamed."""
        pad_token_id = 0 if export.tokenizer is None else write_tokenizer(folder, export.tokenizer, export.config)
        config = {
            **export.config.to_dict(),
            "architectures": [f"ShareBert{export.kind.architecture}"],
            "auto_map": AUTO_MAP,
            "pad_token_id": pad_token_id,
            **export.kind.config_keys(),
            **export.other_keys,
            **self.further_keys(),
        }
        write_json(folder / CONFIG, config)
        (folder / CARD).write_text(model_card(export.config, export.kind, export.card_sections), encoding="utf-8")
        for source in sorted(Path(sharebert.__file__).parent.glob("*.py")):
            shutil.copyfile(source, folder / source.name)
        write_weights(folder, self.weights(export), export.provenance, self.dtype)
