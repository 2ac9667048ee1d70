"""Time and memory of each fused operation against its plain form, forward and backward.

    python -m benchmarks.kernels [--rows 64] [--rounds 5] [--threads 2] [--device cpu|cuda] [--dtype float32|bfloat16]

Sizes are those of sharebert-small, with rows of 128 tokens. `ours` is what `sharebert.kernels` and `sharebert.virtual`
do on this device; `plain` is the same in plain PyTorch. Virtual weights are compared with the definition, and with a
product for each of them. A round runs both in turn, and a ratio is the median over the rounds. Memory is the peak of
what the operation allocates. GELU is compared only on CUDA, and attention only on CPUs: on the other device both are
the same.

The last line compares the time of the virtual weights with the time of their products alone, forward and backward, at
the rate of a product of two 2048 x 2048 matrices in the same rounds (bar: 1.3 x).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sharebert import SIZES, ShareBertConfig, kernels, virtual

SEQ_LEN, MASK_RATE, DROPOUT, PRODUCT = 128, 0.15, 0.1, 2048
CONFIG = ShareBertConfig(**SIZES["sharebert-small"])
HEAD = CONFIG.hidden_size // CONFIG.num_attention_heads


class Operation(NamedTuple):
    """Two implementations of one operation, each forward and backward."""

    name: str
    ours: Callable[[], object]
    plain: Callable[[], object]


def backward(outputs: list[Tensor], inputs: list[Tensor]) -> None:
    torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs], allow_unused=True)


def loss(make: Callable[..., Tensor]) -> Callable[[int], Callable[[], object]]:
    """The head's logits and loss over the masked tokens."""

    def prepare(tokens: int) -> Callable[[], object]:
        count = round(tokens * MASK_RATE)
        hidden = made(count, CONFIG.hidden_size)
        decoder = made(CONFIG.vocab_size, CONFIG.hidden_size)
        labels = torch.randint(CONFIG.vocab_size, (count,))
        weights = torch.ones(count)
        return lambda: make(hidden, decoder, labels, weights).backward()

    return prepare


def made(*shape: int) -> Tensor:
    """Random values that require a gradient, on the default device and in the default dtype."""
    return torch.randn(*shape).mul_(0.02).requires_grad_()


def chunked(hidden: Tensor, decoder: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return kernels.linear_cross_entropy(hidden, decoder, None, labels, weights)[0]


def whole(hidden: Tensor, decoder: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    logits = F.linear(hidden, decoder)
    weights = weights * (logits.argmax(1) >= 0)  # the correct predictions are counted too
    return (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum()


def weights_ours(embedding: Tensor, projection: Tensor, bias: Tensor) -> list[Tensor]:
    return list(virtual.generate(tuple(virtual.blocks(CONFIG).values())[:-1], embedding, projection, bias))


def weights_plain(embedding: Tensor, projection: Tensor, bias: Tensor) -> list[Tensor]:
    """The definition: make the whole virtual matrix, and cut columns out of it."""
    matrix = embedding @ projection.t() + bias
    return [
        matrix[:, block.first : block.last].flatten()[: block.rows * block.columns].view(block.rows, block.columns)
        for block in tuple(virtual.blocks(CONFIG).values())[:-1]
    ]


def weights_by_block(embedding: Tensor, projection: Tensor, bias: Tensor) -> list[Tensor]:
    """A product for each block, and a view of it."""
    cut = tuple(virtual.blocks(CONFIG).values())[:-1]
    return list(virtual.products_of(embedding, projection, bias, cut, embedding.dtype))


def operations(tokens: int) -> list[Operation]:
    """The operations that are compared, on the default device and in the default dtype."""
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    given = [made(CONFIG.vocab_size, CONFIG.factor_size), made(hidden, CONFIG.factor_size), made(hidden)]
    gradients = [torch.randn_like(weight) for weight in weights_ours(*given)]  # as the layers would give them
    found = [
        Operation("linear + cross-entropy", loss(chunked)(tokens), loss(whole)(tokens)),
        Operation(
            "virtual weights",
            lambda: torch.autograd.grad(weights_ours(*given), given, gradients),
            lambda: torch.autograd.grad(weights_plain(*given), given, gradients),
        ),
        Operation(
            "the same, by block",
            lambda: torch.autograd.grad(weights_ours(*given), given, gradients),
            lambda: torch.autograd.grad(weights_by_block(*given), given, gradients),
        ),
    ]
    stream, branch, scale, shift = made(tokens, hidden), made(tokens, hidden), made(hidden), made(hidden)
    norm = [stream, branch, scale, shift]

    def plain_norm() -> None:
        summed = stream + F.dropout(branch, DROPOUT)
        backward([summed, F.layer_norm(summed, (hidden,), scale, shift)], norm)

    found.append(
        Operation(
            "dropout + add + norm",
            lambda: backward(list(kernels.add_dropout_norm(*norm, 1e-5, DROPOUT)), norm),
            plain_norm,
        )
    )
    if torch.get_default_device().type == "cuda":
        x, matrix, bias = made(tokens, hidden), made(hidden, inner), made(inner)
        found.append(
            Operation(
                "linear + bias + GELU",
                lambda: backward([kernels.linear_gelu(x, matrix, bias)], [x, matrix, bias]),
                lambda: backward([F.gelu(torch.addmm(bias, x, matrix))], [x, matrix, bias]),
            )
        )
    else:
        query, key, value = (
            made(tokens, hidden).view(-1, SEQ_LEN, CONFIG.num_attention_heads, HEAD).transpose(1, 2) for _ in range(3)
        )

        def attention_with(attend: Callable[[], Tensor]) -> Callable[[], object]:
            return lambda: backward([attend().transpose(1, 2).flatten(2)], [query, key, value])

        found.append(
            Operation(
                "attention with dropout",
                attention_with(lambda: kernels.attention(query, key, value, None, HEAD**-0.5, DROPOUT)),
                attention_with(lambda: F.scaled_dot_product_attention(query, key, value, dropout_p=DROPOUT)),
            )
        )
    return found


def timed(run: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def peak_bytes(run: Callable[[], object]) -> int:
    """The peak of what `run` allocates."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = highest = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def making_flops() -> int:
    """Forward and backward of the products that make the virtual weights: 2 forward and 4 backward a multiply-add."""
    blocks = tuple(virtual.blocks(CONFIG).values())[:-1]
    return 6 * CONFIG.vocab_size * CONFIG.factor_size * sum(block.last - block.first for block in blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="of 128 tokens in a micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_default_device(given.device)
    torch.set_default_dtype(getattr(torch, given.dtype))
    torch.manual_seed(0)
    a, b = torch.randn(2, PRODUCT, PRODUCT).unbind()
    print(f"{given.device}, {given.dtype}, {given.threads} threads, {given.rows} x {SEQ_LEN} tokens, sharebert-small")
    for operation in operations(given.rows * SEQ_LEN):
        for run in (operation.ours, operation.plain):
            run()
        times = [
            (timed(operation.ours), timed(operation.plain), timed(lambda: torch.mm(a, b))) for _ in range(given.rounds)
        ]
        ours, plain, product = map(statistics.median, zip(*times, strict=True))
        ratio = statistics.median(plain / ours for ours, plain, _ in times)
        memory = peak_bytes(operation.ours), peak_bytes(operation.plain)
        print(
            f"{operation.name:24} {ours * 1e3:8.1f} ms, plain {plain * 1e3:8.1f} ms: {ratio:5.2f} x as fast; "
            f"peak {memory[0] / 2**20:7.1f} MiB, plain {memory[1] / 2**20:7.1f} MiB: "
            f"saves {(memory[1] - memory[0]) / 2**20:7.1f} MiB"
        )
        if operation.name == "virtual weights":
            rate = 2 * PRODUCT**3 / product
            floor = making_flops() / rate
            cost = statistics.median(ours / (making_flops() * p / (2 * PRODUCT**3)) for ours, _, p in times)
            print(
                f"    {making_flops() / 1e9:.1f} GFLOPs, {floor * 1e3:.1f} ms at {rate / 1e9:.0f} GFLOP/s: "
                f"they cost {cost:.2f} x their products (bar: 1.3)"
            )


if __name__ == "__main__":
    main()
