"""A cache of its own for the code that transformers copies out of an export."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def remote_code_cache(folder: Path) -> Iterator[None]:
    """transformers keeps remote code in `folder` inside the block, and forgets the code of other caches."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(str(folder))
        yield
    forget()
