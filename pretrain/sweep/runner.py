"""Trains the trials of a sweep, each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from pretrain.recipe import TrainRecipe
from pretrain.sweep.recipe import Trial, differing_keys
from sharebert_common.errors import FAILED, FINISHED, STOPPED, BadInput, CommandError
from sharebert_common.files import make_folders, write_atomically
from sharebert_common.recipe import load, to_yaml
from sharebert_common.run_files import peek_state

SETTLED = ("run", "data.micro_batch")
"""Keys that may differ in `config.yaml` of a run: its folder may have been moved, and it picks a number for `auto`. How
rows are cut into micro-batches changes no loss but for rounding."""


class Stopped(CommandError):
    """A stop was asked for, and the training saved its state."""

    exit_code = STOPPED


def is_finished(trial: Trial) -> bool:
    """Whether its run has reached its last step."""
    return bool(peek_state(trial.run)["state"] == "finished")


def refuse_other_keys(trials: Sequence[Trial]) -> None:
    """Raise BadInput, naming the run and the keys, where a run was begun with others than its trial has.

    A finished one would be left out, and its row show what was asked before; another one would go on with the new keys,
    and its row show a mixture.
    """
    for trial in trials:
        config = trial.run / "config.yaml"
        if not config.is_file() and not is_finished(trial):
            continue
        changed = [key for key in differing_keys(load(TrainRecipe, config), trial.recipe) if key not in SETTLED]
        if changed:
            raise BadInput(
                f"{trial.run}: was trained with other keys ({', '.join(changed)}); remove it, or give another folder"
            )


def run_all(trials: Sequence[Trial], report: Callable[[str], None]) -> int:
    """Train all trials that are not finished yet; one that was stopped or killed resumes.

    A trial that fails is reported, and the others still run. SIGTERM and SIGINT stop the trial that runs, which saves.

    Returns FINISHED, FAILED where some trial failed, or STOPPED.
    """
    failed = 0
    for number, trial in enumerate(trials, 1):
        if is_finished(trial):
            continue
        report(f"trial {number} of {len(trials)}: {trial.run}")
        code = _train(trial)
        if code == STOPPED or code < 0:
            return STOPPED
        if code != FINISHED:
            failed += 1
            report(f"{trial.run}: failed with exit code {code}")
    return FAILED if failed else FINISHED


def run_one(trial: Trial, report: Callable[[str], None]) -> None:
    """Train a trial to its end, as `run_all` does.

    Raises Stopped: the process was asked to stop, and the training saved its state; CommandError: the training failed.
    """
    code = run_all([trial], report)
    if code == STOPPED:
        raise Stopped("the training stopped and saved; run the command again to go on")
    if code != FINISHED:
        raise CommandError(f"the training in {trial.run} failed; its messages stand above")


def _train(trial: Trial) -> int:
    """Train one trial; the exit code of its process."""
    recipe = trial.run.parent.parent / "recipes" / f"{trial.run.name}.yaml"
    make_folders(recipe.parent)
    write_atomically(recipe, to_yaml(trial.recipe))
    process = subprocess.Popen([sys.executable, "-m", "pretrain", str(recipe)])
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return STOPPED if asked and code != FINISHED else code
