"""Which matrices each layer uses: another way to share plugs in without a change to layers or encoder."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn

from sharebert.sharing import Encoder, Weights

TOKENS = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(0))


class FromLists(NamedTuple):
    layers: list[Weights]
    pooler: Tensor | None

    def of_layer(self, index: int) -> Weights:
        return self.layers[index]


class OwnMatrices(nn.Module):
    """Each layer has its own matrices: the parameters are in this module, not in the layers."""

    def __init__(self, layers: list[Weights], pooler: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ParameterDict({name: w.detach().clone() for name, w in one._asdict().items()}) for one in layers
        )
        self.pooler = nn.Parameter(pooler.detach().clone())

    def forward(self, encoder: Encoder, pooler: bool) -> FromLists:
        layers = [Weights(**{name: layer[name] for name in Weights._fields}) for layer in self.layers]
        return FromLists(layers, self.pooler if pooler else None)


def own_matrices(model: nn.Module, change: float = 0.0) -> OwnMatrices:
    """A copy of the generated matrices for each layer; `change` times the layer's index is added to them."""
    made = model.sharebert.layer_weights()
    assert made.pooler is not None
    layers = [
        Weights(*(weight + change * index for weight in made.of_layer(index)))
        for index in range(model.config.num_hidden_layers)
    ]
    return OwnMatrices(layers, made.pooler)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sharing", ["veps", "eps"])
def test_own_matrices_plug_in(sharing: str, recompute: bool) -> None:
    """With the same values as the generated ones, the output is the same; each layer gets gradients of its own."""
    model = tiny_model(sharing=sharing).double()
    expected = model.sharebert(TOKENS)
    own = own_matrices(model)
    model.sharebert.sharing = own
    model.sharebert.recompute = recompute
    made = model.sharebert(TOKENS)
    torch.testing.assert_close(made.hidden, expected.hidden, rtol=0, atol=0)
    torch.testing.assert_close(made.pooled, expected.pooled, rtol=0, atol=0)

    made.hidden.square().sum().backward()
    first, second = (layer["query"].grad for layer in own.layers)
    assert first.abs().max() > 0
    assert not torch.allclose(first, second)
    assert {name for name, _ in model.named_parameters()} >= {"sharebert.sharing.layers.1.query"}


def test_each_layer_uses_the_matrices_of_its_index() -> None:
    model = tiny_model().double()
    shared = model.sharebert(TOKENS).hidden
    model.sharebert.sharing = own_matrices(model, change=0.1)
    inputs = []
    for layer in model.sharebert.layers:
        layer.register_forward_pre_hook(lambda module, given: inputs.append(given[2]))
    assert (model.sharebert(TOKENS).hidden - shared).abs().max() > 1e-3
    assert [one.query is own["query"] for one, own in zip(inputs, model.sharebert.sharing.layers, strict=True)] == [
        True,
        True,
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sharing", ["veps", "eps"])
def test_layers_take_turns_with_feed_forward_pairs(sharing: str, training: bool) -> None:
    """The second pair is that of columns left of the first set; attention matrices are shared by all."""
    model = tiny_model(sharing=sharing, vocab_size=500, num_hidden_layers=3, ffn_pairs=2).train(training)
    made = model.sharebert.layer_weights(pooler=False)
    first, second, third = (made.of_layer(layer) for layer in range(3))
    assert first.query is second.query
    assert first.attention_output is second.attention_output
    assert first.intermediate is third.intermediate
    assert first.output is third.output
    assert (first.intermediate - second.intermediate).abs().max() > 1e-3
    encoder = model.sharebert
    virtual = encoder.word_embeddings.weight
    if sharing == "veps":
        virtual = virtual @ encoder.factor_linear_all.weight.T + encoder.factor_linear_all.bias
    columns = virtual[:, 24 - (4 * 2 + 2 * 2 + 2) : 24 - (4 * 2 + 2 * 2)]  # h = f = 2
    torch.testing.assert_close(second.intermediate, columns.flatten()[: 24 * 40].view(24, 40))
    with_pooler = model.sharebert.layer_weights()
    torch.testing.assert_close(with_pooler.pooler, virtual[:, 24 - 18 : 24 - 16].flatten()[: 24 * 24].view(24, 24))
    if not training:
        with torch.no_grad():
            kept, again = (model.sharebert.layer_weights(pooler=False) for _ in range(2))
        assert kept.of_layer(1).output is again.of_layer(1).output


def test_the_generated_set_is_made_once_in_a_forward_pass() -> None:
    """All layers get the very same tensors; the pooler's matrix is made only for who asks."""
    model = tiny_model(num_hidden_layers=3)
    calls = []
    sharing = model.sharebert.sharing

    def counted(encoder: Encoder, pooler: bool) -> object:
        calls.append(sharing(encoder, pooler))
        return calls[-1]

    model.sharebert.sharing = counted
    model.sharebert(TOKENS, pool=False)
    (made,) = calls
    assert made.pooler is None
    assert all(a is b for a, b in zip(made.of_layer(0), made.of_layer(2), strict=True))
    model.sharebert(TOKENS)
    assert calls[1].pooler.shape == (24, 24)
