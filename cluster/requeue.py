"""Whether a job that ended is requeued.

The batch script decides at its end, because everything else may be dead by then: an agent that was killed, a node
without Python. It decides by files in the job's folder. An agent that begins an attempt writes the file `requeue`
with the step that the attempt resumes from, and removes the file when the job needs no further attempt. The script
requeues the job where it finds the file, and removes it: a job whose agent never runs is not requeued for ever. Where
the attempt failed, the script appends the file to `crashes`; the third crash of an attempt from the same step is the
last. What SLURM ends (preemption, a failed node, the time limit) is no failure, and is never counted.

The lines are plain shell, so that they work outside of the container that the agents may run in.
"""

from __future__ import annotations

from pathlib import Path

from sharebert_common.files import write_atomically

CRASHES = 3
"""After so many crashes in a row at the same step the run has failed."""

BEFORE = r"""
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}
facts() { scontrol show job -o "$job" | tr ' ' '\n' | grep -E "^($1)" | head -n 1; }
limit=$(facts EndTime=); limit=$(date -d "${limit#EndTime=}" +%s 2> /dev/null || echo 9999999999)
# A signal to the job must not end this script before its last lines; what it starts gets the signal all the same.
trap : TERM USR1 USR2
""".strip().splitlines()
"""Lines of the batch script before srun."""

AFTER = r"""
code=$?
cd FOLDER/"$job" || exit $code
if [ -e requeue ]; then
    running=$(facts JobState=RUNNING)
    [ $code -ne 0 ] && [ -n "$running" ] && cat requeue >> crashes
    rm -f requeue
    # SLURM calls a job that it ends COMPLETING by now, and one that a user cancelled as well: that one stays ended.
    if [ -n "$running" ] || [ -n "$(facts PreemptTime=[0-9])" ] || [ "$(date +%s)" -ge "$limit" ]; then
        echo "exit code $code: requeue"
        scontrol requeue "$job" && exit 0
    fi
fi
exit $code
""".strip().splitlines()
"""Lines of the batch script after srun. FOLDER stands for the parent of the jobs' folders."""


class GivenUp(RuntimeError):
    """The run crashed too often at the same step, and is not tried again."""


class RequeuePermit:
    """The file that lets the batch script requeue the job. Only the agent of the first node uses it."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the job's folder."""
        self._permit, self._crashes = folder / "requeue", folder / "crashes"

    def allow(self, step: int) -> None:
        """Allow a requeue after this attempt, which resumes from `step`. Raises GivenUp after too many crashes."""
        crashes = self._crashes.read_text().split() if self._crashes.exists() else []
        if crashes[-CRASHES:] == [str(step)] * CRASHES:
            raise GivenUp(f"{CRASHES} attempts in a row crashed without progress beyond step {step}")
        write_atomically(self._permit, f"{step}\n")

    def forbid(self) -> None:
        """Make this attempt the last one."""
        self._permit.unlink(missing_ok=True)
