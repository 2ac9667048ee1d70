"""Which matrices each layer uses: the seam between the encoder and the ways to share.

Once in a forward pass the encoder calls its `Sharing`, and then asks the result for the matrices of each layer in
turn. A way to share that has parameters of its own is an `nn.Module`: as the encoder's submodule `sharing` it holds
them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .config import MATRICES, ShareBertConfig
from .kept import KeptMatrices, may_keep
from .plain_modules import embedding_matrix, is_plain
from .precision import compute_dtype
from .roles import Normal, set_roles, weight_role
from .shared_linear import LowRank, written_out
from .slices import slices_of
from .tracing import is_traced
from .virtual import GradientChange, blocks, generate


class Weights(NamedTuple):
    """The matrices of one layer, each [in, out]: y = x·W + b. With `sharing: low_rank` each is a `LowRank` instead,
    which `linear` and `linear_gelu` take as well."""

    query: Tensor
    """[H, H]."""
    key: Tensor
    """[H, H]."""
    value: Tensor
    """[H, H]."""
    attention_output: Tensor
    """[H, H]."""
    intermediate: Tensor
    """[H, I]."""
    output: Tensor
    """[I, H]."""

    def written_out(self) -> Weights:
        """The same with every product of a low rank made."""
        return Weights(*map(written_out, self))


class LayerWeights(Protocol):
    """The matrices of one forward pass."""

    def of_layer(self, index: int) -> Weights:
        """The matrices of layer `index`, counted from 0. The encoder asks once for each layer, in order."""
        ...

    @property
    def pooler(self) -> Tensor | None:
        """The pooler's matrix [H, H]; None if it was not asked for."""
        ...


class Encoder(Protocol):
    """What a `Sharing` may read of the encoder."""

    word_embeddings: nn.Embedding
    """E [V, F]."""
    factor_linear_all: nn.Linear
    """W_all [H, F] and b_all [H]; only VEPS has it."""
    kept_attention_scale: Any
    """Factors on the rows of the attention output's matrix, [heads · d]; None unless heads were pruned."""
    kept_inner_scale: Any
    """Factors on the rows of the output's matrix, [columns]; None unless columns were pruned."""
    training: bool


class Sharing(Protocol):
    """Makes the matrices of one forward pass, from parameters of the encoder or of its own."""

    def __call__(self, encoder: Encoder, pooler: bool) -> LayerWeights:
        """The matrices of all layers, and the pooler's if `pooler` is true."""
        ...


class SameForAll(NamedTuple):
    """`LayerWeights` in which all layers use the same matrices."""

    weights: Weights
    pooler: Tensor | None

    def of_layer(self, index: int) -> Weights:
        """The same for every index."""
        return self.weights


class SetsByNumber(NamedTuple):
    """`LayerWeights` with several sets, and the number of the set that each layer uses."""

    sets: list[Weights]
    numbers: tuple[int, ...]
    pooler: Tensor | None

    def of_layer(self, index: int) -> Weights:
        """The set of layer `index`."""
        return self.sets[self.numbers[index]]


class OneGeneratedSet:
    """VEPS and EPS: all layers use one set of matrices, cut from the virtual matrix (see `virtual`); or one set of
    attention matrices, and the feed-forward pair whose turn it is (`ffn_pairs`)."""

    def __init__(self, config: ShareBertConfig) -> None:
        self.numbers = tuple(map(config.ffn_pair, range(config.num_hidden_layers)))
        self.virtual = config.sharing == "veps"
        self.words = config.vocab_size
        self.blocks = blocks(config)
        self.slices = slices_of(config)
        self.change_gradients: GradientChange | None = None
        """Called in the backward pass of training with the gradients of the matrices that were made."""
        self.kept = KeptMatrices()

    def __call__(self, encoder: Encoder, pooler: bool) -> LayerWeights:
        """Each matrix is one product (EPS: one copy), made here. In evaluation they are kept, see `kept`."""
        count = len(self.blocks) - 1
        wanted = count + 1 if pooler else count
        sources = None if encoder.training or is_traced() else self._sources(encoder)
        if sources is not None and may_keep(sources):
            dtype = compute_dtype(sources[0])
            matrices = self.kept.get(sources, dtype, wanted, lambda first, last: self._make(encoder, first, last))
        else:
            if not is_traced():  # what is recorded must have no effect outside
                self.kept.forget()
            matrices = self._make(encoder, 0, wanted)
        first, last = Weights(*matrices[: len(Weights._fields)]), matrices[count] if pooler else None
        further = matrices[len(Weights._fields) : count]
        if not further:
            return SameForAll(first, last)
        pairs = zip(further[::2], further[1::2], strict=True)
        sets = [first, *(first._replace(intermediate=wide, output=back) for wide, back in pairs)]
        return SetsByNumber(sets, self.numbers, last)

    def _sources(self, encoder: Encoder) -> tuple[Tensor, ...] | None:
        """The tensors that the matrices are made from; None where a tool has changed their modules."""
        modules = [encoder.word_embeddings, encoder.factor_linear_all] if self.virtual else [encoder.word_embeddings]
        if not all(is_plain(module) for module in modules):
            return None
        parts: list[Any] = [part for module in modules for part in (module.weight, getattr(module, "bias", None))]
        parts += [encoder.kept_attention_scale, encoder.kept_inner_scale]
        return tuple(part for part in parts if part is not None)

    def _make(self, encoder: Encoder, first: int, last: int) -> tuple[Tensor, ...]:
        """The matrices of the blocks [first, last), sliced."""
        made = self._generate(encoder, first, last)
        if self.slices is None:
            return made
        scales = {"attention_output": encoder.kept_attention_scale, "output": encoder.kept_inner_scale}
        names = tuple(self.blocks)[first:last]
        return tuple(self.slices.cut(name, matrix, scales.get(name)) for name, matrix in zip(names, made, strict=True))

    def _generate(self, encoder: Encoder, first: int, last: int) -> tuple[Tensor, ...]:
        """The whole matrices of the blocks [first, last)."""
        wanted = tuple(self.blocks.values())[first:last]
        embedding = embedding_matrix(encoder.word_embeddings, self.words)
        if not self.virtual:
            return generate(wanted, embedding, None, None, self.change_gradients)
        if is_plain(encoder.factor_linear_all):
            all_rows = encoder.factor_linear_all
            return generate(wanted, embedding, all_rows.weight, all_rows.bias, self.change_gradients)
        # an adapter or a quantiser has changed it: make the whole virtual matrix with it, and cut that
        return generate(wanted, encoder.factor_linear_all(embedding), None, None)


class MatrixSet(nn.Module):
    """The matrices of `Weights` as parameters."""

    def __init__(self, config: ShareBertConfig) -> None:
        super().__init__()
        role = weight_role(config.initializer_range)._replace(generates=True)
        for name in Weights._fields:
            self.register_parameter(name, nn.Parameter(torch.zeros(config.matrix_shape(name))))
        set_roles(self, **dict.fromkeys(Weights._fields, role))

    def weights(self) -> Weights:
        """The parameters themselves."""
        return Weights(*(getattr(self, name) for name in Weights._fields))


class OwnMatrices(nn.Module):
    """Matrices that are parameters: one set for all layers (`layers`, as ALBERT, Lan et al., ICLR 2020), or a set for
    each layer (`none`, as BERT). They are what generated matrices are compared with.
    """

    def __init__(self, config: ShareBertConfig) -> None:
        super().__init__()
        count = config.num_hidden_layers if config.sharing == "none" else 1
        self.numbers = tuple(layer % count for layer in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(MatrixSet(config) for _ in range(count))
        self.pooler = nn.Parameter(torch.zeros(config.hidden_size, config.hidden_size))
        set_roles(self, pooler=weight_role(config.initializer_range)._replace(generates=True))

    def forward(self, encoder: Encoder, pooler: bool) -> SetsByNumber:
        """The parameters of all sets."""
        sets = [one.weights() for one in self.layers]  # type: ignore[operator]
        return SetsByNumber(sets, self.numbers, self.pooler if pooler else None)


class LowRankMatrices(nn.Module):
    """One set of matrices for all layers, each a product a·b of two parameters, and the pooler's."""

    def __init__(self, config: ShareBertConfig) -> None:
        super().__init__()
        for name in MATRICES:
            rank, (rows, columns) = config.rank_of(name), config.matrix_shape(name)
            self.register_parameter(f"{name}_a", nn.Parameter(torch.zeros(rows, rank)))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.zeros(rank, columns)))
            # the elements of a·b have the standard deviation `initializer_range`
            role = weight_role(config.initializer_range)
            half = role._replace(
                start=role.start._replace(variance=Normal((config.initializer_range**2 / rank) ** 0.25))
            )
            set_roles(self, **{f"{name}_a": half, f"{name}_b": half})

    def forward(self, encoder: Encoder, pooler: bool) -> SameForAll:
        """The parameters themselves; the pooler's are multiplied here."""
        made: list[Any] = [self.matrix(name) for name in Weights._fields]
        return SameForAll(Weights(*made), written_out(self.matrix("pooler")) if pooler else None)

    def matrix(self, name: str) -> LowRank:
        """That of a name in `Weights`, or `pooler`."""
        return LowRank(getattr(self, f"{name}_a"), getattr(self, f"{name}_b"))


def sharing_of(config: ShareBertConfig) -> Sharing:
    """The way to share of a model."""
    if config.generates:
        return OneGeneratedSet(config)
    return LowRankMatrices(config) if config.sharing == "low_rank" else OwnMatrices(config)
