"""Consolidation against `cp` and against DeepSpeed's `zero_to_fp32.py --safe_serialization`, at three model sizes.

    python -m benchmarks.consolidate --save       write one engine's state (ZeRO 2, bf16, 4 ranks) in both formats
    python -m benchmarks.consolidate --measure    time what was saved, and print the table

The model at 1 x has 46 million parameters. Its vocabulary, which makes nearly all of them, is doubled for 2 x and 4 x.
Each measurement is a separate process, and the median of several is shown. Columns:

- `seconds`: from the end of the imports; for `cp`, the time to copy what ours reads and writes: checkpoint and export;
- `with imports`: the time of the whole process;
- `RssAnon`: the most anonymous memory, beyond what `import torch` takes.

`ours, their folder` and `zero_to_fp32` read the folder that DeepSpeed saved. All files are in the page cache. Saving
needs about 7 GB of memory, and 9 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHON_M = (sys.executable, "-m")
THIS = "benchmarks.consolidate"
OUT = ROOT / "out" / "benchmark-consolidate"
MODEL: dict[str, Any] = {
    "vocab_size": 24576,
    "factor_size": 768,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
}
TIMES = (1, 2, 4)
RANKS = 4


def model_config(times: int) -> Any:
    from sharebert import ShareBertConfig

    return ShareBertConfig.from_dict(MODEL | {"vocab_size": MODEL["vocab_size"] * times})


def save(times: int) -> None:
    """On each rank: save an engine with made-up weights and moments in DeepSpeed's format and in ours."""
    import torch

    from pretrain import distributed
    from pretrain.checkpoint.writer import CheckpointRecipe, CheckpointWriter
    from pretrain.engine.config import ZeroRecipe, deepspeed_config
    from pretrain.engine.engine import open_engine
    from pretrain.engine.optimizer import OptimizerRecipe
    from sharebert import ShareBertForMaskedLM

    world = distributed.join(timeout_s=600)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = ShareBertForMaskedLM(model_config(times))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    settings = {"precision": "bf16", "clip": 0.5, "micro_batch": 1, "micro_batches": 1, "parameters": 1_000_000}
    engine = open_engine(model, deepspeed_config(zero=ZeroRecipe(stage=2), **settings), OptimizerRecipe())
    engine.fragments(world)  # makes the moments
    folder = OUT / f"{times}x"
    engine._deepspeed.save_checkpoint(str(folder / "theirs"))
    run = folder / "run"
    writer = CheckpointWriter(run / "checkpoints", CheckpointRecipe(), world.rank, world.world_size, print)
    writer.open("benchmark")
    torch.distributed.barrier()  # rank 0 clears the folder first
    if world.is_main:
        (folder / "config.json").write_text(json.dumps(model_config(times).to_dict()))
        write_tokenizer(run / "tokenizer.json", model_config(times).vocab_size)
    torch.distributed.barrier()
    training = {
        "model": model_config(times).to_dict(),
        "tokenizer_sha256": hashlib.sha256((run / "tokenizer.json").read_bytes()).hexdigest(),
        "loader": {"fingerprint": "made up", "rows_consumed": 0},
    }
    writer.save(1, engine.fragments(world), engine.shapes(), {}, training)
    writer.finish()
    torch.distributed.barrier()
    distributed.leave()


def write_tokenizer(path: Path, words: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *(f"w{i}" for i in range(words - len(special)))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def convert(what: str, source: Path, out: Path, config: Path) -> None:
    """In a separate process: convert, and print the seconds since the imports and the most anonymous memory."""
    import torch  # noqa: F401

    base = peak = anonymous_bytes()

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    if what == "zero_to_fp32":
        sys.path.insert(0, str(source))
        import zero_to_fp32  # the script that DeepSpeed puts beside what it saves

        def work() -> None:
            zero_to_fp32.convert_zero_checkpoint_to_state_dict(str(source), str(out), safe_serialization=True)
    else:
        from pretrain.export.consolidate import consolidate

        def work() -> None:
            consolidate(source, out, config=config if what == "ours, their folder" else None)

    threading.Thread(target=watch, daemon=True).start()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    peak = max(peak, anonymous_bytes())
    print(json.dumps({"seconds": seconds, "memory": peak - base}))


def measured(what: str, source: Path, folder: Path, repeats: int) -> dict[str, float]:
    """Median seconds, with and without imports, and the highest memory, of several conversions."""
    out = folder / "out"
    found = []
    for _ in range(repeats):
        shutil.rmtree(out, ignore_errors=True)
        command = [*PYTHON_M, THIS, "--convert", what, str(source), str(out), str(folder / "config.json")]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        whole = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"{what} failed:\n{done.stderr}")
        found.append(json.loads(done.stdout.splitlines()[-1]) | {"whole": whole})
    medians = {key: statistics.median(one[key] for one in found) for key in ("seconds", "whole")}
    return medians | {"memory": max(one["memory"] for one in found)}


def copying(checkpoint: Path, export: Path, folder: Path, repeats: int) -> float:
    """Median seconds of `cp` for everything that a consolidation reads and writes."""
    target, found = folder / "copied", []
    for _ in range(repeats):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        started = time.perf_counter()
        subprocess.run(["cp", "-r", str(checkpoint), str(export), str(target)], check=True)
        found.append(time.perf_counter() - started)
    shutil.rmtree(target)
    return statistics.median(found)


def measure(times: int, repeats: int) -> None:
    from exports.export import tensor_shapes

    folder = OUT / f"{times}x"
    sizes = [math.prod(shape) for shape in tensor_shapes(model_config(times)).values()]
    theirs = measured("zero_to_fp32", folder / "theirs", folder, repeats)
    ours_theirs = measured("ours, their folder", folder / "theirs", folder, repeats)
    ours = measured("ours", folder / "run", folder, repeats)
    seconds = copying(folder / "run" / "checkpoints" / "step-00000001", folder / "out", folder, repeats)
    print(f"\n{times} x: {sum(sizes) / 1e6:.0f} million parameters, largest tensor {max(sizes) * 4 / 1e6:.0f} MB")
    print(f"{'':20}{'seconds':>9}{'of cp':>8}{'with imports':>14}{'RssAnon':>12}")
    print(f"{'cp':20}{seconds:9.2f}{1:8.2f}")
    for name, row in (("ours", ours), ("ours, their folder", ours_theirs), ("zero_to_fp32", theirs)):
        ratio = f"{row['seconds'] / seconds:8.2f}"
        print(f"{name:20}{row['seconds']:9.2f}{ratio}{row['whole']:14.2f}{row['memory'] / 1e6:9.0f} MB")
    shutil.rmtree(folder / "out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the states")
    parser.add_argument("--measure", action="store_true", help="time them; with neither, do both, and delete them")
    parser.add_argument("--times", type=int, nargs="+", default=TIMES, help="sizes (default 1 2 4)")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default 3)")
    parser.add_argument("--save-on-this-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--convert", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.convert:
        return convert(given.convert[0], *map(Path, given.convert[1:]))
    if given.save_on_this_rank:
        return save(given.save_on_this_rank)
    both = not (given.save or given.measure)
    for times in given.times:
        if given.save or both:
            shutil.rmtree(OUT / f"{times}x", ignore_errors=True)
            start = [*PYTHON_M, "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
            subprocess.run([*start, "-m", THIS, "--save-on-this-rank", str(times)], check=True, cwd=ROOT)
        if given.measure or both:
            measure(times, given.repeats)
    if both:
        shutil.rmtree(OUT)


if __name__ == "__main__":
    main()
