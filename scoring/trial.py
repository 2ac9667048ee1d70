"""An encoder on a task: a sweep over learning rates with the first seed, then all seeds with the best rate."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from scoring.classifier import Classifier
from scoring.data import TaskData
from scoring.distill.teacher import TaskTeacher
from scoring.encoders import Encoded, Encoder
from scoring.finetune import Diverged, fine_tune, latency_ms
from scoring.metrics import measure
from scoring.recipe import EvaluateRecipe
from scoring.report import Board, Result, Scores, by_metric, versions
from sharebert_common.recipe import plain

LOG_EVERY = 20
"""Steps between two points of the loss curve."""


@dataclass(frozen=True)
class Trial:
    """All fine-tunings of one encoder on one task."""

    recipe: EvaluateRecipe
    data: TaskData
    encoder: Encoder
    rows: dict[str, Encoded]
    """The tokenised splits, with train."""
    device: torch.device
    folder: Path
    teacher: TaskTeacher | None = None

    def run(self) -> tuple[Result, Classifier]:
        """The result, and the classifier of the seed that is best on dev.

        Raises Diverged: the loss of a seed is not finite, or the loss is not finite with any learning rate.
        """
        first, *others = self.recipe.seeds
        tried: dict[float, tuple[Classifier, Scores, float]] = {}
        sweep: dict[str, float | None] = {}
        for lr in self.recipe.finetune.lr:
            try:
                tried[lr] = self.fit(lr, first)
                sweep[f"{lr:g}"] = self.headline(tried[lr][1])
            except Diverged as error:
                if len(self.recipe.finetune.lr) == 1:
                    raise
                sweep[f"{lr:g}"] = None
                _say(str(error))
        if not tried:
            raise Diverged(f"{self.encoder.spec}: the loss was not finite with any learning rate; lower finetune.lr")
        lr = max(tried, key=lambda lr: self.headline(tried[lr][1]))
        best, first_scores, first_s = tried[lr]
        tried.clear()  # frees the memory of the other classifiers
        scores, fit_s = [first_scores], [first_s]
        for seed in others:
            classifier, found, seconds = self.fit(lr, seed)
            if self.headline(found) > max(map(self.headline, scores)):
                best = classifier
            scores.append(found)
            fit_s.append(seconds)
        result = Result(
            task=self.data.task.name,
            model=self.encoder.spec,
            scores=by_metric(scores),
            parameters=best.parameters,
            trained_parameters=best.trained,
            bytes=best.nbytes,
            latency_ms=latency_ms(best.predict, self.data.held_out[self.data.dev[0]].texts),
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            train_rows=len(self.data.train),
            fit_s=fit_s,
            seeds=self.recipe.seeds,
            lr=lr,
            sweep=sweep if len(sweep) > 1 else {},
            settings=self.settings(),
            versions=versions(),
            skipped_rows=self.data.skipped,
        )
        return result, best

    def fit(self, lr: float, seed: int) -> tuple[Classifier, Scores, float]:
        """One fine-tuning: the classifier, its scores after the last epoch, and seconds."""
        start = time.perf_counter()
        board = Board(self.folder, self.encoder.spec, f"lr-{lr:g}-seed-{seed}")
        scores: Scores = {}

        def watch(step: int, values: dict[str, float]) -> None:
            if step % LOG_EVERY == 0:
                board.scalars(step, {f"train/{key}": value for key, value in values.items()})

        def at_epoch(epoch: int, step: int, classifier: Classifier) -> None:
            scores.update(self.score(classifier))
            flat = {f"{split}/{metric}": v for split, metrics in scores.items() for metric, v in metrics.items()}
            board.scalars(step, flat)
            _say(
                f"{self.data.task.name}  {self.encoder.spec}  lr {lr:g}  seed {seed}  "
                f"epoch {epoch}/{self.recipe.finetune.epochs}  "
                + "  ".join(f"{name} {value:.4f}" for name, value in flat.items())
                + f"  {time.perf_counter() - start:.0f} s"
            )

        try:
            classifier = fine_tune(
                self.encoder,
                self.data,
                self.rows["train"],
                lr=lr,
                seed=seed,
                settings=self.recipe.finetune,
                device=self.device,
                watch=watch,
                at_epoch=at_epoch,
                teacher=self.teacher,
            )
        finally:
            board.close()
        return classifier, scores, time.perf_counter() - start

    def settings(self) -> dict[str, Any]:
        """The keys of `finetune` that have an effect."""
        unused = self.encoder.unused_settings | (set() if self.teacher else {"distill"})
        unused |= {"lora"} if self.recipe.finetune.lora.rank is None else set()
        return {key: value for key, value in plain(self.recipe.finetune).items() if key not in unused}

    def score(self, classifier: Classifier) -> Scores:
        """The scores on all held-out splits."""
        return {
            split: measure(self.data.task.metrics, classifier.predict_encoded(self.rows[split]), rows.labels)
            for split, rows in self.data.held_out.items()
        }

    def headline(self, scores: Scores) -> float:
        """The number that a sweep compares: the mean of all metrics on the dev splits."""
        return mean(value for split in self.data.dev for value in scores[split].values())


def encode(encoder: Encoder, data: TaskData) -> dict[str, Encoded]:
    """All splits of a task, tokenised for `encoder`."""
    splits = {"train": data.train, **data.held_out}
    return {name: encoder.encode(split.texts, split.where) for name, split in splits.items()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
