"""The pre-flight between nodes that are addresses of this machine."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import collective, preflight
from cluster.agent import Agent
from cluster.allocation import Allocation
from cluster.launch import Training
from cluster.node_facts import facts_of
from cluster.recipe import ClusterRecipe
from sharebert_common.errors import BadInput

NODES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def allocation_of(node: int, port: int, nodes: tuple[str, ...] = NODES) -> Allocation:
    return Allocation("1", 0, node, nodes, Path("/nowhere"), port)


def refusals(port: int, on_node: Callable[[Allocation], None], nodes: tuple[str, ...] = NODES) -> list[str]:
    """The error message of each node; empty where there is none."""
    said = [""] * len(nodes)

    def run(node: int) -> None:
        try:
            on_node(allocation_of(node, port, nodes))
        except BadInput as error:
            said[node] = str(error)

    threads = [threading.Thread(target=run, args=(node,)) for node in range(len(nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_nodes_that_reach_each_other(port: int) -> None:
    assert refusals(port, preflight.reach) == ["", "", ""]


def test_a_name_that_does_not_resolve(port: int) -> None:
    said = refusals(port, preflight.reach, ("127.0.0.1", "no-such-node.invalid"))
    assert all("does not know the address of node 'no-such-node.invalid'" in text for text in said)


def test_a_node_that_is_silent_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "REACH_S", 1.0)
    said = refusals(port, lambda allocation: preflight.reach(allocation) if allocation.node != 1 else None)
    assert said[0] == said[2] == f"pre-flight: 127.0.0.2 did not report to 127.0.0.1 on port {port} within 1 s"


def test_a_port_that_is_closed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "REACH_S", 1.0)
    said = refusals(port, lambda allocation: preflight.reach(allocation) if allocation.node else None)
    assert f"127.0.0.3 cannot reach 127.0.0.1 on port {port}" in said[2]


def test_workers_ports_that_are_closed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.create_connection

    def refuse(address: tuple[str, int], **options: float) -> socket.socket:
        if address[0] == "127.0.0.3":
            raise ConnectionRefusedError(111, "Connection refused")
        return connect(address, **options)

    monkeypatch.setattr(socket, "create_connection", refuse)
    said = refusals(port, preflight.reach)
    assert len(set(said)) == 1
    assert "127.0.0.1 cannot reach 127.0.0.3 on port" in said[0]


def test_what_differs_is_named_on_all_nodes(port: int, tmp_path: Path, dataset: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text("{}")

    def exchange(allocation: Allocation) -> None:
        training = Training(tmp_path, ("pretrain",), (dataset,), ClusterRecipe())
        facts = facts_of(training, {})
        if allocation.node == 2:
            facts[f"dataset {dataset}"] = facts_of(Training(tmp_path, (), (other,), ClusterRecipe()), {})[
                f"dataset {other}"
            ]
        preflight._exchange(allocation, facts, None, 10)

    said = refusals(port, exchange)
    assert len(set(said)) == 1
    assert f"dataset {dataset} is not the same on all nodes" in said[0]
    assert "on 127.0.0.3" in said[0]


def test_a_run_directory_without_room(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    assert preflight._no_room(Training(tmp_path, (), (), ClusterRecipe(free_gb=0.0))) is None
    said = preflight._no_room(Training(tmp_path, (), (), ClusterRecipe(free_gb=1e9)))
    assert said is not None
    assert "GB free, the recipe wants 1e+09 (free_gb)" in said


@pytest.mark.parametrize("floor", ["0", "1.5"])
def test_a_rank_alone_passes_any_floor(floor: str, port: int) -> None:
    """It sends nothing, so there is nothing to measure."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "cluster.collective", floor]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "over 1 cpu ranks: right" in done.stdout


def test_the_bus_bandwidth_is_what_a_rank_sends() -> None:
    """In a ring of n ranks each sends n - 1 of n parts twice: once to add them up, once to pass the sums on."""
    assert collective.bus_bandwidth(1_000_000_000, 2, 1.0) == pytest.approx(1.0)
    assert collective.bus_bandwidth(1_000_000_000, 8, 0.5) == pytest.approx(3.5)
    assert collective.bus_bandwidth(1_000_000_000, 1, 1.0) == 0


@pytest.mark.parametrize(("floor", "code"), [(1.25, 0), (1.27, 1)])
def test_a_network_below_the_floor_fails(
    floor: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 of four; each all-reduce of 8 MiB takes 10 ms on the clock of this test: 2^23 · 1.5 / 0.01 bytes/s."""
    ticks = iter(range(100))
    fakes: dict[str, Callable[..., object]] = {
        "init_process_group": lambda *_, **__: None,
        "destroy_process_group": lambda: None,
        "get_rank": lambda: 0,
        "get_world_size": lambda: 4,
        "barrier": lambda: None,
        "all_reduce": lambda values: values.fill_(1 + 2 + 3 + 4),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(collective.dist, name, fake)
    monkeypatch.setattr("cluster.collective.time.perf_counter", lambda: next(ticks) * 0.01)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert collective.main(floor) == code
    said = capsys.readouterr()
    assert "all-reduce of 8 MiB over 4 cpu ranks: right, 1.26 GB/s" in said.out
    assert ("reaches 1.26 GB/s, below min_bandwidth (1.27 GB/s)" in said.err) == bool(code)


def test_a_node_whose_gpus_are_gone_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A broken driver: the job asked for GPUs, and its workers would train on CPUs."""
    agent = Agent(Training(tmp_path, (), (), ClusterRecipe(gpus_per_node=8)))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", **agent._environment()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert collective.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("pre-flight: rank 0 on ")
    assert f"8 GPUs were asked for, and PyTorch sees 0 on node {platform.node()}" in said


def stranger(port: int, said: bytes) -> socket.socket:
    """A connection to the first node, which stays open."""
    deadline = time.monotonic() + 5
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    connection.sendall(said)
    return connection


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\xff\n",
        b"5\n",
        b"{}\n",
        b'{"attempt": "1.0", "node": 7, "door": 1}\n',
        b'{"attempt": "1.0", "node": 1}\n',
        b'{"attempt": "2.0", "node": 1, "door": 1}\n',
    ],
)
def test_a_stranger_at_the_port_does_no_harm(port: int, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port scanner, a health check, a node of another job: it comes first, and stays."""
    monkeypatch.setattr(preflight, "CONNECT_S", 0.5)
    connected = threading.Event()
    open_now: list[socket.socket] = []

    def on_node(allocation: Allocation) -> None:
        if allocation.node == 1:
            open_now.append(stranger(port, said))
            connected.set()
        elif allocation.node == 2:
            connected.wait()
        preflight.reach(allocation)

    assert refusals(port, on_node) == ["", "", ""]
    open_now[0].close()


def test_a_node_that_dies_in_the_meeting_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "CONNECT_S", 0.5)

    def on_node(allocation: Allocation) -> None:
        if allocation.node != 1:
            return preflight.reach(allocation)
        facts = {"attempt": allocation.attempt, "node": 1, "door": port}
        with stranger(port, json.dumps(facts).encode() + b"\n") as connection:
            connection.recv(1 << 16)
        return None

    said = refusals(port, on_node)
    assert said[0] == said[2]
    assert "127.0.0.1 lost its connection to 127.0.0.2 (closed by the other side)" in said[0]


def test_what_answers_at_the_port_is_no_node(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as server:

        def serve() -> None:
            with server.accept()[0] as connection:
                connection.sendall(b"[]\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(BadInput, match=r"127\.0\.0\.2 lost its connection to 127\.0\.0\.1 on port"):
            preflight.reach(allocation_of(1, port))
        thread.join()


def test_a_door_stands_more_than_a_hundred_nodes() -> None:
    if int(Path("/proc/sys/net/core/somaxconn").read_text()) < 200:
        pytest.skip("this kernel keeps fewer connections waiting")
    with preflight._listening(0) as door:
        for _ in range(200):
            socket.create_connection(("127.0.0.1", door.getsockname()[1]), timeout=0.5).close()
