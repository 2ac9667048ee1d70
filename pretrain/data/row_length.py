"""Short rows first: into how many tokens long pieces the rows of the dataset are cut, over the course of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT


@dataclass(config=STRICT, kw_only=True)
class RowLengthRecipe:
    """Short rows first: each row of the dataset is cut into equal pieces, until rows become whole. A step has the same
    rows, tokens and masks as without it, but a token attends to its own piece alone, and positions begin at 0 in each
    piece."""

    first: PositiveInt | None = None
    """Tokens of a piece at the start; the length of the dataset's rows must be a multiple of it. None: rows are whole
    from the start. (Staged training of Press, Smith and Lewis, "Shortformer: Better Language Modeling using Shorter
    Inputs", ACL 2021; Devlin et al., "BERT", NAACL 2019, made 9 of 10 steps with 128 of 512 tokens.)"""
    whole_from: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Fraction of the run after which rows are whole."""
    growth: Literal["double", "jump"] = "double"
    """How the pieces grow until then: `double` their length, each length for the same number of steps; or `jump` from
    the first length to whole rows."""

    def check(self, seq_len: int) -> None:
        """Raise BadInput where rows of `seq_len` tokens cannot be cut like this."""
        if self.first is None:
            return
        pieces, rest = divmod(seq_len, self.first)
        if rest or (self.growth == "double" and pieces & (pieces - 1)):
            wanted = "a power of two" if self.growth == "double" else "a whole number"
            raise BadInput(
                f"data.row_length.first: {self.first}, but the dataset's rows have {seq_len} tokens; their number of "
                f"pieces must be {wanted} (data.row_length.growth is {self.growth}); with data.row_length.first=null "
                "rows are whole"
            )

    def at(self, done: float, seq_len: int) -> int:
        """Tokens of a piece after the fraction `done` of the run, of rows of `seq_len` tokens."""
        if self.first is None or done >= self.whole_from:
            return seq_len
        short = (seq_len // self.first).bit_length() - 1 if self.growth == "double" else 1
        return min(seq_len, self.first * 2 ** int(done / self.whole_from * short))

    def mean(self, steps: int, seq_len: int) -> float:
        """The mean of `at` over all steps of a run."""
        if self.first is None:
            return seq_len
        return sum(self.at(step / steps, seq_len) for step in range(steps)) / steps
