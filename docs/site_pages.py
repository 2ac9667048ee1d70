"""Hooks of MkDocs: pages of the root folder join the site, and links into the code become plain names.

On GitHub the same links work as they are, so that every page exists once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File of the root folder → page of the site."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def rewritten(text: str, folder: Path) -> str:
    """A page whose links lead to pages of the site; a link to anything else in the project is its text alone.

    Args:
        text: Markdown.
        folder: that the links are relative to.
    """

    def link(match: re.Match[str]) -> str:
        mark, title, target = match.groups()
        path, _, anchor = target.partition("#")
        if re.match(r"https?:|mailto:", target) or not path:
            return match[0]
        file = (folder / path).resolve()
        if file.is_relative_to(DOCS) and file != DOCS:
            page = file.relative_to(DOCS).as_posix()
        elif file.parent == ROOT and file.name in FROM_ROOT:
            page = FROM_ROOT[file.name]
        else:
            return title
        return f"{mark}[{title}]({page}{'#' + anchor if anchor else ''})"

    return LINK.sub(link, text)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the root folder."""
    from mkdocs.structure.files import File

    for name, page in FROM_ROOT.items():
        text = rewritten((ROOT / name).read_text(encoding="utf-8"), ROOT)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page of docs/; those of the root folder were rewritten when they were added.

    A fence keeps its language alone: format.md names its test vectors behind it, and Python-Markdown takes that for no
    fence.
    """
    text = rewritten(markdown, DOCS) if (DOCS / page.file.src_uri).exists() else markdown
    return re.sub(r"(?m)^(```\w+) .*$", r"\1", text)
