"""The dense form: the compact model's function, as a stock `megatron_bert` with matrices of its own in each layer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SPECIAL, tiny_config, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor, nn
from torch.nn.utils import prune

from exports.dense import Dense, differences, mapped_dense, read_dense
from exports.dense_model import DenseBert, dense_shapes, dense_tensors
from exports.export import Export
from exports.forms import write_export
from exports.weight_files import read_weights
from sharebert import ShareBertForMaskedLM
from sharebert_common.errors import BadInput

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CASES: list[dict[str, Any]] = [
    {},
    {"mlm_head": "tied", "attention_scale": "standard"},
    {"sharing": "eps", "mlm_head": "tied"},
    {"sharing": "eps", "mlm_head": "none", "vocab_pad_multiple": 1},
    {"branch_gain": 0.4},
    {"branch_gain": 0.4, "learned_branch_gains": True, "sharing": "none"},
    {"vocab_size": 500, "num_hidden_layers": 4, "ffn_pairs": 2, "branch_gain": 0.4, "learned_branch_gains": True},
    {"vocab_size": 500, "num_hidden_layers": 4, "ffn_pairs": 2, "ffn_order": "sequence", "sharing": "eps"},
]


def write_dense(out: Path, model: ShareBertForMaskedLM, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    write_export(Export.of_model(model, **more), out, Dense(dtype))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and token types, [3, 11]."""
    generator = torch.Generator().manual_seed(0)
    tokens, types = torch.randint(250, (3, 11), generator=generator), torch.randint(2, (3, 11), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    return tokens, mask, types


def difference(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("changes", CASES)
def test_dense_form_is_the_compact_one(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes).double().eval()
    dense = DenseBert(model.config).double()
    dense.load_state_dict(dict(dense_tensors(model)))
    output, encoded = dense(*batch()), model.sharebert(*batch())
    assert difference(output.hidden, encoded.hidden) < 1e-12
    assert difference(output.pooled, encoded.pooled.tanh()) < 1e-12
    if changes.get("mlm_head") == "none":
        assert output.logits is None
    else:
        assert difference(output.logits, model.logits(*batch())) < 1e-12


def test_tensors_come_in_the_order_of_their_shapes() -> None:
    model = tiny_model()
    assert [(name, tuple(t.shape)) for name, t in dense_tensors(model)] == list(dense_shapes(model.config).items())


def test_tied_head_that_does_not_divide_is_refused() -> None:
    config = tiny_config(mlm_head="tied", factor_size=7)
    with pytest.raises(BadInput, match=r"factor_size \(7\) divides hidden_size \(24\)"):
        dense_shapes(config)


@pytest.fixture(scope="module", params=["untied", "tied"])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ShareBertForMaskedLM]:
    folder = tmp_path_factory.mktemp("dense")
    model = tiny_model(mlm_head=request.param).eval()
    write_dense(folder / "dense", model, tokenizer=tiny_tokenizer(folder), card_sections={"Data": "Made-up words."})
    return folder / "dense", model


def test_folder_says_what_it_is(written: tuple[Path, ShareBertForMaskedLM]) -> None:
    folder, model = written
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    card = (folder / "README.md").read_text()
    assert "tanh" in card
    assert "## Data\n\nMade-up words.\n" in card
    assert "trust_remote_code" not in card
    dense = read_dense(folder, model.config)
    found = difference(dense(*batch()).hidden, model.sharebert(*batch()).hidden)
    assert 0 < found < 1e-6
    assert "e-07 in its hidden states" in card


def test_plain_transformers_takes_it(written: tuple[Path, ShareBertForMaskedLM]) -> None:
    """With no remote code, to 1e-6 of the largest value in float32."""
    transformers = pytest.importorskip("transformers")
    folder, model = written
    tokens, mask, types = batch()
    stock, report = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert type(stock).__name__ == "MegatronBertForMaskedLM"
    assert not report["missing_keys"]
    # The pooler is of no use to a MaskedLM, and stock models leave it out.
    assert set(report["unexpected_keys"]) <= {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    output = stock(tokens, mask, types, output_hidden_states=True)
    assert difference(output.hidden_states[-1], model.sharebert(tokens, mask, types).hidden) < 1e-6
    assert difference(output.logits, model.logits(tokens, mask, types)) < 1e-6

    encoder = transformers.AutoModel.from_pretrained(folder)
    expected = model.sharebert(tokens, mask, types).pooled
    assert expected is not None
    assert difference(encoder(tokens, mask, types).pooler_output, expected.tanh()) < 1e-6
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w1 [MASK]")["input_ids"] == [2, 6, 4, 3]
    (best,) = transformers.pipeline("fill-mask", model=stock, tokenizer=tokenizer)("w1 [MASK]", top_k=1)
    assert best["token"] == model.logits(torch.tensor([[2, 6, 4, 3]]))[0, 2].argmax().item()


def test_tokenizer_stays_what_it_was(tmp_path: Path) -> None:
    """`megatron_bert` has a tokenizer class of its own, which would lower the case of a vocabulary that has case."""
    transformers = pytest.importorskip("transformers")
    words = [*SPECIAL, "The", "the", "##se", *(f"w{i}" for i in range(242))]
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_dense(tmp_path / "dense", tiny_model(), tokenizer=tmp_path / "tokenizer.json")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert loaded("The these w3", add_special_tokens=False)["input_ids"] == [5, 6, 7, 11]


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def test_layers_are_independent_linears(tmp_path: Path) -> None:
    """A low-rank update merged into layer 3, as LoRA does, leaves every other parameter as it was."""
    transformers = pytest.importorskip("transformers")
    write_dense(tmp_path / "dense", tiny_model(num_hidden_layers=4))
    stock = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "dense")
    before = {name: value.detach().clone() for name, value in stock.named_parameters()}
    assert len(linears(stock.bert.encoder.layer)) == 6 * 4
    target = "bert.encoder.layer.3.attention.self.query.weight"
    with torch.no_grad():
        stock.get_parameter(target).add_(torch.randn(24, 2) @ torch.randn(2, 24))
    changed = {name for name, value in stock.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {target}


def test_half_precision_is_the_rounding(tmp_path: Path) -> None:
    model = tiny_model()
    write_dense(tmp_path / "dense", model, dtype=torch.bfloat16)
    found = differences(model, mapped_dense(tmp_path / "dense", model.config))
    tensors = read_weights(tmp_path / "dense")
    for name, tensor in dense_tensors(model):
        assert torch.equal(tensors[name], tensor.bfloat16()), name
    dense = read_dense(tmp_path / "dense", model.config)
    tokens = torch.randint(250, (3, 11))
    mapped = mapped_dense(tmp_path / "dense", model.config)(tokens)
    for ours, theirs in zip(mapped, dense(tokens), strict=True):
        assert torch.equal(ours, theirs)
    assert 1e-4 < found["hidden states"] < 0.1


def test_pruning_and_quantisation_take_it(written: tuple[Path, ShareBertForMaskedLM]) -> None:
    transformers = pytest.importorskip("transformers")
    quantization = pytest.importorskip("torchao.quantization")
    folder, model = written
    tokens, mask, types = batch()
    expected = model.logits(tokens, mask, types)
    stock = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    quantization.quantize_(stock, quantization.Int8WeightOnlyConfig())
    quantised = stock(tokens, mask, types).logits
    assert 0 < difference(quantised, expected) < 0.05

    stock = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    for linear in linears(stock.bert.encoder).values():
        prune.l1_unstructured(linear, "weight", amount=0.5)
        prune.remove(linear, "weight")
        assert (linear.weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.isfinite(stock(tokens, mask, types).logits).all()


def test_damaged_dense_export_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    write_dense(tmp_path / "dense", model)
    with pytest.raises(BadInput, match="not the tensors of this model's dense form"):
        read_dense(tmp_path / "dense", tiny_config(num_hidden_layers=1))
    (tmp_path / "dense/model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"model.safetensors: missing"):
        read_dense(tmp_path / "dense", model.config)
