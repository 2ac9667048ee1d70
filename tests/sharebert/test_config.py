"""Parameter counts of the published sizes, and configs that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_config

from sharebert import SIZES, ShareBert, ShareBertConfig, ShareBertError
from sharebert.config import MATRICES
from sharebert.sharing import Weights

LOW_RANK = {"sharing": "low_rank", "rank": 5}

PUBLISHED = [
    ("sharebert-small", 1, 30522, 4_982_272),
    ("sharebert-base", 1, 30522, 13_844_992),
    ("sharebert-large", 1, 30522, 27_003_904),
    ("sharebert-small", 8, 30528, 4_983_040),
    ("sharebert-base", 8, 30528, 13_847_296),
    ("sharebert-large", 8, 30528, 27_008_512),
]


@pytest.mark.parametrize(("size", "multiple", "rows", "parameters"), PUBLISHED)
def test_published_sizes_have_exactly_their_parameters(size: str, multiple: int, rows: int, parameters: int) -> None:
    config = ShareBertConfig.from_dict({**SIZES[size], "vocab_size": 30522, "vocab_pad_multiple": multiple})
    with torch.device("meta"):
        model = ShareBert(config)
    assert config.vocab_size == rows
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_default_is_base_and_round_trips() -> None:
    config = ShareBertConfig()
    assert config.to_dict().items() >= SIZES["sharebert-base"].items()
    assert config.to_dict()["model_type"] == "sharebert"
    assert ShareBertConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("words", "multiple", "rows"), [(249, 8, 256), (256, 8, 256), (257, 8, 264), (257, 1, 257)])
def test_vocabulary_is_rounded_up_to_its_multiple(words: int, multiple: int, rows: int) -> None:
    assert tiny_config(vocab_size=words, vocab_pad_multiple=multiple).vocab_size == rows


def test_keys_of_new_options_are_left_out_where_they_change_nothing() -> None:
    """So config files, and the identity of a run, are what they were before the keys existed."""
    new = {"branch_gain": 0.5, "learned_branch_gains": True, "ffn_pairs": 2, "ffn_order": "sequence"}
    assert not new.keys() & tiny_config().to_dict().keys()
    config = tiny_config(vocab_size=500, **new)
    assert config.to_dict().items() >= new.items()
    assert ShareBertConfig.from_dict(config.to_dict()) == config


def test_pairs_and_gains_have_the_parameters_that_the_docs_say() -> None:
    """A second pair adds none, learned gains two a layer; sharebert-small has room for one more pair."""
    with torch.device("meta"):
        counts = [
            sum(
                p.numel()
                for p in ShareBert(ShareBertConfig.from_dict({**SIZES["sharebert-small"], **more})).parameters()
            )
            for more in ({}, {"ffn_pairs": 2}, {"branch_gain": 0.2}, {"branch_gain": 0.2, "learned_branch_gains": True})
        ]
    assert [count - counts[0] for count in counts] == [0, 0, 0, 24]
    with pytest.raises(ShareBertError, match=r"ffn_pairs: 3 pairs take 5h \+ 6f = 2340 columns"):
        ShareBertConfig.from_dict({**SIZES["sharebert-small"], "ffn_pairs": 3})


@pytest.mark.parametrize(
    ("order", "layers", "pairs", "wanted"),
    [("cycle", 5, 2, [0, 1, 0, 1, 0]), ("sequence", 5, 2, [0, 0, 0, 1, 1]), ("sequence", 6, 3, [0, 0, 1, 1, 2, 2])],
)
def test_which_pair_a_layer_uses(order: str, layers: int, pairs: int, wanted: list[int]) -> None:
    config = tiny_config(vocab_size=900, num_hidden_layers=layers, ffn_pairs=pairs, ffn_order=order)
    assert [config.ffn_pair(layer) for layer in range(layers)] == wanted


def test_ranks_are_those_that_differ() -> None:
    config = tiny_config(**LOW_RANK, ranks={"key": 5, "output": 7})
    assert config.ranks == {"output": 7}
    assert ShareBertConfig.from_dict(config.to_dict()) == config
    assert hash(config) != hash(tiny_config())
    assert tiny_config(**LOW_RANK, ranks={"key": 5}) == tiny_config(**LOW_RANK)
    assert "ranks" not in tiny_config(**LOW_RANK).to_dict()
    assert (*Weights._fields, "pooler") == MATRICES


def test_score_scales() -> None:
    assert tiny_config(attention_scale="authors").score_scale == pytest.approx(8 ** (-2 / 3))
    assert tiny_config(attention_scale="standard").score_scale == pytest.approx(8**-0.5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_dropuot_prob": 0.1}, "hidden_dropuot_prob: unknown key; did you mean 'hidden_dropout_prob'?"),
        ({"model_type": "bert"}, "'bert' is another model"),
        ({"num_attention_heads": 5}, r"num_attention_heads \(5\) must divide hidden_size \(24\)"),
        ({"sharing": "eps", "factor_size": 8}, r"factor_size \(8\) must equal hidden_size \(24\)"),
        ({"sharing": "both"}, "sharing: must be one of veps, eps, layers, none"),
        ({"mlm_head": True}, "mlm_head: must be one of untied, tied, none"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob: must be a probability"),
        ({"layer_norm_eps": 0}, "layer_norm_eps: must be a number above 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps: must be a number above 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers: must be a whole number"),
        ({"vocab_size": True}, "vocab_size: must be a whole number"),
        ({"branch_gain": 0}, "branch_gain: must be a number above 0"),
        ({"learned_branch_gains": True}, "learned_branch_gains: needs branch_gain"),
        ({"branch_gain": 0.5, "learned_branch_gains": 1}, "learned_branch_gains: must be true or false"),
        ({"ffn_pairs": 0}, "ffn_pairs: must be a whole number, 1 or more"),
        ({"ffn_order": "turn"}, "ffn_order: must be one of cycle, sequence"),
        ({"ffn_pairs": 2, "sharing": "layers"}, "ffn_pairs: is for sharing: veps or eps, this model has layers"),
        ({"ffn_pairs": 3, "vocab_size": 900}, "ffn_pairs: 3 pairs for 2 layers"),
        ({"ffn_pairs": 2, "vocab_size": 500, "kept_heads": [0]}, "kept_heads: is for models with one feed-forward"),
        ({**LOW_RANK, "kept_columns": [0]}, "kept_columns: is for sharing: veps or eps, this model has low_rank"),
        ({"sharing": "layers", "kept_heads": [0]}, "kept_heads: is for sharing: veps or eps, this model has layers"),
        ({"ranks": {"key": 3}}, r"ranks: is for sharing: low_rank \(this model has veps\)"),
        ({**LOW_RANK, "ranks": 4}, "ranks: must be a mapping of names of matrices to ranks"),
        ({**LOW_RANK, "ranks": {"keys": 4}}, "ranks: no matrix 'keys'; names are query, key, value, attention_output,"),
        ({**LOW_RANK, "ranks": {"key": 0}}, r"ranks\.key: must be a whole number, 1 or more"),
        ({**LOW_RANK, "ranks": {"output": 24}}, r"ranks\.output: 24 is not below 24, the smaller side of the matrix"),
        ({"ffn_pairs": 2}, r"ffn_pairs: 2 pairs take 5h \+ 4f = 31 columns .* H = 24, .* = 3 and f = .* = 4 "),
    ],
)
def test_refuses_in_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ShareBertError, match=says) as caught:
        ShareBertConfig.from_dict({**TINY, **changes})
    assert "\n" not in str(caught.value)


def test_shape_that_does_not_fit_is_refused_with_its_sizes() -> None:
    """5h + 2f ≤ H: with V 240 blocks still fit; with V 232 they do not."""
    tiny_config(vocab_size=240)
    with pytest.raises(ShareBertError) as caught:
        tiny_config(vocab_size=232)
    message = str(caught.value)
    for part in ("vocab_size 232", "H = 24", "I = 40", "= 3 and", "= 5 columns", "5h + 2f = 25 > H = 24"):
        assert part in message
