"""A look into the model at a validation: what it says, and the shape of its weights. On rank 0 alone.

It draws no random number and changes no state of the training, so a run is bit for bit the same without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exports.tokenizer import load_tokenizer, vocabulary_size
from pretrain.run.draw import attention_image, curves_image
from sharebert import ShareBertForMaskedLM
from sharebert.shared_linear import linear
from sharebert_common.inference_tokenizer import for_inference

SAMPLES_TAG = "samples/fill_mask"
"""TensorBoard's tag of the sentences."""

TOP = 5
"""Words that are shown for each mask."""

MOST_VALUES = 20_000
"""Values of a matrix that its histogram is made from."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What TensorBoard shows of a model at one step. Keys are tags."""

    step: int
    """Optimizer steps made."""
    scalars: dict[str, float] = field(default_factory=dict)
    """Norms of weights, and of their change since the last look."""
    texts: dict[str, str] = field(default_factory=dict)
    """Markdown."""
    images: dict[str, Any] = field(default_factory=dict)
    """uint8 [height, width, 3]."""
    histograms: dict[str, Any] = field(default_factory=dict)
    """Values, float32 [n]."""


class Looker:
    """Makes a `Look` of a model whenever it is asked."""

    def __init__(self, tokenizer: Path, sentences: list[str]) -> None:
        """`sentences` have one [MASK] or more; one that is too long for the model is left out."""
        self._tokenizer, _ = for_inference(load_tokenizer(tokenizer))
        self._words = vocabulary_size(self._tokenizer)
        cls, sep = (self._tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        self._mask = self._tokenizer.token_to_id("[MASK]")
        encoded = [[cls, *self._tokenizer.encode(text, add_special_tokens=False).ids, sep] for text in sentences]
        self._sentences = [(text, ids) for text, ids in zip(sentences, encoded, strict=True) if self._mask in ids]
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self, step: int, model: nn.Module) -> Look:
        """Look at `model`, a ShareBertForMaskedLM, in evaluation mode and with its whole weights on this rank."""
        assert isinstance(model, ShareBertForMaskedLM)
        encoder = model.sharebert
        factors = {"E": encoder.word_embeddings.weight}
        singular = {"E": singular_values(factors["E"])}
        if encoder.config.sharing == "veps":
            factors["W_all"] = encoder.factor_linear_all.weight
            singular["virtual matrix"] = virtual_singular_values(
                factors["E"], factors["W_all"], encoder.factor_linear_all.bias
            )
        generated = encoder.layer_weights(False).of_layer(0).intermediate
        matrices = {"E": factors["E"], "virtual_matrix": generated}
        texts, images = {}, {"weights/singular_values": curves_image(singular)}
        limit = model.config.max_position_embeddings
        fitting = [(text, ids) for text, ids in self._sentences if len(ids) <= limit]
        if fitting:
            texts[SAMPLES_TAG] = self._fill(model, fitting)
            images["samples/attention_last_layer"] = self._attention(model, fitting[0][1])
        return Look(
            step=step,
            scalars=self._norms(factors),
            texts=texts,
            images=images,
            histograms={f"weights/{name}": _some(matrix) for name, matrix in matrices.items()},
        )

    def _norms(self, factors: dict[str, Tensor]) -> dict[str, float]:
        found = {f"weights/norm_{name}": float(matrix.float().norm()) for name, matrix in factors.items()}
        for name, matrix in factors.items():
            if name in self._before:
                found[f"weights/change_{name}"] = float((matrix - self._before[name]).float().norm())
            self._before[name] = matrix.detach().clone()
        return found

    def _fill(self, model: ShareBertForMaskedLM, sentences: list[tuple[str, list[int]]]) -> str:
        """The likeliest words at each mask, as a table."""
        longest = max(len(ids) for _, ids in sentences)
        tokens = torch.zeros(len(sentences), longest, dtype=torch.int64)
        seen = torch.zeros_like(tokens)
        for row, (_, ids) in enumerate(sentences):
            tokens[row, : len(ids)], seen[row, : len(ids)] = torch.tensor(ids), 1
        positions = (tokens == self._mask).flatten().nonzero().flatten()
        device = model.sharebert.word_embeddings.weight.device
        logits = model.logits(tokens.to(device), seen.to(device), positions=positions.to(device))
        best = logits[:, : self._words].float().softmax(-1).topk(min(TOP, self._words))
        lines = ["| sentence | likeliest words |", "|---|---|"]
        for position, words, shares in zip(
            positions.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        ):
            said = ", ".join(
                f"{self._tokenizer.decode([word], skip_special_tokens=False).strip()} {share:.2f}"
                for word, share in zip(words, shares, strict=True)
            )
            lines.append(f"| {sentences[position // longest][0]} | {said.replace('|', chr(92) + '|')} |")
        return "\n".join(lines)

    def _attention(self, model: ShareBertForMaskedLM, ids: list[int]) -> Any:
        """The attention probabilities of the last layer, head by head, as an image."""
        encoder = model.sharebert
        states = encoder(
            torch.tensor([ids], device=encoder.word_embeddings.weight.device), pool=False, keep_states=True
        ).states
        layer: Any = encoder.layers[-1]
        weights = encoder.layer_weights(False).of_layer(len(encoder.layers) - 1)
        _, x = layer.attention_norm(states[-2], None)
        query, key = (
            linear(x, matrix, bias)[0].unflatten(-1, (layer.heads, -1)).transpose(0, 1).float()
            for matrix, bias in ((weights.query, layer.query_bias), (weights.key, layer.key_bias))
        )
        return attention_image((query @ key.mT * layer.scale).softmax(-1).cpu().numpy())


def singular_values(matrix: Tensor) -> Any:
    """Singular values of a [rows, columns] matrix with few columns, falling, from the eigenvalues of its Gram matrix.

    Those below about 1e-4 of the largest are not exact, which a plot does not show.
    """
    gram = (matrix.float().T @ matrix.float()).double().cpu()
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).numpy()


def virtual_singular_values(embedding: Tensor, projection: Tensor, bias: Tensor) -> Any:
    """Singular values of E · W_allᵀ + b_all [V, H], which is not made: at most F + 1 of them are above 0.

    The matrix is [E, 1] · [W_all, b_all]ᵀ. With [E, 1] = Q·R its singular values are those of R·[W_all, b_all]ᵀ.
    """
    left = torch.cat([embedding.float(), embedding.new_ones(len(embedding), 1).float()], 1)
    right = torch.cat([projection.float(), bias.float()[:, None]], 1).double().cpu()
    values, vectors = torch.linalg.eigh((left.T @ left).double().cpu())
    root = values.clamp(min=0).sqrt()[:, None] * vectors.T
    return torch.linalg.eigvalsh(root @ (right.T @ right) @ root.T).clamp(min=0).sqrt().flip(0).numpy()


def _some(matrix: Tensor) -> Any:
    """Values of a matrix, evenly spaced where there are many."""
    flat = matrix.flatten()
    return np.ascontiguousarray(flat[:: max(1, len(flat) // MOST_VALUES)].float().cpu().numpy())
