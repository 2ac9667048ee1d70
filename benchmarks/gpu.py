"""All measurements of speed that need a GPU, in one command.

    python -m benchmarks.gpu [--rows 64] [--steps 20] [--sizes sharebert-small,sharebert-base,sharebert-large]

Prints, in this order:

    tests      the tests marked gpu, and those of the Triton kernels and of the model's parity, on the device
    kernels    the time of each kernel, its bytes by `pretrain.plan.tables.traffic`, its share of the bandwidth
    products   the products of the virtual weights: 138 and 275 columns wide as they are, and padded to 144 and 280
    attention  attention within documents by FlexAttention, and by SDPA with a mask; forward and backward
    steps      a step of each size, bf16 autocast, dropout 0.1, a bare loop with fused AdamW: tokens/s, share of the
               peak (MFU), peak memory; with this project's kernels, and with torch.compile
    forms      `benchmarks.kernels --device cuda --dtype bfloat16`

Times are medians; each measurement waits for the device. `--device cpu` only shows that the command works.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.plan.gpus import Gpu, gpu_of_device

ROOT = Path(__file__).parents[1]

SEQ_LEN, MASK_RATE = 128, 0.15


def measured(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds of `run`, after two to warm up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for n in range(repeats + 2):
        wait()
        started = time.perf_counter()
        run()
        wait()
        if n >= 2:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def known_gpu(device: str) -> Gpu | None:
    """The data sheet of this device."""
    return gpu_of_device(torch.cuda.get_device_name()) if device == "cuda" else None


def share(value: float, whole: float | None) -> str:
    return "no data sheet known" if whole is None else f"{value / whole:.0%} of the data sheet's"


def tests() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    subprocess.run(command, cwd=ROOT, check=False)
    files = ("test_kernels_triton.py", "test_equations.py", "test_within_documents.py")
    paths = ["tests/exports/test_authors.py", *(f"tests/sharebert/{file}" for file in files)]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *paths], cwd=ROOT, check=False)


def kernels(rows: int, device: str, repeats: int) -> None:
    """Forward and backward of each operation of `sharebert.kernels` on this device, in bf16."""
    from pretrain.plan.tables import traffic
    from sharebert import SIZES, ShareBertConfig
    from sharebert.kernels import add_dropout_norm, attention, chunk_cross_entropy, triton_for

    config = ShareBertConfig.from_dict(SIZES["sharebert-small"])
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    tokens, masked = rows * SEQ_LEN, rows * round(MASK_RATE * SEQ_LEN)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_()

    norm = [made(tokens, hidden), made(tokens, hidden), made(hidden), made(hidden)]
    product, bias = made(tokens, inner), made(inner)
    parts = [made(rows, heads, SEQ_LEN, hidden // heads) for _ in range(3)]
    fused = triton_for(product)
    gelu = (lambda: [fused.bias_gelu(product, bias)]) if fused else lambda: [torch.nn.functional.gelu(product + bias)]
    cases: dict[str, tuple[Callable[[], Any], list[torch.Tensor]]] = {
        "dropout + add + LayerNorm": (lambda: add_dropout_norm(*norm, 1e-5, 0.1), norm),
        "bias + GELU": (gelu, [product, bias]),
        "attention": (lambda: [attention(*parts, None, 0.1, 0.1)], parts),
    }
    times: dict[str, float] = {}
    for name, (forward, inputs) in cases.items():
        outputs = forward()
        gradients = [torch.randn_like(x) for x in outputs]
        times[f"{name}, forward"] = measured(forward, device, repeats)
        times[f"{name}, backward"] = measured(
            lambda outputs=outputs, inputs=inputs, gradients=gradients: torch.autograd.grad(
                outputs, inputs, gradients, retain_graph=True, allow_unused=True
            ),
            device,
            repeats,
        )
    logits = made(masked, config.vocab_size).detach()
    labels, weights = torch.zeros(masked, dtype=torch.int64, device=device), torch.ones(masked, device=device)
    rows_of_logits = fused.chunk_cross_entropy if fused else chunk_cross_entropy
    times["cross-entropy and its gradient"] = measured(
        lambda: rows_of_logits(logits, None, labels, weights, True), device, repeats
    )
    gpu = known_gpu(device)
    for name, seconds in times.items():
        moved = traffic(config, MASK_RATE, SEQ_LEN)[name][0] * tokens
        reached = share(moved / seconds, gpu.bandwidth if gpu else None)
        print(f"{name:38} {seconds * 1e6:9.0f} µs, {moved / seconds / 1e9:6.0f} GB/s, {reached}")


def products(device: str, repeats: int) -> None:
    """The product of E [V, F] and columns of W_all, and the two of its gradients: as they are cut, and padded."""
    for factor in (128, 384, 768):
        for width, padded in ((138, 144), (275, 280)):
            seconds = []
            for columns in (width, padded):
                e = torch.randn(30_528, factor, device=device, dtype=torch.bfloat16)
                w = torch.randn(columns, factor, device=device, dtype=torch.bfloat16)
                g = torch.randn(30_528, columns, device=device, dtype=torch.bfloat16)
                seconds.append(measured(lambda e=e, w=w, g=g: (e @ w.t(), g @ w, g.t() @ e), device, repeats))
            flops = 6 * 30_528 * factor * width
            print(
                f"F {factor}, {width} columns: {seconds[0] * 1e6:.0f} µs, {flops / seconds[0] / 1e12:.1f} TFLOP/s; "
                f"{padded} columns: {seconds[1] * 1e6:.0f} µs"
            )


def documents(rows: int, device: str, repeats: int) -> None:
    """Attention of 16 heads of 128 in rows of 128 and 512 tokens, four documents a row."""
    from sharebert.kernels_flex import attention_within, document_mask

    for length in (128, 512):
        shape = (max(1, rows * 128 // length), 16, length, 128)
        trains = device == "cuda"  # FlexAttention has no backward on a CPU
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_(trains) for _ in range(3))
        document_ids = (torch.arange(length, device=device) * 4 // length).expand(shape[0], -1).contiguous()
        dense = document_ids[:, None, :, None] == document_ids[:, None, None, :]

        def flex(document_ids: torch.Tensor = document_ids, q: Any = q, k: Any = k, v: Any = v) -> torch.Tensor:
            return attention_within(q, k, v, document_mask(document_ids), 0.1)

        def sdpa(dense: torch.Tensor = dense, q: Any = q, k: Any = k, v: Any = v) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=0.1)

        for name, run in (("FlexAttention, with its mask", flex), ("SDPA with a mask", sdpa)):
            both = (lambda run=run: run().sum().backward()) if trains else run
            print(f"{length} tokens a row, {name:30} {measured(both, device, repeats) * 1e6:9.0f} µs")


def step(size: str, rows: int, device: str, steps: int, compiled: bool) -> None:
    from pretrain.engine.optimizer import OptimizerRecipe, optimizer_groups
    from pretrain.flops import flops_per_token
    from sharebert import SIZES, ShareBertConfig, ShareBertForMaskedLM, initialize

    torch.manual_seed(0)
    config = ShareBertConfig.from_dict(SIZES[size])
    model = ShareBertForMaskedLM(config).to(device).train()
    initialize(model, "variance", 0)
    run_model = torch.compile(model, dynamic=False) if compiled else model
    adamw = torch.optim.AdamW(optimizer_groups(model, OptimizerRecipe().weight_decay), lr=1e-4, fused=True)
    tokens = torch.randint(1000, config.vocab_size, (rows, SEQ_LEN), device=device)
    positions = torch.arange(0, rows * SEQ_LEN, device=device)[:: round(1 / MASK_RATE)]
    labels, weights = tokens.flatten()[positions], torch.ones(len(positions), device=device)

    def one() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss_sum = run_model(tokens, positions=positions, labels=labels, loss_weights=weights).loss_sum
        (loss_sum / len(positions)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.step()
        adamw.zero_grad()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rate = rows * SEQ_LEN / measured(one, device, steps)
    flops = rate * flops_per_token(config, SEQ_LEN, MASK_RATE, rows * SEQ_LEN)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    how = "torch.compile" if compiled else "kernels of this project"
    peak = share(flops, gpu.peak_flops if (gpu := known_gpu(device)) else None)
    print(f"{size}, {how}: {rate:,.0f} tokens/s, {flops / 1e12:.1f} TFLOP/s, {peak}, peak {memory:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="of 128 tokens in a micro-batch")
    parser.add_argument("--steps", type=int, default=20, help="repetitions of each measurement")
    parser.add_argument("--sizes", default="sharebert-small,sharebert-base,sharebert-large")
    parser.add_argument("--only", default="tests,kernels,products,attention,steps,forms", help="with commas between")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA device here; --device cpu shows that the command works")
    wanted = given.only.split(",")
    print(torch.cuda.get_device_name() if given.device == "cuda" else "cpu", "torch", torch.__version__)
    if "tests" in wanted:
        tests()
    if "kernels" in wanted:
        kernels(given.rows, given.device, given.steps)
    if "products" in wanted:
        products(given.device, given.steps)
    if "attention" in wanted:
        documents(given.rows, given.device, given.steps)
    if "steps" in wanted:
        for size in given.sizes.split(","):
            for compiled in (False, True):
                step(size, given.rows, given.device, given.steps, compiled)
    if "forms" in wanted:
        options = ["--device", given.device, "--dtype", "bfloat16", "--rows", str(given.rows)]
        subprocess.run([sys.executable, "-m", "benchmarks.kernels", *options], cwd=ROOT, check=False)


if __name__ == "__main__":
    main()
