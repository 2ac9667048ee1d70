"""`python -m pretrain` in a world where something is wrong; what, is said in the environment.

SLOW_FSYNC_S=S      a call of fsync takes S seconds longer
FULL_DISK=FILE      fsync of what lies under a folder `checkpoints` fails, as on a full disk, while FILE exists
HANG="RANK STEP"    the forward pass of that step never comes back on that rank
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

from pretrain import __main__ as program
from pretrain import train as training

fsync = os.fsync


def faulty_fsync(handle: int) -> None:
    time.sleep(float(os.environ.get("SLOW_FSYNC_S", 0)))
    full = os.environ.get("FULL_DISK")
    if full and Path(full).exists() and "/checkpoints/" in str(Path(f"/proc/self/fd/{handle}").readlink()):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync(handle)


class HangingTrainer(training.Trainer):
    """Stands still."""

    def step(self, step: int, batch: training.StepBatch) -> bool:
        if f"{self.world.rank} {step}" == os.environ["HANG"]:
            self.objective = stand_still
        return super().step(step, batch)


def stand_still(*given: Any) -> Any:
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    os.fsync = faulty_fsync
    if "HANG" in os.environ:
        training.Trainer = HangingTrainer  # type: ignore[misc]
    sys.exit(program.launch(sys.argv[1], sys.argv[2:], debug=False))
