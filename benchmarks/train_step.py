"""A training step of this project against BERT's, and against the cost of its matrix products alone.

    python -m benchmarks.train_step [--batch 4] [--steps 5] [--threads 2]

Three measurements. A product of two 2048 x 2048 matrices follows each step, so that a ratio compares times from the
same seconds; every number is a median over the steps:

    ours      sharebert-small through the real DeepSpeed engine: forward, backward, clip, AdamW; dropout 0.1
    bert      BertForMaskedLM of transformers with the same sizes, a bare loop with fused AdamW; dropout 0.1
    overhead  ours and a bare loop over the same model, in turn: the time that the engine adds

All run in float32 on the CPU, on the same tokens, each in its own process, so that the peak memory is its own. The
model FLOPs are those of `pretrain.flops.flops_per_token`; a product of 2048 x 2048 matrices counts 2 · 2048³. BERT does
more FLOPs for each token: its head computes logits at every position.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from sharebert_common.processes import peak_memory_bytes

SEQ_LEN = 128
VOCAB_SIZE = 30_528
MASK_RATE = 0.15
PRODUCT = 2048
SIZES = {"hidden_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 16, "intermediate_size": 4096}
LEARNING_RATE = 1e-4
BARS = {4: "bars: 1.3 x BERT's tokens/s, 0.35 x its memory", 16: "bar: 85 % of the product rate"}

Step = Callable[[], Any]


def timed(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def product() -> Step:
    """A product of two PRODUCT x PRODUCT matrices."""
    import torch

    a, b = torch.randn(2, PRODUCT, PRODUCT).unbind()
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def batch_of(rows: int) -> dict[str, Any]:
    """Made-up tokens, and the positions to predict."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, VOCAB_SIZE, (rows, SEQ_LEN), generator=generator)
    columns = torch.rand(rows, SEQ_LEN, generator=generator).argsort(1)[:, : round(MASK_RATE * SEQ_LEN)]
    positions = (columns + SEQ_LEN * torch.arange(rows)[:, None]).flatten()
    labels = tokens.flatten()[positions].clone()
    tokens.view(-1)[positions] = 103
    return {"tokens": tokens, "positions": positions, "labels": labels, "loss_weights": torch.ones(len(labels))}


def sharebert() -> Any:
    """sharebert-small in training."""
    import torch

    from sharebert import SIZES as NAMED
    from sharebert import ShareBertConfig, ShareBertForMaskedLM, initialize

    torch.manual_seed(0)
    model = ShareBertForMaskedLM(ShareBertConfig(**NAMED["sharebert-small"]))
    initialize(model, "variance", 0)
    return model.train()


def engine_step(rows: int, stage: int) -> Step:
    """A step as `pretrain.train` makes it."""
    from pretrain import distributed
    from pretrain.engine.config import ZeroRecipe, deepspeed_config
    from pretrain.engine.engine import open_engine
    from pretrain.engine.optimizer import OptimizerRecipe

    distributed.join(timeout_s=60)
    model, recipe, batch = sharebert(), OptimizerRecipe(), batch_of(rows)
    config = deepspeed_config(
        zero=ZeroRecipe(stage=stage),
        precision="fp32",
        clip=recipe.clip,
        micro_batch=rows,
        micro_batches=1,
        parameters=sum(p.numel() for p in model.parameters()),
    )
    engine = open_engine(model, config, recipe)

    def step() -> None:
        engine.learning_rate = LEARNING_RATE
        loss_sum, _ = engine(**batch)
        engine.backward(loss_sum / len(batch["labels"]))
        engine.step()

    return step


def bare_step(rows: int) -> Step:
    """The same without DeepSpeed."""
    import torch

    from pretrain.engine.optimizer import OptimizerRecipe, optimizer_groups

    model, recipe, batch = sharebert(), OptimizerRecipe(), batch_of(rows)
    groups = optimizer_groups(model, recipe.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=recipe.betas, eps=recipe.eps, fused=True)

    def step() -> None:
        loss_sum, _ = model(**batch)
        (loss_sum / len(batch["labels"])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        adamw.step()
        adamw.zero_grad()

    return step


def bert_step(rows: int) -> Step:
    """`BertForMaskedLM` of the same sizes."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=SEQ_LEN, **SIZES)
    model, batch = BertForMaskedLM(config).train(), batch_of(rows)
    labels = torch.full_like(batch["tokens"], -100)
    labels.view(-1)[batch["positions"]] = batch["labels"]
    adamw = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> None:
        model(input_ids=batch["tokens"], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.step()
        adamw.zero_grad()

    return step


def measure(what: str, rows: int, steps: int, threads: int, stage: int) -> dict[str, Any]:
    """Times of `steps` steps in seconds, each list with one entry a step, after one to warm up."""
    import torch

    torch.set_num_threads(threads)
    run: dict[str, Step] = {
        "ours": lambda: {"step": engine_step(rows, stage)},
        "bert": lambda: {"step": bert_step(rows)},
        "overhead": lambda: {"step": engine_step(rows, stage), "bare": bare_step(rows)},
    }[what]()
    run["product"] = product()
    times: dict[str, list[float]] = {name: [] for name in run}
    for n in range(steps + 1):
        for name, step in run.items():
            seconds = min(timed(step) for _ in range(3)) if name == "product" else timed(step)
            if n:
                times[name].append(seconds)
    return {"times": times, "peak_memory_bytes": peak_memory_bytes()}


def in_own_process(what: str, given: argparse.Namespace) -> dict[str, Any]:
    numbers = (f"--{name}={getattr(given, name)}" for name in ("batch", "steps", "threads", "stage"))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", "--only", what, *numbers],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(given.threads)},
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def report(given: argparse.Namespace) -> None:
    from pretrain.flops import flops_per_token
    from sharebert import SIZES as NAMED
    from sharebert import ShareBertConfig

    tokens = given.batch * SEQ_LEN
    per_token = flops_per_token(ShareBertConfig(**NAMED["sharebert-small"]), SEQ_LEN, MASK_RATE, tokens)
    wanted = given.what.split(",")
    print(f"sharebert-small, float32, {given.threads} threads, batch {given.batch} x {SEQ_LEN}, ZeRO {given.stage}")
    speeds: dict[str, float] = {}
    per_product: dict[str, float] = {}
    memory: dict[str, int] = {}
    for what in wanted:
        found = in_own_process(what, given)
        times, memory[what] = found["times"], found["peak_memory_bytes"]
        rates = [2 * PRODUCT**3 / seconds for seconds in times["product"]]
        print(f"{what:9} products {statistics.median(rates) / 1e9:6.1f} GFLOP/s", end="   ")
        if what == "overhead":
            added = statistics.median(e / b for e, b in zip(times["step"], times["bare"], strict=True)) - 1
            print(f"the engine adds {added:+.1%} to a bare loop (bar: 3 %)")
            continue
        speeds[what] = tokens / statistics.median(times["step"])
        pairs = list(zip(times["step"], rates, strict=True))
        per_product[what] = statistics.median(tokens / seconds / rate for seconds, rate in pairs)
        print(f"{speeds[what]:6.1f} tokens/s, peak memory {memory[what] / 1e9:.2f} GB", end="")
        if what == "ours":
            print(
                f", {per_product[what] * per_token:.1%} of the product rate ({per_token / 1e9:.3f} GFLOPs a token)",
                end="",
            )
        print(flush=True)
    if {"ours", "bert"} <= set(wanted):
        print(f"ours : bert   {speeds['ours'] / speeds['bert']:.2f} x the tokens/s", end=" ")
        print(f"({per_product['ours'] / per_product['bert']:.2f} x at one product rate)", end=", ")
        print(f"{memory['ours'] / memory['bert']:.2f} x the peak memory", end="   ")
    print(BARS.get(given.batch, ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="rows of 128 tokens (4 and 16 have bars)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stage", type=int, default=0, help="ZeRO stage of ours; one rank has nothing to share out")
    parser.add_argument("--what", default="ours,bert,overhead", help="which of them, with commas between")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given.batch, given.steps, given.threads, given.stage)))
    else:
        report(given)


if __name__ == "__main__":
    main()
