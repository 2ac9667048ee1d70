"""The words of a text for n-grams: the same text gives the same words, whatever its typography.

Words are runs of letters, digits and marks, whatever their case: "STRASSE" is "straße". Everything else separates them:
spaces of all kinds (no-break and zero-width ones too), quotes and dashes of all kinds, other punctuation, symbols.
Full-width letters, ligatures and other compatibility forms count as the letters that they stand for. Composed and
decomposed accents are the same. Characters that only control the layout (soft hyphens, joiners, variation selectors)
are left out. A word that a soft hyphen breaks at the end of a line is one word. In scripts without spaces between
words, each character is a word: Han, Japanese, Thai, Lao, Khmer, Burmese and similar ones.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_SPACE = 0x20
_PIECE_CHARS = 1 << 18  # arrays take 6 bytes a character: they stay small for a document of any size
_SEPARATORS = bytes(b if b >= 0x80 or chr(b).isalnum() else _SPACE for b in range(256))

LETTER, SEPARATOR, ALONE, REMOVED, COMPATIBILITY = range(5)
"""Classes of characters: part of a word, between words, a word of its own, left out, written as other characters."""

_SEPARATING_LETTERS = [*range(0x2B9, 0x2C0), 0x2C8, 0x2CA, 0x2CB, 0x2EE, 0xA78B, 0xA78C]
"""Letters by their category that texts use as apostrophes, primes and quotes."""

_LEFT_OUT = [(0x34F, 0x34F), (0x640, 0x640), (0x180B, 0x180F), (0x20DD, 0x20E4), (0xFE00, 0xFE0F), (0xE0000, 0xE0FFF)]
"""Left out, like the characters of category Cf: the Arabic tatweel, enclosing marks, variation selectors, tags."""

_ALONE = [
    (0x0E01, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A00, 0x1A1F),  # Buginese
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),
    (0x3021, 0x30FF),  # Han numerals, Hiragana, Katakana
    (0x3100, 0x312F),  # Bopomofo
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9DF),  # Javanese
    (0xA9E0, 0xA9FF),  # Myanmar
    (0xAA60, 0xAA7F),
    (0xAA80, 0xAADF),  # Tai Viet
    (0xF900, 0xFAFF),
    (0x11700, 0x1174F),  # Ahom
    (0x16FE0, 0x18DFF),  # Tangut, Khitan
    (0x1AFF0, 0x1B16F),  # kana
    (0x1B170, 0x1B2FF),  # Nushu
    (0x20000, 0x3FFFF),  # Han
]
_SOFT_HYPHEN = "\u00ad"
_BROKEN_WORD = re.compile(rf"{_SOFT_HYPHEN}[ \t]*[\n\r\x85\u2028\u2029]\s*")  # a word that goes on in the next line
_ZERO_WIDTH_SPACE = 0x200B  # it marks the end of a word, unlike the others of category Cf


def words(text: str) -> bytes:
    """The words of a text in UTF-8, with one or more ASCII spaces between them."""
    if text.isascii():
        return text.lower().encode().translate(_SEPARATORS)  # in ASCII, lower case is what casefold gives
    if _SOFT_HYPHEN in text:
        text = _BROKEN_WORD.sub("", text)
    return b" ".join(_folded(piece).encode().translate(_SEPARATORS) for piece in _pieces(text))


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces, cut at spaces where there are any."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        stop = text.rfind(" ", start, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _folded(text: str) -> str:
    text = _caseless(text)
    codes, high, classes = _above_ascii(text)
    if (classes == COMPATIBILITY).any():
        for code in np.unique(high[classes == COMPATIBILITY]).tolist():
            text = text.replace(chr(code), unicodedata.normalize("NFKC", chr(code)))
        text = _caseless(text)
        codes, high, classes = _above_ascii(text)
    if (classes == ALONE).any():
        return _with_characters_alone(codes)
    # Few different ones: `replace` searches at the speed of memory, an array of all characters takes twice the time.
    for code in np.unique(high[classes == SEPARATOR]).tolist():
        text = text.replace(chr(code), " ")
    for code in np.unique(high[classes == REMOVED]).tolist():
        text = text.replace(chr(code), "")
    return text


def _caseless(text: str) -> str:
    """The text without differences of case, composed. To fold case takes some composed characters apart."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _with_characters_alone(codes: NDArray[np.uint32]) -> str:
    """The text of these code points with a space before and after each character that is a word of its own."""
    classes = _classes()[codes]
    codes = np.where(classes == SEPARATOR, np.uint32(_SPACE), codes)
    copies = np.where(classes == ALONE, 3, 1)
    places = (np.cumsum(copies) - copies)[classes == ALONE]
    codes, classes = np.repeat(codes, copies), np.repeat(classes, copies)
    codes[places] = codes[places + 2] = _SPACE
    return codes[classes != REMOVED].tobytes().decode("utf-32-le", "surrogatepass")


def _above_ascii(text: str) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint8]]:
    """All code points of a text, those above ASCII, and the classes of these."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    high = codes[codes >= 0x80]
    return codes, high, _classes()[high]


@lru_cache(maxsize=1)
def _classes() -> NDArray[np.uint8]:
    """The class of every code point. It takes 30 ms, so it is made for the first text that is not ASCII."""
    classes = np.full(0x110000, LETTER, np.uint8)
    for first, last in _ALONE:
        classes[first : last + 1] = ALONE
    for code in (*range(0x20000), *range(0x2F800, 0x2FA20)):
        char = chr(code)
        category = unicodedata.category(char)
        form = unicodedata.normalize("NFKC", char)
        if category == "Cf" and code != _ZERO_WIDTH_SPACE:
            classes[code] = REMOVED
        elif form != char and ("M" in unicodedata.category(form[0]) or any(map(str.isalnum, form))):
            classes[code] = COMPATIBILITY
        elif category[0] in "PSZ" or category in ("Cc", "Cf"):
            classes[code] = SEPARATOR
    classes[_SEPARATING_LETTERS] = SEPARATOR
    for first, last in _LEFT_OUT:
        classes[first : last + 1] = REMOVED
    return classes
