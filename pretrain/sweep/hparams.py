"""A sweep on TensorBoard's HPARAMS page: the keys in which trials differ, with their final loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pretrain.run.event_file import open_writer
from pretrain.sweep.recipe import Trial
from pretrain.sweep.table import read_curve
from sharebert_common.errors import BadInput

FINAL_LOSS = "sweep/final_loss"


def write_hparams(trials: Sequence[Trial], folder: Path) -> None:
    """Write one event file for each trial that has validated, below `folder`, in place of those of an earlier call."""
    from torch.utils.tensorboard.summary import hparams

    for trial in trials:
        try:
            loss = read_curve(trial.run).losses[-1]
        except (BadInput, OSError):
            continue
        here = folder / trial.run.name
        for old in here.glob("events.out.tfevents.*"):
            old.unlink()
        values = {
            key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in trial.keys.items()
        }
        writer = open_writer(here, 0)
        for summary in hparams(values | {"row": trial.row, "seed": trial.seed}, {FINAL_LOSS: loss}):
            writer._get_file_writer().add_summary(summary)
        writer.add_scalar(FINAL_LOSS, loss, 0)
        writer.close()
