"""A student and its teacher: what is checked, what is minimised, and that runs are those of any other training."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import losses, train_arguments, train_many

from exports.distill_losses import cosine_loss, hidden_loss, logits_loss, relations_loss, scores_of
from pretrain.checkpoint import format as checkpoint
from pretrain.data.batches import MicroBatch
from pretrain.distill.objective import Distillation, real_positions
from pretrain.distill.recipe import DistillRecipe, plan_distillation
from pretrain.distill.student import DistilledForMaskedLM
from pretrain.distill.teacher import load_teacher
from pretrain.export.consolidate import consolidate
from pretrain.objective import MaskedLanguageModelling
from pretrain.recipe import TrainRecipe
from sharebert import ShareBertConfig, initialize
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def student_config(**changes: Any) -> ShareBertConfig:
    keys = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    keys |= {"num_attention_heads": 4, "factor_size": 8, "max_position_embeddings": 32, "mlm_head": "tied"}
    keys |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ShareBertConfig.from_dict(keys | changes)


def micro_batch() -> MicroBatch:
    """Three rows: a whole one of two documents, one with padding, and one that only fills up the shape."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 301, (3, 32), generator=generator)
    documents = torch.ones(3, 32, dtype=torch.uint8)
    documents[0, 20:] = 2
    documents[1, 25:] = 0
    positions = torch.tensor([3, 17, 32, 40, 0, 0])
    labels = torch.randint(5, 301, (6,), generator=generator)
    return MicroBatch(tokens, documents, positions, labels, torch.tensor([1.0, 1, 1, 1, 0, 0]), padded=True)


EVERYTHING = {"mlm": 0.5, "logits": 2.0, "temperature": 2.0, "hidden": 1.0, "relations": 3.0, "relation_heads": 8}


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
        plan = plan_distillation(given, config, dataset / "tokenizer.json")
        assert plan is not None
        student = DistilledForMaskedLM(config, plan)
        initialize(student, "variance", 0)
        teacher = load_teacher(plan, CPU, within_documents=within, precision="fp32")
        mlm = MaskedLanguageModelling(CPU, within_documents=within)
        batch = micro_batch().cut(length)
        total = Distillation(mlm, teacher, 0.15)(student, batch)
        taught = teacher(batch)
        with torch.no_grad():
            plain = mlm(student, batch)
            ids = batch.document_ids
            hide = None if within else ids
            kept = student.sharebert(
                batch.tokens, hide, document_ids=ids if within else None, pool=False, keep_states=True
            )
            visible = ids[:, :, None] == ids[:, None, :] if within else (ids != 0)[:, None, :].expand(-1, length, -1)
            weights = 0.15 * real_positions(batch)
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
            assert Distillation(mlm, teacher, 0.15)(student, batch).loss == plain.loss, "validation is masked LM alone"


def test_a_teacher_of_transformers_says_what_its_own_forward_pass_says(bert: Path, dataset: Path) -> None:
    """Logits, states, and scores that give the attention probabilities which transformers returns."""
    recipe = DistillRecipe(
        teacher=str(bert), logits=1.0, hidden=1.0, relations=1.0, relation_heads=8, layers=[(1, 1), (2, 4)]
    )
    plan = plan_distillation(recipe, student_config(), dataset / "tokenizer.json")
    assert plan is not None
    batch = micro_batch()
    said = load_teacher(plan, CPU, within_documents=False, precision="fp32")(batch)
    model = transformers.BertForMaskedLM.from_pretrained(bert, attn_implementation="eager").eval()
    mask = (batch.document_ids != 0).long()
    with torch.no_grad():
        made = model(batch.tokens, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(said.logits, made.logits.flatten(0, 1)[batch.positions], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said.states[4], made.hidden_states[4], rtol=1e-4, atol=1e-5)
    scores = scores_of(said.projections[4], said.score_scale).masked_fill(mask[:, None, None] == 0, -1e9)
    torch.testing.assert_close(scores.softmax(-1), made.attentions[3], rtol=1e-4, atol=1e-5)


def test_cosine_and_attention_need_equal_sizes_and_work_then(bert: Path, dataset: Path) -> None:
    config = student_config(hidden_size=24, num_attention_heads=3, intermediate_size=40)
    recipe = DistillRecipe(teacher=str(bert), cosine=1.0, attention=1.0, mlm=0.0)
    plan = plan_distillation(recipe, config, dataset / "tokenizer.json")
    assert plan is not None
    assert plan.layers == ((1, 2), (2, 4))
    student = DistilledForMaskedLM(config, plan)
    initialize(student, "variance", 0)
    teacher = load_teacher(plan, CPU, within_documents=False, precision="fp32")
    batch = micro_batch()
    loss = Distillation(MaskedLanguageModelling(CPU), teacher, 0.15)(student, batch).loss
    kept = student.sharebert(batch.tokens, batch.document_ids, pool=False, keep_states=True)
    taught, weights = teacher(batch), 0.15 * real_positions(batch)
    cosine = sum(cosine_loss(kept.states[i], taught.states[j], weights) / 2 for i, j in plan.layers)
    assert 0 < cosine < loss
    loss.backward()
    assert student.sharebert.word_embeddings.weight.grad is not None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"hidden": 1.0, "teacher": None}, r"distill\.hidden: has a weight, but distill\.teacher is not given"),
        ({}, r"distill\.teacher: no loss with it has a weight"),
        ({"cosine": 1.0}, r"distill\.cosine: the teacher's width is 24, the student's 32"),
        ({"attention": 1.0}, r"distill\.attention: the teacher has 3 heads, the student 4"),
        ({"relations": 1.0, "relation_heads": 5}, r"distill\.relation_heads: 5 do not divide the teacher's width 24"),
        ({"hidden": 1.0, "layers": [(3, 1)]}, r"distill\.layers: the student has layers 0 to 2, and no 3"),
        ({"relations": 1.0, "layers": [(1, 5)]}, r"distill\.layers: the teacher has layers 1 to 4, and no 5"),
        ({"hidden": 1.0, "layers": []}, r"distill\.layers: names no pair"),
        ({"hidden": 1.0, "teacher": "nowhere"}, r"distill\.teacher: nowhere/config\.json: not readable"),
    ],
)
def test_what_does_not_fit_is_refused(bert: Path, dataset: Path, keys: dict[str, Any], said: str) -> None:
    recipe = DistillRecipe(**({"teacher": str(bert)} | keys))
    with pytest.raises(BadInput, match=said):
        plan_distillation(recipe, student_config(), dataset / "tokenizer.json")


def test_a_teacher_with_another_vocabulary_or_without_a_head_is_refused(
    bert: Path, dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(bert, tmp_path / "other")
    text = (bert / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace('"word7"', '"wort7"'))
    recipe = DistillRecipe(teacher=str(tmp_path / "other"), logits=1.0)
    with pytest.raises(BadInput, match=r"another vocabulary than the dataset \(1 of 301 words have other ids, 'word7'"):
        plan_distillation(recipe, student_config(), dataset / "tokenizer.json")
    (tmp_path / "other" / "tokenizer.json").write_text(text)
    config = (bert / "config.json").read_text()
    (tmp_path / "other" / "config.json").write_text(config.replace("BertForMaskedLM", "BertModel"))
    with pytest.raises(BadInput, match=r"distill\.logits: .*has no MLM head; use distill\.relations"):
        plan_distillation(recipe, student_config(), dataset / "tokenizer.json")


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
