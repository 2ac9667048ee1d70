"""The generated matrices: their values, their gradients, and that nothing is copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_paths import PATHS, kernels_of
from tiny_models import tiny_config
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sharebert import ShareBertConfig
from sharebert.shared_linear import linear, linears, matmul
from sharebert.virtual import blocks, generate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Matrices are made block by block, and on CUDA out of a slab."""
    with kernels_of(request.param), torch.device(DEVICE):
        yield request.param


def parameters(config: ShareBertConfig, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """E, and for VEPS W_all and b_all."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    shapes: list[tuple[int, ...]] = [(config.vocab_size, config.factor_size)]
    if config.sharing == "veps":
        shapes += [(config.hidden_size, config.factor_size), (config.hidden_size,)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def cut_from_whole_matrix(config: ShareBertConfig, given: list[Tensor]) -> list[Tensor]:
    """The seven matrices by definition: the columns of the whole M, flattened, cut and reshaped."""
    matrix = given[0] if config.sharing == "eps" else given[0] @ given[1].T + given[2]
    return [
        matrix[:, b.first : b.last].flatten()[: b.rows * b.columns].reshape(b.rows, b.columns)
        for b in blocks(config).values()
    ]


def make(config: ShareBertConfig, given: list[Tensor]) -> list[Tensor]:
    embedding, projection, bias = (*given, None, None)[:3]
    assert embedding is not None
    return list(generate(tuple(blocks(config).values()), embedding, projection, bias))


CASES: list[dict[str, Any]] = [
    {},
    {"vocab_size": 251, "vocab_pad_multiple": 1},
    {"vocab_size": 576, "vocab_pad_multiple": 1},  # H² = V: one column a block, nothing cut off
    {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 40, "vocab_size": 401, "vocab_pad_multiple": 1},
    {"vocab_size": 288, "intermediate_size": 48},  # V divides H² and H·I
    {"vocab_size": 500, "ffn_pairs": 2},
    {"sharing": "eps"},
    {"sharing": "eps", "vocab_size": 288, "intermediate_size": 48},
    {"sharing": "eps", "vocab_size": 500, "ffn_pairs": 2},
]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("changes", CASES)
def test_weights_and_gradients_are_those_of_the_whole_matrix(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    given = parameters(config)
    made, expected = make(config, given), cut_from_whole_matrix(config, given)
    factors = [torch.randn_like(weight) for weight in expected]
    gradients = torch.autograd.grad([w * g for w, g in zip(made, factors, strict=True)], given, factors)
    wanted = torch.autograd.grad([w * g for w, g in zip(expected, factors, strict=True)], given, factors)
    for a, b in zip((*made, *gradients), (*expected, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("path")
def test_unused_weights_cost_no_gradient() -> None:
    config = tiny_config()
    given = parameters(config)
    make(config, given)[1].sum().backward()
    key = blocks(config)["key"]
    assert given[1].grad is not None
    used = given[1].grad.abs().sum(1) > 0
    assert used[key.first : key.last].all()
    assert used.sum() == key.last - key.first


@pytest.mark.usefixtures("path")
def test_gradient_by_finite_differences() -> None:
    config = tiny_config()
    given = parameters(config)
    assert torch.autograd.gradcheck(lambda *p: tuple(make(config, list(p))), given, fast_mode=True)


@pytest.mark.parametrize("sharing", ["veps", "eps"])
def test_each_weight_is_a_contiguous_view_of_its_own_product(sharing: str) -> None:
    config = tiny_config(sharing=sharing)
    with torch.no_grad():
        made = make(config, parameters(config))
    storages = {weight.untyped_storage().data_ptr() for weight in made}
    assert len(storages) == len(made)
    for weight, block in zip(made, blocks(config).values(), strict=True):
        assert weight.is_contiguous()
        assert weight.storage_offset() == 0
        assert weight.untyped_storage().nbytes() == config.vocab_size * (block.last - block.first) * 8


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("sharing", ["veps", "eps"])
def test_layers_add_to_one_gradient_whatever_part_of_the_model_is_used(sharing: str) -> None:
    """`linear` sums beside autograd: gradients are right for one layer, for several, and in a second backward pass."""
    config = tiny_config(sharing=sharing)
    given = parameters(config)
    x, bias = torch.randn(5, 24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)

    def layers(multiply: Callable[[Tensor, Tensor], Tensor], weights: list[Tensor]) -> list[Tensor]:
        """What each of three layers makes; the key matrix is used by an ordinary product as well."""
        found = [x]
        for _ in range(3):
            found.append(multiply(torch.tanh(multiply(found[-1], weights[0])), weights[1]))
        return [*found[1:], x @ weights[1]]

    ours = layers(lambda a, w: linear(a, w, bias), make(config, given))
    theirs = layers(lambda a, w: a @ w, cut_from_whole_matrix(config, given))
    for used in ([0], [2], [0, 2], [1, 3], [3]):
        gradients = (
            torch.autograd.grad(sum(made[i].square().sum() for i in used), given, retain_graph=True)
            for made in (ours, theirs)
        )
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_several_products_of_one_input() -> None:
    """`linears` is `linear` for each weight; one of the weights is generated, one is a parameter, one is unused."""
    config = tiny_config()
    given = parameters(config)
    query, key = make(config, given)[:2]
    own, bias = torch.randn(24, 24, dtype=torch.float64).requires_grad_(), torch.randn(24, dtype=torch.float64)
    x, bias = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True), bias.requires_grad_()
    asked = [x, own, bias, *given]
    ours, theirs = linears(x, (query, own, key), (bias, bias, bias)), [linear(x, w, bias) for w in (query, own, key)]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    gradients = [
        torch.autograd.grad((y[0].square() + y[1].sin()).sum(), asked, retain_graph=True) for y in (ours, theirs)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_one_input_are_added_up_without_a_temporary(dtype: torch.dtype) -> None:
    x = torch.randn(512, 64, dtype=dtype, requires_grad=True)
    weights = [torch.randn(64, 64, dtype=dtype) for _ in range(3)]
    made = linears(x, weights, [torch.zeros(64, dtype=dtype)] * 3)
    ones = torch.ones_like(made[0])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        torch.autograd.grad(made, x, [ones] * 3)
    made_bytes = [e.self_cpu_memory_usage for e in recorded.events() or () if e.self_cpu_memory_usage >= x.nbytes]
    assert len(made_bytes) == 1


@pytest.mark.usefixtures("path")
def test_a_backward_pass_for_something_else_leaves_nothing_behind() -> None:
    """A backward pass for the input alone never reaches the node of the weights; the next pass must not count it."""
    config = tiny_config()
    given = parameters(config)
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(24, dtype=torch.float64)
    loss = linear(x, make(config, given)[0], bias).square().sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    ours = torch.autograd.grad(loss, given)
    theirs = torch.autograd.grad((x @ cut_from_whole_matrix(config, given)[0]).square().sum(), given)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def allocations(nbytes: int, recorded: profile) -> set[str]:
    """The operations that allocated at least `nbytes` themselves."""
    return {event.name for event in recorded.events() or () if event.self_cpu_memory_usage >= nbytes}


def allocated(nbytes: int, recorded: profile, name: str) -> int:
    """How often an operation allocated at least `nbytes` itself."""
    events = recorded.events() or ()
    return sum(event.name == name and event.self_cpu_memory_usage >= nbytes for event in events)


@pytest.mark.parametrize("autocast", [False, True])
def test_no_weight_is_copied_forward_or_backward(autocast: bool) -> None:
    """Only matrices, the slab that they are cut out of, and products of gradients take as much memory as a weight.

    Under autocast a CPU also casts each product to float32, in which the gradients of the layers are summed, and that
    sum back once. On CUDA the products themselves are in float32.
    """
    config = tiny_config(hidden_size=64, num_attention_heads=4, intermediate_size=128, vocab_size=640, factor_size=2)
    given = parameters(config, torch.float32)
    x = torch.randn(8, 64, requires_grad=True)
    bias = torch.zeros(64, requires_grad=True)
    with profile(profile_memory=True) as recorded, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        query, key, value, attention_output, *_ = make(config, given)
        for _ in range(2):  # two layers share the weights
            for weight in (query, key, value, attention_output):
                x = linear(x, weight, bias)
        x.sum().backward()
    casts = {"aten::empty_strided"} if autocast else set()
    assert allocations(query.nbytes, recorded) == {"aten::empty", "aten::mm"} | casts
    matrices, slabs = 7, 2  # a slab in the forward pass, and one in the backward pass
    assert allocated(query.nbytes, recorded, "aten::empty") == matrices + slabs
    assert given[0].grad is not None


def test_the_gradients_of_all_layers_are_summed_in_float32() -> None:
    """In bfloat16 a sum of ones stops at 256: 256 + 1 is 256."""
    config = tiny_config(sharing="eps", factor_size=32, hidden_size=32, num_attention_heads=4)
    embedding = torch.zeros(config.vocab_size, 32, dtype=torch.bfloat16, requires_grad=True)
    (weight,) = generate([blocks(config)["query"]], embedding, None, None)
    x, bias = torch.ones(1, 32, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.bfloat16)
    uses = [linear(x, weight, bias) for _ in range(200)] + [matmul(x, weight) for _ in range(200)]
    sum(use.sum() for use in uses).backward()
    used = embedding.grad[embedding.grad != 0]
    assert len(used) == 32 * 32
    assert (used == 400).all()


def test_products_run_in_autocast_dtype_and_gradients_return_in_the_parameters() -> None:
    config = tiny_config()
    given = parameters(config, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        made = make(config, given)
    assert {weight.dtype for weight in made} == {torch.bfloat16}
    torch.autograd.backward(made, [torch.ones_like(weight) for weight in made])
    assert {p.grad.dtype for p in given if p.grad is not None} == {torch.float32}
    for weight, exact in zip(made, cut_from_whole_matrix(config, given), strict=True):
        torch.testing.assert_close(weight.float(), exact, rtol=0.02, atol=0.05)
