"""Tensors as few bits a number: how an export stores them, and how they become numbers again when it is loaded.

A packed tensor `name` [rows, columns] is stored as

    name.codes      uint8, the codes q of all elements, row by row
    name.scales     float16 [rows, groups] or [1, 1], the step s of each group
    name.offsets    float16, of the same shape, o; only where the scheme has them

and stands for w = (q - zero)·s + o. A group is `group` neighbours of a row (the last one may be shorter), a whole row
(0), or the whole tensor (-1). The schemes, for b bits:

    symmetric    s = max|w| / (2^(b-1) - 1), zero = 2^(b-1), no offset
    asymmetric   s = (max - min) / (2^b - 1), zero = 0, o = min
    midpoint     s = (max - min) / 2^b, zero = 2^(b-1), o = (max + min) / 2

    name.mean              float16 [columns], what is added to every row; only where `centred`
    name.columns           float16 [columns], the factor by which each column of those numbers is multiplied; only
                           where `scaled`, before the mean is added
    name.exact_rows        int32 [k], rows that are stored again, asymmetric in 8 bits with a scale a row, as
    name.exact.codes, name.exact.scales and name.exact.offsets; these count

Codes of b bits lie one after the other, the lowest bit first, without gaps. `coded`: they are compressed by Deflate's
Huffman code instead, as many codes a byte as fit; most codes are near the middle, so that this saves up to a fifth.

`config.json` says in `packing` how each tensor is packed. Where it says `rotated`, E and W_all are stored as E·R and
W_all·R with the tensor `packing.rotation` R [F, F], which leaves E·W_allᵀ as it is: R is orthogonal.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import ShareBertError

SCHEMES = ("symmetric", "asymmetric", "midpoint")

PARTS = (
    *("codes", "scales", "offsets", "mean", "columns", "exact_rows"),
    *("exact.codes", "exact.scales", "exact.offsets"),
)
"""What the name of a packed tensor is followed by."""

ROTATION = "packing.rotation"

ROTATED = ("sharebert.word_embeddings.weight", "sharebert.factor_linear_all.weight")


class Packing(NamedTuple):
    """How one tensor is packed: its entry in `config.json`."""

    shape: tuple[int, ...]
    bits: int
    scheme: str = "asymmetric"
    group: int = 0
    """Neighbours of a row that share a scale; 0: a whole row; -1: the whole tensor."""
    coded: bool = False
    centred: bool = False
    """The mean row was subtracted before rounding."""
    exact: int = 0
    """Rows that are stored in 8 bits instead."""
    scaled: bool = False
    """Columns were divided by factors before rounding, so that those that matter most are rounded finest."""

    @property
    def of_exact(self) -> Packing:
        """How those rows are packed."""
        return Packing((self.exact, self.matrix[1]), 8)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; a vector is one row."""
        rows = 1 if len(self.shape) == 1 else self.shape[0]
        return rows, torch.Size(self.shape).numel() // max(1, rows)

    @property
    def groups(self) -> tuple[int, int]:
        """Shape of the scales."""
        rows, columns = self.matrix
        if self.group < 0:
            return 1, 1
        return rows, -(-columns // self.group) if self.group else 1

    def spread(self, of_groups: Tensor) -> Tensor:
        """A value a group as a value an element, [rows, columns]."""
        rows, columns = self.matrix
        if self.group > 0:
            return of_groups[:, torch.arange(columns, device=of_groups.device) // self.group]
        return of_groups.expand(rows, columns)

    @property
    def zero(self) -> int:
        """The code that stands for the offset."""
        return 0 if self.scheme == "asymmetric" else 2 ** (self.bits - 1)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits as a dense stream of bits, uint8, the lowest bit of each first."""
    flat = codes.reshape(-1).to(torch.uint8)
    stream = ((flat[:, None] >> torch.arange(bits, dtype=torch.uint8)) & 1).reshape(-1)
    padded = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes in a stream that `pack_bits` made, uint8 [count]. Raises ShareBertError for another size."""
    if len(packed) != -(-count * bits // 8):
        raise ShareBertError(f"{len(packed)} bytes of codes in place of {-(-count * bits // 8)}")
    stream = ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1)[: count * bits]
    return (stream.view(count, bits) << torch.arange(bits, dtype=torch.uint8)).sum(1).to(torch.uint8)


def code(codes: Tensor, bits: int) -> Tensor:
    """Codes compressed by Huffman's code, uint8: as many codes as fit are one symbol."""
    together = max(1, 8 // bits)
    flat = codes.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % together)).view(-1, together)
    symbols = (padded << (bits * torch.arange(together, dtype=torch.uint8))).sum(1).to(torch.uint8)
    packer = zlib.compressobj(9, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    data = packer.compress(symbols.numpy().tobytes()) + packer.flush()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def decode(data: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes in what `code` made, uint8 [count]. Raises ShareBertError for damaged data."""
    together = max(1, 8 // bits)
    try:
        symbols = torch.frombuffer(bytearray(zlib.decompress(data.numpy().tobytes(), wbits=-15)), dtype=torch.uint8)
    except zlib.error as error:
        raise ShareBertError(f"damaged codes ({error})") from error
    if len(symbols) != -(-count // together):
        raise ShareBertError(f"{len(symbols)} bytes of decoded codes in place of {-(-count // together)}")
    parts = (symbols[:, None] >> (bits * torch.arange(together, dtype=torch.uint8))) & (2**bits - 1)
    return parts.reshape(-1)[:count]


def stored(name: str, packing: Packing, codes: Tensor, scales: Tensor, offsets: Tensor | None) -> dict[str, Tensor]:
    """The tensors that a file holds of a packed tensor."""
    pack = code if packing.coded else pack_bits
    found = {f"{name}.codes": pack(codes, packing.bits), f"{name}.scales": scales.half()}
    return found if offsets is None else found | {f"{name}.offsets": offsets.half()}


def unpack(name: str, packing: Packing, tensors: Mapping[str, Tensor]) -> Tensor:
    """A packed tensor in float32, of its own shape.

    Raises ShareBertError, naming the tensor: something is missing, of another size, or damaged.
    """
    count = torch.Size(packing.shape).numel()
    try:
        data, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
        offsets = None if packing.scheme == "symmetric" else tensors[f"{name}.offsets"]
        codes = (decode if packing.coded else unpack_bits)(data, packing.bits, count)
        values = (codes.view(packing.matrix).float() - packing.zero) * packing.spread(
            scales.view(packing.groups).float()
        )
        if offsets is not None:
            values += packing.spread(offsets.view(packing.groups).float())
        if packing.scaled:
            values *= tensors[f"{name}.columns"].float()
        if packing.exact:
            values[tensors[f"{name}.exact_rows"].long()] = unpack(f"{name}.exact", packing.of_exact, tensors)
        if packing.centred:
            values += tensors[f"{name}.mean"].float()
    except (KeyError, IndexError, RuntimeError, ShareBertError) as error:
        raise ShareBertError(f"{name}: not the packed tensor that config.json describes ({error})") from error
    return values.view(packing.shape)


def packing_of(name: str, given: Mapping[str, Any]) -> Packing:
    """The packing of a tensor from its entry in `config.json`.

    Raises ShareBertError, naming the tensor: a scheme, a number of bits or a key that this version does not know.
    """
    unknown = sorted(given.keys() - set(Packing._fields))
    if unknown or not {"shape", "bits"} <= given.keys():
        raise ShareBertError(f"{name}: packing has the keys {', '.join(given)}, which this version does not read")
    packing = Packing(**{**given, "shape": tuple(given["shape"])})
    if packing.scheme not in SCHEMES:
        raise ShareBertError(f"{name}: packing.scheme: must be one of {', '.join(SCHEMES)} (got {packing.scheme!r})")
    numbers = {"bits": (packing.bits, 2), "group": (packing.group, -1), "exact": (packing.exact, 0)}
    for key, (value, least) in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least or (key == "bits" and value > 8):
            most = " to 8" if key == "bits" else " or more"
            raise ShareBertError(f"{name}: packing.{key}: must be a whole number, {least}{most} (got {value!r})")
    return packing


def unpack_all(packing: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of an export as they were before packing, in float32; those that are not packed are kept.

    Args:
        packing: the value of `packing` in `config.json`: {"tensors": {name: fields of `Packing`}, "rotated": bool}.
        tensors: what the files hold.

    Raises ShareBertError: see `unpack`.
    """
    entries = {name: packing_of(name, given) for name, given in packing["tensors"].items()}
    parts = {f"{name}.{part}" for name in entries for part in PARTS}
    full = {name: tensor.float() for name, tensor in tensors.items() if name not in parts and name != ROTATION}
    for name, entry in entries.items():
        full[name] = unpack(name, entry, tensors)
    if packing.get("rotated"):
        if ROTATION not in tensors:
            raise ShareBertError(f"{ROTATION}: config.json says that the tensors are rotated, but the file lacks it")
        back = tensors[ROTATION].float().t()
        for name in ROTATED:
            full[name] = full[name] @ back
    return full
