"""What a sweep leaves in its folder: TABLE.md, and TensorBoard's HPARAMS page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pretrain.sweep.hparams import write_hparams
from pretrain.sweep.recipe import SweepRecipe, Trial, reference_row
from pretrain.sweep.table import rows_of, to_text
from sharebert_common.files import make_folders, write_atomically


def summarise(recipe: SweepRecipe, trials: Sequence[Trial]) -> str:
    """Write both into `recipe.folder`, from the trials that are finished. Returns the table."""
    runs: dict[str, list[Path]] = {}
    for trial in trials:
        runs.setdefault(trial.row, []).append(trial.run)
    reference = reference_row(recipe, trials)
    rows = rows_of(runs, reference)
    text = to_text(rows, reference, unfinished=len(trials) - sum(row.seeds for row in rows))
    folder = Path(recipe.folder)
    make_folders(folder)
    write_atomically(folder / "TABLE.md", text + "\n")
    write_hparams(trials, folder / "tensorboard")
    return text
