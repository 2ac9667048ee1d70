"""Bytes and time of the ONNX form, fp32 and int8, against a file with a copy of the matrices for each layer.

    python -m benchmarks.onnx_file [--size sharebert-small] [--tokens 16] [--rounds 5] [--threads 1]

The weights are random: they change neither bytes nor time. int8 is the step `onnx_int8` with its defaults. The bytes of
copies are computed from the shapes of the dense form. A round runs both files in turn; a ratio is the median over the
rounds. Bars: fp32 at most 0.10 of the bytes of copies; int8 at most 36 MB, and 0.30 of the time of fp32. Where OpenVINO
is installed, it runs the same files in the same rounds, in fp32 (its own choice may be bf16).
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.inference import milliseconds
from compress.dense.onnx_int8 import OnnxInt8
from exports.dense_model import dense_shapes
from exports.onnx import write_onnx
from sharebert import SIZES, ShareBertConfig, ShareBertForMaskedLM


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options)


def openvino_runs(files: list[Path], given: dict[str, Any], threads: int) -> list[Callable[[], object]]:
    """A call of each file in OpenVINO; none where it is not installed or broken, which is said in a line."""
    try:
        import openvino
    except Exception as error:  # a library that is installed may be broken in any way
        print(f"OpenVINO: left out ({error})")
        return []
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    requests = [openvino.Core().compile_model(str(file), "CPU", options).create_infer_request() for file in files]
    return [lambda one=one: one.infer(given) for one in requests]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="sharebert-small", choices=list(SIZES))
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    config = ShareBertConfig(**{**SIZES[args.size], "mlm_head": "none"})
    copies = 4 * sum(math.prod(shape) for shape in dense_shapes(config).values())
    with tempfile.TemporaryDirectory() as folder:
        full, small = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        write_onnx(full, ShareBertForMaskedLM(config).eval())
        OnnxInt8().write(full, small)
        sizes = [path.stat().st_size for path in (full, small)]
        print(
            f"copies {copies / 1e6:.1f} MB, fp32 {sizes[0] / 1e6:.1f} MB ({sizes[0] / copies:.3f} of copies)", end=", "
        )
        print(f"int8 {sizes[1] / 1e6:.1f} MB")
        given = {"input_ids": np.random.default_rng(0).integers(1000, size=(1, args.tokens))}
        given["attention_mask"] = np.ones_like(given["input_ids"])
        sessions = [session(path, args.threads) for path in (full, small)]
        runs = [lambda one=one: one.run(None, given) for one in sessions]
        runs += openvino_runs([full, small], given, args.threads)
        rounds = [[milliseconds(run) for run in runs] for _ in range(args.rounds + 1)]
    times = [statistics.median(one) for one in zip(*rounds[1:], strict=True)]
    ratio = statistics.median(one[1] / one[0] for one in rounds[1:])
    print(f"1 x {args.tokens} tokens, {args.threads} threads: fp32 {times[0]:.0f} ms, int8 {times[1]:.0f} ms")
    print(f"ratio {ratio:.2f}")
    if times[2:]:
        print(f"OpenVINO: fp32 {times[2]:.0f} ms, int8 {times[3]:.0f} ms")


if __name__ == "__main__":
    main()
