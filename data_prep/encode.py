"""Documents → ids: exactly those of `tokenizers` with the same file, by a faster library where it can.

nanotoken 0.1.0 (Rust, MIT) encodes WordPiece at 50 MB/s cold and 160 MB/s warm on one core, where `tokenizers`
does 2 to 3. It is young, so every part encodes a sample of its documents with both and stops on a difference.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sharebert_recipe import BadInput

Encoder = Callable[[Sequence[str]], tuple[NDArray[np.uint32], NDArray[np.int64]]]
"""Texts → (ids of all, one after the other; offsets [texts + 1] of each one's first id). No special tokens are added,
but those that the text itself spells out (`[MASK]`) are recognised, as `tokenizers` does."""

_SAMPLE_DOCUMENTS = 16
_SAMPLE_CHARS = 8 << 10  # a batch, of about 4 MB: 3 ms of `tokenizers` beside 50 ms of nanotoken


def fast_encoder(tokenizer_json: str) -> Encoder | None:
    """nanotoken's encoder, or None where it does not support this tokenizer (anything but WordPiece)."""
    import nanotoken

    try:
        backend = nanotoken.WordPieceTokenizer.from_json(tokenizer_json)
    except nanotoken.UnsupportedTokenizerError:
        return None
    return lambda texts: backend.encode_batch(texts, add_special_tokens=False, parallel=False)


def reference_encoder(tokenizer_json: str) -> Encoder:
    """The encoder of `tokenizers` itself."""
    tokenizer = Tokenizer.from_str(tokenizer_json)

    def encode(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        offsets = np.cumsum([0] + [len(encoding) for encoding in encodings], dtype=np.int64)
        ids = np.fromiter((i for encoding in encodings for i in encoding.ids), np.uint32, offsets[-1])
        return ids, offsets

    return encode


class CheckedEncoder:
    """What a part encodes with: fast where possible, compared with the reference on a sample of every batch."""

    def __init__(self, tokenizer_json: str, kind: Literal["auto", "tokenizers"]) -> None:
        self._reference = reference_encoder(tokenizer_json)
        self._fast = fast_encoder(tokenizer_json) if kind == "auto" else None

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Encode; raises BadInput, quoting the text, where the fast encoder's ids are not the reference's."""
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
