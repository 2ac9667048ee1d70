"""For every kind of tokenizer, a text and a pair give what a training row holds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_texts import made_texts, recipe, write_jsonl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_prep.pipeline import prepare
from data_prep.tokens.tokenizer import TokenizerRecipe, TrainTokenizerRecipe, load, train
from sharebert_common.inference_tokenizer import SPECIAL_TOKENS

TEXTS = [
    text.lower() for text in made_texts(200, seed=4) if text.isascii() and text.rstrip(".").replace(" ", "").isalnum()
]
SPECIAL = list(SPECIAL_TOKENS.values())


def wordpiece() -> Tokenizer:
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL))
    return words


def byte_level(prefix: bool) -> Tokenizer:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return words


def unigram(scheme: str) -> Tokenizer:
    words = Tokenizer(models.Unigram())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    words.decoder = decoders.Metaspace(prepend_scheme=scheme)
    words.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="[UNK]"))
    return words


def word_level() -> Tokenizer:
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(vocab_size=500, special_tokens=SPECIAL))
    return words


KINDS = {
    "WordPiece": wordpiece(),
    "byte-level BPE": byte_level(False),
    "byte-level BPE with a space first": byte_level(True),
    "Unigram": unigram("always"),
    "Unigram, first word alone": unigram("first"),
    "words": word_level(),
}


def template(single: str, pair: str, swapped: bool = False) -> Any:
    def made(ids: dict[str, int]) -> Any:
        names = [("[CLS]", ids["[SEP]" if swapped else "[CLS]"]), ("[SEP]", ids["[CLS]" if swapped else "[SEP]"])]
        return processors.TemplateProcessing(single=single, pair=pair, special_tokens=names)

    return made


POST_PROCESSORS: dict[str, Any] = {
    "none": lambda ids: None,
    "BERT's": lambda ids: processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])),
    "RoBERTa's": lambda ids: processors.RobertaProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])),
    "byte-level": lambda ids: processors.ByteLevel(trim_offsets=True),
    "one-sided": template("[CLS] $A", "[CLS] $A [SEP] $B"),
    "pair alone": template("$A", "[CLS] $A [SEP] $B [SEP]"),
    "swapped": template("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", swapped=True),
}

SPECIAL_AS: dict[str, dict[str, Any] | None] = {
    "special": {},
    "words alone": None,
    "not special": {"special": False},
    "normalised": {"normalized": True},
    "single words": {"single_word": True},
    "stripped on the right": {"rstrip": True},
}


def saved(folder: Path, kind: str, post_processor: str, special_as: str) -> Path:
    words = Tokenizer.from_str(KINDS[kind].to_str())
    post = POST_PROCESSORS[post_processor]({token: words.token_to_id(token) for token in SPECIAL})
    if post is not None:
        words.post_processor = post
    config = json.loads(words.to_str())
    changes = SPECIAL_AS[special_as]
    config["added_tokens"] = [] if changes is None else [token | changes for token in config["added_tokens"]]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(config), "utf-8")
    return path


WORDS = st.lists(st.sampled_from(" ".join(TEXTS[:40]).replace(".", "").split()), min_size=1, max_size=6)


@pytest.mark.parametrize(("kind", "post", "special"), list(itertools.product(KINDS, POST_PROCESSORS, SPECIAL_AS)))
def test_a_text_and_a_pair_are_what_a_row_holds(tmp_path: Path, kind: str, post: str, special: str) -> None:
    text = load(str(saved(tmp_path, kind, post, special)), lowercase=True)
    words = Tokenizer.from_str(text)
    ids = {token: words.token_to_id(token) for token in SPECIAL}

    @settings(max_examples=5, deadline=None)
    @given(first=WORDS, second=WORDS)
    def check(first: list[str], second: list[str]) -> None:
        one, two = (words.encode(" ".join(w), add_special_tokens=False).ids for w in (first, second))
        assert words.encode(" ".join(first)).ids == [ids["[CLS]"], *one, ids["[SEP]"]]
        pair = words.encode(" ".join(first), " ".join(second)).ids
        assert pair == [ids["[CLS]"], *one, ids["[SEP]"], *two, ids["[SEP]"]]

    check()
    for token in SPECIAL:
        assert words.encode(f"{token}", add_special_tokens=False).ids == [ids[token]]
        assert words.decode([ids[token]], skip_special_tokens=True) == ""
    (tmp_path / "again.json").write_text(text, "utf-8")
    assert load(str(tmp_path / "again.json"), lowercase=True) == text


@pytest.mark.parametrize("special", SPECIAL_AS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_word_is_that_of_a_row(tmp_path: Path, kind: str, special: str) -> None:
    words = Tokenizer.from_str(load(str(saved(tmp_path, kind, "none", special)), lowercase=True))
    mask, tried = words.token_to_id("[MASK]"), 0
    for text in TEXTS[:30]:
        pieces = text.rstrip(".").split()[:10]
        for place in range(1, len(pieces)):
            row = words.encode(" ".join(pieces), add_special_tokens=False)
            inside = [i for i, number in enumerate(row.word_ids) if number == place]
            before = words.encode(" ".join(pieces[:place]), add_special_tokens=False).ids
            if len(inside) != 1 or row.ids[: inside[0]] != before:
                continue
            asked = " ".join([*pieces[:place], "[MASK]", *pieces[place + 1 :]])
            masked = [*row.ids[: inside[0]], mask, *row.ids[inside[0] + 1 :]]
            assert words.encode(asked, add_special_tokens=False).ids == masked
            tried += 1
    assert tried > 20


def test_a_trained_byte_level_vocabulary_has_no_stray_space() -> None:
    words = Tokenizer.from_str(
        train(
            lambda: ["ba de lo ki.", "lo ki ba de."] * 30,
            TokenizerRecipe(train=TrainTokenizerRecipe(type="bpe", vocab_size=290)),
        )
    )
    row, asked = words.encode("ba de lo ki."), words.encode("ba de [MASK] ki.")
    place = row.tokens.index("Ġlo")
    assert asked.ids == [*row.ids[:place], words.token_to_id("[MASK]"), *row.ids[place + 1 :]]


def test_what_was_corrected_is_said_and_stands_in_the_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, "WordPiece", "none", "words alone")
    made = prepare(recipe(tmp_path / "d", write_jsonl(tmp_path / "c.jsonl", TEXTS), tokenizer=path))
    said = capsys.readouterr().err
    assert f"prep: {path}: made [PAD], [UNK], [CLS], [SEP], [MASK] special tokens" in said
    assert f"prep: {path}: set the post-processor to [CLS] text [SEP], as in training rows" in said
    words = Tokenizer.from_file(str(made / "tokenizer.json"))
    assert words.encode("ba").tokens[:: len(words.encode("ba").tokens) - 1] == ["[CLS]", "[SEP]"]


def test_transformers_gives_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for kind in KINDS:
        text = load(str(saved(tmp_path, kind, "one-sided", "words alone")), lowercase=True)
        (tmp_path / "tokenizer.json").write_text(text, "utf-8")
        names = {f"{key}_token": token for key, token in SPECIAL_TOKENS.items()}
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **names)
        ours = Tokenizer.from_str(text)
        for asked in (("ba na",), ("ba na", "de ki"), ("ba [MASK] ki",)):
            assert theirs(*asked)["input_ids"] == ours.encode(*asked).ids
