"""What TensorBoard's looks into the model cost, as a share of the steps between two of them.

    python -m benchmarks.dashboard [RECIPE ...]            default: the demo and sharebert-small

For each recipe: the seconds of a step (measured in a process of its own), those of a look with its event file, and the
share at the recipe's `validate.every`. Between validations a run does nothing for the looks.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from pretrain.model import build_model
from pretrain.plan.estimate import PLAN_DEFAULTS
from pretrain.plan.measure import measure
from pretrain.recipe import TrainRecipe
from pretrain.run.event_file import EventFile
from pretrain.run.look import Looker
from sharebert_common.recipe import load

SIZES_OF_DATA = {"demo": ["model.vocab_size=4096", "model.max_position_embeddings=32"]}
"""What a dataset would give: here those of the demo. For other recipes 30,528 words."""

REPEATS = 5
MOST_ROWS = 32
"""Of the measured micro-batch; a step takes as many as it needs, one after another."""


def main(recipes: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    for name in recipes:
        recipe = load(TrainRecipe, name, SIZES_OF_DATA.get(name, ["model.vocab_size=30528"]), defaults=PLAN_DEFAULTS)
        training = recipe.resolve(1, needs_data=False)
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = [*special, *(f"w{number}" for number in range(training.model.config.vocab_size - len(special)))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(special)
        rows = min(training.micro_rows, MOST_ROWS)
        step = measure(recipe, micro_batches=1, micro_rows=rows)
        step_s = step.step_s * recipe.data.global_batch / rows
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(f"{folder}/tokenizer.json")
            looker = Looker(Path(folder) / "tokenizer.json", recipe.monitor.sentences)
            events = EventFile(Path(folder) / "tensorboard", 0, "a: 1\n")
            model = build_model(training.model, 0).eval()
            times = []
            for number in range(REPEATS + 1):
                started = time.perf_counter()
                events.looks.append(looker.look(number, model))
                events.write()
                times.append(time.perf_counter() - started)
            events.close()
        look_s = statistics.median(times[1:])
        share = look_s / (look_s + step_s * recipe.validate.every)
        print(
            f"{name}: a step {step_s:.3f} s (from {rows} rows), a look {look_s:.3f} s: "
            f"{share:.3%} of {recipe.validate.every} steps, {torch.get_num_threads()} threads"
        )


if __name__ == "__main__":
    main(sys.argv[1:] or ["demo", "sharebert-small"])
