"""The start of a new model."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from tiny_models import tiny_config

from sharebert import ShareBertConfig, ShareBertError, ShareBertForMaskedLM, initialize, parameter_roles

LARGER = {"vocab_size": 2000, "hidden_size": 96, "intermediate_size": 192, "factor_size": 32}


def started(init: str, seed: int = 0, config: ShareBertConfig | None = None) -> ShareBertForMaskedLM:
    model = ShareBertForMaskedLM(config or tiny_config(**LARGER))
    initialize(model, init, seed)
    return model


@pytest.mark.parametrize("init", ["authors", "variance"])
def test_values_depend_on_seed_and_name_alone(init: str) -> None:
    torch.manual_seed(1)
    first = dict(started(init).named_parameters())
    torch.manual_seed(2)
    deeper = dict(started(init, config=tiny_config(**LARGER, num_hidden_layers=4, mlm_head="tied")).named_parameters())
    for name, parameter in first.items():
        if not name.startswith("mlm_head"):
            assert torch.equal(parameter, deeper[name]), name
    other = dict(started(init, seed=1).named_parameters())
    name = "sharebert.word_embeddings.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["sharebert.factor_linear.weight"], first["sharebert.factor_linear_all.weight"])


def test_dtype_only_rounds() -> None:
    model = ShareBertForMaskedLM(tiny_config()).bfloat16()
    initialize(model, "authors", 0)
    for a, b in zip(model.parameters(), started("authors", config=tiny_config()).parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())


def test_authors_start() -> None:
    p = dict(started("authors").named_parameters())
    assert p["sharebert.word_embeddings.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert p["sharebert.factor_linear_all.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert p["mlm_head.decoder.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert p["sharebert.position_embeddings.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert not p["sharebert.factor_linear.bias"].any()
    for name in ("layers.0.intermediate_bias", "layers.1.query_bias", "pooler_bias"):
        assert p[f"sharebert.{name}"].std().item() == pytest.approx(1, rel=0.3)
    dense = p["mlm_head.dense.weight"]
    assert dense.abs().max().item() == pytest.approx(1 / sqrt(96), rel=0.01)
    assert dense.std().item() == pytest.approx(1 / sqrt(3 * 96), rel=0.02)
    for name, parameter in p.items():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()


@pytest.mark.parametrize("sharing", ["veps", "eps"])
def test_variance_start_gives_generated_weights_their_standard_deviation(sharing: str) -> None:
    size = {**LARGER, "factor_size": 96 if sharing == "eps" else 32}
    model = started("variance", config=tiny_config(**size, sharing=sharing)).sharebert
    made = model.layer_weights()
    for weight in (*made.of_layer(0), made.pooler):
        assert weight is not None
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("_bias"))


@pytest.mark.parametrize("init", ["authors", "variance"])
@pytest.mark.parametrize("sharing", ["veps", "eps"])
def test_scale_gives_generated_weights_scale_over_root_of_width(sharing: str, init: str) -> None:
    config = tiny_config(**LARGER | ({"sharing": "eps", "factor_size": 96} if sharing == "eps" else {}))
    model = ShareBertForMaskedLM(config)
    initialize(model, init, 0, 0.35)
    intermediate = model.sharebert.layer_weights().of_layer(0).intermediate
    assert intermediate.std().item() == pytest.approx(0.35 / sqrt(96), rel=0.12)  # of 320 draws
    with pytest.raises(ShareBertError, match="init_scale: must be above 0"):
        initialize(model, init, 0, 0.0)


@pytest.mark.parametrize("init", ["authors", "variance"])
def test_learned_gains_start_at_the_constant_and_are_not_decayed(init: str) -> None:
    model = ShareBertForMaskedLM(tiny_config(branch_gain=0.25, learned_branch_gains=True))
    initialize(model, init, 0)
    constant = ShareBertForMaskedLM(tiny_config(branch_gain=0.25)).eval()
    initialize(constant, init, 0)
    tokens = torch.arange(5, 17)[None]
    for number, layer in enumerate(model.sharebert.layers):
        assert layer.branch_gains.tolist() == [0.25, 0.25]
        assert not parameter_roles(model)[f"sharebert.layers.{number}.branch_gains"].decayed
    assert torch.equal(model.eval().logits(tokens), constant.logits(tokens))


def test_unknown_start_is_refused() -> None:
    with pytest.raises(ShareBertError, match="one of authors, variance"):
        started("zeros")
