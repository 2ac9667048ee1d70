"""Packed tensors whose parts do not fit together are refused by name, also where the rest could be read."""

from __future__ import annotations

import pytest
import torch

from sharebert.config import ShareBertError
from sharebert.packed import code, decode, pack_bits, unpack_all, unpack_bits

CODES = torch.arange(21) % 8


def test_a_byte_too_many_is_refused() -> None:
    longer = torch.cat((pack_bits(CODES, 3), torch.zeros(1, dtype=torch.uint8)))
    with pytest.raises(ShareBertError, match="9 bytes of codes in place of 8"):
        unpack_bits(longer, 3, 21)


def test_coded_numbers_of_another_count_are_refused() -> None:
    with pytest.raises(ShareBertError, match="11 bytes of decoded codes in place of 10"):
        decode(code(CODES, 3), 3, 19)


def test_a_rotation_that_is_missing_is_named() -> None:
    with pytest.raises(ShareBertError, match=r"packing\.rotation"):
        unpack_all({"tensors": {}, "rotated": True}, {})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scheme", "log2", r"w: packing\.scheme: must be one of symmetric, asymmetric, midpoint \(got 'log2'\)"),
        ("bits", 16, r"w: packing\.bits: must be a whole number, 2 to 8 \(got 16\)"),
        ("bits", "4", r"w: packing\.bits: must be a whole number"),
        ("group", -2, r"w: packing\.group: must be a whole number, -1 or more"),
        ("codebook", [1, 2], "w: packing has the keys .*codebook, which this version does not read"),
    ],
)
def test_a_packing_that_is_not_known_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ShareBertError, match=message):
        unpack_all({"tensors": {"w": {"shape": [3, 7], "bits": 4, key: value}}}, {})
