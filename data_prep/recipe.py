"""The recipe of `sharebert prep`."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_prep.filter.clean import CleanConfig
from data_prep.read.sources import SourceConfig
from data_prep.tokens.tokenizer import TokenizerConfig
from sharebert_common.recipe import STRICT


@dataclass(config=STRICT, kw_only=True)
class ShardConfig:
    """How rows lie on disk."""

    rows_per_block: int = Field(default=4096, ge=1)
    """Rows of one tar member."""
    bytes_per_shard: int = Field(default=256 << 20, ge=1 << 16)
    """About the size of a shard; a worker holds one in memory."""


@dataclass(config=STRICT, kw_only=True)
class PrepRecipe:
    """Text → a dataset to pretrain on."""

    SHORTHAND: ClassVar[dict[str, str]] = {"source": "paths", "tokenizer": "path"}

    output: str
    """Folder of the dataset."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the order of documents and the choice of those that validate."""
    source: SourceConfig
    """Where documents come from; a plain value means source.paths."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """Which documents are changed or left out; nothing by default."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The vocabulary; a plain value means tokenizer.path."""
    seq_len: int = Field(default=128, ge=8, le=65_536)
    """Tokens of a row, [CLS] and [SEP] included."""
    validation: float = Field(default=0.01, ge=0)
    """Held-out documents: rows if 1 or more, else the fraction of all tokens. Whole documents, so at least that."""
    shards: ShardConfig = field(default_factory=ShardConfig)
    """How rows lie on disk."""
    workers: int | None = Field(default=None, ge=1)
    """Processes on this machine; none: one a core. Never changes the result."""
