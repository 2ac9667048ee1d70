"""The step `quantise`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compress.quantise.awq import column_factors
from compress.quantise.hessians import Statistics, collect, of_embedding, of_projection
from compress.quantise.rounding import gptq, searched
from compress.source import pad_id
from compress.step import FromCompact, Source, Tools
from exports.compact import stored_weights
from exports.export import Export
from exports.forms import write_export
from exports.packed import Packed, bits_of, is_matrix
from exports.read import load_model, read_export
from exports.rounding import Rounded, to_nearest
from exports.weight_source import TensorWeights, all_tensors, whole
from sharebert.config import ShareBertConfig
from sharebert.heads import ShareBertForMaskedLM
from sharebert.packed import ROTATED, ROTATION, Packing, stored, unpack
from sharebert.stored import full_tensors
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

EMBEDDING, PROJECTION = ROTATED


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Quantise(FromCompact):
    """Store the factors in a few bits a number, and all vectors in 16 or 8; products are as before."""

    NAME = "quantise"

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    """Bits of a number of E, and of an untied head's matrices."""
    small_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    """Bits of the small matrices: W_all, factor_linear and a tied head's; none: as `bits`. They are a few percent of
    the numbers, and do much of the damage at few bits."""
    scheme: Literal["symmetric", "asymmetric", "midpoint"] = "asymmetric"
    """How a range becomes codes; see sharebert/packed.py."""
    group: Annotated[int, Field(ge=-1)] = 0
    """Neighbours of a row that share a scale; 0: a whole row; -1: the whole matrix."""
    vectors: Literal[8, 16] = 16
    """Bits of biases, norms and position embeddings."""
    rounding: Literal["nearest", "search", "gptq"] = "search"
    """nearest; search: the range of each group with the least error; gptq: also move each error into later columns, by
    what calibration rows say."""
    centre: bool = False
    """Subtract the mean row of E before rounding, and add it again at the load: rows of E have much in common."""
    frequent: Annotated[int, Field(ge=0)] = 0
    """Keep 8 bits for the rows of E of so many words, those that are most frequent in the calibration rows."""
    rotate: bool = False
    """Rotate the columns of E and W_all before rounding, which spreads large numbers over all columns."""
    awq: bool = False
    """Multiply the columns of E and W_all by factors before rounding, found on calibration rows, so that columns that
    matter most are rounded finest. Not with `rotate`, nor with `rounding: gptq`."""
    coded: bool = False
    """Compress the codes by Huffman's code."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return self.rounding == "gptq" or self.awq or self.frequent > 0

    def check_config(self, config: ShareBertConfig) -> None:
        """See `FromCompact.check_config`."""
        if self.awq and (self.rotate or self.rounding == "gptq"):
            raise BadInput("quantise.awq: not with rotate, nor with rounding: gptq, which weigh errors themselves")
        if self.awq and config.sharing != "veps":
            raise BadInput("quantise.awq: takes a model with sharing: veps")
        if config.altered and (self.awq or self.rounding == "gptq"):
            raise BadInput(
                "quantise: awq and rounding: gptq take no model with fewer heads, columns or factors, nor with "
                "ffn_pairs; use search"
            )
        if self.rotate and config.sharing != "veps":
            raise BadInput(
                f"quantise.rotate: needs W_all to rotate along with E, and sharing: {config.sharing} has none"
            )
        if self.rounding == "gptq" and config.sharing != "veps":
            raise BadInput(f"quantise.rounding: gptq is for sharing: veps, this model has {config.sharing}; use search")

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        export = read_export(source.folder)
        kept = stored_weights(export)
        tensors = {name: whole(kept, name).float() for name in kept.specs}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise BadInput(f"{source.folder}: {name} has numbers that are infinite or NaN; it cannot be quantised")
        model = load_model(source.folder)
        tokens = tools.calibration() if self.needs_calibration else torch.zeros(0, 0, dtype=torch.int64)
        real = tokens != pad_id(source.folder)
        statistics = collect(model, tokens, real) if self.rounding == "gptq" or self.awq else None
        packings = {name: self.packing_of(name, tensor) for name, tensor in tensors.items()}
        parts: dict[str, Tensor] = {}
        back = None
        if self.rotate:
            rotation = random_rotation(export.config.factor_size, tools.seed)
            parts[ROTATION] = rotation.half()
            back = parts[ROTATION].float().t()  # what a loader multiplies by; its inverse makes the stored factors
            for name in ROTATED:
                tensors[name] = torch.linalg.solve(back.double(), tensors[name].double(), left=False).float()
        values = dict(tensors)
        errors: dict[str, float] = {}
        for name, packing in packings.items():
            if packing is None:
                continue
            matrix = tensors[name].view(packing.matrix)
            further: dict[str, Tensor] = {}
            if packing.centred:
                further[f"{name}.mean"] = matrix.mean(0).half()
                matrix = matrix - further[f"{name}.mean"].float()
            unscaled = matrix
            if packing.scaled:
                assert statistics is not None
                columns = column_factors(matrix, packing, error_costs(name, len(matrix), model, statistics, values))
                further[f"{name}.columns"] = columns
                matrix = matrix / columns.float()
            rounded = self.round(name, matrix, packing, model, statistics, back, values)
            check_scales(name, rounded, source.folder)
            codes = rounded.codes
            if packing.exact:
                rows = frequent_rows(tokens[real], packing.shape[0], packing.exact)
                codes[rows] = packing.zero  # nobody reads them, and equal codes are short ones
                exact = to_nearest(unscaled[rows], packing.of_exact)
                check_scales(name, exact, source.folder)
                further[f"{name}.exact_rows"] = rows.to(torch.int32)
                further |= stored(f"{name}.exact", packing.of_exact, exact.codes, exact.scales, exact.offsets)
            parts |= further | stored(name, packing, codes, rounded.scales, rounded.offsets)
            values[name] = unpack(name, packing, parts)
            errors[name] = float((values[name] - tensors[name]).norm() / tensors[name].norm().clamp(min=1e-12))
        form = Packed(
            dtype=None,
            packings={name: packing for name, packing in packings.items() if packing is not None},
            parts=parts,
        )
        halves = {name: tensor.half() for name, tensor in tensors.items() if packings[name] is None}
        for name, half in halves.items():
            if not half.isfinite().all():
                raise BadInput(f"{source.folder}: {name} has numbers above the range of float16; use vectors: 8")
        write_export(with_tensors(export, halves), out, form)
        return {f"relative error of {name}": errors[name] for name in errors if is_matrix(name)}

    def packing_of(self, name: str, tensor: Tensor) -> Packing | None:
        """How a tensor is packed; None where it is stored in 16 bits."""
        shape = tuple(tensor.shape)
        if is_matrix(name):
            exact, centre = (min(self.frequent, shape[0]), self.centre) if name == EMBEDDING else (0, False)
            bits = bits_of(name, shape, self.bits, self.small_bits)
            return Packing(
                shape, bits, self.scheme, self.group, self.coded, centre, exact, self.awq and name in ROTATED
            )
        if self.vectors == 16:
            return None
        return Packing(shape, 8, "asymmetric", 0, False)

    def round(
        self,
        name: str,
        matrix: Tensor,
        packing: Packing,
        model: ShareBertForMaskedLM,
        statistics: Statistics | None,
        back: Tensor | None,
        values: dict[str, Tensor],
    ) -> Rounded:
        """A matrix as codes. `values` are all tensors as they stand: W_all is rounded for an E that is rounded."""
        keep = None if self.rounding == "nearest" or not is_matrix(name) else searched(matrix, packing)
        if statistics is None or name not in ROTATED or self.rounding != "gptq":
            return to_nearest(matrix, packing, keep)
        turn = torch.eye(matrix.shape[1]) if back is None else back
        if name == EMBEDDING:
            plain = of_embedding(model, statistics, full_projection(model, values[PROJECTION], turn))
            return gptq(matrix, packing, lambda rows: turn @ plain(rows) @ turn.t(), keep, rows_at_once=256)
        missing = model.config.hidden_size - len(matrix)
        plain = of_projection(model, statistics, values[EMBEDDING] @ turn)

        def some_rows(rows: slice) -> Tensor:
            return turn @ plain(slice(rows.start + missing, rows.stop + missing)) @ turn.t()

        return gptq(matrix, packing, some_rows, keep, rows_at_once=256)


def check_scales(name: str, rounded: Rounded, folder: Path) -> None:
    """Raise BadInput where scales or offsets are above the range of float16, in which they are stored."""
    for part in (rounded.scales, rounded.offsets):
        if part is not None and not part.isfinite().all():
            raise BadInput(
                f"{folder}: {name} has numbers so large that its scales leave the range of float16; it cannot be "
                "quantised"
            )


def error_costs(
    name: str, rows: int, model: ShareBertForMaskedLM, statistics: Statistics, values: dict[str, Tensor]
) -> Tensor:
    """What a squared error of each element of E or W_all costs, [rows, F]: the diagonals of its Hessians."""
    skipped = 0
    if name == EMBEDDING:
        turn = torch.eye(values[PROJECTION].shape[1])
        hessians = of_embedding(model, statistics, full_projection(model, values[PROJECTION], turn))
    else:
        hessians = of_projection(model, statistics, values[EMBEDDING])
        skipped = model.config.hidden_size - rows  # a trimmed export stores the last rows alone
    ends = range(0, rows, 256)
    some = (slice(skipped + first, skipped + min(first + 256, rows)) for first in ends)
    return torch.cat([hessians(part).diagonal(dim1=1, dim2=2) for part in some])


def frequent_rows(tokens: Tensor, words: int, count: int) -> Tensor:
    """The `count` most frequent of `tokens` [N], ascending; among equals those with the lowest id."""
    counts = torch.bincount(tokens, minlength=words)
    return torch.sort(counts, descending=True, stable=True).indices[:count].sort().values


def full_projection(model: ShareBertForMaskedLM, projection: Tensor, turn: Tensor) -> Tensor:
    """W_all [H, F] before the rotation, with zeros where rows are not stored."""
    full = torch.zeros(model.config.hidden_size, projection.shape[1])
    full[len(full) - len(projection) :] = projection @ turn
    return full


def random_rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix [size, size]."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def with_tensors(export: Export, tensors: dict[str, Tensor]) -> Export:
    """The export with some tensors in place of its own, given as a trimmed export stores them."""
    own = all_tensors(export.weights)
    full = full_tensors({name: tensor.shape for name, tensor in own.items() if name in tensors}, tensors)
    return dataclasses.replace(export, weights=TensorWeights(own | full))
