"""The recipe of `sharebert prep`."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_prep.filter.clean import CleanRecipe
from data_prep.read.sources import SourceRecipe
from data_prep.tokens.tokenizer import TokenizerRecipe
from sharebert_common.recipe import STRICT


@dataclass(config=STRICT, kw_only=True)
class ShardRecipe:
    """How rows are stored on disk."""

    rows_per_block: int = Field(default=4096, ge=1)
    """Rows of a block, which is one tar member."""
    bytes_per_shard: int = Field(default=256 << 20, ge=1 << 16)
    """About the bytes of a shard; a worker holds one in memory."""


@dataclass(config=STRICT, kw_only=True)
class PrepRecipe:
    """Make a dataset to pretrain on from text."""

    SHORTHAND: ClassVar[dict[str, str]] = {"source": "paths", "tokenizer": "path"}

    output: str
    """Folder of the dataset, on a local or shared disk."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the order of documents and of the choice of validation documents."""
    source: SourceRecipe
    """Where documents come from; a plain value sets source.paths."""
    clean: CleanRecipe = field(default_factory=CleanRecipe)
    """Which documents are changed or left out; none by default."""
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    """The vocabulary; a plain value sets tokenizer.path."""
    seq_len: int = Field(default=128, ge=8, le=65_536)
    """Tokens of a row, with [CLS] and [SEP]."""
    validation: float = Field(default=0.01, ge=0)
    """Size of the validation split: rows if 1 or more, otherwise a fraction of all tokens; rounded up to documents."""
    shards: ShardRecipe = field(default_factory=ShardRecipe)
    """How rows are stored on disk."""
    workers: int | None = Field(default=None, ge=1)
    """Processes on this machine; none: one for each core. It never changes the result."""
