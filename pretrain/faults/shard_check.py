"""Whether the shards are what was written: checksums, compared while the training runs.

Opening a dataset looks at sizes alone, for reading terabytes would delay every start. Here each rank reads its
share of the shards once a launch, in a thread; a flipped bit then ends the run, with the file's name. A dataset
that is read through a cache needs none of it: copies are compared when they are made.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from data_prep.shards.reader import Dataset
from sharebert_common.errors import BadInput


class ShardCheck:
    """Starts to compare the checksums of shards `rank`, `rank` + `ranks`, … of each dataset."""

    def __init__(self, datasets: Sequence[Dataset], rank: int, world_size: int) -> None:
        self._damage: BadInput | None = None
        self._over = threading.Event()
        shares = [(dataset, dataset.files_to_verify()[rank::world_size]) for dataset in datasets]
        self._thread = threading.Thread(target=self._compare, args=(shares,), name="shard-check", daemon=True)
        self._thread.start()

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
        """Raise the BadInput, naming the file, of the first damaged shard that was found by now."""
        if self._damage is not None:
            raise self._damage

    def close(self) -> None:
        """Stop after the shard that is being read."""
        self._over.set()
