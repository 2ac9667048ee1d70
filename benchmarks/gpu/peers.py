"""Other encoders of the size of sharebert-small, in the same run: tokens/s and share of the product rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.kernels import MASK_RATE, SEQ_LEN, config_of, product_rate
from benchmarks.gpu.timing import milliseconds
from sharebert import ShareBertConfig


def peers(folder: Path, device: str) -> Iterator[dict[str, Any]]:
    """A step (forward, backward, clip, fused AdamW) under bf16 autocast on 64 rows; dropout 0.1."""
    config, rows = config_of(device), 64 if device == "cuda" else 2
    rate = product_rate(device)
    tokens = torch.randint(5, config.vocab_size, (rows, SEQ_LEN), device=device)
    made: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
        "BertForMaskedLM, SDPA": lambda: bert(config, tokens),
        "nn.TransformerEncoder": lambda: encoder(config, tokens),
    }
    for name, make in made.items():
        for compiled in (False, True) if device == "cuda" else (False,):
            row = {"peer": name, "compiled": compiled, "rows": rows}
            try:
                yield row | step(*make(), tokens.numel(), device, compiled, config, rate)
            except RuntimeError as error:  # out of memory, or a compiler that fails
                yield row | {"failed": str(error).splitlines()[0][:200]}
            if device == "cuda":
                torch.cuda.empty_cache()


def step(
    model: nn.Module,
    loss_of: Callable[[nn.Module], Tensor],
    tokens: int,
    device: str,
    compiled: bool,
    config: ShareBertConfig,
    rate: float,
) -> dict[str, Any]:
    """Time one training step."""
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    runs = torch.compile(model, dynamic=False) if compiled else model

    def one() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(runs)  # type: ignore[arg-type]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.step()
        adamw.zero_grad()

    took = milliseconds(one, device)
    matrices = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    flops = 6 * config.num_hidden_layers * matrices * tokens  # the layers alone: the heads of these models differ
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return {
        "ms": took,
        "tokens_per_s": tokens / took * 1e3,
        "share_of_product_rate": flops / (took / 1e3) / rate,
        "memory_gb": memory,
    }


def bert(config: ShareBertConfig, tokens: Tensor) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """transformers' BERT of the same sizes."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    given = BertConfig(**{name: getattr(config, name) for name in sizes}, attn_implementation="sdpa")
    labels = torch.full_like(tokens, -100)
    positions = torch.arange(0, tokens.numel(), round(1 / MASK_RATE), device=tokens.device)
    labels.view(-1)[positions] = tokens.view(-1)[positions]
    return BertForMaskedLM(given).to(tokens.device).train(), lambda model: model(input_ids=tokens, labels=labels).loss


def encoder(config: ShareBertConfig, tokens: Tensor) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """PyTorch's own layers, pre-LN, without a head."""
    layer = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        dropout=0.1,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    model = nn.Sequential(
        nn.Embedding(config.vocab_size, config.hidden_size),
        nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False),
    )
    return model.to(tokens.device).train(), lambda model: model(tokens).float().square().mean()
