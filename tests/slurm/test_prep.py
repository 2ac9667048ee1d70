"""`sharebert prep` as an array gives the dataset of one process, byte for byte."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from made_texts import made_texts, write_jsonl
from slurm.runs import Run
from slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

TASKS = 3


def files_of(dataset: Path) -> dict[str, bytes]:
    return {str(file.relative_to(dataset)): file.read_bytes() for file in dataset.rglob("*") if file.is_file()}


def test_an_array_on_three_nodes_makes_the_same_dataset(run: Run, slurm: SlurmCluster, tmp_path: Path) -> None:
    """One task of the first array is killed; it is requeued, and the dataset does not show it."""
    texts = made_texts(1000)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [f"{text} {number}" for number in range(16) for text in texts])
    recipe = tmp_path / "prep.yaml"
    recipe.write_text(f"source: {corpus}\nseq_len: 64\nvalidation: 20\ntokenizer:\n  train:\n    vocab_size: 600\n")
    alone, array = tmp_path / "alone", tmp_path / "array"
    run.sharebert("prep", str(recipe), f"output={alone}", "workers=1", timeout=120)
    said = run.sharebert(
        "submit", "--stage=prep", str(recipe), f"output={array}", "workers=1",
        f"--cluster={run.cluster}", f"--nodes={TASKS}", "--procs-per-node=1",
    )  # fmt: skip
    jobs = [line.split()[-1] for line in said.splitlines()]
    assert len(jobs) == 3, "an array for encode, one for pack, and the merge"

    def victim() -> list[int]:
        return [pid for node in slurm.nodes for pid in slurm.host(node).processes("sharebert_cli prep", "--task=1/3")]

    os.kill(slurm.wait_for(victim, "task 1")[0], signal.SIGKILL)
    logs = array.with_name("array.jobs")
    slurm.wait_for_state(jobs[-1], "COMPLETED", "FAILED", timeout_s=240)
    said = "\n".join(file.read_text() for file in sorted(logs.glob("*/*.out")))
    assert slurm.job(jobs[-1])["JobState"] == "COMPLETED", said
    assert "sharebert prep ended with exit code -9" in said
    assert (logs / f"{jobs[0]}_1" / "crashes").read_text() == "0\n"
    assert files_of(array) == files_of(alone)
