"""A real SLURM on this machine: each node a host of `namespaces`, all state in one folder, seconds up and down."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slurm.namespaces import Host, Network

PACKAGES = "slurm-wlm munge slurmdbd mariadb-server-core iproute2 iptables"
INSTALL = f"apt-get install -y --no-install-recommends {PACKAGES}"
PROGRAMS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "iptables")
CGROUPS = Path("/sys/fs/cgroup")
CONTROL_PORT, ACCOUNTING_PORT, NODE_PORT = 17000, 17001, 17002


def not_possible_here() -> str | None:
    """Why there can be no test cluster on this machine; None where there can."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing:
        return f"no {missing[0]} here; run `make test-slurm`, or as root: {INSTALL}"
    if os.geteuid() != 0:
        return "the test cluster makes network namespaces: run as root"
    return None


class SlurmCluster:
    """A controller and nodes; a context manager."""

    def __init__(self, nodes: int = 3, *, accounting: bool = True) -> None:
        self.accounting = accounting
        # Not a folder of pytest: the paths of SLURM's sockets in it may have no more than 108 letters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        tag = secrets.token_hex(2)  # cgroups are named by node, and shared with other test clusters
        self.nodes = [f"node{tag}x{number}" for number in range(1, nodes + 1)]
        self.config = self.folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        for name in ("munge", "state", "spool", "log", "run"):
            (self.folder / name).mkdir()
        self.network = Network(["control", *self.nodes], self.folder)
        try:
            self._start()
        except BaseException:
            print(self.tails(), file=sys.stderr)
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def control(self) -> Host:
        """The host of the controller, from which users submit."""
        return self.network.hosts["control"]

    def host(self, node: str) -> Host:
        """The host of a node."""
        return self.network.hosts[node]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of SLURM's commands."""
        here = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SUBMITIT_"))
        }
        return here | {
            "SLURM_CONF": str(self.config),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str, **options: Any) -> str:
        """Run a command on the controller's host, as a user does; its output."""
        return self.control.run(*command, env=self.environment, **options)

    def sbatch(self, script: str, *options: str) -> str:
        """Submit a shell script; the job's id."""
        return self.run("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", script).strip()

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return {key: value for key, _, value in (word.partition("=") for word in words)}

    def wait_for(
        self, condition: Callable[[], Any], what: str, timeout_s: float = 120, explain: Callable[[], str] = str
    ) -> Any:
        """Wait until `condition` holds; its value. Fails with what `explain` says and the ends of the daemons' logs."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                queue = self.run("squeue")
                raise AssertionError(f"waited {timeout_s:.0f} s in vain: {what}\n{queue}{self.tails()}\n{explain()}")
            time.sleep(0.1)
        return value

    def wait_for_state(
        self, job: str, *states: str, timeout_s: float = 120, explain: Callable[[], str] = str
    ) -> dict[str, str]:
        """Wait until a job is in one of `states`."""

        def reached() -> dict[str, str] | None:
            facts = self.job(job)
            return facts if facts["JobState"] in states else None

        return dict(self.wait_for(reached, f"job {job} in {' or '.join(states)}", timeout_s, explain))

    def start_controller(self) -> None:
        """Start slurmctld, with the state that it saved where it ran before."""
        self._daemon(self.control, "slurmctld", "-D", *([] if any((self.folder / "state").iterdir()) else ["-i"]))
        self._until(lambda: "is UP" in self.run("scontrol", "ping"), "slurmctld")

    def kill_controller(self) -> None:
        """kill -9 of slurmctld."""
        for pid in self.control.processes("slurmctld", "-D"):
            os.kill(pid, 9)

    def start_node(self, node: str) -> None:
        """Start slurmd."""
        self._daemon(self.host(node), "slurmd", "-D", "-N", node)

    def replace_node(self, node: str) -> None:
        """Start a node again after a power cut."""
        address = self.host(node).address
        self.network.add(node, address)
        self.start_node(node)

    def wait_for_idle(self, nodes: Sequence[str] | None = None) -> None:
        """Wait until these nodes (all, by default) have nothing to do."""
        wanted = set(nodes or self.nodes)

        def idle() -> bool:
            lines = self.run("sinfo", "-h", "-N", "-o", "%N %T").splitlines()
            return wanted <= {name for name, state in map(str.split, lines) if state == "idle"}

        self._until(idle, f"idle nodes {sorted(wanted)}")

    def clear(self) -> None:
        """Cancel all jobs, and wait for all nodes."""
        self.run("scancel", "--user=root")
        self._until(lambda: not self.run("squeue", "-h"), "an empty queue")
        self.wait_for_idle()

    def tails(self, lines: int = 8) -> str:
        """The ends of the daemons' logs."""
        parts = []
        for file in sorted((self.folder / "log").glob("*.log")):
            parts.append(f"--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-lines:]))
        return "\n".join(parts)

    def close(self) -> None:
        """Stop everything, and remove the cgroups that the kernel keeps."""
        self.network.close()
        for daemon in self._daemons:
            daemon.wait(timeout=30)
        for node in self.nodes:
            for group in (*CGROUPS.glob(f"*/slurm_{node}"), *CGROUPS.glob(f"*/slurm/{node}")):
                for folder in sorted((group, *filter(Path.is_dir, group.rglob("*"))), reverse=True):
                    _remove_group(folder)
        shutil.rmtree(self.folder)

    def _start(self) -> None:
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self._write_config()
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon(
            self.control, "munged", "--foreground", "--force", "--num-threads=4", f"--socket={munge / 'sock'}", *files
        )
        self._until((munge / "sock").exists, "munged")
        if self.accounting:
            self._start_accounting()
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_idle()

    def _start_accounting(self) -> None:
        data, sock = self.folder / "db", self.folder / "db.sock"
        data.mkdir()
        options = ["--no-defaults", "--user=root", f"--datadir={data}", "--skip-grant-tables", "--skip-networking"]
        options += ["--skip-log-bin", "--innodb-buffer-pool-size=16M", "--innodb-log-file-size=8M"]
        tables = Path("/usr/share/mysql/mysql_system_tables.sql").read_text()
        first = "create database mysql;\nuse mysql;\nSET @auth_root_socket=NULL;\n"
        self.control.run("mariadbd", *options, "--bootstrap", stdin=None, input=first + tables, env=self.environment)
        self._daemon(self.control, "mariadbd", *options, f"--socket={sock}")
        self._until(sock.exists, "mariadbd")
        self._daemon(self.control, "slurmdbd", "-D", environment={"MYSQL_UNIX_PORT": str(sock)})
        self._until(lambda: f":{ACCOUNTING_PORT}" in self.run("ss", "-ltn"), "slurmdbd")
        self.run("sacctmgr", "-Q", "-i", "add", "cluster", "test")

    def _write_config(self) -> None:
        control, sock = self.control.address, self.folder / "munge" / "sock"
        lines = [
            "ClusterName=test",
            f"SlurmctldHost=control({control})",
            f"SlurmctldPort={CONTROL_PORT}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            f"AuthInfo=socket={sock},cred_expire=5",  # every requeue waits this long; 5 is the minimum
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool/%n",
            f"SlurmctldPidFile={self.folder}/run/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/run/slurmd-%n.pid",
            f"SlurmctldLogFile={self.folder}/log/slurmctld.log",
            f"SlurmdLogFile={self.folder}/log/slurmd-%n.log",
            "SlurmctldParameters=preempt_send_user_signal",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "ProctrackType=proctrack/cgroup",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=bf_interval=1,sched_interval=1",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "JobAcctGatherType=jobacct_gather/none",
            "JobCompType=jobcomp/none",
            "ReturnToService=2",
            "SlurmctldTimeout=10",
            "SlurmdTimeout=10",
            "MessageTimeout=5",
            "TCPTimeout=2",
            "InactiveLimit=0",
            "KillWait=5",
            "MinJobAge=600",
            "JobRequeue=1",
            "SlurmdParameters=config_overrides",
        ]
        if self.accounting:
            lines += [
                "AccountingStorageType=accounting_storage/slurmdbd",
                f"AccountingStorageHost={control}",
                f"AccountingStoragePort={ACCOUNTING_PORT}",
                f"AccountingStoragePass={sock}",
            ]
        for node in self.nodes:
            address = self.host(node).address
            lines.append(
                f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={NODE_PORT} CPUs=2 RealMemory=4000"
            )
        lines += [
            "PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60",
            "PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=off",
        ]
        self.config.write_text("\n".join(lines) + "\n")
        (self.folder / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={CGROUPS}\nCgroupAutomount=no\n"
        )
        accounting = self.folder / "slurmdbd.conf"
        accounting.touch(mode=0o600)
        accounting.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={sock}\nDbdHost=control\nDbdAddr={control}\n"
            f"DbdPort={ACCOUNTING_PORT}\nSlurmUser=root\nStorageType=accounting_storage/mysql\nStorageLoc=accounting\n"
            f"LogFile={self.folder}/log/slurmdbd.log\nPidFile={self.folder}/run/slurmdbd.pid\n"
        )

    def _daemon(self, host: Host, *command: str, environment: dict[str, str] | None = None) -> None:
        output = (self.folder / "log" / f"{command[0]}-{host.name}.out").open("ab")
        with output:
            self._daemons.append(
                subprocess.Popen(
                    host.command(*command),
                    env=self.environment | (environment or {}),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            )

    def _until(self, condition: Callable[[], Any], what: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if condition():
                    return
                error: Exception | None = None
            except RuntimeError as failed:
                error = failed
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} after {timeout_s:.0f} s: {error or ''}\n{self.tails()}")
            time.sleep(0.05)


def _remove_group(folder: Path) -> None:
    """Remove a cgroup; its last processes may take a moment to go."""
    for _ in range(100):
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.05)
