"""The pre-flight: what would make a start fail, found before rank 0 builds anything, with a line that says what it is.

    reach   each node                  names of all nodes resolve
            each node ──▶ first node   over the port that torchrun will use
            each node ──▶ each node    a connection to any port, as NCCL and gloo will make
    check   first node                 the run directory has room
            each node ──▶ first node   versions, code, config, datasets are the same
            all GPUs                   `cluster.collective`: each answers, and an all-reduce is right

A recipe's `setup` runs between the two: it may take minutes, and bring a dataset to the node.

The nodes talk over plain sockets, one JSON object a line: where this fails, torch would wait for minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from cluster import processes
from cluster.allocation import Place
from cluster.launch import Training, elastic
from cluster.node_facts import differences, facts_of
from sharebert_common.errors import BadInput

REACH_S = 30.0
"""How long nodes may take to reach the first one: they do not start at the same moment."""
SETUP_S = 3600.0
"""How much longer than another one a node's setup may take."""
CONNECT_S = 5.0
"""How long a connection between two nodes may take."""
COLLECTIVE_S = 180.0
"""How long the all-reduce may take, with the import of PyTorch."""
WRITTEN_BYTES = 16 << 20
"""What the first node writes to the run directory: a quota does not show in the file system's free space."""


def reach(place: Place) -> None:
    """Check the network between the nodes. Every node calls this.

    Raises BadInput, with the same line on every node that can be reached.
    """
    began = time.monotonic()
    _names_resolve(place)
    _exchange(place, {}, None, REACH_S)
    if place.is_first:
        print(f"pre-flight: {len(place.nodes)} nodes reach each other, {time.monotonic() - began:.1f} s", flush=True)


def check(training: Training, place: Place, environment: dict[str, str]) -> None:
    """Check what each node has, and its devices. Every node calls this, after `reach`.

    Raises BadInput, with the same line on every node.
    """
    _exchange(place, facts_of(training, environment), _no_room(training) if place.is_first else None, SETUP_S)
    began = time.monotonic()
    _collective(training, place, environment)
    if place.is_first:
        print(f"pre-flight: all devices answer, {time.monotonic() - began:.1f} s", flush=True)


def _names_resolve(place: Place) -> None:
    for name in place.nodes:
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            raise BadInput(
                f"pre-flight: {place.name} does not know the address of node '{name}' ({error.strerror}); "
                "its name must resolve on every node, through DNS or /etc/hosts"
            ) from error


def _exchange(place: Place, facts: dict[str, Any], problem: str | None, patience_s: float) -> None:
    """Compare facts with the first node, which may have a problem, then try a connection to every other one."""
    with _listening(0) as door:
        facts = facts | {"node": place.node, "door": door.getsockname()[1]}
        if place.is_first:
            _collect(place, facts, problem, patience_s)
        else:
            _report(place, facts, patience_s)


def _collect(place: Place, ours: dict[str, Any], problem: str | None, patience_s: float) -> None:
    """The first node's part: hear all others, compare, tell them where the others are, and the verdict."""
    others = range(1, len(place.nodes))
    with ExitStack() as stack:
        try:
            hall = stack.enter_context(_listening(place.port))
        except OSError as error:
            raise BadInput(
                f"pre-flight: port {place.port} on {place.name} is taken ({error.strerror}); set `port` in the recipe"
            ) from error
        lines: dict[int, IO[str]] = {}
        theirs = {0: ours}
        deadline = time.monotonic() + patience_s
        while len(lines) < len(others) and (left := deadline - time.monotonic()) > 0:
            hall.settimeout(left)
            try:
                line = stack.enter_context(hall.accept()[0]).makefile("rw", encoding="utf-8")
                facts = _read(line)
            except (OSError, ValueError):
                continue
            lines[facts["node"]], theirs[facts["node"]] = line, facts
        problems = [problem]
        silent = [place.nodes[number] for number in others if number not in lines]
        if silent:
            problems.append(
                f"{', '.join(silent)} did not report to {place.nodes[0]} on port {place.port} within {patience_s:.0f} s"
            )
        problems += [differences(place, number, ours, theirs[number]) for number in sorted(lines)]
        problem = next(filter(None, problems), None)
        doors = {} if problem else {number: facts["door"] for number, facts in theirs.items()}
        _tell(lines, {"problem": problem, "doors": doors})
        if problem is None:
            found = [_unreachable(place, doors), *(_read(line)["problem"] for line in lines.values())]
            problem = next(filter(None, found), None)
            _tell(lines, {"problem": problem})
        if problem:
            raise BadInput(f"pre-flight: {problem}")


def _report(place: Place, facts: dict[str, Any], patience_s: float) -> None:
    """The other nodes' part."""
    deadline, first = time.monotonic() + patience_s, place.nodes[0]
    while True:
        try:
            connection = socket.create_connection((first, place.port), timeout=CONNECT_S)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise BadInput(
                    f"pre-flight: {place.name} cannot reach {first} on port {place.port} ({error}); "
                    "open the ports between the nodes, or set `port` in the recipe to one that is open"
                ) from error
            time.sleep(0.2)
    with connection:
        connection.settimeout(patience_s + len(place.nodes) * CONNECT_S)
        line = connection.makefile("rw", encoding="utf-8")
        try:
            _write(line, facts)
            answer = _read(line)
            if answer["problem"] is None:
                doors = {int(number): door for number, door in answer["doors"].items()}
                _write(line, {"problem": _unreachable(place, doors)})
                answer = _read(line)
        except (OSError, ValueError) as error:
            raise BadInput(f"pre-flight: {place.name} lost its connection to {first} ({error})") from error
        if answer["problem"]:
            raise BadInput(f"pre-flight: {answer['problem']}")


def _unreachable(place: Place, doors: dict[int, int]) -> str | None:
    """Try every other node's door; what is wrong."""
    for number, port in doors.items():
        if number == place.node:
            continue
        try:
            socket.create_connection((place.nodes[number], port), timeout=CONNECT_S).close()
        except OSError as error:
            return (
                f"{place.name} cannot reach {place.nodes[number]} on port {port} ({error}); "
                "workers use any port: open all of them between the nodes"
            )
    return None


def _no_room(training: Training) -> str | None:
    """What is wrong with the run directory."""
    wanted = int(training.recipe.free_gb * 1e9)
    file = training.run / "cluster" / ".preflight"
    try:
        free = shutil.disk_usage(training.run).free
        if free < wanted:
            return (
                f"{training.run}: {free / 1e9:.2f} GB free, the recipe wants {training.recipe.free_gb:g} (free_gb); "
                "make room, or choose another directory"
            )
        with file.open("wb") as out:
            out.write(bytes(WRITTEN_BYTES))
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        return f"{training.run}: cannot be written to ({error.strerror})"
    finally:
        file.unlink(missing_ok=True)
    return None


def _collective(training: Training, place: Place, environment: dict[str, str]) -> None:
    """Let every process of every node use its device, and all of them make an all-reduce."""
    port = place.port + 1
    command = elastic(training.recipe, place, ["cluster.collective"], port=port, max_restarts=0)
    running = processes.start(command, environment)
    try:
        code = running.wait(timeout=COLLECTIVE_S)
    except subprocess.TimeoutExpired as error:
        raise BadInput(
            f"pre-flight: the all-reduce between {len(place.nodes)} nodes did not end within {COLLECTIVE_S:.0f} s; "
            "look at NCCL_SOCKET_IFNAME and the fabric, NCCL_DEBUG=INFO says more"
        ) from error
    finally:
        processes.end(running)
    if code:
        raise BadInput(f"pre-flight: a device or the all-reduce failed on or beside {place.name}; see the lines above")


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """A socket that takes connections on a port of all addresses."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6) as server:
        yield server


def _read(line: IO[str]) -> dict[str, Any]:
    """The other side's next object. Raises ValueError where it is gone."""
    text = line.readline()
    if not text:
        raise ValueError("closed by the other side")
    return dict(json.loads(text))


def _write(line: IO[str], value: dict[str, Any]) -> None:
    line.write(json.dumps(value) + "\n")
    line.flush()


def _tell(lines: dict[int, IO[str]], value: dict[str, Any]) -> None:
    """Tell all other nodes; one that is gone does not keep the others from hearing it."""
    for line in lines.values():
        try:
            _write(line, value)
        except OSError as error:
            print(f"pre-flight: a node left ({error})", file=sys.stderr, flush=True)
