"""Whether the shards are what was written: their checksums are compared while the training runs.

Opening a dataset checks sizes only, because reading terabytes would delay every start. Here each rank reads its share
of the shards once an attempt, in a thread. A flipped bit then ends the run, with the name of the file. A dataset that
is read through a cache needs no check here: the cache compares each copy when it makes it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from data_prep.shards.reader import Dataset
from sharebert_common.errors import BadInput


class ShardCheck:
    """Compares the checksums of shards `rank`, `rank` + `world_size`, … of each dataset while its block runs."""

    def __init__(self, datasets: Sequence[Dataset], rank: int, world_size: int) -> None:
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
                    dataset.verify([name])
        except BadInput as damage:
            self._damage = damage

    def raise_damage(self) -> None:
        """Raise BadInput, naming the file, where a damaged shard was found by now."""
        if self._damage is not None:
            raise self._damage
