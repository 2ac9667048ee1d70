"""`sharebert evaluate`: models go one after the other through the same rows, settings, seeds and metrics."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch

from scoring.baselines import MAJORITY, TFIDF, Baseline, fit_majority, fit_tfidf
from scoring.data import TaskData, load_task
from scoring.encoders import Encoded, Encoder, open_encoder
from scoring.finetune import Classifier, Diverged, fine_tune, latency_ms
from scoring.metrics import measure
from scoring.recipe import EvaluateRecipe
from scoring.report import Board, Result, file_name, read_results, table, write_result
from sharebert_common.errors import BadInput
from sharebert_common.recipe import plain

BASELINES: dict[str, Callable[[TaskData], Baseline]] = {MAJORITY: fit_majority, TFIDF: fit_tfidf}
LOG_EVERY = 20  # steps between points of the loss's curve

Scores = dict[str, dict[str, float]]
"""Split → metric → value."""


def evaluate(recipe: EvaluateRecipe, models: Sequence[str], save: Path | None = None) -> str:
    """Fine-tune and score each of `models`; results are kept in `recipe.output`/task.

    Args:
        recipe: task, rows, settings.
        models: folders of encoders, `random:FOLDER`, `majority`, `tfidf`.
        save: keep the best of the fine-tuned classifiers of the one encoder among them as an export.

    Returns: the table of all results of the task, those of earlier calls with the same output among them.

    Raises BadInput or ShareBertError before the first fit where something given is wrong.
    """
    _refuse_missing_packages()
    if not models:
        raise BadInput("no model was given: an export, the folder of an encoder, random:FOLDER, majority or tfidf")
    device = _device(recipe.device)
    data = load_task(recipe.task, recipe.data)
    encoders = {spec: open_encoder(spec, recipe.finetune) for spec in models if spec not in BASELINES}
    if save is not None:
        _check_save(save, list(encoders))
    rows = {spec: _encode(encoder, data) for spec, encoder in encoders.items()}
    for encoder in encoders.values():
        encoder.build(data.task, 0)  # so that what is damaged is found before an hour is spent on another model
    folder = Path(recipe.output) / file_name(data.task.name)
    folder.mkdir(parents=True, exist_ok=True)
    read_results(folder)
    for spec in models:
        if spec in BASELINES:
            result = score_baseline(spec, data)
        else:
            scoring = _Scoring(recipe, data, encoders[spec], rows[spec], device, folder)
            result, best = scoring.run()
            if save is not None:
                encoders[spec].save(best.cpu(), data.task, table([result]), save)
        write_result(folder, result)
    return table(read_results(folder))


def score_baseline(name: str, data: TaskData) -> Result:
    """Fit a baseline, which has no chance in it, and score it."""
    start = time.perf_counter()
    fitted = BASELINES[name](data)
    fit_s = time.perf_counter() - start
    scores = {
        split: measure(data.task.metrics, fitted.predict(rows.texts), rows.labels)
        for split, rows in data.held_out.items()
    }
    return Result(
        task=data.task.name,
        model=name,
        scores=_by_metric([scores]),
        parameters=fitted.parameters,
        bytes=fitted.nbytes,
        latency_ms=latency_ms(fitted.predict, data.held_out[data.dev[0]].texts),
        device="cpu",
        threads=1,
        train_rows=len(data.train),
        fit_s=[fit_s],
        versions=_versions(),
    )


@dataclass(frozen=True)
class _Scoring:
    """One encoder on one task: a sweep over learning rates, then all seeds with the best."""

    recipe: EvaluateRecipe
    data: TaskData
    encoder: Encoder
    rows: dict[str, Encoded]
    """Tokenised splits, train among them."""
    device: torch.device
    folder: Path

    def run(self) -> tuple[Result, Classifier]:
        """The result, and the classifier of the seed that is best on dev.

        Raises Diverged where the loss of a seed, or with all learning rates, is not finite.
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
        tried.clear()  # the other classifiers' memory
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
            scores=_by_metric(scores),
            parameters=best.parameters,
            bytes=best.nbytes,
            latency_ms=latency_ms(best.predict, self.data.held_out[self.data.dev[0]].texts),
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            train_rows=len(self.data.train),
            fit_s=fit_s,
            seeds=self.recipe.seeds,
            lr=lr,
            sweep=sweep if len(sweep) > 1 else {},
            settings=plain(self.recipe.finetune),
            versions=_versions(),
        )
        return result, best

    def fit(self, lr: float, seed: int) -> tuple[Classifier, Scores, float]:
        """One fine-tuning: its classifier, scores at the end, and seconds."""
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
            )
        finally:
            board.close()
        return classifier, scores, time.perf_counter() - start

    def score(self, classifier: Classifier) -> Scores:
        """All held-out splits."""
        return {
            split: measure(self.data.task.metrics, classifier.predict_encoded(self.rows[split]), rows.labels)
            for split, rows in self.data.held_out.items()
        }

    def headline(self, scores: Scores) -> float:
        """What a sweep goes by: the mean of all metrics on the dev splits."""
        return mean(value for split in self.data.dev for value in scores[split].values())


def _encode(encoder: Encoder, data: TaskData) -> dict[str, Encoded]:
    splits = {"train": data.train, **data.held_out}
    return {name: encoder.encode(split.texts, split.where) for name, split in splits.items()}


def _by_metric(scores: Sequence[Scores]) -> dict[str, dict[str, list[float]]]:
    return {split: {metric: [s[split][metric] for s in scores] for metric in scores[0][split]} for split in scores[0]}


def _check_save(save: Path, encoders: Sequence[str]) -> None:
    if len(encoders) != 1:
        raise BadInput(f"--save: keeps the classifier of one encoder, and {len(encoders)} were given")
    if save.exists() and not (save.is_dir() and not any(save.iterdir())):
        raise BadInput(f"--save: {save}: exists; choose another folder, or remove it first")


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadInput("device: no CUDA device here; use device=cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _refuse_missing_packages() -> None:
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise BadInput(f"evaluate needs {error.name}: pip install 'sharebert[evaluate]'") from error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "scikit-learn", "scipy")}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
