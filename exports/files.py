"""The files of an export, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

CONFIG, TOKENIZER, TOKENIZER_CONFIG, CARD = "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write `values` as indented JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
