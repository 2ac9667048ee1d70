"""Stop signals are noted, from the first on, and ignored at the end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from sharebert_common.processes import STOP_SIGNALS, StopSignals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
