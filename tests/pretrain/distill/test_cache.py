"""A teacher's outputs on disk: they are the teacher's, whole or absent, and refused where they do not fit a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import losses, train_arguments, train_many

from exports.distill_losses import top_words_loss
from pretrain import train
from pretrain.checkpoint import format as checkpoint
from pretrain.data.batches import MicroBatch
from pretrain.data.loader import Loader
from pretrain.distill import cache_maker
from pretrain.distill.cache import MANIFEST, UNFINISHED, TeacherCache
from pretrain.distill.cache_maker import CacheSettings, make_cache
from pretrain.distill.cached_teacher import CachedTeacher
from pretrain.distill.objective import Distillation
from pretrain.distill.student import DistilledForMaskedLM
from pretrain.distill.teacher import TeacherOutput, load_teacher
from pretrain.objective import MaskedLanguageModelling
from pretrain.recipe import ResolvedTraining, TrainRecipe
from sharebert import initialize
from sharebert_cli import main
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

pytest.importorskip("transformers")
CPU = torch.device("cpu")
KEYS: dict[str, Any] = {
    "steps": 4,
    "distill__logits": 1.0,
    "distill__temperature": 2.0,
    "distill__hidden": 1.0,
    "distill__relations": 1.0,
    "distill__relation_heads": 8,
    "distill__layers": "[[1,1],[2,3]]",
}
ALL = CacheSettings(top_words=1000, dtype="fp32")


def recipe_of(dataset: Path, teacher: Path, cache: Path | None, **changes: Any) -> TrainRecipe:
    given = KEYS | {"distill": teacher} | changes
    given |= {} if cache is None else {"distill__cache": cache}
    return load(TrainRecipe, None, train_arguments(dataset, Path("run"), **given))


def batches(recipe: TrainRecipe, training: ResolvedTraining, rank: int = 0, ranks: int = 1) -> Iterator[MicroBatch]:
    loader = Loader(training.datasets, recipe.data, recipe.seed, rank, ranks, beside=training.teacher_cache)
    for _ in range(recipe.steps):
        yield from next(loader).micro_batches
    loader.close()


@pytest.fixture(scope="module")
def caches(bert: Path, export: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bert` and `export` with all words in fp32, `small` with 16 words in fp16; 40 rows, 16 a shard."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_maker, "SHARD_TOKENS", 16 * 32)
        make_cache(recipe_of(dataset, bert, folder / "bert"), ALL)
        make_cache(recipe_of(dataset, export, folder / "export"), ALL)
        make_cache(recipe_of(dataset, bert, folder / "small"), CacheSettings(top_words=16))
    return folder


@pytest.mark.parametrize("kind", ["bert", "export"])
def test_a_student_has_the_losses_of_an_online_teacher(
    caches: Path, dataset: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    teacher_folder = request.getfixturevalue(kind)
    recipe = recipe_of(dataset, teacher_folder, caches / kind, data__global_batch=13, data__micro_batch=4, steps=3)
    training = recipe.resolve()
    assert training.distill is not None
    assert training.teacher_cache is not None
    student = DistilledForMaskedLM(training.model.config, training.distill)
    initialize(student, "variance", 0)
    mlm = MaskedLanguageModelling(CPU)
    online = load_teacher(training.distill, CPU, within_documents=False, precision="fp32")
    cached = CachedTeacher(training.distill, training.teacher_cache.score_scale)
    seen = 0
    for rank in range(2):
        for batch in batches(recipe, training, rank, 2):
            found = Distillation(mlm, cached)(student, batch)
            wanted = Distillation(mlm, online)(student, batch)
            torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-5)
            assert found.correct == wanted.correct
            seen += 1
    assert seen == 2 * 3 * 2


def test_training_makes_no_teacher(caches: Path, bert: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(dataset, bert, caches / "bert")
    monkeypatch.setattr(train, "load_teacher", lambda *_, **__: pytest.fail("a teacher was loaded"))
    objective = train.make_objective(recipe, recipe.resolve(), CPU)
    assert isinstance(objective, Distillation)
    assert isinstance(objective.teacher, CachedTeacher)


def test_webdataset_reads_the_shards_and_the_bytes_are_those_of_the_formula(
    caches: Path, bert: Path, dataset: Path
) -> None:
    wds = pytest.importorskip("webdataset")
    manifest = json.loads((caches / "small" / MANIFEST).read_text())
    slots, width, heads = 5, 24, 3  # 0.15 · 32 masked tokens a row
    row = slots * (16 * (2 + 2) + 4) + 2 * (2 * 32 * width) + 3 * 2 * 32 * width
    assert manifest["bytes_per_token"] == row / 32
    assert manifest["arrays"]["query-3"] == {"shape": [heads, 32, width // heads], "dtype": "float16"}
    urls = [str(caches / "small" / entry["name"]) for entry in manifest["shards"]]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["json"] for sample in samples] == [
        {"first_position": 0, "rows": 16}, {"first_position": 16, "rows": 16}, {"first_position": 32, "rows": 8},
    ]  # fmt: skip
    assert sum(entry["bytes"] for entry in manifest["shards"]) < 1.3 * 40 * row
    for entry in manifest["shards"]:
        data = (caches / "small" / entry["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    recipe = recipe_of(dataset, bert, None, data__global_batch=16, data__micro_batch=16)
    training = recipe.resolve()
    assert training.distill is not None
    teacher = load_teacher(training.distill, CPU, within_documents=False, precision="fp32")
    said = teacher(next(batches(recipe, training)))
    assert said.logits is not None
    shifted = (said.logits - said.logits.amax(-1, keepdim=True))[:, :301]
    top = np.sort(shifted.numpy(), -1)[:, :-17:-1].reshape(16, slots, 16)
    used = samples[0]["logits.npy"].min(-1) < 0
    np.testing.assert_allclose(samples[0]["logits.npy"][used], top[used], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(samples[0]["hidden-3.npy"], said.states[3].numpy(), rtol=1e-3, atol=1e-3)


def test_with_the_likeliest_words_alone_the_others_count_as_one(caches: Path, bert: Path, dataset: Path) -> None:
    recipe = recipe_of(dataset, bert, caches / "small")
    training = recipe.resolve()
    assert training.distill is not None
    assert training.teacher_cache is not None
    full = load_teacher(training.distill, CPU, within_documents=False, precision="fp32")
    cached = CachedTeacher(training.distill, training.teacher_cache.score_scale)
    batch = next(batches(recipe, training))
    said, kept = full(batch), cached(batch)
    assert said.logits is not None
    assert kept.logits is not None
    assert kept.words is not None
    assert kept.rest is not None
    student = torch.randn(len(kept.logits), 301, generator=torch.Generator().manual_seed(0))
    found = top_words_loss(student, kept.logits, kept.words, kept.rest, batch.loss_weights, 2.0)
    wanted = 0.0
    for n in range(len(student)):
        if batch.loss_weights[n] == 0:
            continue
        p, q = F.softmax(said.logits[n, :301] / 2, -1), F.softmax(student[n] / 2, -1)
        top = kept.words[n]
        pairs = [*zip(p[top], q[top], strict=True), (1 - p[top].sum(), 1 - q[top].sum())]
        wanted += 4 * sum(float(a * (a / b).log()) for a, b in pairs)
    assert float(found) == pytest.approx(wanted, rel=2e-3)


def test_what_was_cut_off_goes_on_and_what_is_damaged_is_made_anew(
    caches: Path, bert: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    recipe, settings = recipe_of(dataset, bert, folder), CacheSettings(top_words=16)
    monkeypatch.setattr(cache_maker, "SHARD_TOKENS", 16 * 32)
    write, made = cache_maker.write_shard, []

    def failing(folder: Path, number: int, *given: Any) -> Any:
        if number == 2 and len(made) == 2:
            raise OSError(28, "No space left on device")
        made.append(number)
        return write(folder, number, *given)

    monkeypatch.setattr(cache_maker, "write_shard", failing)
    with pytest.raises(BadInput, match="not written \\(No space left on device\\); start again to go on"):
        make_cache(recipe, settings)
    assert (folder / UNFINISHED).is_file()
    with pytest.raises(BadInput, match="is not whole yet; make it with sharebert cache-teacher"):
        recipe.resolve()
    (folder / ".shard-000002.tar.dead").write_text("a leftover")
    made.append(-1)
    make_cache(recipe, settings)
    assert made == [0, 1, -1, 2]

    def content(place: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in place.iterdir()}

    assert content(folder) == content(caches / "small")
    make_cache(recipe, settings)
    assert made == [0, 1, -1, 2]
    data = bytearray((folder / "shard-000001.tar").read_bytes())
    data[5000] ^= 1
    (folder / "shard-000001.tar").write_bytes(data)
    training = recipe.resolve()
    with pytest.raises(BadInput, match=r"shard-000001\.tar: missing or damaged; start sharebert cache-teacher again"):
        list(batches(recipe, training))
    make_cache(recipe, settings)
    assert made == [0, 1, -1, 2, 1]
    assert content(folder) == content(caches / "small")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"seed": 3}, r"was made with another seed \(0, this run has 3\)"),
        ({"data__mask_rate": 0.2}, r"another data\.mask_rate \(0\.15, this run has 0\.2\)"),
        ({"data__window_shards": 2}, r"small was made of other rows: of another dataset, or with another data\.window"),
        ({"data__within_documents": True}, r"another data\.within_documents \(False, this run has True\)"),
        ({"data__mask_schedule__masked": 0.9}, r"another data\.mask_schedule\.masked"),
        ({"data__mask_schedule__last_rate": 0.2}, r"not with data\.mask_schedule\.last_rate"),
        ({"distill__layers": "[[1,2]]"}, r"does not hold hidden-2 of the teacher.*it holds logits, hidden-1"),
        ({"distill__temperature": 1.0}, r"distill\.temperature: 1, and .*small was made with 2"),
        ({"steps": 5}, r"holds 40 rows, and the run trains on 50: make it with --rows 50, or"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(
    caches: Path, bert: Path, dataset: Path, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        recipe_of(dataset, bert, caches / "small", **keys).resolve()


def test_a_cache_of_short_rows_is_not_made(bert: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^data\.row_length: not with compile or distill\.cache; set "):
        make_cache(recipe_of(dataset, bert, tmp_path / "cache", data__row_length__first=8), ALL)
    assert not (tmp_path / "cache").exists()


def test_another_teacher_another_dataset_and_a_folder_without_a_cache_are_refused(
    caches: Path, bert: Path, export: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInput, match=r"was made with another distill\.teacher"):
        recipe_of(dataset, export, caches / "bert", distill__layers="[[1,1]]").resolve()
    other = other_dataset(dataset, tmp_path)
    with pytest.raises(BadInput, match=r"^distill\.cache: .*bert was made of other rows: of another dataset, or with"):
        recipe_of(other, bert, caches / "bert").resolve()
    with pytest.raises(BadInput, match=r"there is no cache; make it with sharebert cache-teacher"):
        recipe_of(dataset, bert, tmp_path / "nowhere").resolve()
    with pytest.raises(BadInput, match=r"distill\.cache: distill\.teacher is not given"):
        load(TrainRecipe, None, train_arguments(dataset, tmp_path, distill__cache=caches / "bert")).resolve()
    with pytest.raises(BadInput, match=r"holds a cache with rows 40, and this one would have 60"):
        make_cache(recipe_of(dataset, bert, caches / "bert"), dataclasses.replace(ALL, rows=60))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(BadInput, match="holds other files; choose another folder"):
        make_cache(recipe_of(dataset, bert, tmp_path / "full"), ALL)
    words = train_arguments(dataset, tmp_path / "run", **KEYS, distill=bert)
    (tmp_path / "recipe.yaml").write_text("{}")
    assert main(["cache-teacher", str(tmp_path / "recipe.yaml"), *words]) == 2
    assert "distill.cache: not given; name the folder" in capsys.readouterr().err


def other_dataset(dataset: Path, folder: Path) -> Path:
    """Other texts with the same tokenizer and row length."""
    (folder / "texts.txt").write_text("".join(f"word{i % 7} word{i % 11} word{i % 5}\n\n" for i in range(400)))
    words = [f"source.paths={folder / 'texts.txt'}", f"output={folder / 'other'}", "seq_len=32", "validation=0.1"]
    words.append("source.document=paragraph")
    assert main(["prep", "corpus", *words, f"tokenizer.path={dataset / 'tokenizer.json'}"]) == 0
    return folder / "other"


def test_a_cache_that_another_precision_began_is_not_gone_on_with(
    caches: Path, bert: Path, dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(caches / "small", tmp_path / "cache")
    (tmp_path / "cache" / "shard-000001.tar").unlink()
    recipe = recipe_of(dataset, bert, tmp_path / "cache", precision="bf16")
    with pytest.raises(BadInput, match=r"holds a cache with precision fp32, and this one would have bf16"):
        make_cache(recipe, CacheSettings(top_words=16))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: m.pop("temperature"), r"manifest\.json: no manifest of a cache \(it has no temperature\)"),
        (lambda m: m["shards"].pop(), r"it names 2 shards for 40 rows"),
        (lambda m: m.update(shards=[None, *m["shards"][1:]]), r"a shard is missing"),
        (lambda m: m.update(identity=[]), r"manifest\.json: no manifest of a cache \(identity: "),
        (lambda m: m.update(shard_rows=0), r"manifest\.json: no manifest of a cache \(shard_rows: "),
        (lambda m: m.update(arrays=None), r"\(arrays: "),
        (lambda m: m.update(temperature="warm"), r"\(temperature: "),
        (lambda m: m.update(score_scale=None), r"\(score_scale: "),
        (lambda m: m["shards"][1].pop("sha256"), r"\(it has no shards\.1\.sha256\); remove the folder"),
        (lambda m: m["shards"].__setitem__(0, "shard"), r"\(shards\.0: "),
        (lambda m: m.clear(), r"\(it has no format\)"),
    ],
)
def test_a_damaged_manifest_is_one_line(
    caches: Path, bert: Path, dataset: Path, tmp_path: Path, damage: Any, said: str
) -> None:
    shutil.copytree(caches / "small", tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    damage(manifest)
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps(manifest))
    recipe = recipe_of(dataset, bert, tmp_path / "cache")
    with pytest.raises(BadInput, match=said) as refused:
        recipe.resolve()
    with pytest.raises(BadInput) as again:
        make_cache(recipe, CacheSettings(top_words=16))
    assert str(again.value) == str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_manifest_that_was_cut_off_is_one_line(caches: Path, bert: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(caches / "small", tmp_path / "cache")
    file = tmp_path / "cache" / MANIFEST
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadInput, match=r"^[^\n]*manifest\.json: no manifest of a cache [^\n]*$"):
        recipe_of(dataset, bert, tmp_path / "cache").resolve()


def test_a_longer_run_goes_over_the_cached_rows_again(caches: Path, bert: Path, dataset: Path) -> None:
    recipe = recipe_of(dataset, bert, caches / "small", steps=6, distill__repeat_cache=True)
    made = list(batches(recipe, recipe.resolve()))
    for first, again in ((0, 4), (1, 5)):
        assert torch.equal(made[first].tokens, made[again].tokens)
        assert torch.equal(made[first].beside["logits"], made[again].beside["logits"])
    assert not torch.equal(made[0].tokens, made[1].tokens)


def test_numbers_that_16_bits_do_not_hold_are_refused(
    bert: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Huge:
        def __call__(self, batch: MicroBatch) -> TeacherOutput:
            states = {layer: torch.full((*batch.tokens.shape, 24), 1e5) for layer in (1, 3)}
            return TeacherOutput(None, states, {}, 1.0)

    monkeypatch.setattr(cache_maker, "load_teacher", lambda *_, **__: Huge())
    recipe = recipe_of(dataset, bert, tmp_path / "cache", distill__logits=0, distill__relations=0)
    with pytest.raises(BadInput, match="the teacher's hidden-1 has values that fp16 does not hold; use --dtype fp32"):
        make_cache(recipe, CacheSettings())
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_runs_agree_with_an_online_teacher_on_1_and_2_ranks_and_resume_bitwise(
    bert: Path, dataset: Path, tmp_path: Path
) -> None:
    keys = KEYS | {"distill": bert, "steps": 8}

    def arguments(name: str, **changes: Any) -> list[str]:
        return train_arguments(dataset, tmp_path / name, **(keys | changes))

    cached = {"distill__cache": tmp_path / "cache"}
    make_cache(load(TrainRecipe, None, arguments("whole", **cached)), ALL)
    cut = arguments("cut", **cached)
    plan = [{"overrides": arguments("online")}, {"overrides": arguments("whole", **cached)}]
    train_many([*plan, {"overrides": cut, "stop_after": 4}, {"overrides": cut}], 1, tmp_path)
    train_many([{"overrides": arguments("two", **cached, zero__stage=2, data__micro_batch=5)}], 2, tmp_path)
    whole = losses(tmp_path / "whole")
    assert len(whole) == 8
    assert losses(tmp_path / "cut") == whole
    for other in ("online", "two"):
        assert max(abs(a - b) / b for a, b in zip(losses(tmp_path / other), whole, strict=True)) < 2e-5
    newest = checkpoint.newest_whole(tmp_path / "whole" / "checkpoints", print)
    assert newest is not None
    own = {name for name in newest.manifest["shapes"] if not name.startswith(("sharebert.", "mlm_head."))}
    assert own == {"hidden_projection.weight", "hidden_projection.bias"}


def test_a_cache_reads_only_what_the_losses_need(caches: Path, bert: Path, dataset: Path) -> None:
    recipe = recipe_of(dataset, bert, caches / "small", distill__hidden=0, distill__relations=0)
    cache = recipe.resolve().teacher_cache
    assert isinstance(cache, TeacherCache)
    assert set(cache.read(np.array([39, 0, 17]))) == {"logits", "words", "rest"}
