"""The vocabulary: train one with `tokenizers`, or take an existing file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_prep.shards.reader import SPECIAL_TOKENS
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT


@config_dataclass(config=STRICT, kw_only=True)
class TrainConfig:
    """A new vocabulary."""

    type: Literal["wordpiece", "bpe"] = "wordpiece"
    """WordPiece as in BERT, or byte-level BPE."""
    vocab_size: int = Field(default=30_522, ge=1)
    """Words, special tokens included; fewer where the text has no more."""
    sample_bytes: int = Field(default=256 << 20, ge=1)
    """Text to learn from, taken evenly from all parts of the input."""
    alphabet: int = Field(default=1000, ge=1)
    """WordPiece keeps this many of the most frequent characters; words with others become [UNK]."""
    min_frequency: int = Field(default=2, ge=1)
    """A pair of pieces that occurs less often is not merged."""


@config_dataclass(config=STRICT, kw_only=True)
class TokenizerConfig:
    """Which vocabulary, and what encodes with it."""

    path: str | None = None
    """An existing tokenizer.json, or a vocab.txt as BERT's; none: train one."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How to train one, where no path is given."""
    lowercase: bool = True
    """For a new vocabulary and for a vocab.txt: lower case and no accents, as bert-base-uncased."""
    encoder: Literal["auto", "tokenizers"] = "auto"
    """auto takes nanotoken where it supports the tokenizer (same ids, many times faster); tokenizers: the reference."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and what others need to know of it. `size` is one more than its highest id."""

    json: str
    size: int
    special_ids: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> Vocabulary:
        """From the text of a tokenizer.json."""
        words = parsed(text).get_vocab()
        return cls(text, max(words.values()) + 1, {key: words[token] for key, token in SPECIAL_TOKENS.items()})

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of token ids on disk."""
        return np.dtype("<u2" if self.size <= 1 << 16 else "<u4")


@lru_cache(maxsize=1)
def parsed(text: str) -> Tokenizer:
    """The tokenizer of the text of a tokenizer.json. To parse one takes 30 ms, and a run asks for the same again."""
    return Tokenizer.from_str(text)


UNTRAINED = Vocabulary("", 0, {})
"""Stands in for a vocabulary while one is trained."""


def load(path: str, lowercase: bool) -> str:
    """An existing tokenizer.json or vocab.txt, as the text of a tokenizer.json without padding and truncation.

    Raises BadInput: unreadable, or special tokens missing.
    """
    file = Path(path)
    try:
        if file.suffix == ".txt":
            words = file.read_text(encoding="utf-8").splitlines()
            if len(set(words)) != len(words):
                raise BadInput(f"{path}: the same word on two lines; this is no vocab.txt")
            _require_special(path, words)
            tokenizer = _bert(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"), lowercase)
        else:
            tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"tokenizer.path: {path}: {error.strerror}") from error
    except Exception as error:
        raise BadInput(f"{path}: not readable as a tokenizer ({' '.join(str(error).split())[:200]})") from error
    _require_special(path, [word for word in SPECIAL_TOKENS.values() if tokenizer.token_to_id(word) is not None])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return str(tokenizer.to_str())


def train(texts: Callable[[], Iterable[str]], config: TokenizerConfig) -> str:
    """Train a vocabulary: the text of a tokenizer.json, the same for the same texts, byte for byte.

    Args:
        texts: called twice, gives the same documents each time.
        config: see `TokenizerConfig`.

    Raises BadInput where vocab_size is too small for the alphabet.
    """
    size, specials = config.train.vocab_size, list(SPECIAL_TOKENS.values())
    if config.train.type == "bpe":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        _require_size(size, specials + alphabet)
        tokenizer = _byte_level(models.BPE())
        tokenizer.train_from_iterator(
            texts(),
            trainers.BpeTrainer(
                vocab_size=size,
                min_frequency=config.train.min_frequency,
                special_tokens=specials,
                initial_alphabet=alphabet,
                show_progress=False,
            ),
        )
        return str(tokenizer.to_str())
    bare = _bert(models.WordPiece(unk_token="[UNK]"), config.lowercase)
    alphabet = _alphabet(texts(), bare, config.train.alphabet)
    # The trainer numbers the pieces of one character in the order of a randomly seeded hash map, and breaks ties
    # by number: two runs give two vocabularies. Special tokens get their numbers first, in the order given, so
    # all pieces of one character are passed as such and lose that mark in the tokenizer built from the words.
    pieces = alphabet + ["##" + char for char in alphabet if _continues_words(char, bare)]
    _require_size(size, specials + pieces)
    bare.train_from_iterator(
        texts(),
        trainers.WordPieceTrainer(
            vocab_size=size,
            min_frequency=config.train.min_frequency,
            special_tokens=specials + pieces,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        ),
    )
    return str(_bert(models.WordPiece(bare.get_vocab(), unk_token="[UNK]"), config.lowercase).to_str())


def _bert(model: models.WordPiece, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_special(tokenizer)


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer)


def _with_special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS.values()])
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return tokenizer


def _alphabet(texts: Iterable[str], tokenizer: Tokenizer, limit: int) -> list[str]:
    """The most frequent characters after normalisation, sorted."""
    raw = np.zeros(0x110000, np.int64)
    for text in texts:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        found, times = np.unique(codes, return_counts=True)
        raw[found] += times
    counts: dict[str, int] = {}
    for code in np.flatnonzero(raw):
        for char in tokenizer.normalizer.normalize_str(chr(code)):
            if not char.isspace():
                counts[char] = counts.get(char, 0) + int(raw[code])
    return sorted(sorted(counts, key=lambda char: (-counts[char], char))[:limit])


def _continues_words(char: str, tokenizer: Tokenizer) -> bool:
    """Whether pre-tokenisation leaves the character inside a word: punctuation and CJK stand alone."""
    words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(f"a{char}a"))
    return len(words) == 1


def _require_size(size: int, needed: list[str]) -> None:
    if size <= len(needed):
        raise BadInput(
            f"tokenizer.train.vocab_size: {size} is too small: special tokens and single characters alone are "
            f"{len(needed)}; give more, or lower tokenizer.train.alphabet"
        )


def _require_special(path: str, words: Iterable[str]) -> None:
    missing = sorted(set(SPECIAL_TOKENS.values()) - set(words))
    if missing:
        raise BadInput(f"{path}: lacks the special tokens {', '.join(missing)}; add them or take another tokenizer")
