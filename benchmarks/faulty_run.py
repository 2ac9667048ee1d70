"""A demo-size training, launched as users launch it, and its processes, for the faults of `faults.py`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.failing_calls import FailingCalls
from sharebert_common import run_files

EVERY, VALIDATE_EVERY = 5, 7
"""Steps between checkpoints, and between validations."""
SEQ_LEN, WORDS = 64, 1000


def make_dataset(folder: Path) -> Path:
    """Rows of made-up words that follow each other in a fixed order most of the time, in eight shards.

    The dataset of tests/conftest.py is similar, but it draws its rows in another order and has smaller blocks: one
    maker for both would change the bytes of this dataset, and with them the losses of every soak so far.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from data_prep.shards.format import shard_name, write_manifest
    from data_prep.shards.shard_file import write_shard
    from sharebert_common.files import file_sha256

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"word{i}" for i in range(WORDS)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    splits: dict[str, Any] = {}
    for split, shards, rows in (("train", 8, 500), ("validation", 1, 256)):
        entries = []
        for number in range(shards):
            steps = np.where(rng.random((rows, SEQ_LEN)) < 0.9, 1, rng.integers(1, WORDS, (rows, SEQ_LEN)))
            tokens = (len(special) + np.cumsum(steps, axis=1) % WORDS).astype(np.uint16)
            tokens[:, 0], tokens[:, -1] = 2, 3
            entries.append(write_shard(folder, shard_name(split, number), [(tokens, np.ones_like(tokens, np.uint8))]))
        splits[split] = {"rows": shards * rows, "shards": entries}
    write_manifest(
        folder,
        {
            "seq_len": SEQ_LEN,
            "dtype": "uint16",
            "segments_dtype": "uint8",
            "vocab_size": len(words),
            "tokenizer_sha256": file_sha256(folder / "tokenizer.json"),
            "special_ids": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
            "splits": splits,
        },
    )
    return folder


@dataclass
class Run:
    """A training, and its present attempt."""

    folder: Path
    dataset: Path
    steps: int
    dropout: float
    said: Path
    """The file for the output of all attempts."""
    world_size: int = 2
    stage: int = 1
    micro_batch: int = 8
    process: subprocess.Popen[bytes] | None = None
    calls: FailingCalls | None = None
    """Makes calls of the attempts fail; None where it cannot be built."""
    clock_shift_s: int = 0
    """The clock of the next attempt is this many seconds ahead."""
    wrong: list[str] = field(default_factory=list)
    """What an attempt did that it should not have done."""

    def launch(self) -> None:
        """Start an attempt with the command of a user; its output goes to `said`."""
        keys = {
            "run": self.folder,
            "data.dataset": self.dataset,
            "data.global_batch": 24,
            "data.micro_batch": self.micro_batch,
            "steps": self.steps,
            "precision": "fp32",
            "zero.stage": self.stage,
            # At 2e-3 gradients jump after 90 steps, and rounding errors grow without bound: the losses of two runs
            # without faults, with micro-batches of 8 and 24, then differ by 1e-2; at 5e-4 they differ by 1.5e-7.
            "optimizer.lr": 5e-4,
            "model.hidden_size": 64,
            "model.intermediate_size": 128,
            "model.num_hidden_layers": 4,
            "model.num_attention_heads": 4,
            "model.factor_size": 16,
            "model.mlm_head": "tied",
            "model.hidden_dropout_prob": self.dropout,
            "model.attention_probs_dropout_prob": self.dropout,
            "monitor.every": 1,
            "validate.every": VALIDATE_EVERY,
            "validate.rows": 256,
            "checkpoint.every": EVERY,
            "checkpoint.keep": 3,
            "faults.hang_s": 20,
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.world_size}",
                   "--max-restarts=3", "-m", "pretrain", self._empty_recipe()]  # fmt: skip
        faulty = {**self.calls.environment, "CLOCK_SHIFT_S": str(self.clock_shift_s)} if self.calls else {}
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                [*command, *(f"{key}={value}" for key, value in keys.items())],
                env=os.environ | {"OMP_NUM_THREADS": "1"} | faulty,
                stderr=said,
                stdout=said,
                start_new_session=True,
            )

    def _empty_recipe(self) -> str:
        """A recipe file with a seed alone: all other keys are overrides."""
        file = self.said.with_suffix(".yaml")
        file.write_text("seed: 1\n")
        return str(file)

    def keep_alive(self) -> None:
        """Start the next attempt if the last one has ended and the training is not finished."""
        if self.process is None or (self.process.poll() is not None and not self.finished):
            self.launch()

    @property
    def ended(self) -> bool:
        """Whether no attempt is alive."""
        return self.process is None or self.process.poll() is not None

    @property
    def state(self) -> dict[str, Any]:
        """`state.json`, with the defaults of a run that was never started."""
        return run_files.peek_state(self.folder)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.state.get("state") == "finished"

    def log(self) -> list[dict[str, Any]]:
        """Whole lines of the log so far."""
        return run_files.read_log(self.folder)

    @property
    def step(self) -> int:
        """The last step in the log."""
        return int(self.last_line.get("step", 0))

    @property
    def last_line(self) -> dict[str, Any]:
        """The last whole line of the log; empty where there is none."""
        with contextlib.suppress(OSError), (self.folder / run_files.LOG_FILE).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            for line in reversed(log.read().splitlines()):
                with contextlib.suppress(ValueError):
                    return dict(json.loads(line))
        return {}

    def workers(self) -> list[int]:
        """Process ids of the workers, in the order of their ranks."""
        assert self.process is not None
        found = {}
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for child in children:
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                found |= {int(v.removeprefix(b"RANK=")): int(child) for v in variables if v.startswith(b"RANK=")}
        return [found[rank] for rank in sorted(found)]

    def processes(self) -> list[int]:
        """Process ids of the launcher and of all that it started, directly or not."""
        assert self.process is not None
        with contextlib.suppress(psutil.Error):
            return [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(True))]
        return []

    def newest_checkpoint(self) -> Path | None:
        """The folder of the newest checkpoint; None where there is none."""
        return max(self.folder.glob("checkpoints/step-*"), default=None)

    def send(self, number: int, pids: list[int]) -> None:
        """Send a signal to each process that is alive."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill_group(self) -> None:
        """Kill the launcher and all ranks at once, if an attempt is alive."""
        if self.process is not None and self.process.poll() is None:
            self.send(signal.SIGKILL, [self.process.pid, *self.workers()])
            self.process.wait()


def wait_until(condition: Callable[[], Any], timeout_s: float) -> bool:
    """Whether `condition` becomes true in time; it is checked every few milliseconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.004)
    return True
