"""The tokenizer: train one with `tokenizers`, or load an existing file and check it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_prep.progress import say
from sharebert_common.encodings import decode_utf8
from sharebert_common.errors import BadInput
from sharebert_common.inference_tokenizer import SPECIAL_TOKENS, for_inference, training_template
from sharebert_common.recipe import STRICT


@config_dataclass(config=STRICT, kw_only=True)
class TrainTokenizerRecipe:
    """How a new vocabulary is trained."""

    type: Literal["wordpiece", "bpe"] = "wordpiece"
    """Kind of the vocabulary: WordPiece as in BERT, or byte-level BPE."""
    vocab_size: int = Field(default=30_522, ge=1)
    """Number of words, with special tokens; a small text gives fewer."""
    sample_bytes: int = Field(default=256 << 20, ge=1)
    """Bytes of text to train on, taken evenly from all parts of the input."""
    alphabet: int = Field(default=1000, ge=1)
    """Number of characters that WordPiece keeps, the most frequent ones; words with others become [UNK]."""
    min_frequency: int = Field(default=2, ge=1)
    """Least number of times that a pair of pieces must occur to be merged."""


@config_dataclass(config=STRICT, kw_only=True)
class TokenizerRecipe:
    """Which vocabulary to use, and which library encodes with it."""

    path: str | None = None
    """Path of a tokenizer.json, or of a vocab.txt as BERT has; none: train a vocabulary."""
    train: TrainTokenizerRecipe = field(default_factory=TrainTokenizerRecipe)
    """How a vocabulary is trained; used without a path."""
    lowercase: bool = True
    """Lower case and no accents, as bert-base-uncased has; for a new vocabulary and for a vocab.txt."""
    encoder: Literal["auto", "tokenizers"] = "auto"
    """Library that encodes: auto uses nanotoken where it can (same ids, many times faster), otherwise tokenizers."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as JSON text, with its size and special ids. `size` is one more than the highest id."""

    json: str
    size: int
    special_ids: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> Vocabulary:
        """Make it from the text of a tokenizer.json."""
        words = parsed(text).get_vocab()
        return cls(text, max(words.values()) + 1, {key: words[token] for key, token in SPECIAL_TOKENS.items()})

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of token ids on disk."""
        return np.dtype("<u2" if self.size <= 1 << 16 else "<u4")


@lru_cache(maxsize=1)
def parsed(text: str) -> Tokenizer:
    """The tokenizer of the text of a tokenizer.json. It is cached, because to parse one takes 30 ms."""
    return Tokenizer.from_str(text)


UNTRAINED = Vocabulary("", 0, {})
"""Used while the vocabulary is not trained yet."""


def load(path: str, lowercase: bool) -> str:
    """Load a tokenizer.json or vocab.txt, as the text of a tokenizer.json.

    Padding and truncation are taken off. If it would give other ids at inference than in training rows, it is
    corrected, and a line says so: see `for_inference`.

    Raises BadInput: not readable, or a special token is missing.
    """
    file = Path(path)
    try:
        text = decode_utf8(file.read_bytes())
        if file.suffix == ".txt":
            words = word_list(path, text)
            _require_special(path, words)
            tokenizer = _bert(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"), lowercase)
        else:
            tokenizer = Tokenizer.from_str(text)
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"tokenizer.path: {path}: {error.strerror}") from error
    except Exception as error:
        raise BadInput(f"{path}: not readable as a tokenizer ({' '.join(str(error).split())[:200]})") from error
    _require_special(path, [word for word in SPECIAL_TOKENS.values() if tokenizer.token_to_id(word) is not None])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ready, changes = for_inference(tokenizer)
    for change in changes:
        say(f"{path}: {change}")
    return str(ready.to_str())


def word_list(path: str, text: str) -> list[str]:
    """The words of a vocab.txt: line n is the word with id n. Lines end at \\n or \\r\\n and at nothing else.

    Blank lines at the end are left out. Raises BadInput, naming the lines, where two words are the same.
    """
    words = [line.removesuffix("\r") for line in text.split("\n")]
    while words and not words[-1]:
        words.pop()
    first: dict[str, int] = {}
    for number, word in enumerate(words, 1):
        if first.setdefault(word, number) != number:
            what = f"the same word {word!r} is" if word else "no word is"
            raise BadInput(f"{path}: {what} on lines {first[word]} and {number}; each line of a vocab.txt is one word")
    return words


def train(texts: Callable[[], Iterable[str]], config: TokenizerRecipe) -> str:
    """Train a vocabulary: the text of a tokenizer.json, byte for byte the same for the same texts.

    Args:
        texts: called twice; it must return the same documents each time.
        config: see `TokenizerRecipe`.

    Raises BadInput if vocab_size is too small for the alphabet.
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
        return str(for_inference(tokenizer)[0].to_str())
    bare = _bert(models.WordPiece(unk_token="[UNK]"), config.lowercase)
    alphabet = _alphabet(texts(), bare, config.train.alphabet)
    # The trainer numbers the pieces of one character in the order of a randomly seeded hash map, and breaks ties by
    # number, so two runs give two vocabularies. Special tokens get their numbers first, in the order given. So all
    # pieces of one character are passed as special tokens; the tokenizer that is built from the words has them as
    # ordinary words again.
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
    tokenizer.post_processor = training_template(tokenizer)
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
    """Whether pre-tokenisation keeps the character inside a word; punctuation and CJK become words of their own."""
    words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(f"a{char}a"))
    return len(words) == 1


def _require_size(size: int, needed: list[str]) -> None:
    if size <= len(needed):
        raise BadInput(
            f"tokenizer.train.vocab_size: {size} is too small: special tokens and single characters alone are "
            f"{len(needed)}; raise it, or lower tokenizer.train.alphabet"
        )


def _require_special(path: str, words: Iterable[str]) -> None:
    missing = sorted(set(SPECIAL_TOKENS.values()) - set(words))
    if missing:
        raise BadInput(f"{path}: lacks the special tokens {', '.join(missing)}; add them or use another tokenizer")
