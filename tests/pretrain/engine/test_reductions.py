"""At which ZeRO stages gradients are on their way to the other ranks while the backward pass goes on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tiny_models import TINY
from tiny_runs import torchrun

from pretrain.engine.config import ZeroRecipe

SCRIPT = Path(__file__).parent / "reductions.py"
DECODER = 256 * TINY["hidden_size"]
"""Elements of the decoder's gradient [V, H], with V rounded up."""


@pytest.fixture(scope="module")
def passes() -> dict[int, list[str | int]]:
    """What happens in a backward pass on 2 ranks, in order, by stage."""
    environment = {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parents[3])])}
    done = subprocess.run(
        torchrun(2, str(SCRIPT)),
        capture_output=True,
        text=True,
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {int(stage): happened for stage, happened in json.loads(done.stdout.splitlines()[-1]).items()}


def sizes(happened: list[str | int]) -> list[int]:
    return [size for size in happened if isinstance(size, int)]


def test_the_default_stage_reduces_the_decoders_gradient_before_the_layers_have_theirs(
    passes: dict[int, list[str | int]],
) -> None:
    happened = passes[ZeroRecipe().stage]
    first_layer = next(n for n, what in enumerate(happened) if "layers" in str(what))
    assert happened[0] == "mlm_head.decoder.weight"
    assert sizes(happened[:first_layer]) == [DECODER], "whole: an all-reduce"
    assert len(happened) - first_layer > 30, "the backward pass was not at its end"


def test_stage_3_does_so_too_and_scatters(passes: dict[int, list[str | int]]) -> None:
    first_layer = next(n for n, what in enumerate(passes[3]) if "layers" in str(what))
    assert sizes(passes[3][:first_layer]) == [DECODER // 2]


@pytest.mark.parametrize("stage", [0, 1])
def test_other_stages_reduce_everything_after_the_backward_pass(passes: dict[int, list[str | int]], stage: int) -> None:
    """The reason for the default. Where a newer DeepSpeed overlaps here too, the default may be chosen anew."""
    end = passes[stage].index("end")
    assert sizes(passes[stage][:end]) == []
    assert sum(sizes(passes[stage][end:])) > DECODER
