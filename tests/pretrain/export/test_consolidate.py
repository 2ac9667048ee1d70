"""Consolidation: the export holds the fp32 weights bit for bit, and what does not fit is refused."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import SPECIAL
from tiny_runs import open_writer, train_arguments, train_many
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import sharebert_cli
from exports.dense import read_dense
from exports.export import tensor_shapes
from exports.read import load_model, read_config
from pretrain.checkpoint import format as checkpoint
from pretrain.engine.fragments import Fragment
from pretrain.export.checkpoint_weights import CheckpointWeights
from pretrain.export.consolidate import consolidate
from sharebert import SIZES, ShareBertConfig
from sharebert_common.errors import BadInput

EARLIER, STEP = 3, 6


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each ZeRO stage in bf16, on 2 ranks, with two checkpoints."""
    folder = tmp_path_factory.mktemp("consolidate")
    settings = {"steps": STEP, "precision": "bf16", "checkpoint__every": EARLIER, "validate__every": EARLIER}
    plan = [
        {"overrides": train_arguments(dataset, folder / str(stage), zero__stage=stage, **settings)}
        for stage in range(4)
    ]
    train_many(plan, 2, folder)
    return folder


@pytest.mark.parametrize("stage", range(4))
def test_the_export_is_the_fp32_weights_bit_for_bit(runs: Path, tmp_path: Path, stage: int) -> None:
    out = consolidate(runs / str(stage), tmp_path / "export")
    tensors = load_file(out / "model.safetensors")
    saved = checkpoint.read_manifest(runs / str(stage) / "checkpoints" / checkpoint.folder_name(STEP))
    assert tensors.keys() == saved.manifest["shapes"].keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, checkpoint.read_whole(saved, name)), name
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in tensors.values()), "these are bf16 weights"
    load_model(out)


def test_provenance_is_in_the_header_and_the_card(runs: Path, dataset: Path, tmp_path: Path) -> None:
    out = consolidate(runs / "1", tmp_path / "export")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    saved = checkpoint.read_manifest(runs / "1" / "checkpoints" / checkpoint.folder_name(STEP))
    assert metadata["run"] == "1"
    assert metadata["step"] == str(STEP)
    assert metadata["dataset"] == saved.training["loader"]["fingerprint"]
    assert metadata["config"] == (runs / "1/config.yaml").read_text()
    assert set(json.loads(metadata["crc32"])) == set(load_file(out / "model.safetensors"))
    card = (out / "README.md").read_text()
    assert "| dataset | " in card
    assert "| 192 | " in card, "the rows of the dataset"
    assert "micro_batch: 10" in card, "the recipe"
    assert f"after step {STEP}: loss" in card, "the validation loss"
    shutil.rmtree(out)
    moved = tmp_path / "moved"
    shutil.copytree(runs / "1", moved)
    (moved / "config.yaml").unlink()
    (moved / "log.jsonl").unlink()
    card = (consolidate(moved, out) / "README.md").read_text()
    assert "(not recorded)" in card
    assert metadata["dataset"] in card


def test_half_precision_is_the_rounding(runs: Path, tmp_path: Path) -> None:
    full = load_file(consolidate(runs / "2", tmp_path / "fp32") / "model.safetensors")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        half = load_file(consolidate(runs / "2", tmp_path / name, dtype=name) / "model.safetensors")
        assert all(torch.equal(half[key], full[key].to(dtype)) for key in full)


def test_without_head(runs: Path, tmp_path: Path) -> None:
    out = consolidate(runs / "0", tmp_path / "encoder", head=False)
    assert not any(name.startswith("mlm_head") for name in load_file(out / "model.safetensors"))
    assert load_model(out).mlm_head is None


def test_it_needs_nothing_but_the_run(runs: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(runs / "3", moved)
    load_model(consolidate(moved, tmp_path / "export"))


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    saved = checkpoint.read_manifest(run / "checkpoints" / checkpoint.folder_name(step))
    return {name: checkpoint.read_whole(saved, name) for name in saved.manifest["shapes"]}


def test_the_mean_of_the_last_checkpoints(runs: Path, tmp_path: Path) -> None:
    out = consolidate(runs / "2", tmp_path / "export", average=2)
    earlier, later = weights(runs / "2", EARLIER), weights(runs / "2", STEP)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, ((earlier[name].double() + later[name].double()) / 2).float()), name
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "3,6"
    assert "mean of the checkpoints after steps 3, 6" in (out / "README.md").read_text()
    with pytest.raises(BadInput, match="2 whole checkpoints, --average asks for 3"):
        consolidate(runs / "2", tmp_path / "export", average=3)


def test_other_forms(runs: Path, tmp_path: Path) -> None:
    """Dense, in both precisions, from the run and from its export: the same function."""
    compact = consolidate(runs / "3", tmp_path / "compact")
    model, config = load_model(compact), read_config(compact)
    tokens = torch.randint(config.vocab_size, (2, 9))
    expected = model.logits(tokens)
    for source, dtype, bar in ((runs / "3", "fp32", 1e-6), (compact, "fp32", 1e-6), (compact, "bf16", 0.05)):
        out = consolidate(source, tmp_path / "dense", form="dense", dtype=dtype)
        found = read_dense(out, config)(tokens).logits
        assert ((found - expected).abs().max() / expected.abs().max()).item() < bar
        with safe_open(out / "model.safetensors", framework="pt") as file:
            assert file.metadata()["step"] == str(STEP)
        card = (out / "README.md").read_text()
        assert "## Training" in card
        assert "micro_batch: 10" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compact", "dense"]


def test_an_export_of_an_export(runs: Path, tmp_path: Path) -> None:
    compact = consolidate(runs / "0", tmp_path / "compact")
    out = consolidate(compact, tmp_path / "half", dtype="bf16", head=False)
    full = load_file(compact / "model.safetensors")
    half = load_file(out / "model.safetensors")
    assert half.keys() == {name for name in full if not name.startswith("mlm_head")}
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in half)
    assert (compact / "README.md").read_text().partition("## Data")[2] in (out / "README.md").read_text()
    with pytest.raises(BadInput, match="would replace its own source"):
        consolidate(compact, compact)


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and stderr of the command."""
    code = sharebert_cli.main(["consolidate", *map(str, arguments)])
    return code, capsys.readouterr().err


def test_of_a_run_that_still_writes_the_newest_whole_checkpoint_is_taken(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "export"
    shutil.copytree(runs / "1", run)
    newest = run / "checkpoints" / checkpoint.folder_name(STEP)
    half = newest.with_name(f".{checkpoint.folder_name(9)}.token")
    shutil.copytree(newest, half)
    (half / "manifest.json").unlink()
    code, text = said(capsys, run, out)
    assert code == 0
    assert text == f"{half}: not finished; taking the checkpoint of step {STEP}\n"
    assert torch.equal(load_file(out / "model.safetensors")["mlm_head.bias"], weights(run, STEP)["mlm_head.bias"])

    with (newest / "rank-00001.safetensors").open("r+b") as file:
        file.truncate(1000)
    code, text = said(capsys, run, out)
    assert code == 0
    assert "rank-00001.safetensors: 1000 bytes" in text
    assert f"taking the checkpoint of step {EARLIER}" in text
    assert torch.equal(load_file(out / "model.safetensors")["mlm_head.bias"], weights(run, EARLIER)["mlm_head.bias"])

    for folder in checkpoint.found(run / "checkpoints"):
        shutil.rmtree(folder)
    code, text = said(capsys, run, tmp_path / "other")
    assert code == 2
    assert text.count("\n") == 1
    assert f"no whole checkpoint here yet; {half.name} is not finished" in text
    assert not (tmp_path / "other").exists()


def test_bad_input_is_one_line_and_code_2(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = runs / "1", tmp_path / "export"
    compact = consolidate(run, tmp_path / "compact")
    (tmp_path / "notes.txt").write_text("dear")
    (tmp_path / "empty").mkdir()
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    (moved / "tokenizer.json").write_text("{}")
    damaged = tmp_path / "damaged"
    shutil.copytree(compact, damaged)
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\xff")
    missing = tmp_path / "missing"
    shutil.copytree(compact, missing)
    (missing / "model.safetensors").unlink()
    for arguments, expected in (
        ([tmp_path / "nowhere", out], "nowhere: no such folder"),
        ([tmp_path / "empty", out], "not a run, not an export, and not a folder that DeepSpeed saved"),
        ([moved, out], "tokenizer.json: sha256"),
        ([run, tmp_path / "notes.txt"], "notes.txt: exists and is no export"),
        ([run, tmp_path / "notes.txt" / "export"], "notes.txt/export: cannot be made"),
        ([run, out, "--form", "onnx", "--dtype", "bf16"], "onnx is written in fp32"),
        ([run, out, "--opset", "20"], "--form compact has no operators of ONNX; leave --opset away"),
        ([run, out, "--form", "onnx", "--opset", "3"], "opset: 3 is not one of"),
        ([run, out, "--average", "0"], "average: from 1"),
        ([compact, out, "--average", "2"], "takes the checkpoints of a run"),
        ([run, out, "--ema"], "has no average of the weights (--ema); train with optimizer.ema.decay"),
        ([compact, out, "--ema"], "--ema takes the checkpoint of a run, and this is no run"),
        ([run, out, "--config", compact], "--config is for a folder that DeepSpeed saved"),
        ([damaged, out], "model.safetensors: damaged"),
        ([missing, out, "--form", "dense"], "model.safetensors: missing"),
    ):
        code, text = said(capsys, *arguments)
        assert (code, text.count("\n")) == (2, 1), text
        assert expected in text
    assert not out.exists()


def test_a_checkpoint_that_is_deleted_meanwhile_is_named(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "1", run)
    saved = checkpoint.read_manifest(run / "checkpoints" / checkpoint.folder_name(STEP))
    source = CheckpointWeights(saved)
    shutil.rmtree(saved.folder)
    with pytest.raises(BadInput, match="deleted while it was read"):
        source.read("mlm_head.bias", 0, 10)


MEASURED = """
import sys, threading, time
import torch
def anonymous_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
base = peak = anonymous_bytes()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
from pathlib import Path
from pretrain.export.consolidate import consolidate
consolidate(Path(sys.argv[1]), Path(sys.argv[2]), form=sys.argv[3])
assert "deepspeed" not in sys.modules
print(peak - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("form", ["compact", "dense"])
def test_memory_holds_a_part_of_the_largest_tensor_at_most(big_run: Path, tmp_path: Path, form: str) -> None:
    """92 million parameters, 250 MB the largest tensor: compact in pieces, dense with the matrices of a layer."""
    command = [sys.executable, "-c", MEASURED, str(big_run), str(tmp_path / "export"), form]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < (128e6 if form == "compact" else 250e6 + 256e6)


@pytest.fixture(scope="module")
def big_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sharebert-large with a checkpoint of one rank, as far as consolidation reads it."""
    run = tmp_path_factory.mktemp("big") / "run"
    config = ShareBertConfig(**{**SIZES["sharebert-large"], "num_hidden_layers": 2})
    fragments = []
    for name, shape in tensor_shapes(config).items():
        values = torch.randn(math.prod(shape)) * 0.02
        fragments.append(Fragment(name, 0, len(values), {"weight": values, "exp_avg": values, "exp_avg_sq": values}))
    run.mkdir()
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *map(str, range(30523))])}))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(run / "tokenizer.json"))
    training = {
        "model": config.to_dict(),
        "tokenizer_sha256": hashlib.sha256((run / "tokenizer.json").read_bytes()).hexdigest(),
        "loader": {"fingerprint": "made up", "rows_consumed": 0},
    }
    writer = open_writer(run / "checkpoints", 0, 1, pytest.fail)
    writer.save(1, fragments, {name: list(shape) for name, shape in tensor_shapes(config).items()}, {}, training)
    writer.finish()
    return run
