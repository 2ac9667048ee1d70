"""Vocabularies: trained the same every time, loaded from files, refused if they cannot work."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from made_texts import made_texts
from tokenizers import BertWordPieceTokenizer, Tokenizer

from data_prep.tokens.tokenizer import TokenizerRecipe, TrainTokenizerRecipe, Vocabulary, load, train
from sharebert_common.errors import BadInput
from sharebert_common.inference_tokenizer import SPECIAL_TOKENS

TEXTS = made_texts(200, seed=3)
SPECIAL = list(SPECIAL_TOKENS.values())


def config(**values: object) -> TokenizerRecipe:
    return TokenizerRecipe(train=TrainTokenizerRecipe(**values))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_is_the_same_in_every_process(kind: str) -> None:
    code = (
        "import hashlib; from made_texts import made_texts; from data_prep.tokens.tokenizer import *;"
        f"c = TokenizerRecipe(train=TrainTokenizerRecipe(type={kind!r}, vocab_size=800));"
        "print(hashlib.sha256(train(lambda: made_texts(200, seed=3), c).encode()).hexdigest())"
    )
    ours = hashlib.sha256(train(lambda: TEXTS, config(type=kind, vocab_size=800)).encode()).hexdigest()
    path = str(Path(__file__).parents[2])
    for _ in range(2):
        run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"]
        assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == ours


def test_trained_wordpiece_is_a_bert_vocabulary() -> None:
    text = train(lambda: TEXTS, config(vocab_size=900))
    words = Tokenizer.from_str(text)
    vocabulary = Vocabulary.parse(text)
    assert vocabulary.size == words.get_vocab_size() == 900
    assert vocabulary.special_ids == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert vocabulary.dtype == "uint16"
    encoding = words.encode("Ba na [MASK] ☃")
    assert encoding.tokens[0] == "[CLS]"
    assert encoding.tokens[-2:] == ["[UNK]", "[SEP]"]
    assert "[MASK]" in encoding.tokens
    joined = "".join(TEXTS).lower()
    assert "[UNK]" not in words.encode(joined[:2000], add_special_tokens=False).tokens
    special = {token.content for token in words.get_added_tokens_decoder().values()}
    assert special == set(SPECIAL)  # the pieces of one character are ordinary words


def test_rare_characters_are_left_out_of_a_small_alphabet() -> None:
    words = Tokenizer.from_str(train(lambda: [*TEXTS, "☃ once"], config(vocab_size=600, alphabet=40)))
    assert words.token_to_id("☃") is None
    assert words.token_to_id("a") is not None


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_too_small_a_vocabulary_is_refused(kind: str) -> None:
    with pytest.raises(BadInput, match=r"vocab_size: 20 is too small: .* alone are \d+"):
        train(lambda: TEXTS, config(type=kind, vocab_size=20))


def test_vocab_txt_encodes_as_bert_does(tmp_path: Path) -> None:
    words = Tokenizer.from_str(train(lambda: TEXTS, config(vocab_size=700))).get_vocab()
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(sorted(words, key=words.__getitem__)) + "\n", "utf-8")
    ours = Tokenizer.from_str(load(str(file), lowercase=True))
    theirs = BertWordPieceTokenizer(str(file), lowercase=True)
    for text in TEXTS[:50]:
        assert ours.encode(text).ids == theirs.encode(text).ids
    cased = Tokenizer.from_str(load(str(file), lowercase=False))
    assert cased.encode("BA", add_special_tokens=False).tokens == ["[UNK]"]


def test_padding_and_truncation_of_a_file_are_taken_off(tmp_path: Path) -> None:
    words = Tokenizer.from_str(train(lambda: TEXTS, config(vocab_size=700)))
    words.enable_padding(length=64)
    words.enable_truncation(8)
    words.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_str(load(str(tmp_path / "tokenizer.json"), lowercase=True))
    assert loaded.padding is None
    assert loaded.truncation is None


def test_a_file_without_special_tokens_is_refused_with_their_names(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
    with pytest.raises(BadInput, match=r"vocab\.txt: lacks the special tokens \[MASK\], \[SEP\]"):
        load(str(file), lowercase=True)
    Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}').save(str(tmp_path / "t.json"))
    with pytest.raises(BadInput, match=r"t\.json: lacks the special tokens \[CLS\], \[MASK\], \[PAD\], \[SEP\]"):
        load(str(tmp_path / "t.json"), lowercase=True)


SPECIAL_LINES = "\n".join(SPECIAL)


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x1c", "\x1d", "\x1e", "\x0b", "\x0c", "\r"])
def test_only_a_line_feed_ends_a_word(tmp_path: Path, char: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(f"{SPECIAL_LINES}\na\n{char}\nb{char}c\nthe\nba\n".encode())
    words = Tokenizer.from_str(load(str(tmp_path / "vocab.txt"), lowercase=True))
    assert (words.token_to_id("a"), words.token_to_id("the"), words.token_to_id("ba")) == (5, 8, 9)


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\n\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_marks_at_the_start_and_blank_lines_at_the_end_of_a_word_list(tmp_path: Path, start: str, end: str) -> None:
    newline = "\r\n" if "\r" in end else "\n"
    (tmp_path / "vocab.txt").write_bytes((start + newline.join([*SPECIAL, "a", "ba"]) + end).encode())
    text = load(str(tmp_path / "vocab.txt"), lowercase=True)
    assert Tokenizer.from_str(text).token_to_id("ba") == 6
    assert Vocabulary.parse(text).size == 7
    (tmp_path / "tokenizer.json").write_bytes((start + text).encode())
    assert load(str(tmp_path / "tokenizer.json"), lowercase=True) == text


def test_blank_lines_within_a_word_list_are_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(f"{SPECIAL_LINES}\n\na\n\nb\n")
    with pytest.raises(BadInput, match=r"vocab\.txt: no word is on lines 6 and 8"):
        load(str(tmp_path / "vocab.txt"), lowercase=True)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.json: No such file"):
        load(str(tmp_path / "none.json"), lowercase=True)
    (tmp_path / "bad.json").write_text("{]")
    with pytest.raises(BadInput, match=r"bad\.json: not readable as a tokenizer"):
        load(str(tmp_path / "bad.json"), lowercase=True)
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "a", "a"]))
    with pytest.raises(BadInput, match=r"vocab\.txt: the same word 'a' is on lines 6 and 7"):
        load(str(tmp_path / "vocab.txt"), lowercase=True)


def test_a_word_list_in_another_encoding_is_named(tmp_path: Path) -> None:
    words = "\n".join([*SPECIAL, "caf\u00e9"])
    for encoding, said in (("utf-16", "it looks like UTF-16"), ("latin-1", "byte 0xe9 on line 6 is not UTF-8")):
        (tmp_path / "vocab.txt").write_bytes(words.encode(encoding))
        with pytest.raises(BadInput, match=said):
            load(str(tmp_path / "vocab.txt"), lowercase=True)
