"""Whether a job that ended is requeued.

The batch script decides at its end, because everything else may be dead by then: an agent that was killed, a node
without Python. It decides by files in the job's folder. An agent that begins an attempt writes the file `requeue`
with the step that the attempt resumes from, and removes the file when the job needs no further attempt. The script
requeues the job where it finds the file, and removes it: a job whose agent never runs is not requeued for ever. Where
the attempt failed, the script appends the file to `crashes`; the third crash of an attempt from the same step is the
last. What SLURM ends (preemption, a failed node, the time limit) is no failure, and is never counted.

SLURM ends a job at its EndTime: that of the time limit, or, once it announced a preemption, the end of the grace time.
A person who cancels a job does so earlier. `scontrol` calls both jobs COMPLETING, and shows EndTime as it was before
only before the end: so a watcher beside srun keeps it in the file `deadline`. The watcher also asks for the requeue
when the deadline comes, because SLURM kills the script KillWait later where workers do not end.

The lines are plain shell, so that they work outside of the container that the agents may run in.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from pathlib import Path

from sharebert_common.errors import BadInput
from sharebert_common.files import write_atomically
from sharebert_common.processes import StopSignals

CRASHES = 3
"""After so many crashes in a row at the same step the run has failed."""

BEFORE = r"""
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}
folder=FOLDER/$job
mkdir -p "$folder"; rm -f "$folder"/{deadline,signalled,announced,asked}
# Get the facts of the job. While the controller is down, ask again: for an hour, or until SLURM kills this script.
ask() {
    local pause=1 tries=0
    until facts=$(scontrol show job -o "$job"); do
        [ $((tries += 1)) -lt 120 ] && command -v scontrol > /dev/null || return 1
        sleep $pause; pause=$((pause < 30 ? 2 * pause : 30))
    done
}
fact() { tr ' ' '\n' <<< "$facts" | sed -n "s/^$1=//p" | head -n 1; }
seconds() { date -d "$(fact "$1" | grep . || echo unknown)" +%s 2> /dev/null || echo 9999999999; }
requeue() {
    local pause
    for pause in 1 5 15 30; do
        ask && scontrol requeue "$job" && return
        sleep $pause
    done
    return 1
}
# EndTime is a deadline only while the job runs; afterwards it is the time at which somebody ended it.
look() {
    ask && [ "$(fact JobState)" = RUNNING ] || return
    seconds EndTime > "$folder/.deadline"; mv "$folder/.deadline" "$folder/deadline"
}
over() { [ "$(date +%s)" -ge "$(cat "$folder/deadline" 2> /dev/null || echo 9999999999)" ]; }
watch() {
    trap '' TERM USR1 USR2
    look
    while sleep 1; do
        [ -e "$folder/signalled" ] && [ ! -e "$folder/announced" ] && look && touch "$folder/announced"
        # Somebody may have raised the time limit, so look again. A job that is over for good has no file `requeue`.
        if over && { look; over; } && [ -e "$folder/requeue" ]; then
            requeue && touch "$folder/asked"
            return
        fi
    done
}
# A signal to the job must not end this script before its last lines; what it starts gets the signal all the same.
trap : TERM USR1 USR2
watch & watcher=$!; disown
""".strip().splitlines()
"""Lines of the batch script before srun. FOLDER stands for the parent of the jobs' folders."""

AFTER = r"""
code=$?
kill -KILL $watcher 2> /dev/null
cd "$folder" || exit $code
if [ -e requeue ]; then
    ask
    state=$(fact JobState)
    [ $code -ne 0 ] && [ "$state" = RUNNING ] && cat requeue >> crashes
    rm -f requeue
    [ -e asked ] && exit 0
    # A preemption without grace time ends the job at once: there was no EndTime to look at before.
    preempted=$(seconds PreemptTime) ended=$(seconds EndTime)
    [ -e announced ] || [ $preempted -eq 9999999999 ] || [ $ended -gt $((preempted + 1)) ] || state=PREEMPTED
    if [ "$state" = RUNNING ] || [ "$state" = PREEMPTED ] || over; then
        echo "exit code $code: requeue"
        requeue && exit 0
    fi
fi
exit $code
""".strip().splitlines()
"""Lines of the batch script after srun."""


class GivenUp(RuntimeError):
    """The run crashed too often at the same step, and is not tried again."""


class RequeuePermit:
    """The files by which an agent tells the batch script what to do. Only the agent of the first node uses them."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the job's folder."""
        self._permit, self._crashes, self._signalled = folder / "requeue", folder / "crashes", folder / "signalled"

    def allow(self, step: int) -> None:
        """Allow a requeue after this attempt, which resumes from `step`. Raises GivenUp after too many crashes."""
        crashes = self._crashes.read_text().split() if self._crashes.exists() else []
        if crashes[-CRASHES:] == [str(step)] * CRASHES:
            raise GivenUp(f"{CRASHES} attempts in a row crashed without progress beyond step {step}")
        write_atomically(self._permit, f"{step}\n")

    def forbid(self) -> None:
        """Make this attempt the last one."""
        self._permit.unlink(missing_ok=True)

    def interrupted(self, error: BadInput, signals: StopSignals) -> bool:
        """Whether what was refused may have been refused because of a stop signal; if not, this attempt is the last.

        SLURM signals the other nodes and the rest of the step as well, so after a signal anything may be missing. The
        next attempt tells: what is wrong in truth, it finds again.
        """
        print(f"error: {error}", file=sys.stderr, flush=True)
        if signals.received is None:
            self.forbid()
            return False
        print(
            f"{signal.Signals(signals.received).name} came before it: the job may be requeued",
            file=sys.stderr,
            flush=True,
        )
        return True

    def note_signal(self) -> None:
        """Let the script look for the time at which SLURM will end the job: a signal announced an end."""
        with suppress(OSError):
            self._signalled.touch()
