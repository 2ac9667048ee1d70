"""What SLURM knows about a job, with or without accounting.

`scontrol` answers while the controller remembers the job (until MinJobAge after its end, 300 s by default); after that
`sacct` answers, where there is accounting. Where neither knows the job, the run's own files are all there is.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ALIVE = {
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


def job_facts(job: str) -> dict[str, str]:
    """JobState, NodeList and, from the controller, many more facts about a job; empty where it is unknown."""
    lines = _output("scontrol", "show", "job", "-o", job).splitlines()
    if lines:
        pairs = (word.partition("=") for word in lines[0].split())
        return {key: value for key, _, value in pairs}
    for line in _output("sacct", "-X", "-n", "-P", "-o", "State,NodeList", "-j", job).splitlines()[-1:]:
        state, nodes = line.split("|")[:2]
        return {"JobState": state.split()[0], "NodeList": nodes}
    return {}


def state_of(job: str, launcher: str) -> str:
    """The job's state in SLURM's words; "GONE" where it is unknown."""
    if launcher == "local":
        return "RUNNING" if _is_controller(job) else "GONE"
    return job_facts(job).get("JobState", "GONE")


def is_over(job: str, launcher: str) -> bool:
    """Whether the job has ended for good."""
    return state_of(job, launcher) not in ALIVE


def cancel(job: str) -> None:
    """Cancel a job."""
    _output("scancel", job)


def _is_controller(pid: str) -> bool:
    """Whether a process is submitit's local executor, and not another process with the same id."""
    try:
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _output(*command: str) -> str:
    """What a command of SLURM prints; nothing where it fails or is not installed."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return done.stdout if done.returncode == 0 else ""
