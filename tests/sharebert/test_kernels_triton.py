"""The Triton kernels against the reference in float64, under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_paths import PATHS, kernels_of
from torch import Tensor

from sharebert import kernels
from sharebert.kernels import add_dropout_norm, linear_cross_entropy, linear_gelu

if "triton" not in PATHS:
    pytest.skip("needs Triton, and either a GPU or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest error of an output, of the largest value in it: a few roundings in its dtype."""

DTYPES = st.sampled_from(list(TOLERANCE))
CASES = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def triton_path() -> Iterator[None]:
    with kernels_of("triton"):
        yield


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "part of wider rows":
        return torch.cat((x, x), -1)[..., : x.shape[-1]]
    if layout == "every other row":
        return x.repeat_interleave(2, 0)[::2]
    return x.contiguous()


LAYOUTS = st.sampled_from(["contiguous", "transposed", "part of wider rows", "every other row"])


class Made:
    """Random tensors, and their exact doubles for the reference; both ask for gradients."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.given: list[Tensor] = []
        self.exact: list[Tensor] = []

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous") -> None:
        values = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64).to(dtype)
        leaf = values.to(DEVICE).requires_grad_()
        self.leaves = [*getattr(self, "leaves", []), leaf]
        self.given.append(laid_out(leaf, layout))
        self.exact.append(values.double().requires_grad_())

    def compare(self, ours: Callable[..., Sequence[Tensor]], reference: Callable[..., Sequence[Tensor]]) -> None:
        """Outputs, and gradients for random gradients of the outputs."""
        made, expected = ours(*self.given), reference(*self.exact)
        factors = [torch.randn(x.shape, generator=self.generator, dtype=torch.float64) for x in expected]
        given = [f.to(x) for f, x in zip(factors, made, strict=True)]
        gradients = torch.autograd.grad(made, self.leaves, given)
        exact = torch.autograd.grad(expected, self.exact, [f.cpu().double() for f in given])
        loosest = max(TOLERANCE[x.dtype] for x in (*self.given, *made))
        for a, b, like in zip((*made, *gradients), (*expected, *exact), (*made, *self.given), strict=True):
            assert a.shape == b.shape
            assert a.dtype == like.dtype
            error = (a.detach().cpu().double() - b).abs().max() if a.numel() else 0.0
            assert error <= loosest * max(1.0, b.abs().max().item() if b.numel() else 0.0)


def plain_norm(stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = stream if branch is None else stream + branch
    centred = total - total.mean(-1, keepdim=True)
    return total, centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


@CASES
@given(
    rows=st.integers(1, 9),
    width=st.integers(2, 70),
    dtypes=st.tuples(DTYPES, DTYPES, DTYPES),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    with_branch=st.booleans(),
    seed=st.integers(0, 99),
)
def test_add_norm(
    rows: int,
    width: int,
    dtypes: tuple[torch.dtype, ...],
    layouts: tuple[str, str],
    with_branch: bool,
    seed: int,
) -> None:
    made = Made(seed)
    made.tensor((2, rows, width), dtypes[0], layouts[0])
    if with_branch:
        made.tensor((2, rows, width), dtypes[1], layouts[1])
    for _ in range(2):
        made.tensor((width,), dtypes[2])

    def ours(stream: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *branch, weight, bias = rest
        return add_dropout_norm(stream, branch[0] if branch else None, weight, bias, 1e-5, 0.0)

    def reference(stream: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *branch, weight, bias = rest
        return plain_norm(stream, branch[0] if branch else None, weight, bias)

    made.compare(ours, reference)


def test_add_norm_where_only_one_output_is_used() -> None:
    for used in (0, 1):
        made = Made(used)
        for shape in ((4, 24), (4, 24), (24,), (24,)):
            made.tensor(shape, torch.float64)
        ours = add_dropout_norm(*made.given, 1e-5, 0.0)[used]  # type: ignore[arg-type]
        expected = plain_norm(*made.exact)[used]
        ours.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(made.leaves, made.exact, strict=True):
            torch.testing.assert_close(a.grad.cpu(), torch.zeros_like(b) if b.grad is None else b.grad)


@pytest.mark.parametrize(("rows", "width"), [(150, 20), (40, 200)])
def test_dropout_keeps_its_share_and_backward_drops_the_same(rows: int, width: int) -> None:
    torch.manual_seed(0)
    stream, branch = torch.zeros(rows, width, device=DEVICE), torch.ones(rows, width, device=DEVICE)
    weight, bias = torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE)
    stream.requires_grad_(), branch.requires_grad_()
    summed, normed = add_dropout_norm(stream, branch, weight, bias, 1e-5, 0.3)
    kept = summed != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(summed[kept].unique().cpu(), torch.tensor([1 / 0.7]))
    # Neighbours are dropped independently, along rows and columns.
    for along in (0, 1):
        a, b = kept.narrow(along, 1, kept.shape[along] - 1), kept.narrow(along, 0, kept.shape[along] - 1)
        assert (a & b).float().mean().item() == pytest.approx(0.49, abs=0.05)
    to_stream, to_branch = torch.autograd.grad((normed * torch.randn_like(normed)).sum(), (stream, branch))
    torch.testing.assert_close(to_branch, torch.where(kept, to_stream / 0.7, 0.0))


def test_dropout_follows_the_generator_and_differs_from_call_to_call() -> None:
    inputs = torch.zeros(8, 64), torch.ones(8, 64), torch.ones(64), torch.zeros(64)

    def dropped() -> Tensor:
        return add_dropout_norm(*(x.to(DEVICE) for x in inputs), 1e-5, 0.5)[0]

    torch.manual_seed(1)
    first, second = dropped(), dropped()
    torch.manual_seed(1)
    assert torch.equal(dropped(), first)
    assert not torch.equal(first, second)


@CASES
@given(
    rows=st.integers(1, 11),
    inner=st.integers(1, 9),
    width=st.integers(1, 600),
    dtypes=st.tuples(DTYPES, DTYPES),
    layout=LAYOUTS,
    seed=st.integers(0, 99),
)
def test_gelu(
    rows: int, inner: int, width: int, dtypes: tuple[torch.dtype, torch.dtype], layout: str, seed: int
) -> None:
    made = Made(seed)
    made.tensor((2, rows, inner), dtypes[0], layout)
    made.tensor((inner, width), dtypes[0])
    made.tensor((width,), dtypes[1])

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        z = x @ weight + bias
        return [z * (1 + torch.erf(z / 2**0.5)) / 2]

    made.compare(lambda *inputs: [linear_gelu(*inputs)], reference)


@CASES
@given(
    rows=st.integers(1, 12),
    inner=st.integers(1, 9),
    words=st.integers(2, 5000),
    at_once=st.integers(1, 12),
    dtype=DTYPES,
    with_bias=st.booleans(),
    layout=LAYOUTS,
    seed=st.integers(0, 99),
)
def test_linear_cross_entropy(
    rows: int, inner: int, words: int, at_once: int, dtype: torch.dtype, with_bias: bool, layout: str, seed: int
) -> None:
    made = Made(seed)
    made.tensor((rows, inner), dtype, layout)
    made.tensor((words, inner), dtype, layout)
    if with_bias:
        made.tensor((words,), dtype)
    labels = torch.randint(words, (rows,), generator=made.generator)
    weights = torch.rand(rows, generator=made.generator).round(decimals=1)
    hits = 0.0

    def ours(hidden: Tensor, weight: Tensor, *bias: Tensor) -> list[Tensor]:
        nonlocal hits
        device_labels, device_weights = labels.to(DEVICE), weights.to(DEVICE)
        loss, correct = linear_cross_entropy(hidden, weight, bias[0] if bias else None, device_labels, device_weights)
        hits = correct.item()
        return [loss]

    def reference(hidden: Tensor, weight: Tensor, *bias: Tensor) -> list[Tensor]:
        logits = torch.nn.functional.linear(hidden, weight, *bias)
        if dtype == torch.float64:
            assert hits == pytest.approx((logits.argmax(1) == labels).mul(weights).sum().item())
        return [(torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "CHUNK_LOGITS", dict.fromkeys(("cpu", "cuda"), at_once * words))
        made.compare(ours, reference)


COMPILER = Path(__file__).parent / "compile_kernels.py"


ARCHITECTURES = ("80", "90", "100")
"""A100, H100, B200."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(architecture: str) -> None:
    """In a process of its own: under TRITON_INTERPRET Triton compiles nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(COMPILER.parents[2])
    command = [sys.executable, "-W", "ignore", str(COMPILER), architecture]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "Cannot find ptxas" in done.stderr:
        pytest.skip(f"this build of Triton brings no ptxas for sm_{architecture}")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stdout)
    assert len({line["kernel"] for line in found}) == 7
    assert {line["architecture"] for line in found} == {int(architecture)}
    for line in found:
        assert line["spills"] == 0, line
        assert line["registers"] <= 168, line  # so that a multiprocessor holds 12 warps at least


def test_the_first_of_equal_logits_is_the_guess() -> None:
    hidden, weight = torch.ones(1, 1, device=DEVICE), torch.zeros(5000, 1, device=DEVICE)
    weight[[7, 4999]] = 1.0
    for label, hit in ((7, 1.0), (4999, 0.0)):
        labels = torch.tensor([label], device=DEVICE)
        assert linear_cross_entropy(hidden, weight, None, labels, torch.ones(1, device=DEVICE))[1].item() == hit


@CASES
@given(
    dtypes=st.sampled_from([(torch.float64, torch.float64), (torch.float32, torch.bfloat16)]),
    words=st.integers(1, 400),
    widths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    padding=st.integers(0, 7),
    data=st.data(),
)
def test_matrices_are_cut_out_of_a_slab_and_put_back(
    dtypes: tuple[torch.dtype, torch.dtype], words: int, widths: list[int], padding: int, data: st.DataObject
) -> None:
    fused = kernels.load_triton()
    assert fused is not None
    total, places = padding + sum(widths), []
    right = total
    for width in widths:
        right -= width
        left_out = data.draw(st.integers(0, min(width, words) - 1))  # a matrix ends in the last row of its block
        places.append((right, width, 1, words * width - left_out))
    slab = torch.randn(words, total, dtype=dtypes[1], device=DEVICE)
    matrices = fused.cut_slab(slab, places)
    for matrix, (left, width, rows, columns) in zip(matrices, places, strict=True):
        wanted = slab[:, left : left + width].flatten()[: rows * columns].view(rows, columns)
        assert torch.equal(matrix, wanted)
    gradients = [None if data.draw(st.booleans()) else matrix.to(dtypes[0]) for matrix in matrices[1:]]
    filled = fused.fill_slab([matrices[0].to(dtypes[0]), *gradients], places, words, total, dtypes[1])
    wanted = torch.zeros_like(slab)
    for gradient, (left, width, rows, columns) in zip([matrices[0], *gradients], places, strict=True):
        flat = torch.zeros(words * width, dtype=dtypes[1], device=DEVICE)
        if gradient is not None:
            flat[: rows * columns] = gradient.flatten().to(dtypes[1])
        wanted[:, left : left + width] = flat.view(words, width)
    assert torch.equal(filled, wanted)
