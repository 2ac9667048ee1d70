"""Quantisation-aware fine-tuning: scores are those of the export that `quantise` makes of the saved classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compress_models import tiny_export
from hub_folders import hub_folder

from compress.as_is import model_of
from compress.quantise.step import Quantise
from compress.step import Source
from exports.fake_quantise import QuantiseRecipe
from exports.packed import is_matrix
from exports.rounding import to_nearest
from scoring.encoders import open_encoder
from scoring.recipe import EvaluateRecipe, FineTuneRecipe
from scoring.score import evaluate
from scoring.tasks import Task
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

KEYS = {"bits": 2, "small_bits": 4, "group": 4}
TASK = Task("mine", text=("text",), label="label", labels=("bad", "good"))
GIVEN = {"input_ids": torch.randint(5, 250, (6, 9), generator=torch.Generator().manual_seed(0))}


def test_outputs_and_gradients_are_those_of_rounded_matrices(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source")
    recipe = QuantiseRecipe(**KEYS)
    rounded = open_encoder(str(source), FineTuneRecipe(quantise=recipe)).build(TASK, 1).eval()
    plain = open_encoder(str(source), FineTuneRecipe()).build(TASK, 1).eval()
    assert rounded.state_dict().keys() == plain.state_dict().keys()
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    unrounded = plain(**GIVEN).logits
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if is_matrix(name):
                packing = recipe.packing_of(name, parameter.shape)
                parameter.copy_(to_nearest(parameter, packing).values(packing))
    ours, theirs = rounded(**GIVEN, labels=labels), plain(**GIVEN, labels=labels)
    torch.testing.assert_close(ours.logits, theirs.logits)
    assert not torch.allclose(ours.logits, unrounded, atol=1e-3)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in rounded.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_saved_classifier_quantises_to_what_was_scored(tmp_path: Path) -> None:
    """The logits of the fine-tuned model are those of its packed export, whose vectors are in 16 bits."""
    source, data = tiny_export(tmp_path / "source"), tmp_path / "task"
    data.mkdir()
    for split in ("train", "dev"):
        (data / f"{split}.tsv").write_text("text\tlabel\n" + "w17 w18\tgood\nw19 w20\tbad\n" * 8)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"task: mine\ndata: {{path: {data}, text: text, label: label}}\nseeds: [1]\noutput: {tmp_path / 'scores'}\n"
        f"finetune: {{epochs: 3, batch: 4, lr: 1e-3, max_length: 8, quantise: {KEYS}}}\n"
    )
    evaluate(load(EvaluateRecipe, file), [str(source)], save=tmp_path / "saved")
    out = tmp_path / "packed"
    Quantise(**KEYS, rounding="nearest").apply(Source(tmp_path / "saved", "compact"), None, out)  # type: ignore[arg-type]
    encoder = open_encoder(str(source), FineTuneRecipe(quantise=QuantiseRecipe(**KEYS)))
    trained = encoder.build(TASK, 1)
    trained.load_state_dict(model_of(tmp_path / "saved", "compact").state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            model_of(out, "compact")(**GIVEN).logits, trained.eval()(**GIVEN).logits, rtol=1e-2, atol=1e-2
        )


def test_other_models_are_refused(tmp_path: Path) -> None:
    recipe = load(EvaluateRecipe, None, ["task=sst2", "finetune.quantise.bits=4"])
    assert recipe.finetune.quantise == QuantiseRecipe(bits=4)
    with pytest.raises(BadInput, match=r"finetune\.quantise: is for ShareBERT exports"):
        open_encoder(str(hub_folder(tmp_path / "bert", "")), recipe.finetune)
