"""Commands that agents run: signals reach the workers when they are ready, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster import processes
from sharebert_common.processes import STOP_SIGNALS

WORKER = """
import pathlib, signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: (pathlib.Path(sys.argv[1]).write_text("USR2"), sys.exit(0)))
pathlib.Path(sys.argv[1]).write_text("ready")
time.sleep(60)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(file: Path) -> subprocess.Popen[bytes]:
    command = processes.start([sys.executable, "-c", PARENT, WORKER, str(file)], dict(os.environ))
    wait_for(lambda: file.exists() and file.read_text() == "ready")
    return command


def test_signals_reach_the_workers_and_not_what_started_them(tmp_path: Path) -> None:
    command = start(tmp_path / "file")
    for number in STOP_SIGNALS:
        command.send_signal(number)
    time.sleep(0.2)
    assert command.poll() is None, "torchrun must survive what its workers handle"
    processes.relay(signal.SIGUSR2, command.pid)
    assert command.wait(timeout=30) == 0
    assert (tmp_path / "file").read_text() == "USR2"


def test_workers_of_a_killed_command_are_ended(tmp_path: Path) -> None:
    command = start(tmp_path / "file")
    (worker,) = processes.children(command.pid)
    command.kill()
    command.wait()
    wait_for(lambda: worker in processes.children(os.getpid()))  # an orphan comes to the agent
    processes.end(command)
    assert not Path(f"/proc/{worker}").exists()


def test_a_command_ends_when_its_agent_is_killed(tmp_path: Path) -> None:
    """The command gets SIGHUP, as torchrun does. (The tests may run under nohup, which ignores it.)"""
    code = (
        "import os, signal, time; from cluster import processes\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "command = processes.start(['sleep', '60'], dict(os.environ)); print(command.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        child = int(agent.stdout.readline())
        agent.kill()
    wait_for(lambda: not Path(f"/proc/{child}").exists() or ") Z " in Path(f"/proc/{child}/stat").read_text())
