"""`sharebert prep`: plan the parts → run those that are missing → merge.

    inputs ─▶ parts ─▶ scan   (a part: read, clean, hash; only if duplicates are to be removed)
                    ─▶ dedup  (a range of hashes: which documents repeat an earlier one)
                    ─▶ encode (a part: read, clean, encode, sort by random key)
                    ─▶ pack   (a shard: gather its range of keys from all parts, pack rows, write)
                    ─▶ merge  (move the shards to their place, write report and manifest)

The parts depend on the inputs and the recipe alone, so the dataset is the same whoever runs them.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from data_prep.job import WORK, plan
from data_prep.lock import locked
from data_prep.merge import check_same, merge, refuse_strangers
from data_prep.parts import LocalCores, missing_parts
from data_prep.recipe import PrepRecipe
from data_prep.shards.format import MANIFEST
from data_prep.stages import stages
from sharebert_common.errors import BadInput
from sharebert_common.remote_files import is_url

__all__ = ["PrepRecipe", "prepare"]


def prepare(recipe: PrepRecipe, task: tuple[int, int] | None = None) -> Path:
    """Make the dataset of a recipe, or the parts of it that are missing.

    Args:
        recipe: what to make.
        task: (i, n): run parts i, i + n, … of each stage whose earlier stages are complete, and do not merge. A call
            without `task` runs all parts that are left, and merges.

    Returns: the folder of the dataset.

    While another prep works in the folder, this one waits, except that tasks work together.

    Raises BadInput for anything wrong with the input or the recipe. Finished parts are kept.
    """
    try:
        return _prepare(recipe, task)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(
                f"{recipe.output}: the disk is full; free some space and run again, what is done is kept"
            ) from error
        raise


def _prepare(recipe: PrepRecipe, task: tuple[int, int] | None) -> Path:
    if task and not 0 <= task[0] < task[1]:
        raise BadInput(f"task: {task[0]}/{task[1]}: tasks are numbered from 0 to {task[1] - 1}")
    if is_url(recipe.output):
        raise BadInput(
            f"output: {recipe.output}: a dataset is made on a local or shared disk; give a folder there, and copy it "
            "to the URL when it is complete"
        )
    output = Path(recipe.output)
    if (output / MANIFEST).exists():
        return _made_before(recipe, output)
    with locked(output / WORK, shared=task is not None):
        if (output / MANIFEST).exists():  # by the prep that this one waited for
            return _made_before(recipe, output)
        return _make(recipe, output, task)


def _made_before(recipe: PrepRecipe, output: Path) -> Path:
    check_same(recipe, output)
    shutil.rmtree(output / WORK, ignore_errors=True)  # a merge may have been killed just before this step
    return output


def _make(recipe: PrepRecipe, output: Path, task: tuple[int, int] | None) -> Path:
    refuse_strangers(output)
    with LocalCores(recipe.workers or len(os.sched_getaffinity(0))) as cores:
        job = plan(recipe)
        for stage in stages(job):
            missing = missing_parts(job.work, stage)
            mine = [number for number in missing if task is None or number % task[1] == task[0]]
            if mine:
                cores.run(stage, job, job.work, mine)
            if missing_parts(job.work, stage):
                return output
    if task is None:
        merge(job, output)
    return output
