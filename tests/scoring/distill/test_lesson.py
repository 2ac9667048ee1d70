"""Learning from a fine-tuned teacher: its losses by loops, gradients included, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_folders import hub_folder
from made_tasks import rows, sst2, tiny_export
from torch import Tensor

from exports.dense import Dense
from exports.forms import write_export
from exports.read import read_export
from scoring.data import Split, TaskData
from scoring.distill.lesson import Lesson
from scoring.distill.teacher import TaskTeacher, label_order, uses_teacher
from scoring.encoders import open_encoder
from scoring.recipe import FineTuneRecipe, TaskDistillRecipe
from scoring.tasks import TASKS
from sharebert_cli import main
from sharebert_common.errors import BadInput

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")
CPU = torch.device("cpu")


def named(folder: Path, *names: str) -> Path:
    """The classifier in `folder` with other names of labels."""
    file = folder / "config.json"
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    file.write_text(json.dumps(json.loads(file.read_text()) | labels))
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("student") / "export")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of SST-2 with 3 heads, 4 layers and the export's tokenizer; its labels stand the other way round."""
    sizes = {"hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 4}
    return named(hub_folder(tmp_path_factory.mktemp("teacher") / "bert", "SequenceClassification", **sizes),
                 "positive", "negative")  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sst2(tmp_path_factory.mktemp("task") / "SST-2", train=96)


@pytest.fixture(scope="module")
def teacher(task: Path, export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a classifier that knows the task."""
    folder = tmp_path_factory.mktemp("tuned")
    words = [str(export), "finetune.epochs=12", "finetune.batch=16", "finetune.lr=1e-2", f"output={folder}/scores"]
    assert main(["evaluate", *words, "seeds=1", "--task", "sst2", "--data", str(task), "--save", f"{folder}/best"]) == 0
    return folder / "best"


def made_data(count: int = 9) -> TaskData:
    texts, labels = zip(*rows(count, 0), strict=True)
    return TaskData(TASKS["sst2"], Split("made", [(text,) for text in texts], np.array(labels)), {})


def by_loops(given: dict[str, Any], projection: Any, recipe: TaskDistillRecipe) -> Tensor:
    """The loss from logits, states and vectors of queries and keys, with one number at a time."""
    mask, total = given["mask"], recipe.labels * given["loss"]
    real = [(b, t) for b in range(len(mask)) for t in range(mask.shape[1]) if mask[b, t]]
    temperature = recipe.temperature
    for b in range(len(mask)):
        p = [(x / temperature).exp() for x in given["teacher_logits"][b]]
        q = [(x / temperature).exp() for x in given["logits"][b]]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        kl = sum(a * (a / c).log() for a, c in zip(p, q, strict=True))
        total = total + recipe.logits * temperature**2 * kl / len(mask)
    for ours, theirs in given["pairs"]:
        for b, t in real:
            student = projection.weight @ given["states"][ours][b, t] + projection.bias
            wanted = given["teacher_states"][theirs][b, t]
            square = sum((student[i] - wanted[i]) ** 2 for i in range(len(wanted))) / len(wanted)
            total = total + recipe.hidden * square / len(real) / len(given["pairs"])
            keys = [j for j in range(mask.shape[1]) if mask[b, j]]
            attended = [pair for pair in given["pairs"] if 0 not in pair]
            for h in range(3) if (ours, theirs) in attended else ():
                for j in keys:
                    q1, k1 = (given[name][ours][b, h] for name in ("query", "key"))
                    q2, k2 = (given[name][theirs][b, h] for name in ("teacher_query", "teacher_key"))
                    score = given["scale"] * (q1[t] * k1[j]).sum() - (q2[t] * k2[j]).sum() / math.sqrt(q2.shape[-1])
                    share = recipe.attention / 3 / len(keys) / len(real) / len(attended)
                    total = total + share * score**2
    return total


@pytest.mark.parametrize("form", ["compact", "dense"])
def test_the_loss_is_that_of_the_loops(export: Path, bert: Path, tmp_path: Path, form: str) -> None:
    """`form` of the student: an export of this project, or its dense form, which is a model of transformers."""
    if form == "dense":
        write_export(read_export(export), tmp_path / "dense", Dense())
        export = tmp_path / "dense"
    weights = {"labels": 0.5, "logits": 2.0, "temperature": 3.0, "hidden": 1.5, "attention": 0.7}
    recipe = TaskDistillRecipe(teacher=str(bert), layers=[(0, 0), (1, 2), (2, 3)], **weights)
    settings = FineTuneRecipe(distill=recipe)
    data = made_data()
    encoder = open_encoder(str(export), settings)
    encoded = encoder.encode(data.train.texts, "made")
    taught = TaskTeacher(settings, data, CPU)
    taught.check(encoder, encoded)
    torch.manual_seed(0)
    model = encoder.build(data.task, 0).train()  # without dropout; evaluation would keep the generated matrices
    lesson = Lesson(taught, encoder, model)
    chosen = [4, 0, 7]
    batch = encoder.collate(encoded, chosen)
    assert (batch["attention_mask"] == 0).any()
    labels = torch.tensor(data.train.labels)[chosen]

    from transformers import AutoModelForSequenceClassification

    frozen: Any = AutoModelForSequenceClassification.from_pretrained(bert).eval()
    with torch.no_grad():
        said = frozen(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
        layers = [frozen.bert.encoder.layer[theirs - 1].attention.self for theirs in (2, 3)]
        vectors = {
            kind: {
                theirs: getattr(layer, kind)(said.hidden_states[theirs - 1]).unflatten(-1, (3, -1)).transpose(1, 2)
                for theirs, layer in zip((2, 3), layers, strict=True)
            }
            for kind in ("query", "key")
        }
    torch.testing.assert_close(taught.logits[chosen], said.logits[:, [1, 0]], rtol=1e-4, atol=1e-5)

    def of_student(output: Any) -> dict[str, Any]:
        """Queries and keys, made again from the states before the layers."""
        found: dict[str, dict[int, Tensor]] = {"query": {}, "key": {}}
        for ours in (1, 2):
            state = output.hidden_states[ours - 1]
            if form == "compact":
                encoder = model.sharebert
                layer = encoder.layers[ours - 1]
                matrices = encoder.layer_weights(False).of_layer(ours - 1)
                _, x = layer.attention_norm(state, None)
                found["query"][ours], found["key"][ours], _ = type(layer).project(layer, x, matrices)
            else:
                layer = model.bert.encoder.layer[ours - 1].attention
                x = layer.ln(state)
                for kind in ("query", "key"):
                    found[kind][ours] = getattr(layer.self, kind)(x).unflatten(-1, (3, -1)).transpose(1, 2)
        return found

    parameters = [*model.parameters(), *lesson.parameters()]
    output = model(**batch, labels=labels, **lesson.arguments)
    ours = lesson(output, batch, chosen)
    ours_gradients = torch.autograd.grad(ours, parameters, allow_unused=True)
    output = model(**batch, labels=labels, output_hidden_states=True)
    scale = model.sharebert.config.score_scale if form == "compact" else 8**-0.5
    given = {
        "mask": batch["attention_mask"],
        "loss": output.loss,
        "logits": output.logits,
        "states": output.hidden_states,
        "scale": scale,
        "pairs": recipe.layers,
        "teacher_logits": said.logits[:, [1, 0]],
        "teacher_states": said.hidden_states,
        "teacher_query": vectors["query"],
        "teacher_key": vectors["key"],
    } | of_student(output)
    wanted = by_loops(given, lesson.projection, recipe)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    wanted_gradients = torch.autograd.grad(wanted, parameters, allow_unused=True)
    for parameter, found, expected in zip(parameters, ours_gradients, wanted_gradients, strict=True):
        if found is None or expected is None:
            assert found is None
            assert expected is None
            continue
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * (1 + float(expected.abs().max())))
        assert parameter.requires_grad


def test_regression_learns_the_scores(export: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    bert = hub_folder(tmp_path / "bert", "SequenceClassification")
    BertForSequenceClassification(BertConfig.from_pretrained(bert, num_labels=1)).save_pretrained(bert)
    data = made_data()
    data = TaskData(TASKS["stsb"], Split("made", data.train.texts, np.linspace(0, 5, 9)), {})
    settings = FineTuneRecipe(distill=TaskDistillRecipe(teacher=str(bert), labels=0.0, logits=2.0))
    encoder = open_encoder(str(export), settings)
    teacher = TaskTeacher(settings, data, CPU)
    model = encoder.build(data.task, 0).eval()
    batch = encoder.collate(encoder.encode(data.train.texts, "made"), [3, 5])
    output = model(**batch, labels=torch.tensor([1.0, 2.0]))
    found = Lesson(teacher, encoder, model)(output, batch, [3, 5])
    wanted = 2.0 * ((output.logits - teacher.logits[[3, 5]]) ** 2).sum() / 2
    torch.testing.assert_close(found, wanted)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = (torch.autograd.grad(x, weights, retain_graph=True, allow_unused=True) for x in (found, wanted))
    torch.testing.assert_close(ours, theirs)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in ours)


def test_a_student_learns_from_the_teacher_alone(
    task: Path, export: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the true labels, from its logits, hidden states and attention, and with copies of the rows."""
    words = [f"random:{export}", "finetune.epochs=4", "finetune.batch=16", "finetune.lr=1e-2", f"output={tmp_path}"]
    distill = [f"finetune.distill.teacher={teacher}", "finetune.distill.labels=0", "finetune.distill.hidden=0.1"]
    distill += ["finetune.distill.attention=0.1", "finetune.distill.temperature=2"]
    copies = [f"data.augment.model={export}", "data.augment.copies=3", "data.augment.probability=0.2"]
    call = ["evaluate", *words, *distill, *copies, "seeds=1", "--task", "sst2", "--data", str(task)]
    assert main(call) == 0
    (file,) = (tmp_path / "sst2").glob("*.json")
    result = json.loads(file.read_text())
    assert result["scores"]["dev"]["accuracy"][0] > 0.75
    assert result["settings"]["distill"]["teacher"] == str(teacher)
    assert 96 * 2 < result["train_rows"] <= 96 * 4
    assert f"96 rows, and {result['train_rows'] - 96} copies by {export}" in capsys.readouterr().err
    (kept,) = (tmp_path / "sst2" / "augmented").iterdir()
    before = kept.stat().st_mtime_ns
    assert main(call) == 0
    again = json.loads(file.read_text())
    assert again["scores"] == result["scores"]
    assert kept.stat().st_mtime_ns == before


def test_an_update_of_a_low_rank_learns_from_the_teacher_alone(
    task: Path, export: Path, teacher: Path, tmp_path: Path
) -> None:
    words = [str(export), "finetune.lora.rank=4", "finetune.epochs=6", "finetune.batch=16", "finetune.lr=3e-2"]
    words += [f"finetune.distill.teacher={teacher}", "finetune.distill.labels=0", "seeds=1", f"output={tmp_path}"]
    assert main(["evaluate", *words, "--task", "sst2", "--data", str(task)]) == 0
    (file,) = (tmp_path / "sst2").glob("*.json")
    assert json.loads(file.read_text())["scores"]["dev"]["accuracy"][0] > 0.75


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["finetune.distill.teacher=nowhere"], r"finetune\.distill\.teacher: nowhere/config\.json: missing"),
        (["finetune.distill.logits=0"], "no loss with it has a weight; give one of logits, hidden, attention"),
        (["finetune.distill.layers=[]"], "finetune.distill.layers: names no pair"),
        (
            ["finetune.distill.hidden=1", "finetune.distill.layers=[[3,1]]"],
            r"export has layers 1 to 2 and embeddings \(0\), and no 3",
        ),
        (
            ["finetune.distill.attention=1", "finetune.distill.layers=[[0,1]]"],
            r"\(0\) have none; name a pair of layers",
        ),
    ],
)
def test_keys_that_do_not_fit_are_refused(
    task: Path, export: Path, bert: Path, tmp_path: Path, keys: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(export), f"finetune.distill.teacher={bert}", *keys, f"output={tmp_path}"]
    assert main(["evaluate", *words, "--task", "sst2", "--data", str(task)]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    import re

    assert re.search(said, error), error


def test_teachers_that_do_not_fit_are_refused(export: Path, bert: Path, tmp_path: Path) -> None:
    sst2_task = TASKS["sst2"]
    assert label_order(bert, sst2_task) == [1, 0]
    with pytest.raises(BadInput, match="export is no classifier; give a folder that evaluate --save wrote"):
        label_order(export, sst2_task)
    other = named(shutil.copytree(bert, tmp_path / "other"), "bad", "good")
    with pytest.raises(BadInput, match="scores the labels bad, good; those of sst2 are negative, positive"):
        label_order(other, sst2_task)
    assert label_order(named(other, "LABEL_0", "LABEL_1"), sst2_task) == [0, 1]
    with pytest.raises(BadInput, match="scores the labels LABEL_0, LABEL_1; those of stsb are score"):
        label_order(other, TASKS["stsb"])
    with pytest.raises(BadInput, match=r"finetune\.distill\.hidden: given, but finetune\.distill\.teacher is not"):
        uses_teacher(TaskDistillRecipe(hidden=1.0))
    heads = named(hub_folder(tmp_path / "heads", "SequenceClassification"), "negative", "positive")
    settings = FineTuneRecipe(distill=TaskDistillRecipe(teacher=str(heads), attention=1.0))
    encoder = open_encoder(str(export), settings)
    data = made_data()
    with pytest.raises(BadInput, match=r"distill\.attention: the teacher .*heads has 4 heads, .*export has 3"):
        TaskTeacher(settings, data, CPU).check(encoder, encoder.encode(data.train.texts, "made"))
    tokenizer = heads / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w1"', '"v1"'))
    settings = FineTuneRecipe(distill=TaskDistillRecipe(teacher=str(heads), hidden=1.0))
    with pytest.raises(BadInput, match=r"heads cuts the texts into other tokens than .*; hidden states and attention"):
        TaskTeacher(settings, data, CPU).check(encoder, encoder.encode(data.train.texts, "made"))
