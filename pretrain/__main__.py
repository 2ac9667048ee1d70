"""`python -m pretrain CONFIG [key=value ...]`: train on this process, or under torchrun as one rank of many."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from pretrain.faults.stop import StopRequest, die_with_the_launcher, stop_with_the_launcher, stop_with_the_sweep
from sharebert_common.errors import BAD_INPUT, FAILED, FINISHED, STOPPED, BadInput, write_refusal
from sharebert_common.import_path import leave_working_directory
from sharebert_common.quiet import quiet_libraries
from sharebert_common.recipe import load


def launch(config: str, overrides: Sequence[str], *, debug: bool) -> int:
    """Train; an exit code: 0 finished, 75 stopped and saved (run me again), 2 bad input, 1 failed.

    Under torchrun a stop is 0 as well, because any other code makes torchrun restart the workers.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    stop = StopRequest()  # before the imports, which take seconds
    if under_torchrun:
        die_with_the_launcher()
    else:
        stop_with_the_sweep()
    if not debug:
        quiet_libraries()
    from pretrain import distributed
    from pretrain.recipe import TrainRecipe
    from pretrain.train import train

    joined = together = False
    try:
        recipe = load(TrainRecipe, config, overrides)
        world = distributed.join(recipe.collective_timeout_s)
        joined = True
        if under_torchrun:
            stop_with_the_launcher()
        code = train(recipe, world, stop)
        together = True
    except BadInput as error:
        together = isinstance(error, distributed.Refused)
        if debug:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not (joined or under_torchrun):  # RANK may be left over from elsewhere
            print(f"error: {error}", file=sys.stderr)
        elif joined and not together:  # this rank alone knows of it
            print(f"error on rank {rank}: {error}", file=sys.stderr)
        write_refusal(error)
        return BAD_INPUT
    except Exception:
        traceback.print_exc()
        return FAILED
    finally:
        if together:  # else the teardown would wait for the other ranks; this process ends now
            distributed.leave()
        stop.close()
    return FINISHED if code == STOPPED and under_torchrun else code


if __name__ == "__main__":
    leave_working_directory()
    parser = argparse.ArgumentParser(
        prog="python -m pretrain", description="Train, or resume; `sharebert train --help` lists the keys of a recipe."
    )
    parser.add_argument("config", help="path of a recipe, or the name of one that ships with the project")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the recipe")
    parser.add_argument("--debug", action="store_true", help="show the traceback of bad input")
    given = parser.parse_args()
    code = launch(given.config, given.overrides, debug=given.debug)
    from pretrain.distributed import exit_now

    exit_now(code)
