"""How long models of some shapes take, with random weights: side by side, in a process of its own.

    python -m compress.shape_times < REQUEST     prints the milliseconds of each shape, as a JSON list

REQUEST is JSON: {"configs": [config.json of each shape], "rows": B, "tokens": T, "threads": N}. The batch is as in
`compress.latency`: random ordinary words, without padding, through the encoder without a head.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput

FEWEST, MOST = 9, 300
"""Calls of a shape that are timed."""

SECONDS = 0.6
"""How long the calls of a shape should take together."""


def batch_shape(text: str) -> str:
    """The text, if it is rows x tokens. Raises ValueError."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise ValueError(f"'{text}' is no shape; write rows x tokens as 1x128")
    return text


class Call(NamedTuple):
    """What is timed."""

    rows: int
    tokens: int
    """Words of each row."""
    threads: int


def shape_times(configs: Sequence[ShareBertConfig], call: Call) -> list[float]:
    """Milliseconds of one call of each shape.

    Each is the least of several calls, and the shapes take turns. With one thread it is the time of the processor,
    which other work on the machine changes less than the clock's. Raises BadInput where it fails, as for want of
    memory.
    """
    asked = {"configs": [config.to_dict() for config in configs], **call._asdict()}
    command = [sys.executable, "-m", "compress.shape_times"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise BadInput(f"the shapes of this model cannot be timed here: {said[-1]}")
    return list(json.loads(done.stdout.splitlines()[-1]))


def random_words(words: int, rows: int, tokens: int) -> Any:
    """Token ids [rows, tokens] of ordinary words of a vocabulary of `words`, always the same."""
    import torch

    return torch.randint(min(1000, words // 2), words, (rows, tokens), generator=torch.Generator().manual_seed(0))


def main() -> None:
    """Time and print."""
    import torch

    from sharebert import ShareBertForMaskedLM, initialize

    asked: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    clock = time.process_time if asked["threads"] == 1 else time.perf_counter
    encoders = []
    for given in asked["configs"]:
        model = ShareBertForMaskedLM(ShareBertConfig.from_dict({**given, "mlm_head": "none"}))
        initialize(model, "variance", 0)
        encoders.append(model.eval().sharebert)
    words = random_words(encoders[0].config.vocab_size, asked["rows"], asked["tokens"])
    times: list[list[float]] = [[] for _ in encoders]
    with torch.no_grad():
        for encoder in encoders:  # the first call makes the matrices, which are kept
            encoder(words)
            encoder(words)
        begin = clock()
        encoders[0](words)
        rounds = round(SECONDS / (clock() - begin))
        for _ in range(min(MOST, max(FEWEST, rounds))):
            for encoder, own in zip(encoders, times, strict=True):
                begin = clock()
                encoder(words)
                own.append(clock() - begin)
    print(json.dumps([1000 * min(own) for own in times]))


if __name__ == "__main__":
    main()
