"""The step `prune_hidden` on fine-tuned classifiers: what their scores read is what counts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hidden_models import classifier_folder, dense_folder, lively, masked, pruned, rows_of, tools
from torch import Tensor

from compress.calibrate import Batch
from compress.prune.dense_parts import Kept, gradients, survey
from compress.prune.dense_slices import sliced
from compress.prune.directions import along, components, strongest
from compress.prune.hidden_step import PruneHidden, labels_of, sizes_of
from compress.prune.reconstruct import reconstruct
from compress.source import open_source
from exports.dense import read_dense
from exports.dense_model import DenseBert

TIGHT = {"rtol": 0.0, "atol": 1e-10}


def scores_of(model: DenseBert, tokens: Tensor, mask: Tensor) -> Tensor:
    assert model.classifier is not None
    return model.classifier(model.pooled(model.encode(tokens, mask)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["sp3", "magnitude"])
def test_at_full_rank_scores_are_those_of_the_classifier(tmp_path: Path, method: str) -> None:
    folder = classifier_folder(tmp_path / "classifier", labels=3)
    model = lively(folder)
    small = pruned(folder, model, hidden=24, method=method)
    tokens, mask = masked()
    with torch.no_grad():
        torch.testing.assert_close(scores_of(small, tokens, mask), scores_of(model, tokens, mask), **TIGHT)


def test_the_importance_in_a_classifier_is_that_for_its_scores(tmp_path: Path) -> None:
    """Of the last layer, nothing but the first position is read, by 16 pooled channels that the classifier reads."""
    folder = classifier_folder(tmp_path / "classifier")
    model, rows = lively(folder), rows_of(folder)
    assert model.classifier is not None
    model.classifier.weight[:, 16:] = 0
    channels = survey(model, rows).head_channels
    assert channels is not None
    pooled = torch.cat([model.pooled(model.encode(batch.tokens, batch.visible)) for batch in rows])
    expected = pooled.std(0, correction=0) * model.classifier.weight.norm(dim=0)
    torch.testing.assert_close(channels, expected, rtol=1e-6, atol=1e-12)
    assert channels[16:].eq(0).all()
    before = gradients(model, rows, 0, torch.zeros(24, 0)).heads
    model.classifier.weight.mul_(2)
    torch.testing.assert_close(gradients(model, rows, 0, torch.zeros(24, 0)).heads, 2 * before)
    model.classifier.weight.zero_()
    assert gradients(model, rows, 0, torch.zeros(24, 0)).heads.eq(0).all()


def test_the_sliced_classifier_is_the_masked_one(tmp_path: Path) -> None:
    """Of the pooled channels those stay that add most to the scores. The whole model is left as it is."""
    folder = classifier_folder(tmp_path / "classifier")
    model, config, rows = lively(folder), sizes_of(folder), rows_of(folder)
    assert model.classifier is not None
    channels = survey(model, rows).head_channels
    assert channels is not None
    stays = strongest(channels, 16)
    assert not stays.equal(strongest(model.bert.pooler.dense.weight.norm(dim=1), 16))
    every = [Kept(torch.tensor([0, 1]), torch.arange(40))] * config.num_hidden_layers
    directions = along(components(survey(model, rows).moments)[:, :15])
    small = sliced(model, config, directions, every, stays)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reconstruct(model, small, directions, every, stays, rows, lambda line: None)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    small = sliced(model, config, directions, every, stays)
    hidden = torch.randn(5, 1, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        last = model.bert.encoder.ln
        inside = ((hidden - last.bias) / last.weight) @ directions.down
        wide = inside @ directions.up * last.weight + last.bias
        gone = torch.ones(24, dtype=torch.bool)
        gone[stays] = False
        expected = model.pooled(wide).masked_fill(gone, 0) @ model.classifier.weight.t() + model.classifier.bias
        torch.testing.assert_close(small.classifier(small.pooled(inside)), expected, **TIGHT)  # type: ignore[misc]


def test_least_squares_fit_pooler_and_classifier(tmp_path: Path) -> None:
    """To the scores of the whole, given the stream of the smaller model as it is."""
    folder = classifier_folder(tmp_path / "classifier")
    model, rows = lively(folder), rows_of(folder, 400)
    small, fitted = (pruned(folder, model, 400, hidden=16, least_squares=fitted) for fitted in (False, True))
    head = {
        name: tensor for name, tensor in small.state_dict().items() if name.startswith(("classifier", "bert.pooler"))
    }
    plain = copy.deepcopy(fitted)
    plain.load_state_dict(head, strict=False)

    def error(found: DenseBert) -> float:
        both = ((scores_of(one, batch.tokens, batch.visible) for one in (found, model)) for batch in rows)
        return float(sum((own - whole).square().sum() for own, whole in both))

    with torch.no_grad():
        assert error(fitted) < 0.5 * error(plain)


def test_a_classifier_sees_its_rows_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No word is masked; the other forms have masked rows."""
    seen: list[Tensor] = []
    real = PruneHidden.pruned

    def watched(self: PruneHidden, model: Any, config: Any, sizes: Any, rows: list[Batch], tools: Any) -> Any:
        seen.append(torch.cat([batch.tokens for batch in rows]))
        return real(self, model, config, sizes, rows, tools)

    monkeypatch.setattr(PruneHidden, "pruned", watched)
    for name, folder in (("c", classifier_folder(tmp_path / "c")), ("m", dense_folder(tmp_path / "m"))):
        PruneHidden(hidden=16).apply(open_source(folder), tools(), tmp_path / f"{name}-out")
    assert seen[0].equal(tools().calibration())
    assert not seen[1].equal(tools().calibration())


def test_stock_transformers_loads_the_classifier(tmp_path: Path) -> None:
    from transformers import MegatronBertForSequenceClassification

    folder, (tokens, mask) = classifier_folder(tmp_path / "classifier"), masked()
    PruneHidden(hidden=16, columns=0.5).apply(open_source(folder), tools(), tmp_path / "out")
    stock = MegatronBertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    own = read_dense(tmp_path / "out", sizes_of(tmp_path / "out"), labels_of(tmp_path / "out"))
    with torch.no_grad():
        logits = stock(input_ids=tokens, attention_mask=mask).logits
        torch.testing.assert_close(logits, scores_of(own, tokens, mask), rtol=1e-4, atol=1e-5)
