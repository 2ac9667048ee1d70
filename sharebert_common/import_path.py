"""Where Python finds this project's packages: never in a folder that happens to have the same name.

`python -m MODULE` looks into the working directory first. A folder `sharebert` or `scoring` there (the clone seen from
its parent, for instance) would hide the package of that name.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The folder that holds this project's packages: a checkout, or site-packages."""


def leave_working_directory() -> None:
    """Import nothing more from the working directory, unless this project lies there. Like `python -P` (3.11)."""
    here = Path.cwd()
    if sys.path and Path(sys.path[0] or ".") == here and here != ROOT:
        del sys.path[0]
