"""The docs point at what exists: links, anchors, files, and the names of code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "docs").glob("*.md"))]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PLACE = re.compile(r"([\w./*-]+\.py):([\w.]+)")
FOLDERS = {folder.name for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")} - {"out"}


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def names_in(file: Path) -> set[str]:
    """Dotted names of what a file defines: `Class`, `Class.method`, `function`, `CONSTANT`."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            match node:
                case ast.ClassDef(name=name, body=body):
                    found.add(prefix + name)
                    visit(body, f"{prefix}{name}.")
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    found.add(prefix + name)
                case ast.Assign(targets=targets):
                    found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))
                case ast.AnnAssign(target=ast.Name(id=name)):
                    found.add(prefix + name)

    visit(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return found


def problems(page: Path) -> list[str]:
    """What a page names that is not there."""
    text, found = prose(page), []
    for target in LINK.findall(text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists():
            found.append(f"link {target}")
        elif anchor and anchor not in anchors(linked):
            found.append(f"anchor {target}")
    for code in CODE.findall(text):
        place = PLACE.fullmatch(code)
        path = place[1] if place else code
        if "/" not in path or path.split("/")[0] not in FOLDERS or not re.fullmatch(r"[\w./*-]+", path):
            continue
        files = list(ROOT.glob(path.rstrip("/")))
        if not files:
            found.append(f"file {code}")
        elif place and place[2] not in names_in(files[0]):
            found.append(f"name {code}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    assert not problems(page)


def test_what_does_not_exist_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Here it is\n[a](nowhere.md) [b](#here-it-is) [c](#there)\n"
        "`pretrain/train.py:Trainer.loop` `pretrain/train.py:Trainer.fly` `pretrain/nothing.py` `configs/*.yaml`\n"
        "```\n`pretrain/never.py`\n```\n"
    )
    assert problems(page) == [
        "link nowhere.md",
        "anchor #there",
        "name pretrain/train.py:Trainer.fly",
        "file pretrain/nothing.py",
    ]


def test_every_folder_is_on_the_map() -> None:
    """The docstring of a package names each of its files and folders."""
    for init in sorted(ROOT.glob("*/**/__init__.py")):
        package = init.parent
        if package.relative_to(ROOT).parts[0] in ("tests", "out", "build") or "site-packages" in init.parts:
            continue
        text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        assert text, init
        for path in package.iterdir():
            if path.suffix == ".py" and path.stem.strip("_") not in ("init", "main"):
                assert re.search(rf"\b{path.stem}\b", text.replace("kernels_triton_*", " ".join(TRITON))), path
            elif path.is_dir() and (path / "__init__.py").exists():
                assert re.search(rf"\b{path.name}\b", text), path


TRITON = [path.stem for path in (ROOT / "sharebert").glob("kernels_triton_*.py")]
