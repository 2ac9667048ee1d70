"""An environment with only torch, transformers and safetensors, in which exports are loaded as their users load them.

    python tests/bare_environment.py COMPACT DENSE      an export of each form, the demo's for instance

The environment is made by `venv`, without pip. Its site-packages are links to the installed torch, transformers and
safetensors, and to exactly what their metadata requires: no triton, no deepspeed, and not this project. It runs the
Python snippets of both exports' cards and of the project's pages (with the given exports in place of those that the
pages name), also on a copy by `save_pretrained`, and then `IN_THERE`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.wheels import required

ROOT = Path(__file__).resolve().parent.parent
ONLY = ("torch", "transformers", "safetensors")
LEFT_OUT = frozenset({"triton"})
"""A CUDA build of torch requires it; without it, torch still works."""

PAGES = ("README.md", "docs/exports.md")
COMPACT_IN_PAGES, DENSE_IN_PAGES = ("out/demo/export", "/data/exports/base"), ("out/demo/dense",)
"""The paths of an export of each form in the pages."""

IN_THERE = """
import importlib.util, json, sys
from pathlib import Path

compact, dense, copy, snippets = sys.argv[1:5]
for name in ("sharebert", "pretrain", "sharebert_common", "triton", "deepspeed", "datasets", "omegaconf", "accelerate"):
    assert importlib.util.find_spec(name) is None, f"{name} is here"

import torch
import torch.nn.functional as F
from transformers import (
    AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline,
)

remote = {"trust_remote_code": True}
AutoModelForMaskedLM.from_pretrained(compact, **remote).save_pretrained(copy)
AutoTokenizer.from_pretrained(compact, **remote).save_pretrained(copy)

for name, code in json.loads(Path(snippets).read_text()):
    exec(compile(code, name, "exec"), {})

calls = []
attention = F.scaled_dot_product_attention
F.scaled_dot_product_attention = lambda *given, **named: calls.append(1) or attention(*given, **named)
results = []
for folder, trust in ((compact, remote), (copy, remote), (dense, {})):
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    texts = [f"a b {tokenizer.mask_token} c", "a"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    encoder = AutoModel.from_pretrained(folder, **trust)
    calls.clear()
    hidden = encoder(**inputs).last_hidden_state
    assert calls or not trust, "SDPA was not used"  # megatron_bert has eager attention alone
    alone = encoder(**tokenizer(texts[1], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(hidden[1:, : alone.shape[1]], alone, rtol=1e-4, atol=1e-4)
    logits = AutoModelForMaskedLM.from_pretrained(folder, **trust)(**inputs).logits
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **trust)
    assert classifier(**inputs, labels=torch.tensor([0, 2])).loss.item() > 0
    assert pipeline("fill-mask", model=folder, **trust)(texts[0], top_k=1)[0]["token_str"]
    results.append((hidden, logits))
for other in results[1:]:
    for ours, theirs in zip(results[0], other):
        assert (ours - theirs).abs().max() < 2e-5 * ours.abs().max()
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"triton", "deepspeed", "sharebert"}, loaded
print("as it should be")
"""


def make(folder: Path, only: Sequence[str] = ONLY, left_out: frozenset[str] = LEFT_OUT) -> Path:
    """Make an environment in `folder` with `only` and all that they require; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    for distribution in required(only, left_out).values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and source.suffix != ".pth" and not (site / top).exists():
                (site / top).symlink_to(source)
    return folder / "bin" / "python"


def snippets(compact: Path, dense: Path, copy: Path) -> list[tuple[str, str]]:
    """(page or folder, code) of every snippet that loads an export."""
    found = []
    for page in PAGES:
        for code in _python_blocks(ROOT / page):
            if "from_pretrained(" in code:
                for folder, names in ((compact, COMPACT_IN_PAGES), (dense, DENSE_IN_PAGES)):
                    for name in names:
                        code = code.replace(f'"{name}"', f'"{folder}"')
                found.append((page, code))
    for card, folders in ((compact, (compact, copy)), (dense, (dense,))):
        code = "\n".join(_python_blocks(card / "README.md"))
        found += [(str(folder), code.replace("path/to/this/folder", str(folder))) for folder in folders]
    return found


def _python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def try_exports(compact: Path, dense: Path, folder: Path) -> None:
    """Run everything in an environment made in `folder`. Raises AssertionError with what went wrong."""
    python = make(folder / "environment")
    file, copy = folder / "snippets.json", folder / "copy"
    file.write_text(json.dumps(snippets(compact, dense, copy)))
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    command = [str(python), "-c", IN_THERE, *map(str, (compact, dense, copy, file))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "as it should be"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        try_exports(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), Path(place))
    print("both exports load with torch, transformers and safetensors alone")
