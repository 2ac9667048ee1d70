"""What the modules say of their parameters: decayed or not, and how they start."""

from __future__ import annotations

from math import sqrt

import pytest
from tiny_models import tiny_config
from torch import nn

from sharebert import ShareBertError, ShareBertForMaskedLM, initialize, parameter_roles
from sharebert.roles import Constant, Normal, Role, Start, Uniform, set_roles

LAYER_BIASES = ("query_bias", "key_bias", "value_bias", "attention_output_bias", "intermediate_bias", "output_bias")
LAYER_NORMS = ("attention_norm", "ffn_norm")

DECAYED = {
    "sharebert.word_embeddings.weight",
    "sharebert.pre_factor_norm.weight",
    "sharebert.factor_linear.weight",
    "sharebert.factor_linear_all.weight",
    "sharebert.pos_factor_norm.weight",
    "sharebert.position_embeddings.weight",
    "sharebert.token_type_embeddings.weight",
    "mlm_head.dense.weight",
    "mlm_head.decoder.weight",
}
NOT_DECAYED = {
    "sharebert.pre_factor_norm.bias",
    "sharebert.factor_linear.bias",
    "sharebert.factor_linear_all.bias",
    "sharebert.pos_factor_norm.bias",
    *(f"sharebert.layers.{n}.{bias}" for n in (0, 1) for bias in LAYER_BIASES),
    *(f"sharebert.layers.{n}.{norm}.{p}" for n in (0, 1) for norm in LAYER_NORMS for p in ("weight", "bias")),
    "sharebert.final_norm.weight",
    "sharebert.final_norm.bias",
    "sharebert.pooler_bias",
    "mlm_head.dense.bias",
    "mlm_head.norm.weight",
    "mlm_head.norm.bias",
    "mlm_head.bias",
}


@pytest.mark.parametrize("head", ["untied", "tied", "none"])
@pytest.mark.parametrize("sharing", ["veps", "eps"])
def test_decay_acts_on_all_but_biases_and_the_norms_of_the_layers(sharing: str, head: str) -> None:
    """The authors decay their two factor norms; the layers' norms, the final one and the head's are not decayed."""
    model = ShareBertForMaskedLM(tiny_config(sharing=sharing, mlm_head=head))
    roles = parameter_roles(model)
    names = [name for name, _ in model.named_parameters()]
    assert list(roles) == names
    assert {name for name in names if roles[name].decayed} == DECAYED & set(names)
    assert {name for name in names if not roles[name].decayed} == NOT_DECAYED & set(names)
    assert set(names) <= DECAYED | NOT_DECAYED


def test_the_encoder_alone_says_the_same() -> None:
    model = ShareBertForMaskedLM(tiny_config())
    whole = parameter_roles(model)
    alone = parameter_roles(model.sharebert)
    assert {f"sharebert.{name}": role for name, role in alone.items()} == {
        name: role for name, role in whole.items() if name.startswith("sharebert.")
    }


def test_starts_are_those_of_the_two_inits() -> None:
    roles = parameter_roles(ShareBertForMaskedLM(tiny_config()))
    starts = {name.removeprefix("sharebert."): role.start for name, role in roles.items()}
    small = Normal(0.02)
    assert starts["word_embeddings.weight"] == Start(small, small)
    assert starts["factor_linear_all.weight"] == Start(small, Normal(1 / sqrt(8)))
    assert starts["layers.1.query_bias"] == starts["pooler_bias"] == Start(Normal(1.0), Constant(0.0))
    assert starts["factor_linear.bias"] == Start(Constant(0.0), Constant(0.0))
    assert starts["pos_factor_norm.weight"] == starts["mlm_head.norm.weight"] == Start(Constant(1.0), Constant(1.0))
    bound = Uniform(1 / sqrt(24))
    assert starts["mlm_head.dense.weight"] == starts["mlm_head.dense.bias"] == Start(bound, bound)


def test_a_parameter_without_a_role_is_named() -> None:
    model = ShareBertForMaskedLM(tiny_config())
    model.sharebert.adapter = nn.Linear(2, 2)
    with pytest.raises(ShareBertError, match=r"'sharebert\.adapter\.weight' has no role"):
        parameter_roles(model)
    with pytest.raises(ShareBertError, match=r"'sharebert\.adapter\.weight' has no role"):
        initialize(model, "authors", 0)
    zero = Role(False, Start(Constant(0.0), Constant(0.0)))
    set_roles(model.sharebert.adapter, weight=zero)
    with pytest.raises(ShareBertError, match=r"'sharebert\.adapter\.bias' has no role"):
        parameter_roles(model)
    set_roles(model.sharebert.adapter, bias=zero)
    initialize(model, "authors", 0)
    assert not model.sharebert.adapter.weight.any()
