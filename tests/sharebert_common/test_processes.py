"""Stop signals are noted, from the first on, and ignored at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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


def test_the_memory_of_a_child_is_not_that_of_its_parent() -> None:
    """`getrusage` of a child begins at the peak of the process that started it."""
    code = "from sharebert_common.processes import peak_memory_bytes; print(peak_memory_bytes())"
    held = bytearray(b"x" * (200 << 20))
    child = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert peak_memory_bytes() > len(held) > child > 5 << 20
