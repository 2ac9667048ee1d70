"""Makes all rows of a comparison, one piece after the other. A piece that is whole is not made again."""

from __future__ import annotations

from pathlib import Path

from comparison import times
from comparison.checks import check_models, check_tasks
from comparison.maker import Maker, say
from comparison.recipe import CompareRecipe
from comparison.rows import Row, checked
from comparison.table import write
from data_prep.lock import locked
from pretrain.sweep.runner import Stopped
from sharebert import ShareBertError
from sharebert_common.errors import FAILED, FINISHED, STOPPED, CommandError
from sharebert_common.files import make_folders


def compare(recipe: CompareRecipe, *, only_table: bool = False, time_again: bool = False) -> tuple[int, str]:
    """Make what is missing of all rows, and write the table after each row. Then time all models in turns.

    Args:
        recipe: of the comparison.
        only_table: make nothing, and write the table of what there is, also beside a process that makes some.
        time_again: time all models again, also where that was done.

    Returns an exit code (FAILED where some row failed; STOPPED where a training was asked to stop), and the table.
    Raises BadInput before the first row: what is wrong in the recipe.
    """
    rows = checked(recipe)
    check_models(recipe, rows)
    if not only_table:
        check_tasks(recipe)
    folder = Path(recipe.folder)
    if only_table:
        make_folders(folder)
        return FINISHED, write(recipe, rows)
    with locked(folder, who="process", at=folder):
        return _compare(recipe, rows, time_again)


def _compare(recipe: CompareRecipe, rows: list[Row], time_again: bool) -> tuple[int, str]:
    """See `compare`; nobody else makes pieces in the folder."""
    code, maker, table = FINISHED, Maker(recipe, rows), write(recipe, rows)
    for row in rows:
        try:
            maker.go_through(row)
        except Stopped as error:
            say(f"{row.name}: {error}")
            code = STOPPED
            break
        except (CommandError, ShareBertError) as error:
            say(f"{row.name}: {error}")
            code = FAILED
        table = write(recipe, rows)
    made = maker.models
    if recipe.report.latency and made and code != STOPPED:
        timed = times.kept(recipe, {name: piece.digest for name, piece in made.items()})
        if time_again or timed.keys() != made.keys():
            times.take(recipe, made, say)
            table = write(recipe, rows)
    return code, table
