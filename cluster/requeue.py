"""Whether a job that ended starts again.

The batch script decides, at its end, because everything else may be dead by then: a kill -9 of an agent, a node
without Python. It goes by files in the job's folder. An agent that starts leaves `again` there, with the step it
starts from; it removes it when the job needs no further start. The script requeues the job where it finds the file,
and takes it away: a job whose agent never comes to life is not started again and again. Where the end was a failure
the script adds the file to `crashes`, and the third crash of a start at the same step is the last. What SLURM ended
(preemption, a node that failed, the time limit) is no failure, and is never counted.

In plain shell, so that it works outside of the container that the agents may run in.
"""

from __future__ import annotations

from pathlib import Path

from sharebert_common.files import write_atomically

CRASHES = 3
"""So many in a row at the same step, and the run is given up."""

BEFORE = r"""
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}
facts() { scontrol show job -o "$job" | tr ' ' '\n' | grep -E "^($1)" | head -n 1; }
limit=$(facts EndTime=); limit=$(date -d "${limit#EndTime=}" +%s 2> /dev/null || echo 9999999999)
# A signal to the job must not end this script before its last lines; what it starts gets it all the same.
trap : TERM USR1 USR2
""".strip().splitlines()
"""Lines of the batch script before srun."""

AFTER = r"""
code=$?
cd FOLDER/"$job" || exit $code
if [ -e again ]; then
    running=$(facts JobState=RUNNING)
    [ $code -ne 0 ] && [ -n "$running" ] && cat again >> crashes
    rm -f again
    # A job that SLURM ends is completing by now. It wants to go on, unless a user cancelled it.
    if [ -n "$running" ] || [ -n "$(facts PreemptTime=[0-9])" ] || [ "$(date +%s)" -ge "$limit" ]; then
        echo "exit code $code: starting again"
        scontrol requeue "$job" && exit 0
    fi
fi
exit $code
""".strip().splitlines()
"""Lines after srun. FOLDER is the parent of the jobs' folders."""


class GivenUp(RuntimeError):
    """The job crashed too often without getting further."""


class Again:
    """An agent's hand on the files. Only that of the first node uses it."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the job's."""
        self._again, self._crashes = folder / "again", folder / "crashes"

    def allow(self, step: int) -> None:
        """Let the job start again after this start, which goes on from `step`. Raises GivenUp."""
        crashes = self._crashes.read_text().split() if self._crashes.exists() else []
        if crashes[-CRASHES:] == [str(step)] * CRASHES:
            raise GivenUp(f"{CRASHES} starts in a row crashed without getting further than step {step}")
        write_atomically(self._again, f"{step}\n")

    def forbid(self) -> None:
        """This start is the last."""
        self._again.unlink(missing_ok=True)
