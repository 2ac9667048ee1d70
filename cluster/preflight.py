"""The pre-flight: checks before each attempt that find in seconds what would make it fail, and say it in one line.

    reach   each node                  the names of all nodes resolve
            each node ──▶ first node   a connection to the port that torchrun will use
            each node ──▶ each node    a connection to any port, as NCCL and gloo will make
    check   first node                 the run directory has room
            each node ──▶ first node   versions, code, recipe and datasets are the same
            all GPUs                   `cluster.collective`: each computes, and an all-reduce is right

A recipe's `setup` runs between the two: it may take minutes, and may copy a dataset to the node.

The nodes talk over plain sockets, one JSON object a line. Where this fails, torch would wait for minutes.
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
from cluster.allocation import Allocation
from cluster.launch import Training, elastic
from cluster.node_facts import differences, facts_of
from sharebert_common.errors import BadInput

REACH_S = 30.0
"""How long nodes may take to reach the first node: they do not begin at the same moment."""
SETUP_S = 3600.0
"""How much longer the setup of one node may take than that of another."""
CONNECT_S = 5.0
"""How long a connection between two nodes may take."""
COLLECTIVE_S = 180.0
"""How long the all-reduce may take, with the import of PyTorch."""
BACKLOG = 4096
"""How many nodes may knock at a door, which nobody opens; Linux allows that many from 5.4 on. Python's 128 are few."""
LINE_CHARS = 1 << 20
"""Most characters of a line between nodes; a stranger may send anything."""
WRITTEN_BYTES = 16 << 20
"""How much the first node writes to the run directory as a test: free space does not show a quota."""


def reach(allocation: Allocation) -> None:
    """Check the network between the nodes. Every node calls this.

    Raises BadInput, with the same message on every node that can be reached.
    """
    began = time.monotonic()
    _names_resolve(allocation)
    _exchange(allocation, {}, None, REACH_S)
    if allocation.is_first:
        print(
            f"pre-flight: {len(allocation.nodes)} nodes reach each other, {time.monotonic() - began:.1f} s", flush=True
        )


def check(training: Training, allocation: Allocation, environment: dict[str, str]) -> None:
    """Check the files, versions and devices of each node. Every node calls this, after `reach`.

    Raises BadInput, with the same message on every node.
    """
    _exchange(allocation, facts_of(training, environment), _no_room(training) if allocation.is_first else None, SETUP_S)
    began = time.monotonic()
    _collective(training, allocation, environment)
    if allocation.is_first:
        print(f"pre-flight: all devices work, {time.monotonic() - began:.1f} s", flush=True)


def _names_resolve(allocation: Allocation) -> None:
    for name in allocation.nodes:
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            raise BadInput(
                f"pre-flight: {allocation.name} does not know the address of node '{name}' ({error.strerror}); "
                "its name must resolve on every node, through DNS or /etc/hosts"
            ) from error


def _exchange(allocation: Allocation, facts: dict[str, Any], problem: str | None, patience_s: float) -> None:
    """Compare `facts` with the first node's, then try a connection to every other node.

    `problem` is what the first node found wrong before. Each node listens on a port of its own, its door.
    """
    with _listening(0) as door:
        facts = facts | {"attempt": allocation.attempt, "node": allocation.node, "door": door.getsockname()[1]}
        if allocation.is_first:
            _collect(allocation, facts, problem, patience_s)
        else:
            _report(allocation, facts, patience_s)


def _collect(allocation: Allocation, ours: dict[str, Any], problem: str | None, patience_s: float) -> None:
    """The first node's part: collect all facts, compare them, send every node the ports of all, and the result."""
    others = range(1, len(allocation.nodes))
    with ExitStack() as stack:
        try:
            server = stack.enter_context(_listening(allocation.port))
        except OSError as error:
            raise BadInput(
                f"pre-flight: port {allocation.port} on {allocation.name} is taken ({error.strerror}); "
                "set `port` in the recipe"
            ) from error
        lines: dict[int, IO[str]] = {}
        theirs = {0: ours}
        answer_s = (len(allocation.nodes) + 1) * CONNECT_S
        deadline = time.monotonic() + patience_s
        while len(lines) < len(others) and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection = server.accept()[0]
            except OSError:
                continue
            connection.settimeout(CONNECT_S)
            line = connection.makefile("rw", encoding="utf-8")
            try:
                facts = _facts_of_a_node(allocation, line)
            except (OSError, ValueError):  # a port scanner, a health check, a node of another job
                line.close()
                connection.close()
                continue
            connection.settimeout(answer_s)
            stack.enter_context(connection)
            lines[facts["node"]], theirs[facts["node"]] = line, facts
        problems = [problem]
        silent = [allocation.nodes[number] for number in others if number not in lines]
        if silent:
            problems.append(
                f"{', '.join(silent)} did not report to {allocation.nodes[0]} on port {allocation.port} "
                f"within {patience_s:.0f} s"
            )
        problems += [differences(allocation, number, ours, theirs[number]) for number in sorted(lines)]
        problem = next(filter(None, problems), None)
        doors = {} if problem else {number: facts["door"] for number, facts in theirs.items()}
        _tell(lines, {"problem": problem, "doors": doors})
        if problem is None:
            found = [_unreachable(allocation, doors)]
            found += [_problem_of(allocation, number, line) for number, line in lines.items()]
            problem = next(filter(None, found), None)
            _tell(lines, {"problem": problem})
        if problem:
            raise BadInput(f"pre-flight: {problem}")


def _facts_of_a_node(allocation: Allocation, line: IO[str]) -> dict[str, Any]:
    """The facts that a node of this attempt sends. Raises ValueError for any other line."""
    facts = _read(line)
    if facts.get("attempt") != allocation.attempt or facts.get("node") not in range(1, len(allocation.nodes)):
        raise ValueError("no node of this attempt")
    if not isinstance(facts.get("door"), int):
        raise ValueError("no door")
    return facts


def _problem_of(allocation: Allocation, number: int, line: IO[str]) -> str | None:
    """What node `number` found wrong."""
    try:
        found = _read(line).get("problem")
    except (OSError, ValueError) as error:
        return f"{allocation.nodes[0]} lost its connection to {allocation.nodes[number]} ({error})"
    return None if found is None else str(found)


def _report(allocation: Allocation, facts: dict[str, Any], patience_s: float) -> None:
    """The part of every other node: report to the first one, and try the ports that it sends."""
    deadline, first = time.monotonic() + patience_s, allocation.nodes[0]
    while True:
        try:
            connection = socket.create_connection((first, allocation.port), timeout=CONNECT_S)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise BadInput(
                    f"pre-flight: {allocation.name} cannot reach {first} on port {allocation.port} ({error}); "
                    "open the ports between the nodes, or set `port` in the recipe to one that is open"
                ) from error
            time.sleep(0.2)
    with connection:
        connection.settimeout(patience_s + len(allocation.nodes) * CONNECT_S)
        line = connection.makefile("rw", encoding="utf-8")
        try:
            _write(line, facts)
            answer = _read(line)
            if answer.get("problem") is None:
                doors = {int(number): door for number, door in answer["doors"].items()}
                _write(line, {"problem": _unreachable(allocation, doors)})
                answer = _read(line)
        except (OSError, ValueError, LookupError, AttributeError) as error:  # the last two: what answers is no node
            raise BadInput(
                f"pre-flight: {allocation.name} lost its connection to {first} on port {allocation.port} ({error})"
            ) from error
        if answer.get("problem"):
            raise BadInput(f"pre-flight: {answer['problem']}")


def _unreachable(allocation: Allocation, doors: dict[int, int]) -> str | None:
    """Try a connection to the door of every other node; the problem, if there is one."""
    for number, port in doors.items():
        if number == allocation.node:
            continue
        try:
            socket.create_connection((allocation.nodes[number], port), timeout=CONNECT_S).close()
        except OSError as error:
            return (
                f"{allocation.name} cannot reach {allocation.nodes[number]} on port {port} ({error}); "
                "workers use any port: open all of them between the nodes"
            )
    return None


def _no_room(training: Training) -> str | None:
    """The problem of a run directory that is full or cannot be written to, if there is one."""
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


def _collective(training: Training, allocation: Allocation, environment: dict[str, str]) -> None:
    """Run `cluster.collective` on all processes of all nodes."""
    port = allocation.port + 1
    module = ["cluster.collective", str(training.recipe.min_bandwidth)]
    command = elastic(training.recipe, allocation, module, port=port, max_restarts=0)
    running = processes.start(command, environment)
    try:
        code = running.wait(timeout=COLLECTIVE_S)
    except subprocess.TimeoutExpired as error:
        raise BadInput(
            f"pre-flight: the all-reduce between {len(allocation.nodes)} nodes did not end within "
            f"{COLLECTIVE_S:.0f} s; check NCCL_SOCKET_IFNAME and the network fabric; NCCL_DEBUG=INFO tells more"
        ) from error
    finally:
        processes.end(running)
    if code:
        raise BadInput(
            f"pre-flight: a device or the all-reduce failed (seen on {allocation.name}); see the lines above"
        )


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """A socket that accepts connections on a port of all addresses; port 0 picks a free one."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    dual = family == socket.AF_INET6
    with socket.create_server(("", port), family=family, backlog=BACKLOG, dualstack_ipv6=dual) as server:
        yield server


def _read(line: IO[str]) -> dict[str, Any]:
    """The next object from the other side. Raises ValueError where there is none, OSError where it takes too long."""
    text = line.readline(LINE_CHARS)
    if not text:
        raise ValueError("closed by the other side")
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _write(line: IO[str], value: dict[str, Any]) -> None:
    line.write(json.dumps(value) + "\n")
    line.flush()


def _tell(lines: dict[int, IO[str]], value: dict[str, Any]) -> None:
    """Send `value` to all other nodes, also where one of them is gone."""
    for line in lines.values():
        try:
            _write(line, value)
        except OSError as error:
            print(f"pre-flight: a node closed its connection ({error})", file=sys.stderr, flush=True)
