"""Masked language models that can be scored: ShareBERT exports, and any Hugging Face folder with an MLM head."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exports.hub_weights import LOCAL, load_hub_model, naming_folder
from exports.read import load_model, read_config
from scoring.architecture import Inputs, read_model_type
from sharebert.config import MODEL_TYPE
from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256

CHECK_ROWS, CHECK_LENGTH = 3, 6
"""The size of the batch on which the shortcut of `HuggingFaceLM` is checked."""


class MaskedLM(ABC):
    """A model with its tokenizer, in evaluation mode."""

    folder: Path
    tokenizer: Any
    """A fast tokenizer of transformers, with a mask token."""
    model: nn.Module
    positions: int
    """The longest row that the model takes, in tokens."""
    words: int
    """Rows of its word embedding."""

    @abstractmethod
    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The scores of all words [B, V] at one of the `positions` [B] of each row of `ids` [B, T]; no padding."""

    @torch.inference_mode()
    def log_probabilities(self, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """The log-probability [B] of word `targets` [B] at `positions` [B] in rows `ids` [B, T], on the CPU."""
        device = next(self.model.parameters()).device
        logits = self.logits(ids.to(device), positions.to(device)).float()
        return -F.cross_entropy(logits, targets.to(device), reduction="none").cpu()

    def fingerprint(self) -> str:
        """A hash of the files that decide its scores: config, tokenizer and weights."""
        files = [
            path for path in self.folder.iterdir() if path.suffix in (".json", ".txt", ".model", ".safetensors", ".bin")
        ]
        named = [(path.name, file_sha256(path)) for path in sorted(files)]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def open_masked_lm(spec: str, device: torch.device, needed_by: str = "blimp") -> MaskedLM:
    """The masked language model in a folder.

    Args:
        spec: the folder.
        device: where it will run.
        needed_by: for messages, what needs an MLM head.

    Raises BadInput or ShareBertError: something is missing or damaged, or there is no MLM head or no mask token.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(spec)
    ours = read_model_type(folder) == MODEL_TYPE
    kind: type[ShareBertLM] | type[HuggingFaceLM] = ShareBertLM if ours else HuggingFaceLM
    lm: MaskedLM = kind(folder, needed_by)
    if lm.tokenizer.mask_token_id is None:
        raise BadInput(f"{folder}: its tokenizer has no mask token, which {needed_by} needs")
    lm.model.eval().requires_grad_(False).to(device)
    return lm


class ShareBertLM(MaskedLM):
    """An export of this project; the code in the folder does not run."""

    def __init__(self, folder: Path, needed_by: str) -> None:
        from transformers import PreTrainedTokenizerFast

        config = read_config(folder)
        if config.mlm_head == "none":
            raise BadInput(f"{folder}: has no MLM head, which {needed_by} needs; consolidate without --no-head")
        self.folder = folder
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self._model = self.model = load_model(folder)
        self.positions, self.words = config.max_position_embeddings, config.vocab_size

    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Of the words at `positions`: the head sees no other position."""
        flat = torch.arange(len(ids), device=ids.device) * ids.shape[1] + positions
        return self._model.logits(ids, positions=flat)


class HuggingFaceLM(MaskedLM):
    """What `AutoModelForMaskedLM` loads from a folder, without remote code.

    The head of a masked language model is most of its cost where the encoder is small: a hook on the encoder hands it
    the wanted positions alone. If a model's scores change by that, it gets all positions.
    """

    takes_chosen: bool
    """Whether its head gets the wanted positions alone."""

    def __init__(self, folder: Path, needed_by: str) -> None:
        from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

        self.folder = folder
        with naming_folder(folder):
            config = AutoConfig.from_pretrained(folder, **LOCAL)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, **LOCAL)
        self.model, new = load_hub_model(AutoModelForMaskedLM, folder, "head", config=config)
        head = sorted(name for name in new if not name.startswith(f"{self.model.base_model_prefix}."))
        if head:
            raise BadInput(f"{folder}: has no MLM head, which {needed_by} needs: '{head[0]}' is not among its weights")
        inputs = Inputs.of(self.model, config)
        self._arguments = inputs.arguments
        self.positions = min(inputs.positions or self.tokenizer.model_max_length, self.tokenizer.model_max_length)
        self.words = config.vocab_size
        self._chosen: Tensor | None = None
        self.model.eval()
        self.takes_chosen = self._check_shortcut()

    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Of the words at `positions`."""
        rows = torch.arange(len(ids), device=ids.device)
        if not self.takes_chosen:
            return self._forward(ids)[rows, positions]
        self._chosen = positions
        try:
            return self._forward(ids)[:, 0]
        finally:
            self._chosen = None

    def _forward(self, ids: Tensor) -> Tensor:
        mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in self._arguments else {}
        logits: Tensor = self.model(input_ids=ids, **mask).logits
        return logits

    def _choose(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        """The hook: of the encoder's hidden states [B, T, H], those at the chosen positions [B, 1, H]."""
        if self._chosen is None:
            return output
        hidden = output[0]
        chosen = hidden[torch.arange(len(hidden), device=hidden.device), self._chosen].unsqueeze(1)
        if isinstance(output, tuple):
            return (chosen, *output[1:])
        output.last_hidden_state = chosen
        return output

    @torch.inference_mode()
    def _check_shortcut(self) -> bool:
        encoder = self.model.base_model
        if encoder is self.model or not isinstance(encoder, nn.Module):
            return False
        handle = encoder.register_forward_hook(self._choose)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.words, (CHECK_ROWS, CHECK_LENGTH), generator=generator)
        positions = torch.tensor([1, 4, 2])
        expected = self._forward(ids)[torch.arange(CHECK_ROWS), positions]
        self.takes_chosen = True
        try:
            found = self.logits(ids, positions)
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
                return True
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            pass  # its head needs all positions
        handle.remove()
        return False
