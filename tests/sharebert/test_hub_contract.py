"""What clients of a BERT-like class rely on: arguments, config flags, losses, heads, embeddings, checkpointing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

from hub_models import FORMS, hub_model, padded_batch

from exports.compact import AUTO_MAP
from sharebert import ShareBertError, hub

IDS, MASK = padded_batch()
CLASSES = [getattr(hub, name.removeprefix("hub.")) for key, name in AUTO_MAP.items() if key != "AutoConfig"]


def given_to(kind: type, **more: Any) -> dict[str, Any]:
    """Arguments for a class; multiple choice gets two choices."""
    arguments = {"input_ids": IDS, "attention_mask": MASK, **more}
    if kind is hub.ShareBertForMultipleChoice:
        arguments = {name: torch.stack([x, x.flip(0)], 1) for name, x in arguments.items()}
    return arguments


def labels_of(kind: type) -> dict[str, Any]:
    if kind is hub.ShareBertForQuestionAnswering:
        return {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 2, 8])}
    rows = kind in (hub.ShareBertForSequenceClassification, hub.ShareBertForMultipleChoice)
    return {"labels": torch.tensor([1, 0, 1]) if rows else (IDS % 2)}


def test_hub_names_every_file_of_its_folder() -> None:
    """Transformers before 5.10 copies only the files that `hub.py` itself imports relatively."""
    folder = Path(hub.__file__).parent
    text = Path(hub.__file__).read_text()
    named = {line.split()[1][1:] for line in text.splitlines() if line.strip().startswith("from .")}
    assert named == {file.stem for file in folder.glob("*.py")} - {"hub", "__init__"}


@pytest.mark.parametrize("kind", CLASSES)
def test_config_flags_are_obeyed_and_arguments_win(kind: type) -> None:
    model = hub_model(kind)
    given = given_to(kind)
    plain = model(**given)
    assert plain.hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**given).hidden_states) == 3
    assert model(**given, output_hidden_states=False).hidden_states is None
    model.config.output_hidden_states = False
    model.config.return_dict = False
    as_tuple = model(**given)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], plain[0])
    assert not isinstance(model(**given, return_dict=True), tuple)
    with pytest.raises(ShareBertError, match="output_attentions: not supported"):
        model(**given, output_attentions=True)


@pytest.mark.parametrize("kind", CLASSES)
def test_what_the_trainer_and_peft_hand_over_changes_nothing(kind: type) -> None:
    model = hub_model(kind)
    given = given_to(kind)
    more = {"inputs_embeds": None, "position_ids": None, "head_mask": None, "use_cache": False, "cu_seq_lens_q": None}
    torch.testing.assert_close(model(**given, **more)[0], model(**given)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["past_key_values", "encoder_hidden_states"])
@pytest.mark.parametrize("kind", CLASSES)
def test_what_only_a_decoder_takes_is_refused(kind: type, name: str) -> None:
    """As PEFT's prefix tuning hands it over: ignored, it would train nothing."""
    with pytest.raises(ShareBertError, match=f"{name}: not supported; it is for decoders"):
        hub_model(kind)(**given_to(kind), **{name: ((IDS, IDS),)})


@pytest.mark.parametrize("sharing", ["veps", "eps"])
@pytest.mark.parametrize("kind", CLASSES)
def test_inputs_embeds_are_rows_of_the_input_embedding(kind: type, sharing: str) -> None:
    model = hub_model(kind, sharing=sharing)
    given = given_to(kind)
    expected = model(**given)[0]
    rows = model.get_input_embeddings()(given.pop("input_ids"))
    torch.testing.assert_close(model(**given, inputs_embeds=rows)[0], expected)
    with pytest.raises(ShareBertError, match="not both"):
        model(**given_to(kind), inputs_embeds=rows)
    with pytest.raises(ShareBertError, match="inputs_embeds: must be"):
        model(**given, inputs_embeds=rows[..., :5])
    with pytest.raises(ShareBertError, match="input_ids: required"):
        model(**given)


def test_position_ids() -> None:
    model = hub_model(hub.ShareBertModel)
    default = model(IDS, MASK).last_hidden_state
    for ids in (torch.arange(9), torch.arange(9)[None], torch.arange(9).repeat(3, 1)):
        torch.testing.assert_close(model(IDS, MASK, position_ids=ids).last_hidden_state, default)
    later = model(IDS, MASK, position_ids=torch.arange(3, 12)).last_hidden_state
    assert (later - default).abs().max() > 1e-2
    left = F.pad(IDS, (4, 0)), F.pad(MASK, (4, 0)), F.pad(torch.arange(9), (4, 0)).repeat(3, 1)
    padded = model(left[0], left[1], position_ids=left[2])
    torch.testing.assert_close(padded.last_hidden_state[:, 4:], default, rtol=1e-4, atol=1e-5)


def test_the_pooled_row_is_the_first_that_is_not_padding() -> None:
    model = hub_model(hub.ShareBertModel)
    expected = model(IDS, MASK).pooler_output
    positions = F.pad(torch.arange(9), (4, 0)).repeat(3, 1)
    left = model(F.pad(IDS, (4, 0)), F.pad(MASK, (4, 0)), position_ids=positions).pooler_output
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-5)
    each = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1]])
    output = model(IDS[:, :4], each)
    first = output.last_hidden_state[torch.arange(3), torch.tensor([2, 0, 3])]
    weights = model.sharebert.layer_weights()
    torch.testing.assert_close(output.pooler_output, first @ weights.pooler + model.sharebert.pooler_bias)


def test_masks_of_pairs() -> None:
    """[B, T, T] and [B, 1, T, T], of integers, booleans, or numbers that are added to the scores."""
    model = hub_model(hub.ShareBertModel)
    expected = model(IDS, MASK).last_hidden_state[MASK > 0]
    pairs = MASK[:, None, :].expand(3, 9, 9)
    added = (1.0 - pairs.float())[:, None] * torch.finfo(torch.float32).min
    for mask in (pairs, pairs.bool(), pairs[:, None], pairs[:, None].bool(), added, added.double()):
        torch.testing.assert_close(model(IDS, mask).last_hidden_state[MASK > 0], expected)
    causal = torch.ones(9, 9).tril().expand(3, 9, 9)
    ours = model(IDS, causal).last_hidden_state
    torch.testing.assert_close(ours[:, :4], model(IDS[:, :4], causal[:, :4, :4]).last_hidden_state)
    with pytest.raises(ShareBertError, match="attention_mask: "):
        model(IDS, MASK[0])


def test_head_mask_is_a_factor_on_the_probabilities_of_each_head() -> None:
    model = hub_model(hub.ShareBertModel)
    default = model(IDS, MASK).last_hidden_state
    torch.testing.assert_close(model(IDS, MASK, head_mask=torch.ones(3)).last_hidden_state, default)
    torch.testing.assert_close(model(IDS, MASK, head_mask=torch.ones(2, 3)).last_hidden_state, default)
    scale = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.5]])
    made = model(IDS, MASK, head_mask=scale).last_hidden_state
    assert (made - default).abs().max() > 1e-2
    layers = model.sharebert.layers
    kept = [layer.forward for layer in layers]
    for layer, factor in zip(layers, scale, strict=True):
        with_factor = kept[list(layers).index(layer)]
        layer.forward = lambda *given, run=with_factor, factor=factor: run(*given[:4], factor)
    torch.testing.assert_close(model(IDS, MASK).last_hidden_state, made)


def test_rows_without_tokens_are_refused_and_no_rows_are_not() -> None:
    model = hub_model(hub.ShareBertModel)
    with pytest.raises(ShareBertError, match="rows of 0 tokens"):
        model(IDS[:, :0])
    assert model(IDS[:0]).last_hidden_state.shape == (0, 9, 24)


def test_hidden_states_in_training_are_the_stream_that_the_next_layer_gets() -> None:
    """Dropout acts on what a layer adds to the stream, so a state without it would be another one."""
    model = hub_model(hub.ShareBertModel, hidden_dropout_prob=0.5).train()
    entered: list[torch.Tensor] = []
    for layer in model.sharebert.layers:
        layer.register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    states = model(IDS, MASK, output_hidden_states=True).hidden_states
    for state, stream in zip(states[:-1], entered, strict=True):
        assert state is stream
    states[1].retain_grad()
    states[-1].sum().backward()
    assert states[1].grad.abs().max() > 0


# Labels


@pytest.mark.parametrize(
    ("labels", "count", "kind"),
    [
        (torch.tensor([0, 2, 1]), 3, "single_label_classification"),
        (torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]), 3, "multi_label_classification"),
        (torch.tensor([0.5, -2.0, 1.0]), 1, "regression"),
        (torch.tensor([[0.5], [-2.0], [1.0]]), 1, "regression"),
        (torch.tensor([3, 1, 2]), 1, "regression"),
    ],
)
def test_labels_decide_the_problem_type(labels: torch.Tensor, count: int, kind: str) -> None:
    model = hub_model(hub.ShareBertForSequenceClassification, num_labels=count)
    output = model(IDS, MASK, labels=labels)
    assert model.config.problem_type == kind
    expected = {
        "single_label_classification": lambda x: F.cross_entropy(x, labels),
        "multi_label_classification": lambda x: F.binary_cross_entropy_with_logits(x, labels),
        "regression": lambda x: (x.flatten() - labels.flatten()).square().mean(),
    }[kind](output.logits)
    torch.testing.assert_close(output.loss, expected)


def test_labels_that_do_not_fit_the_problem_type_are_refused() -> None:
    model = hub_model(hub.ShareBertForSequenceClassification, num_labels=3)
    model(IDS, MASK, labels=torch.tensor([0, 1, 2]))
    with pytest.raises(ShareBertError, match="problem_type is 'single_label_classification'"):
        model(IDS, MASK, labels=torch.eye(3))


@pytest.mark.parametrize(
    "kind", [c for c in CLASSES if c not in (hub.ShareBertModel, hub.ShareBertForQuestionAnswering)]
)
def test_accumulated_gradients_count_every_label_once(kind: type) -> None:
    """With `num_items_in_batch` the losses of two micro-batches add up to the mean over both."""
    model = hub_model(kind)
    given = given_to(kind) | labels_of(kind)
    if given["labels"].dim() == 2:
        given["labels"] = given["labels"].masked_fill(MASK == 0, -100)
    whole = model(**given).loss
    items = (given["labels"] != -100).sum()
    parts = [
        model(**{name: x[rows] for name, x in given.items()}, num_items_in_batch=items).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


# Heads


def test_token_classification() -> None:
    model = hub_model(hub.ShareBertForTokenClassification, num_labels=5)
    labels = (IDS % 5).masked_fill(MASK == 0, -100)
    output = model(IDS, MASK, labels=labels)
    hidden = model.base_model(IDS, MASK).last_hidden_state
    torch.testing.assert_close(output.logits, F.linear(hidden, model.classifier.weight, model.classifier.bias))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[MASK > 0], labels[MASK > 0]))


def test_question_answering_leaves_out_answers_that_were_cut_off() -> None:
    model = hub_model(hub.ShareBertForQuestionAnswering)
    start, end = torch.tensor([1, 2, 40]), torch.tensor([2, 4, 41])
    output = model(IDS, MASK, start_positions=start, end_positions=end)
    hidden = model.base_model(IDS, MASK).last_hidden_state
    scores = F.linear(hidden, model.qa_outputs.weight, model.qa_outputs.bias)
    torch.testing.assert_close(output.start_logits, scores[..., 0])
    torch.testing.assert_close(output.end_logits, scores[..., 1])
    losses = [F.cross_entropy(scores[:2, :, n], places[:2]) for n, places in enumerate((start, end))]
    torch.testing.assert_close(output.loss, sum(losses) / 2)


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_multiple_choice(pooling: str) -> None:
    model = hub_model(hub.ShareBertForMultipleChoice, classifier_pooling=pooling)
    given = given_to(hub.ShareBertForMultipleChoice)
    labels = torch.tensor([1, 0, 1])
    output = model(**given, labels=labels)
    encoded = [model.base_model(ids, mask) for ids, mask in ((IDS, MASK), (IDS.flip(0), MASK.flip(0)))]
    if pooling == "pooler":
        texts = [one.pooler_output for one in encoded]
    else:
        masks = (MASK[..., None], MASK.flip(0)[..., None])
        texts = [(one.last_hidden_state * m).sum(1) / m.sum(1) for one, m in zip(encoded, masks, strict=True)]
    scores = torch.cat([F.linear(text, model.classifier.weight, model.classifier.bias) for text in texts], 1)
    torch.testing.assert_close(output.logits, scores)
    torch.testing.assert_close(output.loss, F.cross_entropy(scores, labels))


def test_multiple_choice_takes_positions_as_the_other_classes_do() -> None:
    model = hub_model(hub.ShareBertForMultipleChoice)
    given = given_to(hub.ShareBertForMultipleChoice)
    expected = model(**given).logits
    for ids in (torch.arange(9), torch.arange(9)[None], torch.arange(9).expand(3, 2, 9)):
        torch.testing.assert_close(model(**given, position_ids=ids).logits, expected)
    with pytest.raises(ShareBertError, match=r"multiple choice: needs \[B, choices, T\] ids.*\[3, 9\]"):
        model(IDS, MASK)


def test_mean_pooling_refuses_a_mask_that_does_not_say_what_is_padding() -> None:
    model = hub_model(hub.ShareBertForSequenceClassification, classifier_pooling="mean")
    with pytest.raises(ShareBertError, match="classifier_pooling: mean needs"):
        model(IDS, MASK[:, None, :].expand(3, 9, 9))


# Embeddings and copies


def test_the_input_embedding_can_be_replaced_by_one_of_its_size() -> None:
    model = hub_model(hub.ShareBertForMaskedLM, mlm_head="tied")
    before = model(IDS, MASK).logits
    old = model.get_input_embeddings()
    model.set_input_embeddings(nn.Embedding.from_pretrained(torch.randn(256, 8)))
    assert (model(IDS, MASK).logits - before).abs().max() > 1e-2
    model.set_input_embeddings(old)
    torch.testing.assert_close(model(IDS, MASK).logits, before, rtol=0, atol=0)
    model.set_input_embeddings(nn.Embedding(300, 8))
    with pytest.raises(ShareBertError, match=r"must be \[256, 8\] \(it is \[300, 8\]\)"):
        model(IDS, MASK)


def test_resizing_to_the_same_size_is_no_change() -> None:
    """The vocabulary of 250 words is padded to 256: a script that resizes to its tokenizer's length may go on."""
    model = hub_model(hub.ShareBertForMaskedLM)
    embedding = model.get_input_embeddings()
    for size in (None, 256, 250, 249):
        assert model.resize_token_embeddings(size) is embedding
    assert model.resize_token_embeddings(250, pad_to_multiple_of=64) is embedding
    for size in (248, 257, 300):
        with pytest.raises(ShareBertError, match="its size is fixed at 256"):
            model.resize_token_embeddings(size)


def test_output_embeddings() -> None:
    model = hub_model(hub.ShareBertForMaskedLM)
    decoder = nn.Linear(24, 256, bias=False)
    model.set_output_embeddings(decoder)
    assert model.get_output_embeddings() is decoder
    with pytest.raises(ShareBertError, match="set_output_embeddings: must be"):
        model.set_output_embeddings(nn.Linear(24, 300))
    with pytest.raises(ShareBertError, match="tied MLM head has no decoder"):
        hub_model(hub.ShareBertForMaskedLM, mlm_head="tied").set_output_embeddings(decoder)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_base_model_is_the_encoder_and_can_be_saved(kind: type, tmp_path: Path) -> None:
    model = hub_model(kind)
    base = model.base_model
    assert isinstance(base, hub.ShareBertModel)
    assert base.sharebert is model.sharebert
    base.save_pretrained(tmp_path)
    again = hub.ShareBertModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS, MASK).pooler_output, base(IDS, MASK).pooler_output)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_saved_config_says_whether_there_is_an_mlm_head(kind: type, tmp_path: Path) -> None:
    hub_model(kind, mlm_head="tied").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["mlm_head"]
    assert saved == ("tied" if kind is hub.ShareBertForMaskedLM else "none")


# Training


@pytest.mark.parametrize("reentrant", [True, False, None])
@pytest.mark.parametrize("kind", [c for c in CLASSES if c is not hub.ShareBertModel])
def test_gradient_checkpointing_gives_the_same_gradients(kind: type, reentrant: bool | None) -> None:
    model = hub_model(kind, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
    given = given_to(kind) | labels_of(kind)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(**given).loss.backward()
        return [p.grad for p in model.parameters()]

    plain = gradients()
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    model.sharebert.layers[0].attention_norm.register_forward_hook(count)
    model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    again = gradients()
    assert runs == 2
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    model.gradient_checkpointing_disable()
    gradients()
    assert runs == 3


@pytest.mark.parametrize(("head", "sharing"), FORMS)
@pytest.mark.parametrize("pooling", ["pooler", "mean"])
@pytest.mark.parametrize("kind", [c for c in CLASSES if c is not hub.ShareBertModel])
def test_every_parameter_gets_a_gradient(kind: type, pooling: str, head: str, sharing: str) -> None:
    """What gets none stops DistributedDataParallel: a model that does not pool has no parameter for it."""
    model = hub_model(kind, mlm_head=head, sharing=sharing, classifier_pooling=pooling).train()
    model(**given_to(kind), **labels_of(kind)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert "sharebert.pooler_bias" in model.state_dict()
