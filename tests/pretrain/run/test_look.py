"""A look into the model: singular values by NumPy, the likeliest words by hand, pictures, and no trace of it."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.run.draw import attention_image, curves_image
from pretrain.run.folder import RunFolder
from pretrain.run.look import Look, Looker, singular_values, virtual_singular_values
from pretrain.run.metric_log import MetricLog
from pretrain.train import Trainer
from sharebert import ShareBertConfig, ShareBertForMaskedLM, initialize

SENTENCES = ["word1 word2 [MASK] word4", "word7 [MASK]", "no mask", "[MASK] " * 200]


@pytest.fixture
def model() -> ShareBertForMaskedLM:
    config = ShareBertConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        factor_size=8,
        max_position_embeddings=32,
    )
    model = ShareBertForMaskedLM(config)
    initialize(model, "variance", 1)
    return model.eval()


def test_singular_values_are_numpys(model: ShareBertForMaskedLM) -> None:
    encoder = model.sharebert
    torch.nn.init.normal_(encoder.factor_linear_all.bias)
    e, w, b = (
        x.detach().numpy()
        for x in (encoder.word_embeddings.weight, encoder.factor_linear_all.weight, encoder.factor_linear_all.bias)
    )
    assert singular_values(torch.tensor(e)) == pytest.approx(np.linalg.svd(e, compute_uv=False), rel=1e-4)
    virtual = np.linalg.svd(e @ w.T + b, compute_uv=False)[: e.shape[1] + 1]
    ours = virtual_singular_values(*(torch.tensor(x) for x in (e, w, b)))
    assert ours == pytest.approx(virtual, rel=1e-3, abs=1e-5)


def test_words_are_the_likeliest_ones(model: ShareBertForMaskedLM, dataset: Path) -> None:
    looker = Looker(dataset / "tokenizer.json", SENTENCES)
    look = looker.look(3, model)
    rows = look.texts["samples/fill_mask"].splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| word1 word2 [MASK] word4", "| word7 [MASK]"]
    tokens = torch.tensor([[2, 5 + 7, 4, 3]])
    shares = model.logits(tokens).detach()[0, 2, : looker._words].softmax(-1)
    said = rows[1].split(" | ")[1].removesuffix(" |").split(", ")
    assert said[0] == f"word{int(shares.argmax()) - 5} {float(shares.max()):.2f}"
    assert len(said) == 5


def test_a_look_leaves_no_trace(model: ShareBertForMaskedLM, dataset: Path) -> None:
    looker = Looker(dataset / "tokenizer.json", SENTENCES)
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    looker.look(0, model)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_change_is_that_since_the_last_look(model: ShareBertForMaskedLM, dataset: Path) -> None:
    looker = Looker(dataset / "tokenizer.json", [])
    first = looker.look(0, model)
    assert "weights/change_E" not in first.scalars
    with torch.no_grad():
        model.sharebert.word_embeddings.weight[0, :2] += torch.tensor([3.0, 4.0])
    second = looker.look(5, model)
    assert second.scalars["weights/change_E"] == pytest.approx(5.0, rel=1e-5)
    assert second.scalars["weights/change_W_all"] == 0
    assert not second.texts


def test_pictures() -> None:
    probabilities = np.full((6, 3, 3), 1.0, np.float32)
    probabilities[0, 0, 2] = 0.0
    image = attention_image(probabilities)
    assert image.shape == (2 * 24, 4 * 24, 3)
    assert image[3, 15].tolist() == [255, 245, 225], "probability 0 is light"
    assert image[3, 3].tolist() == [0, 0, 0], "probability 1 is dark"
    curve = curves_image({"a": np.array([1.0, 0.1, 0.0]), "b": np.array([0.5])})
    assert curve.shape == (240, 360, 3)
    assert (curve == (31, 119, 180)).all(-1).sum() > 100


def test_tensorboard_shows_it(model: ShareBertForMaskedLM, dataset: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    log = MetricLog(run, enabled=True, steps=9)
    log.open(0, "a: 1\nb:\n  c: x\n")
    looker = Looker(dataset / "tokenizer.json", SENTENCES)
    log.event(0, "started")
    log.look(looker.look(0, model))
    log.line({"step": 2, "loss": 2.0, "step_s": 0.5, "rank_wait_s": 0.1, "lr": 1e-3, "tokens_per_s": 10.0})
    log.close()
    log = MetricLog(run, enabled=True, steps=9)
    log.open(2, "a: 1\n")
    log.event(2, "resumed from step 2")
    log.look(looker.look(4, model))
    log.close()
    board = EventAccumulator(str(run.tensorboard), size_guidance={"tensors": 0, "images": 0, "histograms": 0})
    board.Reload()
    assert [image.step for image in board.Images("samples/attention_last_layer")] == [0, 4]
    assert [event.step for event in board.Histograms("weights/virtual_matrix")] == [0, 4]
    (point,) = board.Scalars("wait/ranks")
    assert point.value == pytest.approx(0.2)
    assert board.Scalars("train/perplexity")[0].value == pytest.approx(np.exp(2.0))
    texts = [event.tensor_proto.string_val[0] for event in board.Tensors("events/text_summary")]
    assert texts == [b"started", b"resumed from step 2"]
    data = board.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert data.plugin_name == "hparams"
    assert b"b.c" in data.content
    assert "custom_scalars__config__" in board.Tags()["tensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_weights_that_cannot_be_shown_end_no_training(
    model: ShareBertForMaskedLM, dataset: Path, tmp_path: Path, value: float
) -> None:
    """It is said once, and the lines of the log go on."""
    with torch.no_grad():
        model.sharebert.word_embeddings.weight[:] = value
    log, trainer, said = MetricLog(RunFolder(tmp_path), enabled=True, steps=9), MagicMock(), []
    log.open(0, "")
    trainer.looker, trainer.metric_log, trainer._look_failed = Looker(dataset / "tokenizer.json", SENTENCES), log, False
    trainer.engine.module, trainer.report = model, said.append
    for step in (0, 4):
        Trainer.look(trainer, step)
        log.line({"step": step, "loss": 2.0, "step_s": 0.5, "lr": 1e-3, "tokens_per_s": 9.0})
    assert len(said) == 1
    assert said[0].startswith("step 0: no look into the model (")

    log.look(Look(step=6, histograms={"weights/E": np.full(5, value, np.float32)}))
    log.line({"step": 8, "loss": 1.0, "step_s": 0.5, "lr": 1e-3, "tokens_per_s": 9.0})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [0, 4, 8]
