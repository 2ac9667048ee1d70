"""ShareBERT in plain PyTorch: the model, its exports, and the authors' checkpoints."""

from .config import SIZES, ShareBertConfig, ShareBertError
from .encoder import Encoded, ShareBert
from .heads import MlmOutput, ShareBertForMaskedLM
from .init import initialize

__all__ = [
    "SIZES",
    "Encoded",
    "MlmOutput",
    "ShareBert",
    "ShareBertConfig",
    "ShareBertError",
    "ShareBertForMaskedLM",
    "initialize",
]
