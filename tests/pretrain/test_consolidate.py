"""Consolidation: the export holds the masters bit for bit, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import train_arguments, train_many

from pretrain import checkpoint
from pretrain.consolidate import consolidate
from sharebert.export import read_export
from sharebert_recipe import BadInput

STEP = 6


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each ZeRO stage in bf16, on 2 ranks."""
    folder = tmp_path_factory.mktemp("consolidate")
    plan = [
        {"overrides": train_arguments(dataset, folder / str(stage), steps=STEP, zero__stage=stage, precision="bf16")}
        for stage in range(4)
    ]
    train_many(plan, 2, folder)
    return folder


@pytest.mark.parametrize("stage", range(4))
def test_the_export_is_the_masters_bit_for_bit(runs: Path, tmp_path: Path, stage: int) -> None:
    out = consolidate(runs / str(stage), tmp_path / "export")
    tensors = load_file(out / "model.safetensors")
    saved = checkpoint.read_manifest(runs / str(stage) / "checkpoints" / checkpoint.folder_name(STEP))
    assert tensors.keys() == saved.manifest["shapes"].keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, checkpoint.read_whole(saved, name)), name
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in tensors.values()), "these are bf16 weights"
    read_export(out)


def test_provenance_is_in_the_header(runs: Path, tmp_path: Path) -> None:
    out = consolidate(runs / "1", tmp_path / "export")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["run"] == "1"
    assert metadata["step"] == str(STEP)
    assert set(json.loads(metadata["crc32"])) == set(load_file(out / "model.safetensors"))


def test_half_precision_is_the_rounding(runs: Path, tmp_path: Path) -> None:
    full = load_file(consolidate(runs / "2", tmp_path / "fp32") / "model.safetensors")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        half = load_file(consolidate(runs / "2", tmp_path / name, dtype=name) / "model.safetensors")
        assert all(torch.equal(half[key], full[key].to(dtype)) for key in full)


def test_without_head(runs: Path, tmp_path: Path) -> None:
    out = consolidate(runs / "0", tmp_path / "encoder", head=False)
    assert not any(name.startswith("mlm_head") for name in load_file(out / "model.safetensors"))
    assert read_export(out).mlm_head is None


def test_it_needs_nothing_but_the_run(runs: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(runs / "3", moved)
    read_export(consolidate(moved, tmp_path / "export"))


def test_refusals_name_the_file(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such run"):
        consolidate(tmp_path / "nowhere", tmp_path / "export")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no whole checkpoint"):
        consolidate(tmp_path / "empty", tmp_path / "export")
    moved = tmp_path / "moved"
    shutil.copytree(runs / "1", moved)
    (moved / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer\.json: sha256"):
        consolidate(moved, tmp_path / "export")
    assert not (tmp_path / "export").exists()
