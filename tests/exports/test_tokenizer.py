"""What an export's AutoTokenizer gives for a text and for a pair is what a training row holds.

Tried with tokenizers of every kind that `sharebert prep` accepts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import SPECIAL, tiny_config
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from data_prep.tokens.tokenizer import TokenizerRecipe, TrainTokenizerRecipe, load, train
from exports.tokenizer import training_tokenizer_sha256, write_tokenizer
from sharebert import ShareBertConfig
from sharebert_common.files import file_sha256
from sharebert_common.inference_tokenizer import for_inference

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

WORDS = ["the", "a", "is", "of", "cat", "dog", "house", "runs", "red", "12", "éa", "naïve", "big", "small", "tree"]
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 5] + WORDS[i % 11 :]) + ", " + WORDS[i % 15] + "." for i in range(200)]
TEXTS.append(" ".join(f"w{i}" for i in range(60)))


def config_for(words: int) -> ShareBertConfig:
    """Of a model that is small enough for few words."""
    return tiny_config(vocab_size=words, hidden_size=8, intermediate_size=8, num_attention_heads=2)


def by_prep(**keys: Any) -> str:
    return train(lambda: TEXTS, TokenizerRecipe(train=TrainTokenizerRecipe(vocab_size=400, **keys)))


def trained(model: Any, trainer: Any, splitter: Any, normalizer: Any = None) -> str:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitter
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(TEXTS, trainer)
    return str(tokenizer.to_str())


def unigram(scheme: str) -> str:
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(prepend_scheme=scheme))


def bpe(splitter: Any) -> str:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(splitter, pre_tokenizers.ByteLevel) else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return trained(models.BPE(unk_token="[UNK]"), trainer, splitter)


def word_level() -> str:
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    return trained(models.WordLevel(unk_token="[UNK]"), trainer, splitter, normalizers.Lowercase())


def changed(text: str, change: Callable[[dict[str, Any]], Any]) -> str:
    state = json.loads(text)
    change(state)
    return json.dumps(state)


def swapped(state: dict[str, Any]) -> None:
    """A template that puts [SEP] first and [CLS] last."""
    tokens = state["post_processor"]["special_tokens"]
    tokens["[CLS]"]["ids"], tokens["[SEP]"]["ids"] = tokens["[SEP]"]["ids"], tokens["[CLS]"]["ids"]


def one_sided(text: str) -> str:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", tokenizer.token_to_id("[SEP]"))]
    )
    return str(tokenizer.to_str())


KINDS: dict[str, Callable[[], str]] = {
    "wordpiece": lambda: by_prep(type="wordpiece", alphabet=60),
    "byte-level": lambda: by_prep(type="bpe"),
    "no post-processor": lambda: changed(by_prep(alphabet=60), lambda s: s.update(post_processor=None)),
    "special tokens not added": lambda: changed(
        by_prep(alphabet=60), lambda s: s.update(added_tokens=[], post_processor=None)
    ),
    "special tokens not special": lambda: changed(
        by_prep(alphabet=60), lambda s: [entry.update(special=False) for entry in s["added_tokens"]]
    ),
    "swapped": lambda: changed(by_prep(alphabet=60), swapped),
    "one-sided": lambda: one_sided(by_prep(alphabet=60)),
    "truncated": lambda: changed(
        by_prep(alphabet=60),
        lambda s: s.update(truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
    ),
    "unigram": lambda: unigram("always"),
    "unigram, first": lambda: unigram("first"),
    "bpe of words": lambda: bpe(pre_tokenizers.Metaspace()),
    "byte-level without special rules": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bpe after BERT's splitter": lambda: bpe(pre_tokenizers.BertPreTokenizer()),
    "word-level": word_level,
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """The tokenizer as prep takes it, and the AutoTokenizer of an export with it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "given.json").write_text(KINDS[request.param]())
    (folder / "tokenizer.json").write_text(load(str(folder / "given.json"), lowercase=True))
    training = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = config_for(max(training.get_vocab().values()) + 1)
    (folder / "export").mkdir()
    write_tokenizer(folder / "export", folder / "tokenizer.json", config)
    return training, transformers.AutoTokenizer.from_pretrained(folder / "export")


texts = st.lists(st.sampled_from([*WORDS, ",", "."]), min_size=1, max_size=8).map(
    lambda words: " ".join(words).replace(" ,", ",").replace(" .", ".")
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts, other=texts)
def test_a_text_and_a_pair(pair: tuple[Tokenizer, Any], text: str, other: str) -> None:
    training, tokenizer = pair
    cls, sep = training.token_to_id("[CLS]"), training.token_to_id("[SEP]")
    a, b = (training.encode(part, add_special_tokens=False).ids for part in (text, other))
    assert tokenizer(text)["input_ids"] == [cls, *a, sep]
    both = tokenizer(text, other)
    assert both["input_ids"] == [cls, *a, sep, *b, sep]
    assert both["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.lists(st.sampled_from(WORDS), max_size=4), behind=st.sampled_from(["", ".", ", the", " cat", " a 12"]))
def test_a_text_with_a_mask(pair: tuple[Tokenizer, Any], before: list[str], behind: str) -> None:
    """The ids of the text in which one word stands, with that word's tokens replaced."""
    training, tokenizer = pair
    cls, sep, mask = (training.token_to_id(token) for token in ("[CLS]", "[SEP]", "[MASK]"))
    start = "".join(f"{word} " for word in before)
    whole = training.encode(f"{start}tree{behind}", add_special_tokens=False)
    first = len(training.encode(start.rstrip(), add_special_tokens=False).ids)
    assume(not any(begin < len(start) + 4 < end for begin, end in whole.offsets))  # "tree." may be one token
    last = max(i for i, (begin, _) in enumerate(whole.offsets) if begin < len(start) + 4) + 1
    expected = [cls, *whole.ids[:first], mask, *whole.ids[last:], sep]
    assert tokenizer(f"{start}[MASK]{behind}")["input_ids"] == expected


def test_special_tokens_are_special(pair: tuple[Tokenizer, Any]) -> None:
    training, tokenizer = pair
    ids = [training.token_to_id(token) for token in SPECIAL]
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == ids
    assert set(tokenizer.all_special_ids) == set(ids)
    assert "[" not in tokenizer.decode(tokenizer("the cat")["input_ids"], skip_special_tokens=True)


def test_a_right_tokenizer_is_copied_and_another_one_keeps_the_sha256_of_the_training(tmp_path: Path) -> None:
    text = KINDS["wordpiece"]()
    config = config_for(Tokenizer.from_str(text).get_vocab_size())
    for name, content in (("right", text), ("wrong", changed(text, lambda s: s.update(post_processor=None)))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(content)
        for number, source in enumerate((tmp_path / name, tmp_path / f"{name}-0")):
            out = tmp_path / f"{name}-{number}"
            out.mkdir()
            write_tokenizer(out, source / "tokenizer.json", config)
            trained = file_sha256(tmp_path / name / "tokenizer.json")
            assert training_tokenizer_sha256(out / "tokenizer.json") == trained
            assert (file_sha256(out / "tokenizer.json") == trained) == (name == "right")


def test_one_token_type_gives_pairs_of_one_type() -> None:
    tokenizer, _ = for_inference(Tokenizer.from_str(KINDS["wordpiece"]()), pair_type=0)
    assert not any(tokenizer.encode("the cat", "a dog").type_ids)


def test_what_has_no_mask_rule_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Byte-level BPE that adds a space before every piece of text takes the full stop after [MASK] for a new word."""
    tokenizer = Tokenizer.from_str(bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)))
    tokenizer.add_special_tokens([AddedToken("[MASK]", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "export").mkdir()
    write_tokenizer(tmp_path / "export", tmp_path / "tokenizer.json", config_for(tokenizer.get_vocab_size()))
    assert "beside some words, [MASK] gives other ids than in training" in capsys.readouterr().err


def test_a_model_that_names_no_unknown_token_is_left_as_it_is() -> None:
    """Its words may be known alone and not beside a space."""
    words = {word: number for number, word in enumerate([*SPECIAL, "w0", "w1"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[NONE]"))
    ready, changes = for_inference(tokenizer)
    assert ready.encode("w0", add_special_tokens=False).ids == [len(SPECIAL)]
    assert not any("take the space" in change for change in changes)
