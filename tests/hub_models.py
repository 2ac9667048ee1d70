"""Tiny models of `sharebert.hub`, made without an export, for tests."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from tiny_models import TINY
from torch import Tensor

from sharebert import hub

M = TypeVar("M", bound=hub.ShareBertPreTrainedModel)

FORMS = [("untied", "veps"), ("tied", "veps"), ("untied", "eps"), ("tied", "eps")]
"""(MLM head, sharing)."""


def hub_model(kind: type[M], **changes: Any) -> M:
    """A model of class `kind` in evaluation mode, in which no parameter is 0 or 1."""
    if changes.get("sharing") == "eps":
        changes.setdefault("factor_size", TINY["hidden_size"])
    torch.manual_seed(0)
    model: Any = kind(hub.ShareBertHubConfig(**{**TINY, **changes}))  # type: ignore[call-arg]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()  # type: ignore[no-any-return]


def padded_batch() -> tuple[Tensor, Tensor]:
    """Ids and attention mask [3, 9]; the second row ends in padding."""
    ids = torch.randint(5, 250, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask
