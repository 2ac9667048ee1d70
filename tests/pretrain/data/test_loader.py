"""Global batches are the same on any number of ranks and after any restart, and an epoch has every row once."""

from __future__ import annotations

import itertools
import resource
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numbered import SEQ_LEN, SPECIAL_IDS, VOCAB_SIZE, numbered_dataset, numbers_of, originals, real_rows, rows_saying

from data_prep.shards.reader import Dataset
from pretrain.data.datasets import DataRecipe, micro_shape, open_datasets
from pretrain.data.loader import Loader, StepBatch
from sharebert import ShareBertConfig, ShareBertForMaskedLM, initialize
from sharebert_common.errors import BadInput
from sharebert_common.recipe import parse

EPOCH_ROWS = 8000


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return numbered_dataset(tmp_path_factory.mktemp("data") / "dataset", [500] * 15 + [317, 183])


def recipe(**keys: Any) -> DataRecipe:
    defaults = {"dataset": "unused", "global_batch": 10, "micro_batch": 4, "window_shards": 3, "prefetch": 1}
    return parse(DataRecipe, defaults | keys, "test")


def steps(loader: Loader, count: int) -> list[StepBatch]:
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def real(step: StepBatch) -> dict[str, np.ndarray]:
    """The rows of a step that count: what they said, and how they were masked."""
    parts: dict[str, list[np.ndarray]] = {"original": [], "seen": [], "columns": []}
    for micro in step.micro_batches:
        here = real_rows(micro)
        parts["original"].append(originals(micro)[here])
        parts["seen"].append(micro.tokens.numpy()[here])
        columns = np.where(micro.loss_weights.numpy() > 0, micro.positions.numpy() % SEQ_LEN, -1)
        parts["columns"].append(columns.reshape(len(here), -1)[here])
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def global_batches(dataset: Dataset, settings: DataRecipe, world_size: int, count: int) -> list[dict[str, np.ndarray]]:
    """`count` global batches, put together from all ranks in rank order."""
    shares = [steps(Loader([dataset], settings, 5, rank, world_size), count) for rank in range(world_size)]
    batches = []
    for step in range(count):
        sizes = [[len(micro.tokens) for micro in share[step].micro_batches] for share in shares]
        assert all(size == sizes[0] for size in sizes)
        parts = [real(share[step]) for share in shares]
        rows = [len(part["original"]) for part in parts]
        assert max(rows) - min(rows) <= 1
        assert sum(rows) == settings.global_batch
        batches.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        masked = [share[step].masked for share in shares]
        assert masked == [int((part["columns"] >= 0).sum()) for part in parts]
    return batches


@pytest.mark.parametrize("world_size", [8, 64, 96, 1024])
def test_any_number_of_ranks_makes_the_same_global_batches(dataset: Dataset, world_size: int) -> None:
    settings = recipe(global_batch=4000, micro_batch=16)
    alone = global_batches(dataset, settings, 1, 2)
    numbers = np.concatenate([numbers_of(batch["original"]) for batch in alone])
    np.testing.assert_array_equal(np.sort(numbers), np.arange(EPOCH_ROWS))
    for one, many in zip(alone, global_batches(dataset, settings, world_size, 2), strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(array, many[name])


def test_the_mean_of_64_ranks_gradients_is_the_gradient_of_one_process(dataset: Dataset) -> None:
    """4,000 rows: 62 or 63 a rank. Each weighs its losses with ranks / masked tokens of all, as `Trainer.step` does."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ShareBertConfig(vocab_size=VOCAB_SIZE, factor_size=4, max_position_embeddings=SEQ_LEN, **sizes)
    model = ShareBertForMaskedLM(config).double().eval()
    initialize(model, "variance", 0)

    def gradient(world_size: int) -> torch.Tensor:
        settings = recipe(global_batch=4000, micro_batch=63)
        shares = [steps(Loader([dataset], settings, 5, rank, world_size), 1)[0] for rank in range(world_size)]
        masked = sum(share.masked for share in shares)
        model.zero_grad()
        for micro in itertools.chain.from_iterable(share.micro_batches for share in shares):
            given = {"positions": micro.positions, "labels": micro.labels, "loss_weights": micro.loss_weights.double()}
            (model(micro.tokens, **given).loss_sum * (world_size / masked)).backward()
        return torch.cat([p.grad.flatten() / world_size for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient(64), gradient(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("global_batch", [1024, 1500, 7])
def test_batches_that_divide_by_nothing(dataset: Dataset, global_batch: int) -> None:
    settings = recipe(global_batch=global_batch, micro_batch=3)
    world_size = min(global_batch, 96)
    alone, many = (global_batches(dataset, settings, r, 2) for r in (1, world_size))
    for one, other in zip(alone, many, strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name])


def test_rows_keep_what_they_said(dataset: Dataset) -> None:
    (batch,) = global_batches(dataset, recipe(global_batch=300), 1, 1)
    tokens, _ = rows_saying(numbers_of(batch["original"]))
    np.testing.assert_array_equal(batch["original"], tokens)


def test_epochs_follow_each_other_in_another_order_with_other_masks(dataset: Dataset) -> None:
    batches = global_batches(dataset, recipe(global_batch=EPOCH_ROWS, micro_batch=EPOCH_ROWS), 1, 2)
    numbers = [numbers_of(batch["original"]) for batch in batches]
    for epoch in numbers:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(EPOCH_ROWS))
    assert (numbers[0] == numbers[1]).mean() < 0.01
    first, second = (batch["columns"][np.argsort(n)] for batch, n in zip(batches, numbers, strict=True))
    assert (first == second).all(axis=1).mean() < 0.1


@pytest.mark.parametrize("consumed", [0, 10, 70, 79990, 8000 * 10**9 + 3])
@pytest.mark.parametrize("prefetch", [1, 8])
def test_going_on_anywhere_equals_the_continuous_stream(dataset: Dataset, consumed: int, prefetch: int) -> None:
    """Three ranks run on; five others start in the middle, from the state of one of them."""
    settings = recipe(prefetch=prefetch)
    started = time.perf_counter()
    before = [Loader([dataset], settings, 5, rank, 3) for rank in range(3)]
    for loader in before:
        loader.load_state(loader.state() | {"rows_consumed": consumed})
    assert next(before[0]).rows_consumed == consumed + 10
    assert time.perf_counter() - started < 1
    state = before[0].state()
    assert state["rows_consumed"] == consumed + 10
    for loader in before[1:]:
        next(loader)
    continuous = [steps(loader, 4) for loader in before]

    after = [Loader([dataset], settings, 5, rank, 5) for rank in range(5)]
    for loader in after:
        next(loader)
        loader.load_state(state)
    resumed = [steps(loader, 4) for loader in after]
    for step in range(4):
        assert continuous[0][step].rows_consumed == resumed[0][step].rows_consumed == consumed + 10 * (step + 2)
        a, b = (
            [np.concatenate(arrays) for arrays in zip(*(real(share[step]).values() for share in shares), strict=True)]
            for shares in (continuous, resumed)
        )
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_state_is_of_what_was_handed_out_not_of_what_is_ready(dataset: Dataset) -> None:
    loader = Loader([dataset], recipe(prefetch=8), 5, 0, 1)
    for step in range(1, 12):
        assert next(loader).rows_consumed == 10 * step
        assert loader.state()["rows_consumed"] == 10 * step
    loader.close()


@pytest.mark.parametrize(("before", "after"), [(0, 0), (10, 10), (11, 45), (20, 45), (44, 45), (45, 45)])
def test_skipped_rows_are_never_handed_out(dataset: Dataset, before: int, after: int) -> None:
    """A step that would hold some of them starts behind them, and so do all later steps."""
    settings = recipe(global_batch=10)

    def loader_at(position: int) -> Loader:
        loader = Loader([dataset], settings, 5, 0, 1)
        loader.load_state(loader.state() | {"rows_consumed": position})
        return loader

    skipping = loader_at(before)
    skipping.skip(range(20, 30))
    skipping.skip(range(29, 45))
    (first,) = steps(skipping, 1)
    (expected,) = steps(loader_at(after), 1)
    assert first.rows == range(after, after + 10)
    for name, values in real(first).items():
        np.testing.assert_array_equal(values, real(expected)[name])


def test_rows_are_skipped_behind_steps_that_are_prepared_already(dataset: Dataset) -> None:
    loader = Loader([dataset], recipe(global_batch=10, prefetch=8), 5, 0, 1)
    assert next(loader).rows == range(10)
    loader.skip(range(25, 31))
    assert [step.rows.start for step in steps(loader, 3)] == [10, 31, 41]


def test_a_state_of_other_data_order_or_seed_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    loader = Loader([dataset], recipe(), 5, 0, 1)
    other = numbered_dataset(tmp_path / "other", [50])
    for data, settings, seed, wrong in (
        (dataset, recipe(), 6, r"seed 6.* has 5"),
        (other, recipe(), 5, rf"fingerprint {other.fingerprint}.* has {dataset.fingerprint}"),
        (dataset, recipe(window_shards=4), 5, r"window_shards 4.*window_shards 3"),
    ):
        with pytest.raises(BadInput, match=wrong):
            loader.load_state(Loader([data], settings, seed, 0, 1).state())
    loader.load_state(Loader([dataset], recipe(global_batch=20, mask_rate=0.4), 5, 0, 1).state())


def test_more_ranks_than_rows_are_refused(dataset: Dataset) -> None:
    with pytest.raises(BadInput, match=r"global_batch: 10 rows.* 11 ranks"):
        Loader([dataset], recipe(global_batch=10), 5, 0, 11)


def test_an_empty_train_split_and_a_seed_out_of_range_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="train split is empty"):
        Loader([numbered_dataset(tmp_path / "empty", [0])], recipe(), 5, 0, 1)
    for seed in (-1, 2**64):
        with pytest.raises(BadInput, match="seed"):
            Loader([dataset], recipe(), seed, 0, 1)


@pytest.mark.parametrize(
    ("global_batch", "world_size", "micro_batch", "expected"),
    [
        (4000, 96, 32, (2, 21)),
        (4000, 1, 256, (16, 250)),
        (10, 3, 10, (1, 4)),
        (7, 7, 100, (1, 1)),
        (65, 1, 64, (2, 33)),
    ],
)
def test_micro_batches_are_few_and_even(
    global_batch: int, world_size: int, micro_batch: int, expected: tuple[int, int]
) -> None:
    assert micro_shape(recipe(global_batch=global_batch, micro_batch=micro_batch), world_size) == expected


def test_a_mixture_keeps_weights_and_epochs_of_its_own(tmp_path: Path) -> None:
    small = numbered_dataset(tmp_path / "small", [40, 24])
    large = numbered_dataset(tmp_path / "large", [400], first=1000)
    entries = [{"path": str(small.path), "weight": 3}, {"path": str(large.path), "weight": 1}]
    settings = recipe(dataset=entries, global_batch=16, micro_batch=16)
    datasets = open_datasets(settings)
    batches = steps(Loader(datasets, settings, 5, 0, 1), 100)
    numbers = [numbers_of(real(step)["original"]) for step in batches]
    assert {int((batch < 1000).sum()) for batch in numbers} <= {11, 12, 13}
    joined = np.concatenate(numbers)
    from_small, from_large = joined[joined < 1000], joined[joined >= 1000]
    assert len(from_small) == 1200
    for start in range(0, 1200 - 64, 64):
        np.testing.assert_array_equal(np.sort(from_small[start : start + 64]), np.arange(64))
    np.testing.assert_array_equal(np.sort(from_large), np.arange(1000, 1400))
    assert batches[-1].epoch == 1200 / 64

    resumed = Loader(datasets, settings, 5, 1, 2)
    resumed.load_state({**resumed.state(), "rows_consumed": 16 * 50})
    (step,) = steps(resumed, 1)
    np.testing.assert_array_equal(real(step)["seen"], real(batches[50])["seen"][8:])

    other = parse(
        DataRecipe, {"dataset": [entries[0], entries[1] | {"weight": 2}], "global_batch": 16, "micro_batch": 16}, "test"
    )
    with pytest.raises(BadInput, match=r"fingerprint .* x 3 .* x 1 .* has .* x 39321 .* x 26215"):
        Loader(datasets, other, 5, 0, 1).load_state(resumed.state())


def test_datasets_that_do_not_go_together_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    other = numbered_dataset(tmp_path / "other", [8], prefix="@@")
    entries = [{"path": str(dataset.path)}, {"path": str(other.path)}]
    with pytest.raises(BadInput, match=r"other has tokenizer_sha256 \w+, .*dataset has \w+: datasets of a mixture"):
        open_datasets(recipe(dataset=entries))


def test_a_mixture_may_hold_more_shards_open_than_the_default_limit_of_files(tmp_path: Path) -> None:
    paths = [str(numbered_dataset(tmp_path / str(n), [1] * 64).path) for n in range(3)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        for dataset in open_datasets(recipe(dataset=[{"path": path} for path in paths])):
            split = dataset.split("train")
            assert len(split.read(np.arange(split.rows))[0]) == 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"mask_rate": 0}, r"mask_rate: .*greater than 0 \(got 0\)"),
        ({"mask_rate": 0.6}, r"mask_rate: .*0\.5 \(got 0\.6\)"),
        ({"global_batch": 0}, "global_batch"),
        ({"micro_batch": -1}, "micro_batch"),
        ({"dataset": []}, "dataset"),
        ({"dataset": [{"path": "x", "weight": 0}]}, r"dataset\.0\.weight: .*greater than 0"),
        ({"dataset": [{"path": "x", "wieght": 1}]}, "did you mean 'weight'"),
        ({"window_shards": 33}, r"window_shards: .*32"),
        ({"mask_rat": 0.2}, "did you mean 'mask_rate'"),
    ],
)
def test_wrong_settings_are_named(keys: dict[str, Any], wrong: str) -> None:
    with pytest.raises(BadInput, match=wrong):
        recipe(**keys)


def test_what_goes_wrong_in_the_thread_is_raised_here(tmp_path: Path) -> None:
    damaged = numbered_dataset(tmp_path / "dataset", [50], vocab_size=40)
    loader = Loader([damaged], recipe(), 5, 0, 1)
    with pytest.raises(BadInput, match="vocabulary of 40"):
        next(loader)
    assert not loader_threads()


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_close_stops_the_thread(dataset: Dataset) -> None:
    loader = Loader([dataset], recipe(), 5, 0, 1)
    next(loader)
    assert len(loader_threads()) == 1
    loader.close()
    assert not loader_threads()


def test_the_wait_is_measured() -> None:
    loader = Loader([slow_dataset(0.05)], recipe(), 5, 0, 1)  # type: ignore[list-item]
    assert next(loader).wait_s > 0.05
    time.sleep(0.3)
    assert next(loader).wait_s < 0.02
    loader.close()


class MadeSplit:
    """Rows made when asked for: as many as one likes."""

    def __init__(self, shard_rows: list[int], delay_s: float) -> None:
        self.shard_rows, self.rows, self._delay_s = shard_rows, sum(shard_rows), delay_s

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(self._delay_s)
        return rows_saying(rows % 64**3)


class MadeDataset:
    """A dataset of made rows."""

    fingerprint, seq_len, vocab_size, special_ids = "made", SEQ_LEN, VOCAB_SIZE, SPECIAL_IDS
    tokenizer_path = None

    def __init__(self, shard_rows: list[int], delay_s: float = 0.0) -> None:
        self._split = MadeSplit(shard_rows, delay_s)

    def split(self, name: str) -> MadeSplit:
        assert name == "train"
        return self._split


def slow_dataset(delay_s: float) -> MadeDataset:
    return MadeDataset([100], delay_s)


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
def test_memory_and_start_do_not_depend_on_the_number_of_rows() -> None:
    peaks = []
    for shard_rows in (1_000, 1_000, 1_000_000):  # in 1,000 shards; the first time also fills caches
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        started = time.perf_counter()
        loader = Loader([MadeDataset([shard_rows] * 1000)], recipe(global_batch=4000), 5, 3, 96)  # type: ignore[list-item]
        loader.load_state(loader.state() | {"rows_consumed": shard_rows * 123_456 * 4000})
        next(loader)
        assert time.perf_counter() - started < 1
        steps(loader, 20)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    _, million, thousand_million = peaks
    assert thousand_million < 1.1 * million


def test_masks_follow_their_schedule_alike_on_any_ranks_and_after_a_resume(dataset: Dataset) -> None:
    """Step s (from 0) of 8 has rate 0.4 + s/8 · (0.1 - 0.4) and all chosen tokens are [MASK], as the recipe says."""
    settings = recipe(mask_rate=0.4, mask_schedule={"last_rate": 0.1, "masked": 1.0, "random": 0.0})
    made = [steps(Loader([dataset], settings, 5, rank, 3, 8), 8) for rank in range(3)]
    alone = steps(Loader([dataset], settings, 5, 0, 1, 8), 8)
    for number, step in enumerate(alone):
        want = max(1, round((0.4 - 0.3 * number / 8) * SEQ_LEN))
        assert all(micro.mask_rate == pytest.approx(0.4 - 0.3 * number / 8) for micro in step.micro_batches)
        found = real(step)
        assert (found["columns"] >= 0).sum(axis=1).max() == want  # rows with padding have fewer
        chosen = np.take_along_axis(found["seen"], np.maximum(found["columns"], 0), axis=1)
        assert (chosen[found["columns"] >= 0] == SPECIAL_IDS["mask"]).all()
        together = [real(share[number]) for share in made]
        assert all((np.concatenate([part[key] for part in together]) == found[key]).all() for key in found)
    later = Loader([dataset], settings, 5, 0, 1, 8)
    later.load_state({"fingerprint": later.fingerprint, "seed": 5, "rows_consumed": 50})
    assert torch.equal(steps(later, 1)[0].micro_batches[0].tokens, alone[5].micro_batches[0].tokens)


def test_shares_above_1_are_refused() -> None:
    with pytest.raises(BadInput, match=r"mask_schedule: masked 1 and random 0.1 at the end are more than 1"):
        recipe(mask_schedule={"last_masked": 1.0})
