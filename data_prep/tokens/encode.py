"""Token ids of documents: exactly those of `tokenizers` with the same file, from a faster library where possible.

nanotoken 0.1.0 (Rust, MIT) encodes WordPiece at 50 MB/s cold and 160 MB/s warm on one core; `tokenizers` does 2 to 3.
It is a young library, so every part encodes a sample of its documents with both, and stops on a difference.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.tokens.tokenizer import parsed
from sharebert_common.errors import BadInput

Encoder = Callable[[Sequence[str]], tuple[NDArray[np.uint32], NDArray[np.int64]]]
"""Texts → (ids of all texts, one after the other; offsets [texts + 1] of the first id of each). No special tokens are
added, but special tokens that the text itself contains (`[MASK]`) are recognised, as by `tokenizers`."""

_PIECE_CHARS = 1 << 20
_SAFE_CUT = re.compile(r"[A-Za-z0-9] [A-Za-z0-9]")
_SAFE_PRE_TOKENIZERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "ByteLevel"}
_SAFE_NORMALIZERS = {None, "BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents"}

_CACHE_ENTRIES = 1 << 17
_SAMPLE_DOCUMENTS = 16
_SAMPLE_CHARS = 4 << 10  # of a batch of about 4 MB: 2 ms of `tokenizers` against 50 ms of nanotoken


def fast_encoder(tokenizer_json: str) -> Encoder | None:
    """nanotoken's encoder, or None for a tokenizer that it does not support (all but WordPiece)."""
    import nanotoken

    # Full caches take 22 MB a worker. Twice as many entries save 4 % of the time on 50 MB of text, four times as many
    # save nothing; the default of 1 << 20 takes about 200 MB.
    nanotoken.set_cache_entries(_CACHE_ENTRIES)
    try:
        backend = nanotoken.WordPieceTokenizer.from_json(tokenizer_json)
    except nanotoken.UnsupportedTokenizerError:
        return None
    return lambda texts: backend.encode_batch(texts, add_special_tokens=False, parallel=False)


def reference_encoder(tokenizer_json: str) -> Encoder:
    """The encoder of `tokenizers` itself.

    It needs about 700 bytes a token, so it gets one megabyte of text at a time. A longer text is cut into pieces at
    places where no known pre-tokenizer joins anything. With an unknown pre-tokenizer, a text is encoded in one piece.
    """
    tokenizer = parsed(tokenizer_json)
    safe = _has_safe_cuts(json.loads(tokenizer_json))

    def encode(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        ids, lengths = [np.zeros(0, np.uint32)], np.zeros(len(texts), np.int64)
        pieces: list[str] = []
        owners: list[int] = []
        held = 0

        def flush() -> None:
            for owner, encoding in zip(
                owners, tokenizer.encode_batch_fast(pieces, add_special_tokens=False), strict=True
            ):
                ids.append(np.array(encoding.ids, np.uint32))
                lengths[owner] += len(ids[-1])

        for number, text in enumerate(texts):
            for piece in _pieces(text, _PIECE_CHARS) if safe else [text]:
                pieces.append(piece)
                owners.append(number)
                held += len(piece)
                if held >= _PIECE_CHARS:
                    flush()
                    pieces, owners, held = [], [], 0
        flush()
        return np.concatenate(ids), np.concatenate([[0], np.cumsum(lengths)])

    return encode


def _has_safe_cuts(config: dict[str, Any]) -> bool:
    """Whether text can be cut before a space between two ASCII letters or digits without changing any id."""
    before = config.get("pre_tokenizer") or {}
    if before.get("type") not in _SAFE_PRE_TOKENIZERS or before.get("use_regex") is False:
        return False
    normalizer = config.get("normalizer") or {"type": None}
    steps = normalizer.get("normalizers", [normalizer])
    return all(step["type"] in _SAFE_NORMALIZERS for step in steps) and not any(
        _may_reach_a_cut(token) for token in config.get("added_tokens", [])
    )


def _may_reach_a_cut(token: dict[str, Any]) -> bool:
    """Whether an added token may hold the space between two ASCII letters or digits, or strip it."""
    content = token["content"]
    stripped = (token["lstrip"] and content[0].isalnum()) or (token["rstrip"] and content[-1].isalnum())
    return " " in content or stripped


def _pieces(text: str, size: int) -> Iterator[str]:
    start = 0
    while len(text) - start > size:
        place = _SAFE_CUT.search(text, start + size)
        if place is None:
            break
        yield text[start : place.start() + 1]
        start = place.start() + 1
    yield text[start:]


class CheckedEncoder:
    """The encoder of a part: the fast one where possible, compared with the reference on a sample of each batch."""

    def __init__(self, tokenizer_json: str, kind: Literal["auto", "tokenizers"]) -> None:
        self._reference = reference_encoder(tokenizer_json)
        self._fast = fast_encoder(tokenizer_json) if kind == "auto" else None

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Encode. Raises BadInput, quoting the text, if the ids of the two encoders differ."""
        if self._fast is None:
            return self._reference(texts)
        ids, offsets = self._fast(texts)
        left = _SAMPLE_CHARS
        for number in random.Random(len(ids)).sample(range(len(texts)), min(len(texts), _SAMPLE_DOCUMENTS)):
            text, ours = texts[number], ids[offsets[number] : offsets[number + 1]]
            if len(text) > left:
                text = text[:left]
                ours = self._fast([text])[0]
            if not np.array_equal(ours, self._reference([text])[0]):
                raise BadInput(
                    f"nanotoken and tokenizers differ on this text: {text[:80]!r}…; set tokenizer.encoder: tokenizers"
                )
            left -= len(text)
            if left <= 0:
                break
        return ids, offsets
