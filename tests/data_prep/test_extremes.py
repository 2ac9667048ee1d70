"""Slow: real commands with workers that are killed, and inputs that need as much memory as possible."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from made_texts import made_texts, recipe, tree, write_jsonl

from data_prep.pipeline import prepare
from data_prep.shards.reader import open_dataset
from sharebert_common.errors import BadInput

WORKER_BYTES = 1_500_000_000
CLEANING = [
    "clean.unicode=nfc",
    "clean.max_symbols=0.99",
    "clean.max_repetition=0.9999999",
    "clean.exact_duplicates=true",
    "clean.near_duplicates=0.8",
]
SHORT_WORDS = "a bc def " * (1 << 17)


def command(output: Path, source: Path, *overrides: str) -> list[str]:
    prep = [sys.executable, "-m", "sharebert_cli", "prep", "corpus", f"output={output}", f"source.paths={source}"]
    return [*prep, "tokenizer.train.vocab_size=600", *overrides]


def children(pid: int) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whoever_is_killed_the_next_run_gives_the_same_bytes(tmp_path: Path) -> None:
    """Kill the parent or a worker, while prep trains a vocabulary, searches duplicates, encodes or packs."""
    texts = made_texts(26_000, seed=3, words=60)
    corpus = write_jsonl(tmp_path / "c.jsonl", [*texts, *texts[::40]])
    assert corpus.stat().st_size > 9 << 20  # three parts
    options = [
        "workers=2",
        "clean.exact_duplicates=true",
        "clean.near_duplicates=0.9",
        "shards.bytes_per_shard=1000000",
    ]
    options += ["tokenizer.train.sample_bytes=300000"]
    started = time.monotonic()
    subprocess.run(command(tmp_path / "alone", corpus, *options), check=True, capture_output=True)
    whole_s = time.monotonic() - started
    alone = tree(tmp_path / "alone")
    assert sum(name.startswith("train/") for name in alone) > 2
    rng, killed = random.Random(1), {"parent": 0, "worker": 0}
    for number in range(4):
        ours = command(tmp_path / f"killed-{number}", corpus, *options)
        for _ in range(3):
            with subprocess.Popen(ours, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
                time.sleep(rng.uniform(0.2, 1) * whole_s)
                workers = children(process.pid)
                if rng.random() < 0.4 and workers:
                    with suppress(ProcessLookupError):
                        os.kill(rng.choice(workers), signal.SIGKILL)
                    assert process.stderr is not None
                    errors = process.stderr.read()
                    if process.wait() == 2:  # else it was finished, or shot while no part was running
                        killed["worker"] += 1
                        assert errors.strip().splitlines()[-1].endswith("what is done is kept")
                else:
                    process.kill()
                    killed["parent"] += process.wait() == -signal.SIGKILL
        subprocess.run(ours, check=True, capture_output=True)
        assert tree(tmp_path / f"killed-{number}") == alone
    assert killed["parent"] >= 3


def text_file(path: Path, piece: str, size: int = 132 << 20) -> Path:
    """A text file without a line break, of more than two documents of the largest size."""
    data = piece.encode()
    with path.open("wb") as file:
        for _ in range(size // len(data)):
            file.write(data)
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["words", "every character a token", "no whitespace", "wide characters", "jsonl"])
def test_a_worker_stays_within_its_memory(tmp_path: Path, kind: str) -> None:
    """The largest document sets the memory: a file of any size is read in pieces of that size."""
    overrides: list[str] = []
    if kind == "jsonl":
        source = tmp_path / "c.jsonl"
        source.write_text(json.dumps({"text": SHORT_WORDS * 50 + "😀"}, ensure_ascii=False))
        overrides = CLEANING
    else:
        pieces = {
            "words": SHORT_WORDS,
            "every character a token": "!?" * (1 << 19),
            "no whitespace": "abcdefgh" * (1 << 17),
            "wide characters": ("a " * 1000 + "😀") * 500,
        }
        source = text_file(tmp_path / "c.txt", pieces[kind])
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", "?", *"abcdef", "##b", "##c"]))
    run = command(tmp_path / "d", source, "workers=1", "validation=0", f"tokenizer.path={vocabulary}", *overrides)
    code = f"""
from sharebert_cli import main
from sharebert_common.processes import peak_memory_bytes
code = main({run[3:]!r})
print(code, peak_memory_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    exit_code, peak_bytes = map(int, done.stdout.splitlines()[-1].split())
    assert exit_code == 0, done.stderr
    assert peak_bytes < WORKER_BYTES
    dataset = open_dataset(tmp_path / "d")
    assert dataset.split("train").rows > 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, in which no folder can be made")
def test_an_output_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="output: /proc/none: No such file or directory"):
        prepare(recipe(Path("/proc/none"), write_jsonl(tmp_path / "a.jsonl", ["a text"])))
