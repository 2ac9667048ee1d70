"""The docs build as a site, from the same files that GitHub shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from docs.site_pages import DOCS, ROOT, rewritten


def test_links_lead_to_pages_of_the_site() -> None:
    text = (
        "[a](docs/data.md) [b](docs/format.md#masks) ![c](docs/images/model.svg) [d](CHANGELOG.md) "
        "[e](pretrain/train.py) [f](https://x.org/y) [g](#here) [h](docs)"
    )
    assert rewritten(text, ROOT) == (
        "[a](data.md) [b](format.md#masks) ![c](images/model.svg) [d](changelog.md) e [f](https://x.org/y) [g](#here) h"
    )
    assert rewritten("[r](../README.md) [m](model.md)", DOCS) == "[r](index.md) [m](model.md)"


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in DOCS.glob("*.md")} | {"contributing", "changelog"}
    for page in pages:
        html = (tmp_path / page / "index.html").read_text(encoding="utf-8")
        assert "```" not in re.sub(r"<code.*?</code>", "", html, flags=re.S), page
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{page}/"' in start for page in pages), "a page is missing in the navigation"
    assert (tmp_path / "images" / "way-of-a-row.svg").exists()
    assert not list(tmp_path.glob("*.py"))
