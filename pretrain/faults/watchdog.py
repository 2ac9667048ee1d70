"""A watchdog: an attempt in which some rank hangs ends, with the stacks of all ranks and the number of that rank.

A rank that hangs leaves the others waiting in a collective. So each rank has a thread that checks how long ago its
training last made progress, and tells the others through a small file, RUN/heartbeats/rank-00000.json. That takes no
collective, and no answer of the rank that hangs. When there was no progress for `hang_s`, each rank writes its stacks
to the log and says which rank is behind; then it exits with code 1, so that torchrun restarts the ranks.

Time in which the process itself was suspended (SIGSTOP, `scontrol suspend`, a laptop's lid) does not count.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pretrain.distributed import World
from pretrain.run.folder import RunFolder

T = TypeVar("T")

BEATS_PER_LIMIT = 10
"""How many times within `hang_s` a rank checks, and writes its file."""


class Watchdog:
    """Watches one rank while its block runs. The training calls `at`; a thread does the rest."""

    def __init__(self, run: RunFolder, world: World, hang_s: float) -> None:
        """`hang_s` of 0 watches nothing."""
        self._run, self._world, self._hang_s = run, world, hang_s
        self._moves, self._place, self._moved, self._allowed_s = 0, "start", time.monotonic(), hang_s
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watchdog:
        """Start watching."""
        if self._hang_s:
            self._moved = time.monotonic()
            self._run.heartbeats.mkdir(parents=True, exist_ok=True)
            self._write()
            faulthandler.register(signal.SIGQUIT, file=2, all_threads=True)  # stacks, for the guard and for people
            guard = [sys.executable, "-S", "-E", str(Path(__file__).with_name("guard.py")), str(os.getpid())]
            self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, bufsize=0)
            self._tell_guard(self._hang_s)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop watching."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            self._guard.wait()
            self._guard = None

    def at(self, place: str) -> None:
        """The training made progress, and is now at `place`."""
        self._moves, self._place, self._moved = self._moves + 1, place, time.monotonic()

    def at_each(self, place: str, items: Iterable[T]) -> Iterator[T]:
        """The items one by one: at each the training made progress, and is at `place`."""
        for number, item in enumerate(items):
            self.at(f"{place}, block {number}")
            yield item

    @contextmanager
    def patient(self, place: str, seconds: float) -> Iterator[None]:
        """At a `place` where waiting for another `seconds` is ordinary."""
        self.at(place)
        self._allowed_s = self._hang_s + seconds
        try:
            yield
        finally:
            self.at(place)
            self._allowed_s = self._hang_s

    def _watch(self) -> None:
        tick_s = self._hang_s / BEATS_PER_LIMIT
        while True:
            slept_from = time.monotonic()
            if self._over.wait(tick_s):
                return
            now = time.monotonic()
            suspended_s = now - slept_from - tick_s
            if suspended_s > tick_s:
                self._moved = min(now, self._moved + suspended_s)
            still_s = now - self._moved
            self._tell_guard(self._allowed_s + 2 * tick_s)
            self._write()
            if still_s > self._allowed_s:
                self._end(still_s, tick_s)

    def _tell_guard(self, seconds: float) -> None:
        """Python code runs here, and should run again within `seconds`."""
        if self._guard is not None and self._guard.stdin is not None:
            with suppress(OSError):  # somebody ended it
                self._guard.stdin.write(f"{seconds}\n".encode())

    def _end(self, still_s: float, tick_s: float) -> None:
        """Say what is known, and exit without waiting for any rank."""
        me = self._world.rank
        lines = [f"rank {me} has not moved for {still_s:.0f} s, at: {self._place}"]
        lines += [f"rank {me}: {line}" for line in self._stacks()]
        self._run.say("\n".join(lines))
        time.sleep(tick_s)  # for the last files of the others
        behind = self._who_is_behind()
        self._run.say(f"rank {me}: {behind}")
        try:
            if self._world.is_main:
                self._run.fail(f"no progress for {still_s:.0f} s; {behind}", crash=True)
            time.sleep(tick_s)  # torchrun ends all ranks once one is gone: let all have their say
        finally:
            os._exit(1)

    def _stacks(self) -> list[str]:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = []
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                lines.append(f"thread {names.get(ident, ident)}")
                lines += [line for entry in traceback.format_stack(frame) for line in entry.rstrip().splitlines()]
        return lines

    def _who_is_behind(self) -> str:
        """The ranks whose file is old (frozen, or gone), else those with the least progress."""
        now, silent, moves, places = time.time(), [], {}, {}
        for rank in range(self._world.world_size):
            try:
                beat = json.loads(_file(self._run, rank).read_text(encoding="utf-8"))
                moves[rank], places[rank] = beat["moves"], beat["place"]
                if now - beat["time"] > self._hang_s / 2:
                    silent.append(f"rank {rank} (on {beat['host']}, silent for {now - beat['time']:.0f} s)")
            except (OSError, ValueError, KeyError):
                silent.append(f"rank {rank} (no heartbeat)")
        if silent:
            return "frozen or gone: " + ", ".join(silent)
        least = min(moves.values())
        if least == max(moves.values()):
            return f"all ranks stand at the same place: {places[0]}"
        return "behind the others: " + ", ".join(
            f"rank {rank} (at: {places[rank]})" for rank, count in moves.items() if count == least
        )

    def _write(self) -> None:
        beat = {"moves": self._moves, "place": self._place, "time": time.time(), "host": os.uname().nodename}
        path = _file(self._run, self._world.rank)
        temporary = path.with_suffix(".partial")
        try:
            temporary.write_text(json.dumps(beat), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            self._run.say(f"{path}: {error.strerror}")


def _file(run: RunFolder, rank: int) -> Path:
    return run.heartbeats / f"rank-{rank:05d}.json"
