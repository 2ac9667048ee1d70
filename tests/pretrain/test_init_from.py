"""A run that starts from an export computes what the export computes, or is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import retokenize

from data_prep.shards.reader import open_dataset
from exports.export import Export
from exports.forms import write_export
from exports.read import read_config
from pretrain.model import ModelRecipe, build_model, choose_model, refuse_other_tokenizer
from sharebert import ShareBertConfig
from sharebert_common.errors import BadInput

TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"factor_size": 8, "mlm_head": "tied", "branch_gain": 1.0}


@pytest.fixture
def export(dataset: Path, tmp_path: Path) -> Path:
    """An export of a model whose weights all are 7, with the dataset's tokenizer."""
    model = build_model(choose_model(ModelRecipe(**TINY), 301, 32), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    write_export(Export.of_model(model, tokenizer=dataset / "tokenizer.json"), tmp_path / "export")
    return tmp_path / "export"


def test_a_run_starts_from_an_export_with_longer_positions(export: Path) -> None:
    with pytest.raises(BadInput, match="max_position_embeddings: 32, and the dataset's rows have 64 tokens"):
        choose_model(ModelRecipe(init_from=str(export)), 301, 64)
    choice = choose_model(ModelRecipe(init_from=str(export), max_position_embeddings=64), 301, 64)
    model = build_model(choice, seed=0)
    for name, parameter in model.named_parameters():
        known = parameter[:32] if "position" in name else parameter
        assert (known == 7).all(), name
    positions = model.get_parameter("sharebert.position_embeddings.weight")
    assert positions.shape == (64, 32)
    assert 0 < positions[32:].std() < 0.1
    with pytest.raises(BadInput, match=r"'sharebert\.position_embeddings\.weight' is"):
        build_model(choose_model(ModelRecipe(init_from=str(export), max_position_embeddings=16), 301, 16), seed=0)


def test_weights_of_another_function_are_refused(export: Path) -> None:
    """What a recipe says would change what the same weights compute, without a word."""
    same: dict[str, Any] = {"attention_scale": "authors", "ffn_order": "cycle", "hidden_dropout_prob": 0.3}
    assert choose_model(ModelRecipe(init_from=str(export), **same), 301, 32).config.attention_scale == "authors"
    others: dict[str, Any] = {"attention_scale": "standard", "branch_gain": 0.5, "layer_norm_eps": 1e-3}
    others |= {"ffn_order": "sequence", "num_attention_heads": 2, "num_hidden_layers": 1}
    for key, value in others.items():
        with pytest.raises(BadInput, match=rf"^model\.{key}: {value}, but the weights of .*export belong to "):
            choose_model(ModelRecipe(init_from=str(export), **{key: value}), 301, 32)


OTHER_KEYS: dict[str, Any] = {
    "factor_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-3,
    "sharing": "layers",
    "mlm_head": "untied",
    "attention_scale": "standard",
    "branch_gain": 0.5,
    "learned_branch_gains": True,
    "ffn_pairs": 2,
    "ffn_order": "sequence",
}
HARMLESS = {"hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "vocab_pad_multiple"}
SHAPES = {"vocab_size", "max_position_embeddings"}  # of which some others are taken, see above and `choose_model`


def test_every_key_of_the_model_is_refused_or_changes_no_function(export: Path, dataset: Path, tmp_path: Path) -> None:
    """In both directions: weights of the export that the model lacks, and the other way round."""
    keys = {field.name for field in dataclasses.fields(ModelRecipe)} & set(ShareBertConfig.__dataclass_fields__)
    assert keys == OTHER_KEYS.keys() | HARMLESS | SHAPES
    config = read_config(export)
    for key, value in OTHER_KEYS.items():
        other = build_model(choose_model(ModelRecipe(**(TINY | {key: value})), 301, 32), seed=0)
        write_export(Export.of_model(other, tokenizer=dataset / "tokenizer.json"), tmp_path / key)
        for folder, wanted in ((export, value), (tmp_path / key, getattr(config, key))):
            if wanted is not None:  # which is to say nothing, and takes what the export has
                with pytest.raises(BadInput, match=r"^model"):
                    build_model(choose_model(ModelRecipe(init_from=str(folder), **{key: wanted}), 301, 32), seed=0)


def test_an_export_with_another_tokenizer_is_refused(export: Path, dataset: Path, tmp_path: Path) -> None:
    choice = choose_model(ModelRecipe(init_from=str(export)), 301, 32)
    refuse_other_tokenizer(choice, open_dataset(dataset))
    other = retokenize(Path(shutil.copytree(dataset, tmp_path / "other")))
    with pytest.raises(BadInput, match=r"tokenizer\.json has sha256 \w+, the tokenizer of .*other has \w+"):
        refuse_other_tokenizer(choice, open_dataset(other))
