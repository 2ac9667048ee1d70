"""Teachers: what each kind says is what its own forward pass says, and which ones a student cannot learn from."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_students import micro_batch, student_config
from torch import Tensor

from exports.distill_losses import scores_of
from pretrain.distill.recipe import DistillRecipe, plan_distillation
from pretrain.distill.teacher import load_teacher
from sharebert_common.errors import BadInput

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def test_a_teacher_of_transformers_says_what_its_own_forward_pass_says(bert: Path, dataset: Path) -> None:
    """Logits, states, and scores that give the attention probabilities which transformers returns."""
    recipe = DistillRecipe(
        teacher=str(bert), logits=1.0, hidden=1.0, relations=1.0, relation_heads=8, layers=[(1, 1), (2, 4)]
    )
    plan = plan_distillation(recipe, student_config(), dataset / "tokenizer.json", 32)
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


def projections_of(model: Any, states: tuple[Tensor, ...], layer: int) -> list[Tensor]:
    """Queries, keys and values [B, T, H] of a layer of any of the kinds below, from the states before it."""
    encoder, kind = model.base_model, model.config.model_type
    inputs, names = [states[layer - 1]] * 3, ("query", "key", "value")
    if kind == "distilbert":
        attention, names = encoder.transformer.layer[layer - 1].attention, ("q_lin", "k_lin", "v_lin")
    elif kind == "albert":
        group = int(model.config.num_hidden_groups == 2 and layer > 3)
        attention = encoder.encoder.albert_layer_groups[group].albert_layers[0].attention
    elif kind == "mobilebert":
        inputs = encoder.encoder.layer[layer - 1].bottleneck(inputs[0])
        attention = encoder.encoder.layer[layer - 1].attention.self
    else:
        attention = encoder.encoder.layer[layer - 1].attention.self
    return [getattr(attention, name)(x) for name, x in zip(names, inputs[:3], strict=True)]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # of a MobileBERT without a wider embedding
@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "electra", "distilbert", "albert", "albert of groups", "mobilebert"]
)
def test_kinds_of_teachers(dataset: Path, tmp_path: Path, kind: str) -> None:
    """Logits, states and attention of each are those that its own forward pass returns."""
    names = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 40}
    if kind == "distilbert":
        names = {"dim": 24, "n_layers": 4, "n_heads": 3, "hidden_dim": 40}
    elif kind == "albert of groups":  # layers 1 to 3 and 4 to 5
        kind, names = "albert", names | {"num_hidden_layers": 5, "num_hidden_groups": 2}
    elif kind == "mobilebert":
        names |= {"true_hidden_size": 12, "intra_bottleneck_size": 12, "embedding_size": 24}
    torch.manual_seed(0)
    sizes = {"vocab_size": 301, "max_position_embeddings": 40, "initializer_range": 0.2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **sizes, **names)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    shutil.copy(dataset / "tokenizer.json", tmp_path)
    weights = {"logits": 1.0, "hidden": 1.0, "attention_kl": 1.0, "relations": 1.0}
    recipe = DistillRecipe(teacher=str(tmp_path), layers=[(1, 2), (2, 4)], **weights)
    student = student_config(hidden_size=24, num_attention_heads=3, intermediate_size=40)
    plan = plan_distillation(recipe, student, dataset / "tokenizer.json", 32)
    assert plan is not None
    batch = micro_batch()
    teacher = load_teacher(plan, CPU, within_documents=False, precision="fp32")
    said = [teacher(batch), teacher(batch)][1]
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    mask = (batch.document_ids != 0).long()[:2]
    with torch.no_grad():
        made = model(batch.tokens[:2], attention_mask=mask, output_hidden_states=True, output_attentions=True)
    assert said.logits is not None
    torch.testing.assert_close(said.logits[:4], made.logits.flatten(0, 1)[batch.positions[:4]], rtol=1e-4, atol=1e-5)
    for layer in (2, 4):
        torch.testing.assert_close(said.states[layer][:2], made.hidden_states[layer], rtol=1e-4, atol=1e-5)
        scores = scores_of(said.projections[layer], said.score_scale)[:2].masked_fill(mask[:, None, None] == 0, -1e9)
        torch.testing.assert_close(scores.softmax(-1), made.attentions[layer - 1], rtol=1e-4, atol=1e-5)
    headless = dataclasses.replace(plan, recipe=dataclasses.replace(recipe, logits=0.0))
    alone = load_teacher(headless, CPU, within_documents=False, precision="fp32")(batch)
    with torch.no_grad():
        wanted = projections_of(model, made.hidden_states, 4)
    for found in (said.projections[4], alone.projections[4]):
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours[:2].transpose(1, 2).flatten(2), theirs, rtol=1e-4, atol=1e-5)
    if kind == "mobilebert":
        with pytest.raises(
            BadInput, match=r"joins each word with the words beside it .*; set data\.within_documents=f"
        ):
            load_teacher(plan, CPU, within_documents=True, precision="fp32")
        too_many = dataclasses.replace(recipe, relation_heads=8)
        with pytest.raises(BadInput, match=r"distill\.relation_heads: 8 do not divide the teacher's width 12"):
            plan_distillation(too_many, student, dataset / "tokenizer.json", 32)
        return
    within = load_teacher(plan, CPU, within_documents=True, precision="fp32")(batch)
    first = (batch.document_ids == 1).long()[:2]  # the first document, with all others hidden
    with torch.no_grad():
        made = model(batch.tokens[:2], attention_mask=first, output_hidden_states=True)
    found_state, wanted_state = (x[:2][first == 1] for x in (within.states[4], made.hidden_states[4]))
    torch.testing.assert_close(found_state, wanted_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_position_embeddings": 31}, r"has 31 positions, and the dataset rows of 32 tokens"),
        ({"model_type": "roberta", "pad_token_id": 1}, r"has 30 positions, and the dataset rows of 32 tokens"),
        (
            {"model_type": "electra", "architectures": ["ElectraForPreTraining"]},
            r"distill\.logits: .* has no MLM head",
        ),
        ({"vocab_size": 300}, r"has 300 word embeddings, and its vocabulary 301 words"),
    ],
)
def test_a_teacher_that_is_too_small_is_refused(
    bert: Path, dataset: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = shutil.copytree(bert, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    recipe = DistillRecipe(teacher=str(folder), logits=1.0)
    with pytest.raises(BadInput, match=said):
        plan_distillation(recipe, student_config(), dataset / "tokenizer.json", 32)


def test_a_teacher_whose_weights_lack_a_layer_is_refused(bert: Path, dataset: Path, tmp_path: Path) -> None:
    """transformers would start it at random."""
    folder = shutil.copytree(bert, tmp_path / "deep")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    recipe = DistillRecipe(teacher=str(folder), logits=1.0)
    plan = plan_distillation(recipe, student_config(), dataset / "tokenizer.json", 32)
    assert plan is not None
    with pytest.raises(BadInput, match=r"^distill\.teacher: .*layer\.4\..*' is not among its weights"):
        load_teacher(plan, CPU, within_documents=False, precision="fp32")


@pytest.mark.parametrize("left", [0.5, 0.0])
@pytest.mark.parametrize(("kind", "file"), [("bert", "model.safetensors"), ("bert", "pytorch_model.bin"),
                                            ("export", "model.safetensors")])  # fmt: skip
def test_weights_of_a_teacher_that_were_cut_off_are_one_line(
    dataset: Path, tmp_path: Path, kind: str, file: str, left: float, request: pytest.FixtureRequest
) -> None:
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "cut")
    if file.endswith(".bin"):
        torch.save(transformers.BertForMaskedLM.from_pretrained(folder).state_dict(), folder / file)
        (folder / "model.safetensors").unlink()
    weights = (folder / file).read_bytes()
    (folder / file).write_bytes(weights[: int(left * len(weights))])
    recipe = DistillRecipe(teacher=str(folder), logits=1.0)
    plan = plan_distillation(recipe, student_config(), dataset / "tokenizer.json", 32)
    assert plan is not None
    with pytest.raises(BadInput, match=r"cut[:/].*$") as refused:
        load_teacher(plan, CPU, within_documents=False, precision="fp32")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"hidden": 1.0, "teacher": None}, r"distill\.hidden: has a weight, but distill\.teacher is not given"),
        ({}, r"distill\.teacher: no loss with it has a weight"),
        ({"cosine": 1.0}, r"distill\.cosine: the teacher's width is 24, the student's 32"),
        ({"attention": 1.0}, r"distill\.attention: the teacher has 3 heads, the student 4"),
        ({"relations": 1.0, "relation_heads": 5}, r"distill\.relation_heads: 5 do not divide the teacher's width 24"),
        (
            {"hidden": 1.0, "layers": [(3, 1)]},
            r"the student has layers 1 to 2 and embeddings \(0\), and no 3",
        ),
        (
            {"relations": 1.0, "layers": [(1, 5)]},
            r"the teacher has layers 1 to 4 and embeddings \(0\), and no 5",
        ),
        (
            {"relations": 1.0, "layers": [(1, 1), (0, 0)]},
            r"distill\.layers: .* \(0\) have none; name a pair",
        ),
        ({"attention_kl": 1.0}, r"distill\.attention_kl: the teacher has 3 heads, the student 4"),
        ({"hidden": 1.0, "project": False}, r"distill\.project: the teacher's width is 24, the student's 32"),
        ({"mlm": 0.5, "teacher": None}, r"distill\.mlm: does nothing without distill\.teacher"),
        ({"layers": [(1, 1)], "teacher": None}, r"distill\.layers: does nothing without distill\.teacher"),
        ({"hidden": 1.0, "layers": []}, r"distill\.layers: names no pair"),
        ({"hidden": 1.0, "teacher": "nowhere"}, r"distill\.teacher: nowhere/config\.json: not readable"),
    ],
)
def test_what_does_not_fit_is_refused(bert: Path, dataset: Path, keys: dict[str, Any], said: str) -> None:
    recipe = DistillRecipe(**({"teacher": str(bert)} | keys))
    with pytest.raises(BadInput, match=said):
        plan_distillation(recipe, student_config(), dataset / "tokenizer.json", 32)


def test_a_teacher_with_another_vocabulary_or_without_a_head_is_refused(
    bert: Path, dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(bert, tmp_path / "other")
    text = (bert / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace('"word7"', '"wort7"'))
    recipe = DistillRecipe(teacher=str(tmp_path / "other"), logits=1.0)
    with pytest.raises(BadInput, match=r"another vocabulary than the dataset \(1 of 301 words have other ids, 'word7'"):
        plan_distillation(recipe, student_config(), dataset / "tokenizer.json", 32)
    (tmp_path / "other" / "tokenizer.json").write_text(text)
    config = (bert / "config.json").read_text()
    (tmp_path / "other" / "config.json").write_text(config.replace("BertForMaskedLM", "BertModel"))
    with pytest.raises(BadInput, match=r"distill\.logits: .*has no MLM head; use distill\.relations"):
        plan_distillation(recipe, student_config(), dataset / "tokenizer.json", 32)
