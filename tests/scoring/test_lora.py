"""LoRA in fine-tuning: what is trained, that a merge changes nothing, what is refused, and `evaluate` with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_folders import hub_folder
from made_tasks import sst2, tiny_export
from torch import nn

from exports.read import read_export
from scoring.encoders import Encoder, open_encoder
from scoring.lora import Adapted, UpdatedMatrices, adapt
from scoring.recipe import FineTuneRecipe, LoraRecipe
from scoring.tasks import Task
from sharebert.virtual import blocks
from sharebert_cli import main
from sharebert_common.errors import BadInput

pytest.importorskip("peft")

TASK = Task("mine", text=("text",), label="label", labels=("bad", "good"))
IDS = torch.randint(5, 250, (6, 9), generator=torch.Generator().manual_seed(0))


def opened(folder: Path, **keys: Any) -> tuple[Encoder, FineTuneRecipe]:
    settings = FineTuneRecipe(lora=LoraRecipe(**{"rank": 3, **keys}))
    return open_encoder(str(folder), settings), settings


def trained(encoder: Encoder, settings: FineTuneRecipe, seed: int = 1) -> Adapted:
    """A classifier after three steps with a high learning rate."""
    adapted = adapt(encoder, encoder.build(TASK, seed), settings)
    model = adapted.model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=torch.tensor([0, 1, 0, 1, 1, 0])).loss.backward()
        optimizer.step()
    return adapted


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits  # type: ignore[no-any-return]


def updates_in(model: nn.Module) -> list[str]:
    """The names of modules that hold updates: those of peft, and the sums of generated matrices."""
    return [name for name, part in model.named_modules() if "lora" in name or isinstance(part, UpdatedMatrices)]


@pytest.fixture(params=["compact factors", "compact generated", "eps factors", "pruned factors", "hugging face"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder, and what `finetune.lora` says beside the rank and the kind."""
    kind, _, targets = request.param.partition(" ")
    if kind == "hugging":
        return hub_folder(tmp_path / "bert", "", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), {}
    changes = {"eps": {"sharing": "eps"}, "pruned": {"kept_heads": (0, 2), "kept_columns": tuple(range(20))}}
    return tiny_export(tmp_path / "export", **changes.get(kind, {})), {"targets": [targets]}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merge_is_equal_to_the_unmerged_model(case: tuple[Path, dict[str, Any]], kind: str) -> None:
    folder, keys = case
    encoder, settings = opened(folder, kind=kind, alpha=6, **keys)
    start = logits(encoder.build(TASK, 1))
    fresh = adapt(encoder, encoder.build(TASK, 1), settings)
    torch.testing.assert_close(logits(fresh.model), start, rtol=1e-5, atol=1e-5)  # an update starts at zero
    adapted = trained(encoder, settings)
    assert updates_in(adapted.model)
    before = logits(adapted.model)
    assert (before - start).abs().max() > 0.05
    merged = adapted.merged()
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)
    assert not updates_in(merged)


def test_only_updates_and_the_classifier_change(case: tuple[Path, dict[str, Any]]) -> None:
    folder, keys = case
    encoder, settings = opened(folder, **keys)
    start = encoder.build(TASK, 1).state_dict()
    adapted = trained(encoder, settings)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in adapted.model.state_dict().items()}
    changed = {name for name, tensor in start.items() if name in after and not torch.equal(tensor, after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    new = [p.numel() for name, p in adapted.model.named_parameters() if p.requires_grad and "classifier" not in name]
    assert adapted.trained == sum(new) + sum(start[name].numel() for name in changed)


def test_the_factors_of_a_merge_are_sums_of_a_low_rank(tmp_path: Path) -> None:
    encoder, settings = opened(tiny_export(tmp_path / "export"), rank=2)
    start = encoder.build(TASK, 1).state_dict()
    merged = trained(encoder, settings).merged().state_dict()
    assert start.keys() == merged.keys()
    for name in ("word_embeddings", "factor_linear_all"):
        change = merged[f"sharebert.{name}.weight"] - start[f"sharebert.{name}.weight"]
        values = torch.linalg.svdvals(change.double())
        assert values[1] > 1e-4
        assert values[2] < 1e-5 * values[0]


def test_the_update_of_a_generated_matrix_by_hand() -> None:
    """DoRA's equation 5 on a matrix: its columns have the lengths m and the directions of W + (alpha / r)·A·B."""
    torch.manual_seed(0)
    matrices = {name: torch.randn(6, 4) for name in ("query", "pooler")}
    made = UpdatedMatrices(matrices, LoraRecipe(rank=2, alpha=3, kind="dora"), fixed=("pooler",))
    parameters = dict(made.named_parameters())
    assert sorted(parameters) == ["query_a", "query_b", "query_length"]
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    total = matrices["query"] + 1.5 * parameters["query_a"] @ parameters["query_b"]
    expected = parameters["query_length"] * total / total.square().sum(0).sqrt()
    torch.testing.assert_close(made.matrix("query"), expected)
    assert torch.equal(made.matrix("pooler"), matrices["pooler"])


def test_a_tied_weight_is_refused(tmp_path: Path) -> None:
    """Merged, the update of one module would change the other."""
    encoder, settings = opened(hub_folder(tmp_path / "bert", ""), targets="query")
    model: Any = encoder.build(TASK, 1)
    layers = model.bert.encoder.layer
    layers[1].attention.self.key.weight = layers[0].attention.self.query.weight
    with pytest.raises(BadInput, match=r"0\.attention\.self\.query shares its weight with .*1\.attention\.self\.key"):
        adapt(encoder, model, settings)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 9}, "finetune.lora.rank: 9 is above 8, the smaller side of sharebert.word_embeddings"),
        ({"rank": 25, "targets": "generated"}, "rank: 25 is above 24, the smaller side of query"),
        ({"targets": "query"}, "finetune.lora.targets: query: for a ShareBERT give factors or generated"),
        ({"dropout": 0.1}, "finetune.lora.dropout: is for Hugging Face encoders"),
    ],
)
def test_what_a_sharebert_cannot_do(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    encoder, settings = opened(tiny_export(tmp_path / "export"), **keys)
    with pytest.raises(BadInput) as error:
        adapt(encoder, encoder.build(TASK, 1), settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 33}, "finetune.lora.rank: 33 is above 32, the smaller side of bert.encoder.layer.0"),
        ({"targets": "qery"}, "no linear layer or embedding is named qery; did you mean 'query'? (there are dense, "),
        ({"targets": "factors"}, "is named factors: factors is for ShareBERT exports"),
    ],
)
def test_what_another_encoder_cannot_do(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    encoder, settings = opened(hub_folder(tmp_path / "bert", ""), **keys)
    with pytest.raises(BadInput) as error:
        adapt(encoder, encoder.build(TASK, 1), settings)
    assert message in str(error.value)


def test_matrices_that_are_not_generated_and_pruned_ones(tmp_path: Path) -> None:
    for number, (changes, message) in enumerate(
        [
            ({"sharing": "layers"}, "has sharing: layers, which generates no matrices"),
            ({"sharing": "eps"}, "generated takes a ShareBERT with sharing: veps"),
            ({"kept_heads": (1,)}, "that is not pruned"),
        ]
    ):
        encoder, settings = opened(tiny_export(tmp_path / str(number), **changes), targets="generated")
        with pytest.raises(BadInput, match=message):
            adapt(encoder, encoder.build(TASK, 1), settings)


FAST = ["finetune.epochs=8", "finetune.batch=16", "finetune.lr=2e-2", "finetune.lora.rank=4", "seeds=1"]


def evaluated(model: Path, task: Path, output: Path, *more: str) -> dict[str, Any]:
    arguments = [str(model), *FAST, f"output={output}", "--task", "sst2", "--data", str(task), *more]
    assert main(["evaluate", *arguments]) == 0
    (path,) = (output / "sst2").glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("targets", ["factors", "generated"])
def test_evaluate_a_compact_export(tmp_path: Path, targets: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The saved classifier is an export with the reported score; a second call gives the same bytes."""
    export, task = tiny_export(tmp_path / "export"), sst2(tmp_path / "SST-2")
    key = f"finetune.lora.targets={targets}"
    found = evaluated(export, task, tmp_path / "a", key, "--save", str(tmp_path / "saved"))
    assert found["scores"]["dev"]["accuracy"][0] > 0.8
    plain = read_export(export)
    if targets == "factors":
        updates = 4 * (plain.config.vocab_size + 8 + 8 + 24)
    else:
        updates = sum(4 * (block.rows + block.columns) for block in blocks(plain.config).values())
    assert found["trained_parameters"] == updates + 2 * 24 + 2
    assert found["settings"]["lora"]["targets"] == [targets]
    assert f"| {found['trained_parameters']:,} |" in " ".join(capsys.readouterr().out.split())

    saved = read_export(tmp_path / "saved")
    assert saved.config.sharing == ("veps" if targets == "factors" else "layers")
    evaluated(export, task, tmp_path / "b", key, "--save", str(tmp_path / "again"))
    name = "model.safetensors"
    assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()

    from compress.as_is import score_as_is
    from scoring.recipe import EvaluateRecipe
    from sharebert_common.recipe import load

    recipe = load(EvaluateRecipe, None, ["task=sst2", f"data={task}"])
    scores = score_as_is(tmp_path / "saved", "compact", recipe)
    assert scores["dev accuracy"] == found["scores"]["dev"]["accuracy"]


def test_evaluate_a_dense_export(tmp_path: Path) -> None:
    import transformers

    from exports.dense import Dense
    from exports.forms import write_export

    task = sst2(tmp_path / "SST-2")
    write_export(read_export(tiny_export(tmp_path / "export")), tmp_path / "dense", Dense())
    found = evaluated(tmp_path / "dense", task, tmp_path / "out", "--save", str(tmp_path / "saved"))
    assert found["scores"]["dev"]["accuracy"][0] > 0.8
    # two layers with four matrices [24, 24] and two of [24, 40], the pooler, and the classifier
    assert found["trained_parameters"] == 4 * (2 * (4 * 48 + 2 * 64) + 48) + 2 * 24 + 2
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


def test_a_bad_target_is_found_before_the_first_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export, task = tiny_export(tmp_path / "export"), sst2(tmp_path / "SST-2", train=20, dev=10)
    words = ["evaluate", "majority", str(export), f"output={tmp_path}", "--task", "sst2", "--data", str(task)]
    for keys, message in (
        (["finetune.lora.rank=99"], "finetune.lora.rank: 99 is above 8"),
        (["finetune.lora.rank=2", "finetune.quantise.bits=4"], "finetune.lora: goes without finetune.quantise"),
        (["finetune.lora.kind=loftq"], "finetune.lora.kind: "),
        (["finetune.lora.alpha=4"], "finetune.lora.rank: is missing"),
    ):
        assert main([*words, *keys]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("sst2/*.json"))
