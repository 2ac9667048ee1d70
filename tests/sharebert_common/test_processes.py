"""Stop signals are noted, from the first on, and ignored at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sharebert_common.processes import STOP_SIGNALS, StopSignals, peak_memory_bytes

pytestmark = pytest.mark.usefixtures("signals_restored")


def test_the_newest_signal_is_noted_and_the_first_one_announced() -> None:
    said: list[str] = []
    signals = StopSignals(on_first=lambda: said.append("first"))
    signals.catch()
    assert signals.received is None
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received == signal.SIGTERM
    assert said == ["first"]


def test_signals_are_ignored_at_the_end() -> None:
    signals = StopSignals()
    signals.catch()
    signals.ignore()
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)
    assert signals.received is None


def test_the_first_ctrl_c_is_noted_and_the_second_interrupts() -> None:
    signals = StopSignals(interrupt=True)
    signals.catch()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # as from a sweep that passes the stop on
    assert signals.received == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("interrupt", [True, False])
def test_ctrl_c_stays_ignored_where_it_was(interrupt: bool) -> None:
    """As in the background of a script; and by itself a process handles it as Python does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    StopSignals(interrupt=interrupt).catch()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
    StopSignals().catch()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_signals_do_afterwards_what_they_did_before() -> None:
    before = [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)]
    with StopSignals(interrupt=True) as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.received == signal.SIGUSR1
    assert [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)] == before


STARTED = """
import signal, sys, time
from pathlib import Path
from sharebert_common.processes import signal_on_starter_death
def note(*_):
    Path(sys.argv[1]).write_text("asked")
    sys.exit()
signal.signal(signal.SIGTERM, note)
time.sleep(float(sys.argv[2]))
signal_on_starter_death(signal.SIGTERM)
print("ready", flush=True)
time.sleep(60)
"""

STARTER = """
import subprocess, sys, time
from sharebert_common.processes import environment_for_child
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], env=environment_for_child())
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of its parent's death")
@pytest.mark.parametrize("delay_s", [0, 1])
def test_a_process_is_signalled_when_its_starter_was_killed(delay_s: int, tmp_path: Path) -> None:
    """With a delay, the starter is dead before the process can say that it wants to know."""
    note = tmp_path / "note"
    command = [sys.executable, "-c", STARTER, STARTED, str(note), str(delay_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "started\n"
        if not delay_s:
            assert starter.stdout.readline() == "ready\n"
            assert not note.exists()
        starter.kill()
        starter.stdout.read()  # to the end of both
    assert note.read_text() == "asked"


def test_the_memory_of_a_child_is_not_that_of_its_parent() -> None:
    """`getrusage` of a child begins at the peak of the process that started it."""
    code = "from sharebert_common.processes import peak_memory_bytes; print(peak_memory_bytes())"
    held = bytearray(b"x" * (200 << 20))
    child = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert peak_memory_bytes() > len(held) > child > 5 << 20
