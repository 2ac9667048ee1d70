"""torchrun by hand on two hosts without SLURM: the lines of docs/cluster.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm.namespaces import Network
from tiny_runs import log_of, train_arguments

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

DOCS = Path(__file__).parents[2] / "docs" / "cluster.md"


def lines_of_the_docs() -> list[str]:
    """What docs/cluster.md says to type on the first and on the second node."""
    return re.findall(r"^    (torchrun .*)$", DOCS.read_text(), re.MULTILINE)


def test_two_hosts_train_together(possible: None, dataset: Path, tmp_path: Path) -> None:
    first, second = lines_of_the_docs()
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("faults:\n  memory_probe: false\n")
    arguments = " ".join(train_arguments(dataset, tmp_path / "run", steps=20))
    network = Network(["node1", "node2"], tmp_path)
    try:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        running = []
        for name, line in (("node1", first), ("node2", second)):
            typed = line.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
            typed = typed.replace("--nproc-per-node 8", "--nproc-per-node 2")
            typed = typed.replace("sharebert-base", f"{recipe} {arguments}")
            assert str(recipe) in typed
            command = network.hosts[name].command("sh", "-c", typed)
            running.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
        for process in running:
            _, said = process.communicate(timeout=240)
            assert process.returncode == 0, said[-3000:]
    finally:
        network.close()
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, 21))
