"""Whether the shards are what was written: their checksums are compared while the training runs.

Opening a dataset checks sizes only, because reading terabytes would delay every start. Here each rank reads its share
of the shards once an attempt, in a thread. A flipped bit then ends the run, with the name of the file. Reads that fail
are tried again, as elsewhere; a shard that cannot be read all the same is named, and passed over. A dataset that is
read through a cache needs no check here: the cache compares each copy when it makes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from data_prep.shards.reader import Dataset
from pretrain.run.folder import patiently
from sharebert_common.errors import BadInput


class ShardCheck:
    """Compares the checksums of shards `rank`, `rank` + `world_size`, … of each dataset while its block runs."""

    def __init__(self, datasets: Sequence[Dataset], rank: int, world_size: int, report: Callable[[str], None]) -> None:
        """`report` is told, in the thread, of a shard that cannot be read."""
        self._report = report
        self._damage: BadInput | None = None
        self._over = threading.Event()
        self._shares = [(dataset, dataset.files_to_verify()[rank::world_size]) for dataset in datasets]

    def __enter__(self) -> ShardCheck:
        """Start comparing."""
        self._thread = threading.Thread(target=self._compare, args=(self._shares,), name="shard-check", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop after the shard that is being read."""
        self._over.set()

    def _compare(self, shares: Sequence[tuple[Dataset, Sequence[str]]]) -> None:
        try:
            for dataset, names in shares:
                for name in names:
                    if self._over.is_set():
                        return
                    try:
                        patiently(partial(_verify, dataset, name))
                    except OSError as error:
                        why = error.strerror or error
                        self._report(f"{dataset.path / name}: cannot be read ({why}); its checksum is not compared")
        except BadInput as damage:
            self._damage = damage

    def raise_damage(self) -> None:
        """Raise BadInput, naming the file, where a damaged shard was found by now."""
        if self._damage is not None:
            raise self._damage


def _verify(dataset: Dataset, name: str) -> None:
    """Raise BadInput where a shard is damaged or gone, OSError where it cannot be read now."""
    try:
        dataset.verify([name])
    except BadInput as damage:
        cause = damage.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise cause from None
        raise
