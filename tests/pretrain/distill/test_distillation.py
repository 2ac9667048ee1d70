"""A student and its teacher: what is checked, what is minimised, and that runs are those of any other training."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import losses, train_arguments, train_many
from tiny_students import micro_batch, student_config
from torch import Tensor

from exports.distill_losses import hidden_loss, logits_loss, relations_loss
from pretrain.checkpoint import format as checkpoint
from pretrain.data.batches import MicroBatch
from pretrain.data.loader import Loader
from pretrain.distill.cache_maker import CacheSettings, make_cache
from pretrain.distill.cached_teacher import CachedTeacher
from pretrain.distill.objective import Distillation, real_positions
from pretrain.distill.recipe import DistillPlan, DistillRecipe, plan_distillation
from pretrain.distill.student import DistilledForMaskedLM
from pretrain.distill.teacher import load_teacher
from pretrain.export.consolidate import consolidate
from pretrain.objective import MaskedLanguageModelling
from pretrain.recipe import TrainRecipe
from sharebert import initialize
from sharebert_cli import main
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")

EVERYTHING = {"mlm": 0.5, "logits": 2.0, "temperature": 2.0, "hidden": 1.0, "relations": 3.0, "relation_heads": 8}
LAYERWISE = {"hidden": 0.5, "cosine": 2.0, "attention": 3.0, "attention_kl": 4.0, "relations": 5.0}


def test_positions_that_count() -> None:
    weights = real_positions(micro_batch())
    assert weights.sum(1).tolist() == [32, 25, 0]
    assert real_positions(micro_batch().cut(8).cut(4)).equal(weights.view(-1, 4))


@pytest.mark.parametrize("kind", ["bert", "export"])
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("length", [32, 4])
def test_the_loss_is_the_weighted_sum_of_what_the_recipe_names(
    dataset: Path, kind: str, within: bool, length: int, request: pytest.FixtureRequest
) -> None:
    """Rows are whole, or cut into pieces, of which one is padding alone and some have no chosen token."""
    teacher_folder = request.getfixturevalue(kind)
    config = student_config()
    recipe = DistillRecipe(teacher=str(teacher_folder), layers=[(0, 0), (2, 3)], **(EVERYTHING | {"relations": 0.0}))
    if kind == "bert":
        recipe = dataclasses.replace(recipe, logits=2.0)
    relations = dataclasses.replace(recipe, layers=[(1, 2), (2, 3)], relations=3.0, hidden=0.0)
    for given in (recipe, relations):
        plan = plan_distillation(given, config, dataset / "tokenizer.json", 32)
        assert plan is not None
        student = DistilledForMaskedLM(config, plan)
        initialize(student, "variance", 0)
        teacher = load_teacher(plan, CPU, within_documents=within, precision="fp32")
        mlm = MaskedLanguageModelling(CPU, within_documents=within)
        batch = dataclasses.replace(micro_batch().cut(length), mask_rate=0.3)
        total = Distillation(mlm, teacher)(student, batch)
        taught = teacher(batch)
        with torch.no_grad():
            plain = mlm(student, batch)
            ids = batch.document_ids
            hide = None if within else ids
            kept = student.sharebert(
                batch.tokens, hide, document_ids=ids if within else None, pool=False, keep_states=True
            )
            visible = ids[:, :, None] == ids[:, None, :] if within else (ids != 0)[:, None, :].expand(-1, length, -1)
            weights = 0.3 * real_positions(batch)
            logits = student.scores(kept.hidden.flatten(0, 1)[batch.positions])
            assert taught.logits is not None
            expected = 0.5 * plain.loss + 2.0 * logits_loss(
                logits[:, :301], taught.logits[:, :301], batch.loss_weights, 2.0
            )
            if given.hidden:
                assert student.hidden_projection is not None
                for ours, theirs in ((0, 0), (2, 3)):
                    projected = student.hidden_projection(kept.states[ours])
                    expected = expected + hidden_loss(projected, taught.states[theirs], weights) / 2
            else:
                expected = expected + 3.0 * relations_loss(
                    student.sharebert.take(2), taught.projections[3], 8, weights, visible
                )
        torch.testing.assert_close(total.loss.detach(), expected, rtol=1e-5, atol=1e-5)
        assert total.correct == plain.correct
        with torch.no_grad():
            assert Distillation(mlm, teacher)(student, batch).loss == plain.loss, "validation is masked LM alone"


def of_layer(teacher: Any, states: list[Tensor], layer: int) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, T, H] of a BERT's layer, from the states before it."""
    attention = teacher.bert.encoder.layer[layer - 1].attention.self
    return tuple(getattr(attention, kind)(states[layer - 1]) for kind in ("query", "key", "value"))


@torch.no_grad()
def states_of(teacher: Any, batch: MicroBatch, within: bool) -> list[Tensor]:
    """Its hidden states; with `within` from one forward pass for each document, which hides all others."""
    ids = batch.document_ids
    groups = [ids == document for document in ids.unique() if document] if within else [ids != 0]
    states: list[Tensor] = []
    for group in groups:
        made = teacher(batch.tokens, attention_mask=group.long(), output_hidden_states=True).hidden_states
        states = [torch.where(group[..., None], x, y) for x, y in zip(made, states or made, strict=True)]
    return states


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    return sum((p * (p / q).log() for p, q in zip(expected, found, strict=True)), torch.zeros(()))


def layerwise_by_loops(
    student: DistilledForMaskedLM, teacher: Any, plan: DistillPlan, batch: MicroBatch, within: bool
) -> Tensor:
    """The sum of `LAYERWISE` times the losses of layers, position by position. Both models have equal sizes."""
    ids = batch.document_ids
    hide = None if within else ids
    kept = student.sharebert(batch.tokens, hide, document_ids=ids if within else None, pool=False, keep_states=True)
    states = states_of(teacher, batch, within)
    ours, theirs = {}, {}
    for i, j in plan.layers:
        if i and j:
            ours[i] = [x.transpose(1, 2).flatten(2) for x in student.sharebert.take(i)]
            theirs[j] = of_layer(teacher, states, j)
    heads, width = student.config.num_attention_heads, student.config.hidden_size

    def products(x: Tensor, y: Tensor, t: int, seen: list[int], head: int, heads: int, scale: float) -> Tensor:
        part = slice(head * width // heads, (head + 1) * width // heads)
        return torch.stack([x[t, part] @ y[k, part] * scale for k in seen])

    total = torch.zeros(())
    for b, row in enumerate(ids.tolist()):
        for t in (t for t, document in enumerate(row) if document):
            seen = [k for k, document in enumerate(row) if document and (document == row[t] or not within)]
            for i, j in plan.layers:
                x, y = kept.states[i][b, t], states[j][b, t]
                total = total + LAYERWISE["hidden"] / len(plan.layers) * (x - y).square().sum() / width
                total = total + LAYERWISE["cosine"] / len(plan.layers) * (1 - x @ y / x.norm() / y.norm())
                for head in range(heads) if i and j else ():
                    (q, k, _), scale = ours[i], student.config.score_scale
                    found = products(q[b], k[b], t, seen, head, heads, scale)
                    q, k, _ = theirs[j]
                    expected = products(q[b], k[b], t, seen, head, heads, (width / heads) ** -0.5)
                    share = 1 / len(ours) / heads
                    total = total + LAYERWISE["attention"] * share * (found - expected).square().sum() / len(seen)
                    total = total + LAYERWISE["attention_kl"] * share * divergence(
                        expected.softmax(0), found.softmax(0)
                    )
            i, j = plan.layers[-1]
            for x, y in zip(ours[i], theirs[j], strict=True):
                for head in range(plan.relation_heads):
                    scale = (width / plan.relation_heads) ** -0.5
                    found, expected = (
                        products(a[b], a[b], t, seen, head, plan.relation_heads, scale).softmax(0) for a in (x, y)
                    )
                    total = total + LAYERWISE["relations"] / 3 / plan.relation_heads * divergence(expected, found)
    return 0.15 * total


@pytest.fixture(scope="module")
def packed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of one row: three documents and padding."""
    folder = tmp_path_factory.mktemp("packed")
    lines = (" ".join(f"word{i + j}" for j in range(7 + i)) for i in range(3))
    (folder / "texts.txt").write_text("".join(f"{line}\n\n" for line in lines))
    words = [f"source.paths={folder / 'texts.txt'}", "source.document=paragraph", f"output={folder / 'dataset'}"]
    words += ["seq_len=32", "validation=0", f"tokenizer.path={dataset / 'tokenizer.json'}"]
    assert main(["prep", "corpus", *words]) == 0
    return folder / "dataset"


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_losses_of_layers_are_those_of_loops(
    bert: Path, packed: Path, tmp_path: Path, cached: bool, within: bool
) -> None:
    """Through the real model, gradients included, with a pair of embeddings that attention leaves out."""
    keys: dict[str, Any] = {"model__hidden_size": 24, "model__num_attention_heads": 3, "model__intermediate_size": 40}
    keys |= {f"distill__{name}": weight for name, weight in LAYERWISE.items()}
    keys |= {"distill__mlm": 0.0, "distill__project": False, "distill__relation_heads": 6}
    keys |= {"distill__layers": "[[0,0],[1,2],[2,3]]", "steps": 1, "data__global_batch": 1, "data__micro_batch": 1}
    keys |= {"distill__cache": tmp_path / "cache"} if cached else {}
    keys |= {"data__within_documents": within}
    recipe = load(TrainRecipe, None, train_arguments(packed, tmp_path / "run", distill=bert, **keys))
    if cached:
        make_cache(recipe, CacheSettings(dtype="fp32"))
    training = recipe.resolve()
    plan, cache = training.distill, training.teacher_cache
    assert plan is not None
    student = DistilledForMaskedLM(training.model.config, plan)
    initialize(student, "variance", 0)
    teacher: Any = load_teacher(plan, CPU, within_documents=within, precision="fp32")
    if cached:
        assert cache is not None
        teacher = CachedTeacher(plan, cache.score_scale)
    loader = Loader(training.datasets, recipe.data, recipe.seed, 0, 1, beside=cache)
    (batch,) = next(loader).micro_batches
    loader.close()
    assert batch.document_ids.unique().tolist() == [0, 1, 2, 3]
    found = Distillation(MaskedLanguageModelling(CPU, within_documents=within), teacher)(student, batch).loss
    model = transformers.BertForMaskedLM.from_pretrained(bert).eval().requires_grad_(False)
    wanted = layerwise_by_loops(student, model, plan, batch, within)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    weights = list(student.parameters())
    ours, theirs = (torch.autograd.grad(x, weights, allow_unused=True) for x in (found, wanted))
    for gradient, expected in zip(ours, theirs, strict=True):
        if expected is None:
            assert gradient is None or not gradient.any()  # the weight of masked words is 0
        else:
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max() + 1e-3))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"compile": True}, "distill: not with compile or quantise"),
        ({"quantise__bits": 8}, "distill: not with compile or quantise"),
        ({"data__micro_batch": "auto"}, r"data\.micro_batch: auto does not count the memory of a teacher"),
        ({"recompute": True}, "distill: relations and attention need each layer's queries"),
    ],
)
def test_options_that_exclude_it(bert: Path, dataset: Path, tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    given = train_arguments(dataset, tmp_path, distill=bert, distill__relations=1.0, **keys)
    with pytest.raises(BadInput, match=said):
        load(TrainRecipe, None, given).resolve()


@pytest.fixture(scope="module")
def runs(bert: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`: 12 steps on one rank, in pieces of 8 tokens first; `cut`: stopped after 6; `two-S`: on two ranks at ZeRO
    stage S."""
    folder = tmp_path_factory.mktemp("runs")
    keys = {"distill": bert, "distill__logits": 1.0, "distill__hidden": 1.0, "distill__relations": 1.0}
    keys |= {"distill__relation_heads": 8, "steps": 12, "validate__every": 12, "validate__rows": 8}
    keys |= {"data__row_length__first": 8}

    def arguments(name: str, **changes: Any) -> list[str]:
        return train_arguments(dataset, folder / name, **(keys | changes))

    cut = arguments("cut")
    train_many([{"overrides": arguments("whole")}, {"overrides": cut, "stop_after": 6}, {"overrides": cut}], 1, folder)
    stages = [{"overrides": arguments(f"two-{s}", zero__stage=s, data__micro_batch=5)} for s in range(4)]
    cut_teacher = shutil.copytree(bert, folder / "teacher")
    (cut_teacher / "model.safetensors").write_bytes(b"")
    # A Refused is known to all ranks, and rank 0 alone says it.
    stages.append({"overrides": arguments("no-teacher", distill=cut_teacher), "error": "Refused: distill.teacher: "})
    train_many(stages, 2, folder)
    return folder


@pytest.mark.slow
def test_a_stopped_run_goes_on_bitwise_and_ranks_and_stages_agree(runs: Path) -> None:
    whole = losses(runs / "whole")
    assert len(whole) == 12
    assert whole[-1] < whole[0]
    assert losses(runs / "cut") == whole
    for stage in range(4):
        found = losses(runs / f"two-{stage}")
        assert max(abs(a - b) / b for a, b in zip(found, whole, strict=True)) < 2e-5, f"stage {stage}"


@pytest.mark.slow
def test_checkpoints_hold_the_student_alone_and_exports_leave_the_projection_out(runs: Path) -> None:
    for run in ("whole", *(f"two-{stage}" for stage in range(4))):
        newest = checkpoint.newest_whole(runs / run / "checkpoints", print)
        assert newest is not None
        own = {name for name in newest.manifest["shapes"] if not name.startswith(("sharebert.", "mlm_head."))}
        assert own == {"hidden_projection.weight", "hidden_projection.bias"}
    consolidate(runs / "whole", runs / "export")
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(runs / "export", trust_remote_code=True)
    assert not any("hidden_projection" in name for name, _ in loaded.named_parameters())
