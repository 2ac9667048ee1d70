"""Folders that DeepSpeed itself saved: the fp32 weights bit for bit at every stage, and no pickle is run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed_folders
import pytest
import torch
from deepspeed_folders import CASES, CONFIG, LR, STEPS
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import torchrun

import sharebert_cli
from exports.export import tensor_shapes
from exports.read import load_model
from pretrain.checkpoint import format as checkpoint
from pretrain.export.consolidate import consolidate
from pretrain.export.deepspeed_folders import DeepSpeedWeights
from sharebert_common.errors import BadInput

SCRIPT = Path(deepspeed_folders.__file__)
ROOT = SCRIPT.parent.parent
OURS = [name for name in CASES if name not in ("2-frozen", "3-frozen", "2-round-robin")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case `theirs`, saved by DeepSpeed on 2 ranks, and `ours`; and the `config.json` of their model."""
    folder = tmp_path_factory.mktemp("deepspeed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        torchrun(2, str(SCRIPT), str(folder)), capture_output=True, text=True, timeout=280, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return folder


@pytest.mark.parametrize("case", OURS)
def test_the_export_is_the_fp32_weights_bit_for_bit(folders: Path, tmp_path: Path, case: str) -> None:
    out = consolidate(folders / case / "theirs", tmp_path / "export", config=folders / "config.json")
    ours = checkpoint.read_manifest(folders / case / "ours" / checkpoint.folder_name(STEPS))
    tensors = load_file(out / "model.safetensors")
    assert tensors.keys() == tensor_shapes(CONFIG).keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, checkpoint.read_whole(ours, name)), name
    if "bf16" in case:
        assert any((tensor != tensor.bfloat16().float()).any() for tensor in tensors.values()), "these are bf16 weights"
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == str(STEPS)
    load_model(out)


@pytest.mark.parametrize("case", ["2-frozen", "3-frozen", "2-round-robin"])
def test_it_agrees_with_the_working_weights(folders: Path, case: str) -> None:
    """Where some parameters are frozen, or DeepSpeed lays them out in another order."""
    weights = DeepSpeedWeights(folders / case / "theirs")
    shapes = tensor_shapes(CONFIG)
    assert {name: spec.shape for name, spec in weights.specs.items()} == shapes
    state = folders / case.replace("3-", "2-") / "theirs" / f"global_step{STEPS}" / "mp_rank_00_model_states.pt"
    # Stage 3 keeps no whole working weights, so those of stage 2 are compared. Where a gradient is rounding alone, the
    # two stages may step a parameter in opposite directions.
    tolerance = 2 * STEPS * LR if case == "3-frozen" else 1e-2
    for name, working in torch.load(state, weights_only=True)["module"].items():
        values = weights.read(name, 0, working.numel())
        torch.testing.assert_close(values, working.flatten().float(), rtol=1e-2, atol=tolerance)
        assert torch.equal(weights.read(name, 3, working.numel() - 5), values[3:-2])


def test_a_tag_may_be_given_and_an_export_for_the_config(folders: Path, tmp_path: Path) -> None:
    tag = folders / "3-bf16" / "theirs" / f"global_step{STEPS}"
    headless = consolidate(tag, tmp_path / "headless", config=folders / "config.json", head=False)
    again = consolidate(tag, tmp_path / "again", config=headless)
    tensors = load_file(headless / "model.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(again / "model.safetensors").items())


class Attack:
    """A pickle that would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_bad_input_is_one_line_and_code_2(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(name: str, case: str = "2-bf16") -> Path:
        shutil.copytree(folders / case / "theirs", tmp_path / name)
        return tmp_path / name / f"global_step{STEPS}"

    optimizer = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (broken("lacks") / optimizer).unlink()
    with (broken("cut") / optimizer).open("r+b") as file:
        file.truncate(2000)
    torch.save({"optimizer_state_dict": Attack(tmp_path / "owned")}, broken("attack") / optimizer)
    broken("nowhere")
    (tmp_path / "nowhere" / "latest").write_text("global_step9")
    state = broken("half", "0-fp32") / "mp_rank_00_model_states.pt"
    model = torch.load(state, weights_only=True)
    torch.save(model | {"module": {name: value.half() for name, value in model["module"].items()}}, state)
    (tmp_path / "other.json").write_text(json.dumps(CONFIG.to_dict() | {"max_position_embeddings": 17}))
    given = ["--config", folders / "config.json"]
    for name, more, expected in (
        ("lacks", given, "1 files *_optim_states.pt of 2; did all ranks finish?"),
        ("cut", given, f"{optimizer}: not readable as a PyTorch file"),
        ("attack", given, f"{optimizer}: holds more than tensors, or is damaged; it is not run"),
        ("nowhere", given, "global_step9: no *_model_states.pt there"),
        ("half", given, "is float16, and there are no fp32 weights"),
        ("half", [], "keeps no config of the model; give --config"),
        ("cut", ["--config", tmp_path / "nothing.json"], "nothing.json"),
        ("cut", ["--average", "2", *given], "--average takes the checkpoints of a run"),
    ):
        code = sharebert_cli.main([*map(str, ("consolidate", tmp_path / name, tmp_path / "export", *more))])
        text = capsys.readouterr().err
        assert (code, text.count("\n")) == (2, 1), text
        assert expected in text
    whole = folders / "2-bf16" / "theirs"
    with pytest.raises(BadInput, match=r"position_embeddings.weight' is \[16, 32\].*has \[17, 32\]"):
        consolidate(whole, tmp_path / "export", config=tmp_path / "other.json")
    assert not (tmp_path / "export").exists()
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
def test_no_deepspeed_is_imported(folders: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pretrain.export.consolidate import consolidate\n"
        "consolidate(*map(Path, sys.argv[1:3]), config=Path(sys.argv[3])); print('deepspeed' in sys.modules)"
    )
    arguments = [str(folders / "2-bf16" / "theirs"), str(tmp_path / "export"), str(folders / "config.json")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"
