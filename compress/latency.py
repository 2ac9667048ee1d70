"""How long a model takes, and how much memory: in a process of its own.

    python -m compress.latency FOLDER RUNTIME THREADS REPEATS SHAPE [SHAPE ...]     prints JSON

A shape is rows x tokens. The batch is made of random ordinary words, without padding.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compress.shape_times import random_words
from sharebert_common.errors import BadInput
from sharebert_common.processes import peak_memory_bytes


def runtimes(form: str) -> list[str]:
    """The runtimes that apply to a form, of those that are installed: `pytorch` is this project's own model."""
    from compress.tools import installed

    if form != "onnx":
        return ["pytorch" if form == "compact" else "transformers"]
    return [runtime for runtime in ("onnxruntime", "openvino") if installed(runtime)]


def measure(folder: Path, runtime: str, shapes: Sequence[str], threads: int, repeats: int) -> dict[str, Any]:
    """{"ms": {shape: median}, "peak_bytes": of the process} of the model in `folder`.

    Shapes with more tokens than the model has positions are left out. Raises BadInput where it fails.
    """
    command = [sys.executable, "-m", "compress.latency", str(folder), runtime, str(threads), str(repeats), *shapes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise BadInput(f"{folder}: cannot be timed in {runtime}: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


class Opened(NamedTuple):
    """A model that can be timed."""

    call: Callable[[Any], Any]
    """Takes token ids [B, T] int64."""
    words: int
    positions: int


def opened(folder: Path, runtime: str, threads: int) -> Opened:
    """The model in `folder`, ready in a runtime."""
    import torch

    if runtime == "onnxruntime":
        from compress.dense.runtime import OnnxModel

        session = OnnxModel(folder, threads)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        outputs = ["last_hidden_state"] if "last_hidden_state" in session.outputs else None

        def run_session(ids: Any) -> Any:
            return session(ids, torch.ones_like(ids), outputs)

        return Opened(run_session, config["vocab_size"], config["max_position_embeddings"])
    if runtime == "openvino":
        return _opened_openvino(folder, threads)
    torch.set_num_threads(threads)
    from compress.source import open_hub_model, open_source

    if open_source(folder).form == "compact":
        from exports.read import load_model

        encoder = load_model(folder).sharebert

        def run_compact(ids: Any) -> Any:
            with torch.no_grad():
                return encoder(ids)

        return Opened(run_compact, encoder.config.vocab_size, encoder.config.max_position_embeddings)
    model = open_hub_model(folder)

    def run(ids: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=ids)

    return Opened(run, model.config.vocab_size, model.config.max_position_embeddings)


def _opened_openvino(folder: Path, threads: int) -> Opened:
    import openvino
    import torch

    from exports.onnx import FILE

    # Without the hint OpenVINO computes fp32 models in bf16 where the processor can, which changes their outputs.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(str(folder / FILE), "CPU", options)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    request = model.create_infer_request()

    def run(ids: Any) -> Any:
        return request.infer({"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})

    return Opened(run, config["vocab_size"], config["max_position_embeddings"])


def main(folder: str, runtime: str, threads: str, repeats: str, *shapes: str) -> None:
    """Time and print."""
    model = opened(Path(folder), runtime, int(threads))
    call, words = model.call, model.words
    found = {}
    for shape in shapes:
        rows, tokens = map(int, shape.split("x"))
        if tokens > model.positions:
            continue
        ids = random_words(words, rows, tokens)
        call(ids)
        call(ids)
        times = []
        for _ in range(int(repeats)):
            began = time.perf_counter()
            call(ids)
            times.append(time.perf_counter() - began)
        found[shape] = statistics.median(times) * 1e3
    print(json.dumps({"ms": found, "peak_bytes": peak_memory_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
