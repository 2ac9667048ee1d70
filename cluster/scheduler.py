"""What SLURM knows about a job, with or without accounting.

`scontrol` answers while the controller remembers the job (until MinJobAge after its end, 300 s by default); after that
`sacct` answers, where there is accounting. A job that the controller does not know is over: where accounting does not
know it either, the run's own files are all there is. A controller that does not answer says nothing about the job.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from sharebert_common.errors import BadInput

_NO_SUCH_JOB = re.compile(r"Invalid job id|Job \S+ not found")
"""What scontrol says of a job that the controller does not know; the second of a task of an array that it knows yet."""

UNKNOWN = "UNKNOWN"
"""State of a job where SLURM does not answer; it counts as alive."""
GONE = "GONE"
"""State of a job that SLURM has forgotten."""

ALIVE = {
    UNKNOWN,
    "PENDING",
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "SUSPENDED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
}


def job_facts(job: str, launcher: str) -> dict[str, str]:
    """JobState (in SLURM's words, GONE or UNKNOWN) of a job, NodeList where it is known, and more facts."""
    if launcher == "local":
        return {"JobState": "RUNNING" if _is_controller(job) else GONE, "NodeList": "this machine"}
    found, error = _ask("scontrol", "show", "job", "-o", job)
    if found:
        pairs = (word.partition("=") for word in found.splitlines()[0].split())
        return {"JobState": UNKNOWN} | {key: value for key, _, value in pairs}
    for line in _ask("sacct", "-X", "-n", "-P", "-o", "State,NodeList", "-j", job)[0].splitlines()[-1:]:
        state, nodes = line.split("|")[:2]
        return {"JobState": state.split()[0], "NodeList": nodes}
    # Without accounting sacct fails, with a job of long ago it may say nothing; the controller knows what is alive.
    return {"JobState": GONE if _NO_SUCH_JOB.search(error) else UNKNOWN}


def state_of(job: str, launcher: str) -> str:
    """The job's state in SLURM's words, GONE or UNKNOWN."""
    return job_facts(job, launcher)["JobState"]


def is_over(job: str, launcher: str) -> bool:
    """Whether the job has ended for good."""
    return state_of(job, launcher) not in ALIVE


def cancel(job: str) -> None:
    """Cancel a job. Raises BadInput where SLURM does not do it."""
    if error := _ask("scancel", job)[1]:
        raise BadInput(f"job {job}: scancel failed ({error})")


def _is_controller(pid: str) -> bool:
    """Whether a process is submitit's local executor, and not another process with the same id."""
    try:
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _ask(*command: str) -> tuple[str, str]:
    """What a command of SLURM prints, and, where it fails or is not installed, why, in a line."""
    if shutil.which(command[0]) is None:
        return "", f"no {command[0]} on this machine"
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return done.stdout, ""
    return "", " ".join(f"{done.stderr} {done.stdout}".split()) or f"exit code {done.returncode}"
