"""A plan as text: all numbers of one, or one line for each of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from pretrain.plan.estimate import USABLE, Plan
from pretrain.plan.gpus import GPUS
from pretrain.plan.measure import Measured
from pretrain.plan.memory import Memory

PARTS = [field.name for field in fields(Memory)]


def describe(plan: Plan) -> str:
    """All numbers of a plan."""
    kind, counts = GPUS[plan.gpu], plan.parameters
    lines = [
        f"parameters       {counts['all']:,}: factors {counts['factors']:,}, layers {counts['layers']:,}, "
        f"head {counts['head']:,}",
        *_generated(counts["generated"]),
        f"tokens           {plan.tokens:,}" + ("" if plan.epochs is None else f", {plan.epochs:,.2f} epochs"),
        f"each of {plan.gpus} ranks  {plan.micro_batches} micro-batches of {plan.rows} rows a step, ZeRO {plan.stage}",
        f"FLOPs a token    {plan.flops_per_token / 1e6:,.1f} M",
        f"checkpoint       {size(plan.checkpoint_bytes)}",
        "",
        f"GiB on a GPU, {plan.rows} rows a micro-batch ({kind.title}: {kind.memory_bytes / 2**30:.0f} GiB)",
        "ZeRO " + "".join(f"{part:>12}" for part in (*PARTS, "total", "most rows")),
    ]
    for stage, held in plan.memory.items():
        cells = [f"{getattr(held, part) / 2**30:.2f}" for part in (*PARTS, "total")]
        lines.append(f"{stage:<5}" + "".join(f"{cell:>12}" for cell in (*cells, plan.largest_rows[stage])))
    lines += ["", "ZeRO  sent by a GPU in a step      time, if nothing overlaps"]
    for stage, sent in plan.network_bytes.items():
        lines.append(f"{stage:<5} {size(sent):>22} {plan.network_s[stage] * 1e3:>23,.1f} ms")
    lines += ["", f"{plan.gpus} x {kind.title}, at most {plan.roofline:.0%} of the peak by its memory's bandwidth"]
    for speed in plan.speeds:
        price = f", price {speed['price']:,.2f}" if "price" in speed else ""
        lines.append(
            f"at {speed['utilisation']:.0%} of the peak  {speed['tokens_per_s']:,.0f} tokens/s, "
            f"{speed['hours']:,.1f} hours{price}"
        )
    lines.append(f"most rows: the largest micro-batch that fits into {USABLE:.0%} of the memory")
    return "\n".join(lines)


def _generated(count: int) -> list[str]:
    return [f"generated        {count:,} weights, which all layers share, made from the factors"] if count else []


def compare(plans: Sequence[Plan]) -> str:
    """A line for each plan, at the middle one of the utilisations."""
    shown = plans[0].speeds[len(plans[0].speeds) // 2]["utilisation"]
    priced = "price" in plans[0].speeds[0]
    lines = [
        f"at {shown:.0%} of the peak, ZeRO {plans[0].stage}",
        f"{'GPU':<14}{'GPUs':>6}{'GiB':>8}{'of':>6}{'most rows':>11}{'tokens/s':>14}{'hours':>9}{'GPU-hours':>11}"
        f"{'network, ms':>13}" + (f"{'price':>12}" if priced else ""),
    ]
    for plan in plans:
        speed, kind = plan.speeds[len(plan.speeds) // 2], GPUS[plan.gpu]
        lines.append(
            f"{kind.title:<14}{plan.gpus:>6}{plan.memory[plan.stage].total / 2**30:>8.1f}"
            f"{kind.memory_bytes / 2**30:>6.0f}{plan.largest_rows[plan.stage]:>11}{speed['tokens_per_s']:>14,.0f}"
            f"{speed['hours']:>9,.1f}{speed['hours'] * plan.gpus:>11,.1f}{plan.network_s[plan.stage] * 1e3:>13,.1f}"
            + (f"{speed['price']:>12,.2f}" if priced else "")
        )
    return "\n".join(lines)


def beside(predicted: Memory, measured: Measured, flops_per_token: float) -> str:
    """What was measured on this machine, beside what was predicted for it."""
    ratio = predicted.total / measured.memory_bytes
    return "\n".join(
        [
            f"measured here ({measured.device}, 1 process, {measured.micro_batches} micro-batches a step)",
            f"memory           {size(measured.memory_bytes)}, predicted {size(predicted.total)} ({ratio:.2f} x)"
            + (f", and {size(measured.base_bytes)} of Python and libraries" if measured.base_bytes else ""),
            f"speed            {measured.step_s:.2f} s a step, {measured.tokens_per_s:,.0f} tokens/s, "
            f"{measured.tokens_per_s * flops_per_token / 1e12:.3f} TFLOP/s",
        ]
    )


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
