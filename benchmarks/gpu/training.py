"""Real trainings, as `sharebert train` makes them: tokens/s, utilisation and memory from their own log."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.dataset import random_dataset

STEPS, EVERY = 20, 5
"""Steps of a training, and of a line of its log. The first two lines are warm-up and do not count."""


class Trainings:
    """Trainings in a folder, each under its own name."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.tiny = device == "cpu"

    def dataset(self, seq_len: int, documents: int = 1) -> Path:
        """Random rows, enough for one training."""
        rows, words = (256, 1000) if self.tiny else (32_768, 30_522)
        return random_dataset(self.folder / f"rows-{seq_len}-{documents}", rows, seq_len, words, documents)

    def command(self, name: str, size: str, rows: int, seq_len: int, documents: int, **keys: Any) -> list[str]:
        """A training of STEPS steps of one micro-batch of `rows` rows. `__` in a key stands for a dot."""
        tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        model = json.dumps(tiny | {"factor_size": 16}) if self.tiny else size
        given = {
            "run": self.folder / name,
            "data.dataset": self.dataset(seq_len, documents),
            "data.global_batch": rows,
            "data.micro_batch": rows,
            "model": model,
            "steps": STEPS,
            "precision": "bf16",
            "validate.every": 0,
            "checkpoint.every": 1_000_000,
            "monitor.every": EVERY,
        } | {key.replace("__", "."): value for key, value in keys.items()}
        words = [f"{key}={value}" for key, value in given.items()]
        recipe = self.folder / "empty.yaml"
        recipe.write_text("{}\n")
        return [sys.executable, "-m", "pretrain", str(recipe), *words]

    def run(
        self, name: str, size: str, rows: int, seq_len: int = 128, documents: int = 1, **keys: Any
    ) -> dict[str, Any]:
        """Train; what its log says after the warm-up, or the last line of the error."""
        done = self.finish(self.command(name, size, rows, seq_len, documents, **keys))
        what = {"name": name, "size": size, "rows": rows, "seq_len": seq_len, **keys}
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no error message"]
            return what | {"failed": said[-1][:300]}
        lines = [line for line in self.log(name) if "tokens_per_s" in line][2:]
        median = {
            key: statistics.median(line.get(key) or 0.0 for line in lines) for key in ("tokens_per_s", "mfu", "step_s")
        }
        return what | median | {"memory_gb": max(line["memory_bytes"] for line in lines) / 1e9}

    def finish(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | self.environment())

    def environment(self) -> dict[str, str]:
        """A rehearsal hides the GPU."""
        return {"CUDA_VISIBLE_DEVICES": ""} if self.tiny else {}

    def log(self, name: str) -> list[dict[str, Any]]:
        """The lines of a run's log.jsonl."""
        return [json.loads(line) for line in (self.folder / name / "log.jsonl").read_text().splitlines()]


def engine(folder: Path, device: str) -> Iterator[dict[str, Any]]:
    """ZeRO stages and micro-batches of sharebert-small, the largest micro-batch first; then the other sizes."""
    trainings = Trainings(folder, device)
    rows = (500, 256, 64) if device == "cuda" else (8, 4, 2)
    for count in rows:
        for stage in (2, 1, 0):
            yield trainings.run(f"small-{count}-zero{stage}", "sharebert-small", count, zero__stage=stage)
    for size in ("sharebert-large", "sharebert-base"):
        yield trainings.run(size, size, rows[1])


def options(folder: Path, device: str) -> Iterator[dict[str, Any]]:
    """Options beside the default, out of memory, and a training that is stopped and resumed."""
    trainings = Trainings(folder, device)
    rows, size = (64, "sharebert-small") if device == "cuda" else (2, "tiny")
    dropout_off = {"model__attention_probs_dropout_prob": 0.0}
    yield trainings.run("plain", size, rows)
    yield trainings.run("compile", size, rows, compile=True)
    yield trainings.run("recompute", size, rows, recompute=True)
    yield trainings.run("deterministic", size, rows, deterministic=True)
    for seq_len in (128, 512):
        yield trainings.run(f"row-{seq_len}", size, rows, seq_len, 4, **dropout_off)
        yield trainings.run(f"within-{seq_len}", size, rows, seq_len, 4, data__within_documents=True, **dropout_off)
    if device == "cuda":  # a CPU has no fp16, and no limit of memory of its own
        for stage in range(4):
            yield trainings.run(f"fp16-zero{stage}", size, rows, precision="fp16", zero__stage=stage)
        yield trainings.run("out-of-memory", size, 8192)
    yield resumed(trainings, size, rows)


def resumed(trainings: Trainings, size: str, rows: int) -> dict[str, Any]:
    """Stop a training in the middle, resume it, and compare its losses with those of an undisturbed one."""
    keys: dict[str, Any] = {"deterministic": True, "monitor__every": 1}
    whole = trainings.finish(trainings.command("undisturbed", size, rows, 128, 1, **keys))
    command = trainings.command("stopped", size, rows, 128, 1, **keys)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | trainings.environment()
    )
    log = trainings.folder / "stopped" / "log.jsonl"
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= STEPS // 4):
        time.sleep(0.01)
    (trainings.folder / "stopped" / "stop").touch()
    _, said = process.communicate()
    result: dict[str, Any] = {"name": "stop and resume", "first_exit_code": process.returncode}
    if whole.returncode or process.returncode not in (0, 75):
        return result | {"failed": (whole.stderr or said)[-300:]}
    again = trainings.finish(command)
    losses = [[line["loss"] for line in trainings.log(run)] for run in ("undisturbed", "stopped")]
    return result | {"second_exit_code": again.returncode, "losses_equal_bit_for_bit": losses[0] == losses[1]}
