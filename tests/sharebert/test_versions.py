"""Compact exports in the oldest and the newest transformers that they promise to load in, each in its own environment.

The environments take torch from the one that runs the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress_models import tiny_export
from tiny_models import tiny_model, tiny_tokenizer

from compress.prune.weights_step import PruneWeights
from compress.quantise.step import Quantise
from compress.step import Source
from exports.export import Export
from exports.forms import write_export
from exports.read import load_model

VERSIONS = {"oldest": "transformers==4.48.0", "first of 5": "transformers==5.0.0", "newest": "transformers"}

STEPS = {"packed": Quantise(bits=4), "sparse": PruneWeights(sparsity=0.5, method="magnitude")}

IN_THERE = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

folder, copy, kind = sys.argv[1:]
remote = {"trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
inputs = dict(tokenizer(["w1 w2 [MASK] w4", "w5"], padding=True, return_tensors="pt"))
expected = torch.load(Path(folder).parent / "expected.pt")

def load(head, place=folder):
    return getattr(transformers, f"AutoModel{head}").from_pretrained(place, **remote).eval()

model = load("ForMaskedLM")
torch.testing.assert_close(model(**inputs).logits, expected["logits"], rtol=1e-5, atol=1e-5)
output = load("")(**inputs, output_hidden_states=True)
torch.testing.assert_close(output.last_hidden_state, expected["hidden"], rtol=1e-5, atol=1e-5)
torch.testing.assert_close(output.pooler_output, expected["pooled"], rtol=1e-5, atol=1e-5)
assert len(output.hidden_states) == 3
for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
    classifier = load(f"For{head}")
    layer = classifier.qa_outputs if head == "QuestionAnswering" else classifier.classifier
    assert 0.01 < layer.weight.std() < 0.04 and not layer.bias.any()
    assert all(torch.isfinite(x).all() for x in classifier(**inputs).to_tuple())
assert load("ForMultipleChoice")(**{name: x[None] for name, x in inputs.items()}).logits.shape == (1, 2)
model.save_pretrained(copy)
torch.testing.assert_close(load("ForMaskedLM", copy)(**inputs).logits, expected["logits"], rtol=1e-5, atol=1e-5)
if kind in ("veps", "eps"):
    new = transformers.AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder, **remote), **remote)
    start = dict(new.named_parameters())
    assert not start["sharebert.layers.0.query_bias"].any() and (start["sharebert.final_norm.weight"] == 1).all()
    assert abs(start["sharebert.word_embeddings.weight"].std() - 0.02) < 0.002
model.gradient_checkpointing_enable()
model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
assert all(p.grad is not None for p in model.parameters())
print("as it should be", transformers.__version__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_export_loads(tmp_path: Path, version: str) -> None:
    venv.create(tmp_path / "environment", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "environment").glob("lib/python3*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(site), VERSIONS[version]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip install did not work: {done.stderr.strip().splitlines()[-1]}")
    for kind in ("veps", "eps", "packed", "sparse"):
        folder = tmp_path / kind
        folder.mkdir()
        if kind in STEPS:
            source = Source(tiny_export(folder / "source"), "compact")
            STEPS[kind].apply(source, SimpleNamespace(seed=0), folder / "export")  # type: ignore[arg-type]
            model = load_model(folder / "export")
        else:
            model = tiny_model(sharing=kind).eval()
            write_export(Export.of_model(model, tokenizer=tiny_tokenizer(folder)), folder / "export")
        ids = torch.tensor([[2, 6, 7, 4, 9, 3], [2, 10, 3, 0, 0, 0]])
        mask = (ids != 0).long()
        with torch.no_grad():
            encoded = model.sharebert(ids, mask)
            expected: dict[str, Any] = {"hidden": encoded.hidden, "pooled": encoded.pooled}
            expected["logits"] = model.logits(ids, mask)
        torch.save(expected, folder / "expected.pt")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
        python = str(tmp_path / "environment/bin/python")
        command = [python, "-W", "ignore", "-c", IN_THERE, str(folder / "export"), str(folder / "copy"), kind]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.splitlines()[-1].startswith("as it should be"), done.stdout
        print(done.stdout.splitlines()[-1])
