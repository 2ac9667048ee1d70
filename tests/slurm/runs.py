"""A run on a test cluster, which is submitted and watched with the commands that users have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from slurm.slurm_cluster import SlurmCluster
from tiny_runs import log_of, losses, train_arguments

from cluster.folder import ClusterFolder

BASELINE_STEPS = 120
RECIPE = "procs_per_node: 2\ncpus_per_process: 1\nfree_gb: 0.01\nsignal_s: 1\npreflight: false\n"


class Run:
    """One run, its recipes and its job."""

    def __init__(self, slurm: SlurmCluster, dataset: Path, folder: Path) -> None:
        self.slurm, self.dataset, self.path = slurm, dataset, folder / "run"
        self.folder = ClusterFolder(self.path)
        folder.mkdir(exist_ok=True)
        self.recipe, self.cluster = folder / "tiny.yaml", folder / "cluster.yaml"
        self.recipe.write_text("precision: fp32\nfaults:\n  memory_probe: false\n")
        self.cluster.write_text(RECIPE)
        self.home = folder / "home"

    def move_to(self, folder: Path) -> None:
        """Put the run's directory into another folder."""
        self.path = folder / "run"
        self.folder = ClusterFolder(self.path)

    def sharebert(self, *arguments: str, **options: Any) -> str:
        """Run the command; its output."""
        home = ("env", f"XDG_STATE_HOME={self.home}")
        return self.slurm.run(*home, sys.executable, "-m", "sharebert_cli", *arguments, **options)

    def submission(self, *flags: str, nodes: int = 2, steps: int = BASELINE_STEPS, **overrides: Any) -> list[str]:
        """The arguments of a submission."""
        keys = {"schedule__decay": "constant", "schedule__warmup": 10} | overrides
        arguments = train_arguments(self.dataset, self.path, steps=steps, **keys)
        return ["submit", str(self.recipe), *arguments, f"--cluster={self.cluster}", f"--nodes={nodes}", *flags]

    def submit(self, *flags: str, **options: Any) -> str:
        """Submit; the job's id."""
        return self.sharebert(*self.submission(*flags, **options)).split()[-1]

    @property
    def step(self) -> int:
        """The newest logged step."""
        lines = self.folder.log
        return int(lines[-1]["step"]) if lines else 0

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is logged."""
        self.slurm.wait_for(lambda: self.step >= step, f"step {step}", 240, self.tail)

    def wait_for_attempts(self, count: int) -> None:
        """Wait until the job has begun so many attempts."""
        self.slurm.wait_for(lambda: len(self.folder.attempts) >= count, f"attempt {count}", 240, self.tail)

    def finish(self, job: str) -> None:
        """Wait until the job has completed and the run is finished."""
        self.slurm.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", timeout_s=300, explain=self.tail)
        assert self.slurm.job(job)["JobState"] == "COMPLETED", self.tail()
        assert self.folder.state["state"] == "finished", self.tail()

    def tail(self) -> str:
        """The ends of the job's logs."""
        files = sorted(self.folder.jobs.glob("*/*.out"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-5000:]}" for file in files)

    def steps_of_each_attempt(self) -> list[list[int]]:
        """The steps of each start of the workers, repeated ones as well, from TensorBoard's files."""
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        attempts = []
        for file in sorted((self.path / "tensorboard").glob("events.*"), key=lambda file: file.stat().st_mtime_ns):
            events = EventFileLoader(str(file)).Load()
            steps = [e.step for e in events if any(value.tag == "train/loss" for value in e.summary.value)]
            if steps:
                attempts.append(steps)
        return attempts

    def same_as(self, baseline: list[float]) -> None:
        """Check that the losses equal those of the undisturbed run, as far as both go."""
        mine = losses(self.path)
        assert [line["step"] for line in log_of(self.path)] == list(range(1, len(mine) + 1)), "a step is missing"
        both = min(len(mine), len(baseline))
        assert mine[:both] == baseline[:both]
