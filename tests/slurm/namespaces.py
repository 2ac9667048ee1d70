"""Hosts that share one kernel: each has a name, an address and processes of its own.

A host is a set of namespaces (network, hostname, mounts, process ids). Killing its first process is a
power cut: the kernel kills every process of the host with it. When the processes of a host are gone, so are its network
and its mounts: nothing is left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sharebert_common.processes import signal_on_parent_death

SUBNET = "10.77.0"


class Host:
    """One host. Every host of a `Network` reaches the others by address, and by name through `hosts`."""

    def __init__(self, name: str, address: str, hosts: Path) -> None:
        """`hosts` is the file that the host sees as /etc/hosts."""
        self.name, self.address = name, address
        first = f"hostname {name}; mount --bind {hosts} /etc/hosts; ip link set lo up; echo up; exec sleep infinity"
        own = ["unshare", "--net", "--uts", "--mount", "--pid", "--mount-proc"]
        self._holder = subprocess.Popen(
            [*own, "--fork", "--kill-child", "sh", "-c", first],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # unshare complains when its child is killed
            stdin=subprocess.DEVNULL,
            text=True,
            preexec_fn=_die_with_parent,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "up\n":
            raise RuntimeError(f"{name}: no namespaces here: {self._holder.communicate()[1]}")
        self.pid = int(Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()[0])

    def command(self, *command: str) -> list[str]:
        """What runs `command` on this host; the host's processes have other ids outside."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", *command]

    def run(self, *command: str, **options: Any) -> str:
        """Run a command to its end; its output. Fails where it does."""
        options = {"stdin": subprocess.DEVNULL, "timeout": 300} | options
        done = subprocess.run(self.command(*command), capture_output=True, text=True, check=False, **options)
        if done.returncode:
            raise RuntimeError(
                f"{self.name}: {' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def processes(self, *words: str, but: str = "\0") -> list[int]:
        """Ids, as seen from outside, of the host's processes whose command line has all `words`, and not `but`."""
        return [
            pid
            for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
            if (line := _command_line(pid))
            and all(word in line for word in words)
            and but not in line
            and self._owns(pid)
        ]

    def cut_off(self) -> None:
        """Pull the network cable."""
        self.run("ip", "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        """Put the network cable back."""
        self.run("ip", "link", "set", "eth0", "up")

    def power_cut(self) -> None:
        """Every process of the host is gone at once."""
        if self._holder.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self._holder.wait(timeout=30)

    def _owns(self, pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/ns/uts").readlink() == Path(f"/proc/{self.pid}/ns/uts").readlink()
        except OSError:
            return False


class Network:
    """Hosts on one switch, which the first of them holds."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """`folder` is where the file of host names is written."""
        self.file = folder / "hosts"
        addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, 1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        self.file.write_text("\n".join(lines) + "\n")
        self.hosts: dict[str, Host] = {}
        try:
            for name in names:
                self.add(name, addresses[name])
        except BaseException:
            self.close()
            raise

    def add(self, name: str, address: str) -> Host:
        """Start a host; the first one holds the switch."""
        host = Host(name, address, self.file)
        if not self.hosts:
            host.run("ip", "link", "add", "eth0", "type", "bridge")
        else:
            switch = next(iter(self.hosts.values()))
            port = f"port{address.rsplit('.', 1)[1]}"
            host.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", port)
            # Run outside of the process namespace: a host does not see the processes of another.
            subprocess.run(
                ["nsenter", f"--target={host.pid}", "--net", "ip", "link", "set", port, "netns", str(switch.pid)],
                check=True,
            )
            switch.run("ip", "link", "set", port, "up", "master", "eth0")
        host.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        self.hosts[name] = host
        return host

    def close(self) -> None:
        """Switch everything off."""
        for host in self.hosts.values():
            host.power_cut()


def _die_with_parent() -> None:
    """For a new process: it dies when the tests end, however they end."""
    signal_on_parent_death(signal.SIGKILL)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
