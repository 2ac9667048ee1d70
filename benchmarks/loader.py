"""Tokens a second that one process reads and masks, with this project and with other loaders.

    python -m benchmarks.loader [--dataset DATASET] [--rounds 7] [--seconds 1] [--batch 256]

Every peer reads the same rows in random order and masks them with `DataCollatorForLanguageModeling` of
transformers. Each loader has its own process, which is stopped while another one is measured: otherwise its
threads would read ahead during that measurement. Every round measures each loader once, so that other work on
the machine slows all of them; a ratio is the median over the rounds. Peers that are not installed, are broken,
or give no batch in time are left out with a line. To install them:

    pip install transformers datasets webdataset litdata mosaicml-streaming

The dataset is made by `sharebert prep`; without --dataset it is made of random words.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.shards.format import shard_name, write_manifest
from data_prep.shards.reader import Dataset, open_dataset
from data_prep.shards.shard_file import write_shard
from pretrain.data.datasets import DataRecipe, WeightedDataset
from pretrain.data.loader import Loader
from sharebert_common.files import file_sha256

SEQ_LEN = 128
VOCAB_SIZE = 30_522
ROWS = 49_152
SPECIAL_IDS = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}

Tokens = Iterator[int]
"""The number of tokens of one batch after another, without end."""


def make_dataset(folder: Path) -> Dataset:
    """Rows of two documents; the frequencies of words follow Zipf's law."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece

    folder.mkdir()
    words = {f"##w{i}" if i % 4 == 0 else f"w{i}": i for i in range(VOCAB_SIZE) if i not in SPECIAL_IDS.values()}
    words |= {f"[{name.upper()}]": number for name, number in SPECIAL_IDS.items()}
    Tokenizer(WordPiece(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)

    def block(rows: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = 999 + np.minimum(rng.zipf(1.2, (rows, SEQ_LEN)), VOCAB_SIZE - 1000).astype(np.uint16)
        tokens[:, 0], tokens[:, [60, -1]] = SPECIAL_IDS["cls"], SPECIAL_IDS["sep"]
        return tokens, np.tile((1 + (np.arange(SEQ_LEN) > 60)).astype(np.uint8), (rows, 1))

    shards = [write_shard(folder, shard_name("train", n), [block(1024) for _ in range(8)]) for n in range(ROWS // 8192)]
    manifest = {
        "seq_len": SEQ_LEN,
        "dtype": "uint16",
        "segments_dtype": "uint8",
        "vocab_size": VOCAB_SIZE,
        "tokenizer_sha256": file_sha256(folder / "tokenizer.json"),
        "special_ids": SPECIAL_IDS,
        "splits": {"train": {"rows": ROWS, "shards": shards}, "validation": {"rows": 0, "shards": []}},
    }
    write_manifest(folder, manifest)
    return open_dataset(folder)


def ours(dataset: Dataset, batch: int, folder: Path, **keys: Any) -> Tokens:
    """This project: one micro-batch of `batch` rows a step."""
    recipe = DataRecipe(
        dataset=[WeightedDataset(path=str(dataset.path))], global_batch=batch, micro_batch=batch, **keys
    )
    for step in Loader([dataset], recipe, seed=0, rank=0, world_size=1):
        yield sum(micro.tokens.numel() for micro in step.micro_batches)


def all_rows(dataset: Dataset) -> np.ndarray:
    """The token ids of all train rows, or of the first `ROWS`."""
    split = dataset.split("train")
    return split.read(np.arange(min(split.rows, ROWS)))[0]


def collator(dataset: Dataset) -> Callable[[list[Any]], Any]:
    """The collator of transformers that masks 15 % of the tokens."""
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    names = {f"{name}_token": f"[{name.upper()}]" for name in SPECIAL_IDS}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(dataset.tokenizer_path), **names)
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)


def endless(batches: Any) -> Tokens:
    """One epoch after another of a loader that uses the collator."""
    for batch in itertools.chain.from_iterable(itertools.repeat(batches)):
        yield batch["input_ids"].numel()


def hugging_face(dataset: Dataset, batch: int, folder: Path) -> Tokens:
    """A `datasets` folder, memory-mapped, and shuffled by a DataLoader."""
    import datasets

    datasets.disable_progress_bars()
    rows = all_rows(dataset).astype(np.int32)
    datasets.Dataset.from_dict({"input_ids": list(rows)}).save_to_disk(folder)
    source = datasets.load_from_disk(str(folder))
    return endless(torch.utils.data.DataLoader(source, batch, shuffle=True, collate_fn=collator(dataset)))


def plain_webdataset(dataset: Dataset, batch: int, folder: Path) -> Tokens:
    """One row a sample, as webdataset's own documentation does; shuffled in a buffer."""
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=8192, verbose=0) as writer:
        for number, row in enumerate(all_rows(dataset)):
            writer.write({"__key__": f"{number:08d}", "input_ids.npy": row.astype(np.int32)})
    shards = sorted(str(file) for file in folder.glob("*.tar"))
    source = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(2000).decode()
    collate = collator(dataset)
    samples = source.to_tuple("input_ids.npy")
    return endless(
        torch.utils.data.DataLoader(
            samples, batch, collate_fn=lambda rows: collate([{"input_ids": row} for (row,) in rows])
        )
    )


def litdata(dataset: Dataset, batch: int, folder: Path) -> Tokens:
    """litdata's streaming dataset."""
    import litdata as lit

    rows = all_rows(dataset).astype(np.int32)
    writer = lit.streaming.writer.BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, row in enumerate(rows):
        writer.add_item(number, {"input_ids": row})
    writer.done()
    writer.merge()
    source = lit.StreamingDataset(str(folder), shuffle=True)
    return endless(lit.StreamingDataLoader(source, batch_size=batch, num_workers=0, collate_fn=collator(dataset)))


def mosaic_streaming(dataset: Dataset, batch: int, folder: Path) -> Tokens:
    """mosaicml-streaming's MDS."""
    import streaming

    with streaming.MDSWriter(out=str(folder), columns={"input_ids": "ndarray:int32"}) as writer:
        for row in all_rows(dataset):
            writer.write({"input_ids": row.astype(np.int32)})
    source = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
    return endless(torch.utils.data.DataLoader(source, batch, collate_fn=collator(dataset)))


OURS = "sharebert"
LOADERS: dict[str, Callable[[Dataset, int, Path], Tokens]] = {
    OURS: ours,
    "sharebert, whole words": functools.partial(ours, whole_word=True),
    "sharebert, rate 0.5": functools.partial(ours, mask_rate=0.5),
    "HF datasets": hugging_face,
    "webdataset, a row a sample": plain_webdataset,
    "litdata": litdata,
    "mosaicml-streaming (MDS)": mosaic_streaming,
}


class LeftOut(Exception):
    """A loader that cannot be measured: its library is not installed or broken, or it gives no batch in time."""


class LoaderProcess:
    """A loader in a process of its own, which reads and masks when it is told to.

    Raises LeftOut, also from `rate`. The process is dead then.
    """

    def __init__(self, name: str, dataset: Path, batch: int, folder: Path, timeout_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._timeout_s = timeout_s
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=take_turns, args=(name, dataset, batch, folder, other_end), daemon=True)
        self._process.start()
        other_end.close()  # with it open here, a process that dies would be waited for without end
        self._answer(timeout_s)
        self._signal(signal.SIGSTOP)

    def rate(self, seconds: float) -> float:
        """Measure for at least `seconds`. Returns million tokens a second."""
        self._signal(signal.SIGCONT)
        self._pipe.send(seconds)
        result = self._answer(seconds + self._timeout_s)
        self._signal(signal.SIGSTOP)
        return result

    def end(self) -> None:
        """End the process."""
        self._signal(signal.SIGCONT)
        self._pipe.send(None)
        self._process.join(timeout=10)
        self._process.kill()

    def _answer(self, timeout_s: float) -> float:
        problem: str | float = f"no batch in {timeout_s:g} s"
        try:
            if self._pipe.poll(timeout_s):
                problem = self._pipe.recv()
        except EOFError:
            self._process.join(timeout=10)
            problem = f"its process ended with exit code {self._process.exitcode}"
        if isinstance(problem, str):
            self._process.kill()
            raise LeftOut(problem)
        return problem

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def take_turns(name: str, path: Path, batch: int, folder: Path, pipe: Connection) -> None:
    """The work of a loader's process: a first batch, then a rate for each time; a text says what went wrong."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        tokens = LOADERS[name](open_dataset(path), batch, folder)
        next(tokens)
        pipe.send(0.0)
        while (seconds := pipe.recv()) is not None:
            count, started = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - started) < seconds:
                count += next(tokens)
            pipe.send(count / elapsed / 1e6)
    except Exception as error:  # a library that is installed may be broken in any way
        cause = str(error).strip().split("\n", 1)[0]
        pipe.send(cause if isinstance(error, ImportError) else f"{type(error).__name__}: {cause}")


def measure(loaders: dict[str, LoaderProcess], rounds: int, seconds: float) -> dict[str, list[float]]:
    """The rates of all loaders in each round, by name. One that fails is left out with a line."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(-1, rounds):  # the first round warms up
        for name in list(rates):
            try:
                measured = loaders[name].rate(seconds)
            except LeftOut as error:
                print(f"{name}: left out ({error})")
                del rates[name], loaders[name]
                continue
            if turn >= 0:
                rates[name].append(measured)
    return rates


def start_anywhere_s(dataset: Dataset, batch: int) -> float:
    """Seconds to open a dataset and read the first batch at a position far into a run."""
    started = time.perf_counter()
    recipe = DataRecipe(dataset=[WeightedDataset(path=str(dataset.path))], global_batch=batch, micro_batch=batch)
    loader = Loader([open_dataset(dataset.path)], recipe, seed=0, rank=0, world_size=1)
    loader.load_state(loader.state() | {"rows_consumed": 10**12})
    next(loader)
    seconds = time.perf_counter() - started
    loader.close()
    return seconds


def bytes_on_disk(dataset: Dataset) -> float:
    """The bytes of the shards, divided by the bytes of the arrays in them."""
    split = dataset.manifest["splits"]["train"]
    width = np.dtype(dataset.manifest["dtype"]).itemsize + np.dtype(dataset.manifest["segments_dtype"]).itemsize
    arrays = sum(shard["rows"] for shard in split["shards"]) * dataset.seq_len * width
    return float(sum(shard["bytes"] for shard in split["shards"]) / arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="a dataset made by `sharebert prep`")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="time of each measurement")
    parser.add_argument("--batch", type=int, default=256, help="rows in a batch")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for the first batch of a loader")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = open_dataset(arguments.dataset) if arguments.dataset else make_dataset(folder / "dataset")
        loaders = {}
        for number, name in enumerate(LOADERS):
            try:
                loaders[name] = LoaderProcess(
                    name, dataset.path, arguments.batch, folder / str(number), arguments.timeout
                )
            except LeftOut as error:
                print(f"{name}: left out ({error})", flush=True)
        rates = measure(loaders, arguments.rounds, arguments.seconds)
        for process in loaders.values():
            process.end()
        if OURS not in rates:
            sys.exit("the loader of this project failed; nothing to compare")

        print(
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"NumPy {np.__version__}; {dataset.split('train').rows} rows of {dataset.seq_len}, "
            f"{arguments.batch} rows a batch, {arguments.rounds} rounds of {arguments.seconds} s"
        )
        print(f"{'one process, masking included':32} {'M tokens/s':>10}   sharebert is … times as fast (least … most)")
        for name, theirs in rates.items():
            ratios = [a / b for a, b in zip(rates[OURS], theirs, strict=True)]
            print(
                f"{name:32} {statistics.median(theirs):10.2f}   {statistics.median(ratios):6.1f}"
                f"   ({min(ratios):.1f} … {max(ratios):.1f})"
            )
        print(f"first batch at row 10^12 of a run: {start_anywhere_s(dataset, arguments.batch):.3f} s")
        print(f"bytes on disk over bytes of the arrays: {bytes_on_disk(dataset):.4f}")


if __name__ == "__main__":
    main()
