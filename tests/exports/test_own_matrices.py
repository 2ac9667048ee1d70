"""Models whose layers have matrices of their own are exported like shared ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import TINY, tiny_config, tiny_model, tiny_tokenizer

from exports.dense import Dense
from exports.dense_model import DenseBert, dense_shapes, dense_tensors
from exports.export import Export
from exports.forms import write_export
from sharebert import ShareBertForMaskedLM, initialize

SQUARES, WIDE = 4 * TINY["hidden_size"] ** 2, 2 * TINY["hidden_size"] * TINY["intermediate_size"]


@pytest.mark.parametrize(("sharing", "sets"), [("layers", 1), ("none", 2)])
def test_a_set_of_matrices_costs_its_elements(sharing: str, sets: int) -> None:
    own, generated = (ShareBertForMaskedLM(tiny_config(sharing=name)) for name in (sharing, "veps"))
    difference = sum(p.numel() for p in own.parameters()) - sum(p.numel() for p in generated.parameters())
    generator = TINY["hidden_size"] * (TINY["factor_size"] + 1)
    assert difference == sets * (SQUARES + WIDE) + TINY["hidden_size"] ** 2 - generator


def test_layers_differ_only_where_nothing_is_shared() -> None:
    """The start has 1 / √H with `scale: 1`, and each matrix is drawn by itself."""
    model = ShareBertForMaskedLM(tiny_config(sharing="none"))
    initialize(model, "variance", 0, 1.0)
    first, second = (model.sharebert.layer_weights().of_layer(n).intermediate for n in (0, 1))
    assert first.std().item() == pytest.approx(TINY["hidden_size"] ** -0.5, rel=0.1)
    assert not torch.equal(first, second)
    shared = tiny_model(sharing="layers").sharebert.layer_weights()
    assert shared.of_layer(0).query is shared.of_layer(1).query


@pytest.mark.parametrize("sharing", ["layers", "none"])
def test_the_dense_form_is_the_same_function(sharing: str) -> None:
    """`DenseBert` is stock megatron_bert, as the tests of dense exports show."""
    model = tiny_model(sharing=sharing).eval()
    tokens = torch.randint(5, 250, (3, 12))
    state = dict(dense_tensors(model))
    assert {name: tuple(value.shape) for name, value in state.items()} == dense_shapes(model.config)
    plain = DenseBert(model.config).eval()
    plain.load_state_dict(state)
    with torch.no_grad():
        wanted = model.sharebert(tokens).hidden
        torch.testing.assert_close(plain(tokens).hidden, wanted, rtol=1e-4, atol=1e-5)


def test_plain_transformers_takes_the_dense_form_of_a_bert(tmp_path: Path) -> None:
    """Stock megatron_bert, with no remote code, has the logits of the model whose layers have matrices of their own."""
    transformers = pytest.importorskip("transformers")
    model = tiny_model(sharing="none", mlm_head="tied", attention_scale="standard").eval()
    write_export(Export.of_model(model, tokenizer=tiny_tokenizer(tmp_path)), tmp_path / "dense", Dense())
    stock, report = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert type(stock).__name__ == "MegatronBertForMaskedLM"
    assert not report["missing_keys"]
    tokens = torch.randint(5, 250, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(tokens).logits, model.logits(tokens), rtol=1e-4, atol=1e-4)
