"""`sharebert evaluate --task blimp`: scores against a slow transcription, ties, groups, subsets, resuming, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from made_tasks import blimp, tiny_export

from exports.dense import Dense
from exports.forms import write_export
from exports.read import load_model, read_export
from scoring.blimp import run
from scoring.blimp.likelihood import pseudo_log_likelihoods
from scoring.blimp.masked_lm import HuggingFaceLM, MaskedLM, open_masked_lm
from scoring.blimp.pairs import accuracy, by_kind, read_paradigms
from sharebert_cli import main
from sharebert_common.errors import BadInput

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
BERT = {"vocab_size": 250, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 16}  # fmt: skip
HUGGING_FACE: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertConfig", BERT, "BertForMaskedLM"),
    "roberta": ("RobertaConfig", {**BERT, "type_vocab_size": 1, "pad_token_id": 0}, "RobertaForMaskedLM"),
    "distilbert": ("DistilBertConfig", {"vocab_size": 250, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32,
                                        "max_position_embeddings": 16}, "DistilBertForMaskedLM"),
    "electra": ("ElectraConfig", {**BERT, "embedding_size": 8}, "ElectraForMaskedLM"),
    "albert": ("AlbertConfig", {**BERT, "embedding_size": 8}, "AlbertForMaskedLM"),
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blimp(tmp_path_factory.mktemp("blimp") / "data")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("blimp") / "export")


@pytest.fixture(scope="module")
def models(export: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind of masked language model, with the export's words."""
    folder = tmp_path_factory.mktemp("models")
    found = {"export": export, "dense": folder / "dense"}
    write_export(read_export(export), folder / "dense", Dense())
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(export)
    for name, (config, keys, model) in HUGGING_FACE.items():
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**keys))
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # so that scores differ
        made.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        found[name] = folder / name
    return found


def slow_scores(folder: Path, sentences: list[str]) -> list[float]:
    """Salazar et al. 2020, equation 1, one row at a time."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    if json.loads((folder / "config.json").read_text())["model_type"] == "sharebert":
        logits_of = load_model(folder).logits
    else:
        model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()

        def logits_of(ids: torch.Tensor) -> torch.Tensor:
            return model(input_ids=ids).logits

    scores = []
    for sentence in sentences:
        ids = tokenizer(sentence)["input_ids"]
        total = 0.0
        for position in range(1, len(ids) - 1):
            masked = torch.tensor([ids])
            masked[0, position] = tokenizer.mask_token_id
            with torch.no_grad():
                total += float(logits_of(masked)[0, position].double().log_softmax(0)[ids[position]])
        scores.append(total)
    return scores


@pytest.mark.parametrize("kind", ["export", "dense", *HUGGING_FACE])
def test_scores_are_those_of_a_slow_transcription(kind: str, models: dict[str, Path], pairs: Path) -> None:
    lm = open_masked_lm(str(models[kind]), CPU)
    if isinstance(lm, HuggingFaceLM):
        assert lm.takes_chosen
    texts = [sentence for paradigm in read_paradigms(str(pairs)) for pair in paradigm.pairs for sentence in pair]
    expected = slow_scores(models[kind], texts)
    assert pseudo_log_likelihoods(lm, texts) == pytest.approx(expected, rel=1e-5)
    assert len({round(score, 3) for score in expected}) > len(texts) // 2


def test_a_model_whose_head_needs_all_positions(
    models: dict[str, Path], pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortcut is left out, and the scores are the same."""
    texts = ["w1 w2 w3", "w4 w5", "w6 w7 w8"]
    quick = pseudo_log_likelihoods(open_masked_lm(str(models["bert"]), CPU), texts)
    original = transformers.BertForMaskedLM.forward

    def forward(self: Any, input_ids: torch.Tensor, **keys: Any) -> Any:
        output = original(self, input_ids=input_ids, **keys)
        if output.logits.shape[1] != input_ids.shape[1]:
            raise RuntimeError("the head saw one position")
        return output

    monkeypatch.setattr(transformers.BertForMaskedLM, "forward", forward)
    lm = open_masked_lm(str(models["bert"]), CPU)
    assert isinstance(lm, HuggingFaceLM)
    assert not lm.takes_chosen
    assert pseudo_log_likelihoods(lm, texts) == pytest.approx(quick, rel=1e-5)


def test_batches_do_not_change_scores(models: dict[str, Path], pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = open_masked_lm(str(models["export"]), CPU)
    texts = [pair[0] for paradigm in read_paradigms(str(pairs)) for pair in paradigm.pairs]
    whole = pseudo_log_likelihoods(lm, texts)
    monkeypatch.setattr("scoring.blimp.likelihood.BATCH_TOKENS", 20)
    assert pseudo_log_likelihoods(lm, texts) == pytest.approx(whole, rel=1e-5)


def evaluate(*arguments: str) -> int:
    return main(["evaluate", "--task", "blimp", *arguments])


def read_result(output: Path) -> dict[str, Any]:
    (file,) = (output / "blimp").glob("*.json")
    return dict(json.loads(file.read_text()))


def test_a_constant_scorer_has_50(
    export: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MaskedLM, "log_probabilities", lambda self, ids, positions, targets: torch.zeros(len(ids)))
    assert evaluate(str(export), "--data", str(pairs), f"output={tmp_path}") == 0
    result = read_result(tmp_path)
    assert result["scores"] == {"blimp": {"accuracy": [0.5]}}
    assert {value for group in result["details"].values() for value in group.values()} == {0.5}
    assert "| 50.0 " in capsys.readouterr().out


def test_accuracies_and_groups_against_the_transcription(export: Path, pairs: Path, tmp_path: Path) -> None:
    assert evaluate(str(export), "--data", str(pairs), f"output={tmp_path}") == 0
    result = read_result(tmp_path)
    expected = {}
    for file in sorted(pairs.glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
        good, bad = (slow_scores(export, [row[key] for row in rows]) for key in ("sentence_good", "sentence_bad"))
        expected[file.stem] = sum(a > b for a, b in zip(good, bad, strict=True)) / len(rows)
    assert result["details"]["UID"] == pytest.approx(expected)
    assert result["details"]["linguistics_term"]["x"] == pytest.approx((expected["x_1"] + expected["x_2"]) / 2)
    assert result["details"]["field"]["semantics"] == pytest.approx(expected["y_1"])
    assert result["scores"]["blimp"]["accuracy"] == [pytest.approx(sum(expected.values()) / 3)]
    assert result["settings"] == {"pairs": 18}
    assert result["seeds"] == result["fit_s"] == []
    text = (tmp_path / "blimp" / "results.md").read_text()
    for name in ("field", "linguistics_term", "UID", "syntax", "semantics", "x_2"):
        assert f"\n| {name} " in text


def test_a_tie_counts_a_half() -> None:
    assert accuracy([(1.0, 0.0), (0.0, 1.0), (2.0, 2.0), (2.0, 2.0)]) == 0.5
    assert accuracy([(1.0, 0.0), (2.0, 2.0)]) == 0.75


def test_sentences_with_the_same_tokens_tie(export: Path) -> None:
    """Two words that the tokenizer does not know, and white space."""
    lm = open_masked_lm(str(export), CPU)
    one, two, three = pseudo_log_likelihoods(lm, ["w1 unknown w2", "w1 strange w2", "w1  other w2 "])
    assert one == two == three


def test_models_of_many_kinds_in_one_table(models: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    folders = [str(folder) for folder in models.values()]
    assert evaluate(*folders, "--data", str(pairs), f"output={tmp_path}", "blimp.pairs=2") == 0
    assert len(list((tmp_path / "blimp").glob("*.json"))) == len(models)
    lines = (tmp_path / "blimp" / "results.md").read_text().split("\n\n")
    assert [len(part.splitlines()) for part in lines] == [2 + len(models), 2 + 2, 2 + 2, 2 + 3]


def test_a_subset_has_as_many_pairs_of_each_paradigm(pairs: Path) -> None:
    whole = {p.uid: p.pairs for p in read_paradigms(str(pairs))}
    two, four = read_paradigms(str(pairs), 2), read_paradigms(str(pairs), 4)
    assert [len(p.pairs) for p in two] == [2, 2, 2]
    for small, large in zip(two, four, strict=True):
        assert set(small.pairs) < set(large.pairs) < set(whole[small.uid])
    assert read_paradigms(str(pairs), 2) == two
    with pytest.raises(BadInput, match=r"blimp\.pairs: x_1 has 6 pairs, fewer than 7"):
        read_paradigms(str(pairs), 7)


def test_groups_are_means_over_paradigms(pairs: Path) -> None:
    found = by_kind(read_paradigms(str(pairs)), {"x_1": 0.2, "x_2": 0.4, "y_1": 1.0})
    assert found["field"] == {"semantics": 1.0, "syntax": pytest.approx(0.3)}
    assert found["linguistics_term"] == {"x": pytest.approx(0.3), "y": 1.0}


def test_a_call_that_was_stopped_resumes(
    models: dict[str, Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[list[str]] = []
    true = pseudo_log_likelihoods

    def stop_at_the_third(lm: MaskedLM, texts: list[str]) -> list[float]:
        if len(texts) > 1:
            scored.append(texts)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return true(lm, texts)

    arguments = (str(models["bert"]), "--data", str(pairs))
    monkeypatch.setattr(run, "pseudo_log_likelihoods", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*arguments, f"output={tmp_path / 'a'}")
    (file,) = (tmp_path / "a" / "blimp" / "pairs").iterdir()
    assert file.read_bytes().count(b"\n") == 2
    with file.open("ab") as out:
        out.write(b'{"key": "half a li')  # of a call that was killed
    assert evaluate(*arguments, f"output={tmp_path / 'a'}") == 0
    assert len(scored) == 4
    assert evaluate(*arguments, f"output={tmp_path / 'a'}") == 0
    assert len(scored) == 4
    assert evaluate(*arguments, f"output={tmp_path / 'b'}") == 0
    assert len(scored) == 7
    a, b = read_result(tmp_path / "a"), read_result(tmp_path / "b")
    assert (a["scores"], a["details"]) == (b["scores"], b["details"])


def test_other_weights_or_pairs_are_scored_anew(pairs: Path, tmp_path: Path) -> None:
    folder = tiny_export(tmp_path / "one" / "export")
    arguments = (str(folder), "--data", str(pairs), f"output={tmp_path}")
    assert evaluate(*arguments) == 0
    (file,) = (tmp_path / "blimp" / "pairs").iterdir()
    assert file.read_bytes().count(b"\n") == 3
    assert evaluate(*arguments, "blimp.pairs=6") == 0  # all pairs: the same
    assert file.read_bytes().count(b"\n") == 3
    assert evaluate(*arguments, "blimp.pairs=3") == 0
    assert file.read_bytes().count(b"\n") == 6
    other = tiny_export(tmp_path / "two" / "export", num_hidden_layers=3)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((other / name).read_bytes())
    assert evaluate(*arguments) == 0
    assert file.read_bytes().count(b"\n") == 9


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert evaluate(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.split("\n") if line.startswith("sharebert: ")]
    return line


def test_models_that_cannot_be_scored(
    models: dict[str, Path], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--data", str(pairs), f"output={tmp_path / 'out'}")
    headless = tiny_export(tmp_path / "export", mlm_head="none")
    assert f"{headless}: has no MLM head, which blimp needs" in refusal(capsys, str(headless), *more)
    encoder = tmp_path / "encoder"  # as MiniLM: an encoder alone
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(encoder)
    transformers.PreTrainedTokenizerFast.from_pretrained(models["bert"]).save_pretrained(encoder)
    assert f"{encoder}: has no MLM head, which blimp needs" in refusal(capsys, str(models["bert"]), str(encoder), *more)
    assert not (tmp_path / "out").exists()
    assert "nowhere/config.json: missing; is" in refusal(capsys, str(tmp_path / "nowhere"), *more)
    for spec in ("tfidf", "majority", f"random:{models['bert']}"):
        assert "blimp scores masked language models as they are" in refusal(capsys, spec, *more)
    weights = (models["bert"] / "model.safetensors").read_bytes()
    (encoder / "model.safetensors").write_bytes(weights[:99])
    assert str(encoder) in refusal(capsys, str(encoder), *more)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(models["bert"])
    tokenizer.mask_token = None
    tokenizer.save_pretrained(encoder)
    (encoder / "model.safetensors").write_bytes(weights)
    assert "its tokenizer has no mask token" in refusal(capsys, str(encoder), *more)


def test_keys_that_would_have_no_effect_are_refused(
    export: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (str(export), "--data", str(pairs), f"output={tmp_path}")
    assert "finetune: blimp takes a model as it is" in refusal(capsys, *more, "finetune.epochs=2")
    assert "seeds: blimp takes a model as it is" in refusal(capsys, *more, "seeds=1")
    assert "data: blimp takes data.path and data.bad_rows alone" in refusal(capsys, *more, "data.train_rows=5")
    assert "--save: blimp fine-tunes nothing" in refusal(capsys, *more, "--save", str(tmp_path / "x"))


def test_bad_files(export: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = blimp(tmp_path / "data")
    more = (str(export), f"output={tmp_path / 'out'}", "--data")
    assert "no such file or folder" in refusal(capsys, *more, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "there is no .jsonl file in it" in refusal(capsys, *more, str(tmp_path / "empty"))
    line = {"sentence_good": "a", "sentence_bad": "b", "field": "f", "linguistics_term": "t", "UID": "x_1"}
    for bad, message in (
        ({**line, "UID": None}, "z.jsonl, line 1: no text under 'UID'"),
        ({**line, "sentence_bad": ["b"]}, "z.jsonl, line 1: no text under 'sentence_bad'"),
        (line, "z.jsonl, line 1: another field or linguistics_term than in earlier pairs of x_1"),
    ):
        (folder / "z.jsonl").write_text(json.dumps(bad) + "\n")
        assert message in refusal(capsys, *more, str(folder))
    (folder / "z.jsonl").write_text("{")
    assert "z.jsonl, line 1: not readable as JSON" in refusal(capsys, *more, str(folder))


def test_pairs_that_are_too_long(export: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = blimp(tmp_path / "data")
    with (folder / "x_1.jsonl").open("a") as file:
        row = {"sentence_good": "w1 " * 15, "sentence_bad": "w1", "field": "syntax", "linguistics_term": "x"}
        file.write(json.dumps({**row, "UID": "x_1"}) + "\n")
    more = (str(export), "--data", str(folder), f"output={tmp_path}")
    assert "17 tokens, and the model has 16 positions (data.bad_rows=skip skips such pairs)" in refusal(capsys, *more)
    assert evaluate(*more, "data.bad_rows=skip") == 0
    assert "bad pairs skipped: 1; the first is x_1" in capsys.readouterr().err
    result = read_result(tmp_path)
    assert result["skipped_rows"] == {str(export): 1}
    assert result["settings"] == {"pairs": 18}


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    row = {"sentence_good": "a", "sentence_bad": "b", "field": "f", "linguistics_term": "t"}
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: [f"{name}-2", f"{name}-1"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, uid: {"train": [{**row, "UID": uid}] * 2})
    found = read_paradigms(None)
    assert [(p.uid, p.pairs) for p in found] == [(f"nyu-mll/blimp-{n}", [("a", "b")] * 2) for n in (1, 2)]

    def no_network(*_: str) -> Any:
        raise ConnectionError("Couldn't reach the hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(
        BadInput, match=r"nyu-mll/blimp: cannot be loaded from the hub \(Couldn't reach the hub\).*--data"
    ):
        read_paradigms(None)
