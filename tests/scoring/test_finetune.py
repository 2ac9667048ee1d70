"""The parts of fine-tuning: batches by length, the schedule, seeds, weights, settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made_tasks import rows, tiny_export

from scoring.data import Split, TaskData
from scoring.encoders import Encoder, open_encoder
from scoring.finetune import WINDOW, Classifier, Diverged, batches_by_length, fine_tune
from scoring.recipe import FineTuneRecipe
from scoring.tasks import TASKS

CPU = torch.device("cpu")


def made(count: int, seed: int) -> Split:
    texts, labels = zip(*rows(count, seed), strict=True)
    return Split("made", [(text,) for text in texts], np.array(labels))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("finetune") / "export")


def tuned(
    encoder: Encoder, settings: FineTuneRecipe, train: Split, lr: float = 1e-2
) -> tuple[Classifier, list[dict[str, float]]]:
    seen: list[dict[str, float]] = []
    data = TaskData(TASKS["sst2"], train, {})
    classifier = fine_tune(
        encoder, data, encoder.encode(train.texts, "train"), lr=lr, seed=1, settings=settings, device=CPU,
        watch=lambda step, values: seen.append(values), at_epoch=lambda *_: None,
    )  # fmt: skip
    return classifier, seen


def test_batches_hold_every_row_once_and_rows_of_like_length() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 100, 4 * WINDOW * 8 + 5).tolist()
    batches = list(batches_by_length(lengths, 8, np.random.default_rng(1)))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == 4 * WINDOW + 1
    padding = sum(len(b) * max(lengths[row] for row in b) for b in batches) / sum(lengths)
    assert padding < 1.05  # 1.9 for batches drawn without regard to length
    assert batches != list(batches_by_length(lengths, 8, np.random.default_rng(2)))
    assert batches == list(batches_by_length(lengths, 8, np.random.default_rng(1)))


def test_the_schedule_of_the_authors(export: Path) -> None:
    settings = FineTuneRecipe(epochs=3, batch=8)
    _, seen = tuned(open_encoder(str(export), settings), settings, made(640, 0), lr=1e-3)
    rates = [values["lr"] for values in seen]
    assert len(rates) == 240
    assert rates[:3] == pytest.approx([0, 1e-3 / 50, 2e-3 / 50])
    assert rates[50] == pytest.approx(1e-3)
    assert rates[145] == pytest.approx(0.5e-3)
    assert 0 < rates[-1] < 1e-5


def test_padding_changes_no_prediction(export: Path) -> None:
    settings = FineTuneRecipe()
    encoder = open_encoder(str(export), settings)
    model = encoder.build(TASKS["sst2"], 0)
    texts = made(40, 3).texts
    together = Classifier(encoder, model, CPU, regression=True).predict(texts)
    alone = [Classifier(encoder, model, CPU, regression=True).predict([text])[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_same_seed_gives_the_same_classifier(export: Path) -> None:
    settings = FineTuneRecipe(epochs=1, batch=16, dropout=0.1)
    runs = [tuned(open_encoder(str(export), settings), settings, made(64, 0)) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    for a, b in zip(runs[0][0].model.parameters(), runs[1][0].model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_are_loaded_or_new(export: Path) -> None:
    settings = FineTuneRecipe()
    loaded = open_encoder(str(export), settings)
    fresh = open_encoder(f"random:{export}", settings)
    name = "sharebert.word_embeddings.weight"

    def built(encoder: Encoder, seed: int) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in encoder.build(TASKS["sst2"], seed).state_dict().items()}

    assert torch.equal(built(loaded, 1)[name], built(loaded, 2)[name])
    assert not torch.equal(built(loaded, 1)["classifier.weight"], built(loaded, 2)["classifier.weight"])
    assert torch.equal(built(fresh, 1)[name], built(fresh, 1)[name])
    assert not torch.equal(built(fresh, 1)[name], built(fresh, 2)[name])
    assert not torch.equal(built(fresh, 1)[name], built(loaded, 1)[name])


def test_settings_reach_the_model(export: Path) -> None:
    settings = FineTuneRecipe(dropout=0.3, pooling="mean")
    model = open_encoder(str(export), settings).build(TASKS["sst2"], 0)
    assert model.dropout.p == 0.3
    assert model.sharebert.config.attention_probs_dropout_prob == 0.3
    assert model.config.classifier_pooling == "mean"


def test_a_loss_that_is_not_finite_ends_it(export: Path) -> None:
    settings = FineTuneRecipe(epochs=1, batch=8, clip=0)
    with pytest.raises(Diverged, match=r"export, seed 1: the loss is (nan|inf) at step \d+; lower lr \(1e\+30\)"):
        tuned(open_encoder(str(export), settings), settings, made(64, 0), lr=1e30)
