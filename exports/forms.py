"""The forms that an export is written in, and the one function that writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Protocol

from exports.compact import Compact
from exports.dense import Dense
from exports.export import Export
from exports.files import CARD, CONFIG, TOKENIZER, TOKENIZER_CONFIG
from exports.onnx import Onnx
from exports.weight_files import INDEX
from sharebert_common.errors import BadInput
from sharebert_common.files import whole_or_absent_folder


class Form(Protocol):
    """One way to lay an export out in a folder. An instance holds the choices of the form, as the dtype."""

    model_type: ClassVar[str]
    """`model_type` in the `config.json` that it writes."""

    def check(self, export: Export) -> None:
        """Raise BadInput where this form cannot hold `export`. Called before anything is written."""

    def write(self, export: Export, folder: Path) -> None:
        """Write all files into the new `folder`."""


FORMS: dict[str, type[Form]] = {"compact": Compact, "dense": Dense, "onnx": Onnx}
"""By their names on the command line. A new form is one file with a class, and its name here."""


WRITTEN = {CONFIG, CARD, TOKENIZER, TOKENIZER_CONFIG, INDEX}
"""Names of files of an export, beside those of weights and code."""


def write_export(export: Export, out: Path, form: Form | None = None) -> None:
    """Write `export` in `form` (compact, if not given), whole or not at all; an export in `out` is replaced.

    Raises BadInput: weights that are not the model's, a tokenizer that does not fit, a form that cannot hold the
    model, `out` holds something else.
    """
    form = form or Compact()
    export.check(str(out))
    form.check(export)
    with new_export(out) as folder:
        form.write(export, folder)


@contextmanager
def new_export(out: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `out` when the block ends; see `whole_or_absent_folder`.

    Raises BadInput where `out` exists and is no export, or holds something else too: that is never deleted.
    """
    out = Path(out)
    if out.exists() and not _replaceable(out):
        raise BadInput(f"{out}: exists and is no export; choose another folder, or remove it first")
    if out.exists() and (other := sorted(filter(_is_foreign, out.iterdir()))):
        raise BadInput(f"{out}: holds {other[0].name} beside an export; choose another folder, or move it first")
    with whole_or_absent_folder(out) as folder:
        yield folder


def _replaceable(out: Path) -> bool:
    """An empty folder, or an export in one of the forms."""
    if not out.is_dir() or not any(out.iterdir()):
        return out.is_dir()
    try:
        kept = json.loads((out / CONFIG).read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return kept in {form.model_type for form in FORMS.values()}


def _is_foreign(entry: Path) -> bool:
    """Whether this is nothing that an export writes, nor Python beside its code."""
    if entry.is_dir():
        return entry.name != "__pycache__"
    return entry.name not in WRITTEN and not entry.name.endswith((".safetensors", ".onnx", ".onnx.data", ".py"))
