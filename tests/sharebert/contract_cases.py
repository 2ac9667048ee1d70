"""transformers' own common model tests, run on the classes of `sharebert.hub`; started by `test_contract.py`.

`transformers_tests` is the folder `tests` of transformers' source distribution.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
import transformers
from tiny_models import TINY
from transformers.models.auto import modeling_auto as auto
from transformers_tests.test_modeling_common import ModelTesterMixin

from sharebert import hub

NAMES = {
    "MaskedLM": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "SequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TokenClassification": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QuestionAnswering": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "MultipleChoice": auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
}
"""By class names in these tables the common tests know what labels a model takes."""

transformers.AutoConfig.register("sharebert", hub.ShareBertHubConfig)
transformers.AutoModel.register(hub.ShareBertHubConfig, hub.ShareBertModel)
auto.MODEL_MAPPING_NAMES["sharebert"] = "ShareBertModel"
for head, names in NAMES.items():
    names["sharebert"] = f"ShareBertFor{head}"
    getattr(transformers, f"AutoModelFor{head}").register(hub.ShareBertHubConfig, getattr(hub, names["sharebert"]))

SIZES: dict[str, Any] = {**TINY, "num_hidden_layers": 2, "initializer_range": 0.02}

FIXED_SIZE = "the layers are cut from the embedding, so its size is fixed"
NO_ATTENTIONS = "attention probabilities are never made"
NOT_MADE: dict[str, str] = {
    "test_resize_tokens_embeddings": FIXED_SIZE,
    "test_resize_embeddings_untied": FIXED_SIZE,
    "test_load_with_mismatched_shapes": f"asks for 10 words: {FIXED_SIZE}",
    "test_attention_outputs": NO_ATTENTIONS,
}


class Tester:
    """What the common tests ask of a model's own tests."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.batch_size, self.seq_length, self.is_training = 3, 7, True
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 24, 2, 3
        self.num_choices = 4

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        config = hub.ShareBertHubConfig(**{**SIZES, **self.changes})
        ids = torch.randint(5, 250, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        return config, {"input_ids": ids, "attention_mask": mask}


class Contract(ModelTesterMixin):
    all_model_classes = (hub.ShareBertModel, *(getattr(hub, names["sharebert"]) for names in NAMES.values()))
    has_attentions = False
    test_resize_embeddings = False
    changes: dict[str, Any]

    def setUp(self) -> None:
        self.model_tester = Tester(**self.changes)
        reason = NOT_MADE.get(self._testMethodName)
        if reason:
            self.skipTest(reason)


def _case(**changes: Any) -> type:
    return type("Case", (Contract, unittest.TestCase), {"changes": changes})


UntiedVeps, TiedVeps = _case(mlm_head="untied"), _case(mlm_head="tied")
UntiedEps, TiedEps = (_case(mlm_head=head, sharing="eps", factor_size=24) for head in ("untied", "tied"))
