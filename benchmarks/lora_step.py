"""CPU time of a step of fine-tuning with LoRA beside one that trains all weights, one thread.

    python -m benchmarks.lora_step EXPORT

Takes a compact export with `sharing: veps`. Prints a row for each way: trained parameters, and seconds of the processor
for a step with 64 random rows of 24 tokens, the least of 10 after two others.
"""

from __future__ import annotations

import sys
import time

import torch

from scoring.encoders import open_encoder
from scoring.lora import adapt
from scoring.recipe import FACTORS, GENERATED, FineTuneRecipe, LoraRecipe
from scoring.tasks import Task

TASK = Task("mine", text=(("text",),), labels=("bad", "good"))

WAYS = {
    "all weights": LoraRecipe(),
    "factors": LoraRecipe(rank=8, targets=[FACTORS]),
    "generated": LoraRecipe(rank=8, targets=[GENERATED]),
    "factors, dora": LoraRecipe(rank=8, targets=[FACTORS], kind="dora"),
}


def seconds(export: str, recipe: LoraRecipe) -> tuple[int, float]:
    """Trained parameters, and seconds of a step."""
    settings = FineTuneRecipe(lora=recipe)
    encoder = open_encoder(export, settings)
    model = encoder.build(TASK, 1).train()
    if recipe.rank is not None:
        adapt(encoder, model, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    words, labels = torch.randint(encoder.words, (64, 24)), torch.randint(2, (64,))
    times = []
    for _ in range(12):
        start = time.process_time()
        optimizer.zero_grad()
        model(input_ids=words, labels=labels).loss.backward()
        optimizer.step()
        times.append(time.process_time() - start)
    return sum(parameter.numel() for parameter in trained), min(times[2:])


def main() -> None:
    """Print the rows."""
    torch.set_num_threads(1)
    for name, recipe in WAYS.items():
        count, value = seconds(sys.argv[1], recipe)
        print(f"| {name} | {count:,} | {value:.3f} |")


if __name__ == "__main__":
    main()
