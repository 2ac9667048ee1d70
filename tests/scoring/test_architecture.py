"""Hugging Face encoders of many architectures: dropout, positions, token types, and arguments of `forward`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from made_tasks import tiny_export
from tokenizers import Tokenizer

from scoring.architecture import set_dropout
from scoring.encoders import Encoder, open_encoder
from scoring.recipe import FineTuneRecipe
from scoring.tasks import TASKS
from sharebert_common.errors import BadInput

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

COMMON = {"vocab_size": 250, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "intermediate_size": 32, "max_position_embeddings": 20}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
CONFIGS: dict[str, tuple[str, dict[str, Any], int]] = {
    "bert": ("BertConfig", COMMON, 20),
    "roberta": ("RobertaConfig", {**COMMON, "type_vocab_size": 1, "pad_token_id": 1}, 18),
    "xlm-roberta": ("XLMRobertaConfig", {**COMMON, "type_vocab_size": 1, "pad_token_id": 0}, 19),
    "mpnet": ("MPNetConfig", COMMON, 18),
    "distilbert": ("DistilBertConfig", {"vocab_size": 250, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32,
                                        "max_position_embeddings": 20}, 20),
    "electra": ("ElectraConfig", {**COMMON, "embedding_size": 8}, 20),
    "deberta-v2": ("DebertaV2Config", {**COMMON, "type_vocab_size": 0}, 20),
    "modernbert": ("ModernBertConfig", {**COMMON, **IDS}, 20),
    "fnet": ("FNetConfig", {**COMMON, "type_vocab_size": 4}, 20),
    "xlnet": ("XLNetConfig", {"vocab_size": 250, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32,
                              "pad_token_id": 0}, 24),
}  # fmt: skip
"""Name → class, keys, and the longest row; XLNet has no limit of its own."""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("architecture") / "export")


def open_model(kind: str, export: Path, folder: Path, dropout: float | None = None, **keys: Any) -> Encoder:
    """An encoder with new weights, whose tokenizer gives the second text of a pair the token type 1."""
    name, values, _ = CONFIGS[kind]
    getattr(transformers, name)(**values, **keys).save_pretrained(folder)
    pad = values.get("pad_token_id", 1 if kind == "mpnet" else 0)
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=["[PAD]", "[UNK]"][pad], unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=24,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    fast.save_pretrained(folder)
    return open_encoder(f"random:{folder}", FineTuneRecipe(dropout=dropout, max_length=24))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_longest_row_and_pairs_go_through(kind: str, export: Path, tmp_path: Path) -> None:
    encoder = open_model(kind, export, tmp_path)
    longest = CONFIGS[kind][2]
    assert encoder.positions == longest
    model = encoder.build(TASKS["rte"], 0).eval()
    for texts in ([("w1 " * (longest - 2),), ("w2",)], [("w1 w2", "w3"), ("w4", "w5 w6 w7")]):
        encoded = encoder.encode(texts, "here")
        with torch.no_grad():
            assert model(**encoder.collate(encoded, [0, 1])).logits.shape == (2, 2)
    if longest < 24:
        with pytest.raises(BadInput, match=f"here: example 1 has {longest + 1} tokens.*max_length={longest}"):
            encoder.encode([("w1 " * (longest - 1),)], "here")


@pytest.mark.parametrize("kind", CONFIGS)
def test_dropout_reaches_every_layer(kind: str, export: Path, tmp_path: Path) -> None:
    model = open_model(kind, export, tmp_path, dropout=0.3).build(TASKS["sst2"], 0)
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates
    assert set(rates) == {0.3}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not readable as a model's config"), ("[]", "there is no 'model_type'"), ('{"a": 1}', "no 'model_type'")],
)
def test_a_config_that_is_not_a_models(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match=f"config.json: .*{message}"):
        open_encoder(str(tmp_path), FineTuneRecipe())


def test_a_config_without_dropout_is_refused() -> None:
    with pytest.raises(BadInput, match=r"finetune\.dropout: the config of there has no dropout rate"):
        set_dropout(transformers.PreTrainedConfig(), 0.1, "there")


def test_a_token_type_that_the_model_lacks(export: Path, tmp_path: Path) -> None:
    encoder = open_model("bert", export, tmp_path, type_vocab_size=2)
    types = {"input_ids": [[2, 5]], "token_type_ids": [[0, 2]]}
    with pytest.raises(BadInput, match="there: the tokenizer gives the token type 2, but the model has 2"):
        encoder.inputs.usable(types, "there")


def test_a_sharebert_with_one_token_type_takes_pairs(tmp_path: Path) -> None:
    encoder = open_encoder(str(tiny_export(tmp_path / "export", type_vocab_size=1)), FineTuneRecipe())
    model = encoder.build(TASKS["rte"], 0)
    encoded = encoder.encode([("w1", "w2")], "here")
    assert model(**encoder.collate(encoded, [0])).logits.shape == (1, 2)
