"""FLOPs of a training step, and the peak of the devices that it may run on."""

from __future__ import annotations

import torch

from pretrain.plan.gpus import gpu_of_device
from sharebert import ShareBertConfig
from sharebert.sharing import Weights


def generated_elements(config: ShareBertConfig) -> int:
    """Elements of a layer's matrices: four [H, H] and two [H, I]; of a low rank, those of their factors."""
    if config.rank is not None:
        return sum(config.rank_of(name) * sum(config.matrix_shape(name)) for name in Weights._fields)
    return 4 * config.hidden_size * config.attention_size + 2 * config.hidden_size * config.inner_size


def made_elements(config: ShareBertConfig) -> int:
    """Elements of all matrices that are generated: those of a layer, and further feed-forward pairs."""
    return generated_elements(config) + 2 * (config.ffn_pairs - 1) * config.hidden_size * config.inner_size


def flops_per_token(config: ShareBertConfig, seq_len: float, mask_rate: float, tokens_per_micro_batch: int) -> float:
    """FLOPs of forward and backward a token, counting a multiply-add as two.

    6L(4H² + 2HI) for the layers, 12·L·T·H for the attention scores and their use, 6·rate·(head) for the masked
    tokens, and 6F(4H² + 2HI)/tokens for the generated weights, which each rank makes once a micro-batch (2HI once for
    each feed-forward pair). `seq_len` T may be a mean.
    """
    hidden, layers, matrices = config.hidden_size, config.num_hidden_layers, generated_elements(config)
    dense, decoder = {
        "untied": (hidden**2, hidden * config.vocab_size),
        "tied": (hidden * config.factor_size, config.factor_size * config.vocab_size),
        "none": (0, 0),
    }[config.mlm_head]
    made = made_elements(config)
    making = 6 * config.factor_size * made / tokens_per_micro_batch if config.sharing == "veps" else 0.0
    return 6 * layers * matrices + 12 * layers * seq_len * hidden + 6 * mask_rate * (dense + decoder) + making


def peak_flops_of(device: torch.device) -> float:
    """Data-sheet FLOP/s of this device, or 0 where it is not known (every CPU)."""
    if device.type != "cuda":
        return 0.0
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return gpu.peak_flops if gpu else 0.0
