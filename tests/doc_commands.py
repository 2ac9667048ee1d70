"""The commands, Python blocks and recipes that the docs show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md") if (ROOT / name).exists()),
    *sorted(ROOT.glob("*/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]

FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", flags=re.M | re.S)
PROGRAMS = ("sharebert", "torchrun", "python", "make", "pip", "tensorboard", "sbatch", "srun", "docker", "apptainer")
STARTS = re.compile(rf"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)}) ")
REMARK = re.compile(r" {3,}(?![ -]).*$|\s#\s.*$")


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    page: str
    language: str
    """Of the fence; empty without one."""
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """All blocks of a page, fenced or indented by four columns."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    for language, block in FENCED.findall(text):
        yield Block(name, language, block)
    rest = FENCED.sub("\n", text)
    for block in re.findall(r"(?:^ {4}[^\n]+\n|^\n(?= {4}))+", rest, flags=re.M):
        yield Block(name, "", re.sub(r"^ {4}", "", block, flags=re.M).lstrip("\n"))


def commands(block: Block) -> list[str]:
    """The command lines of a block, without prompts, remarks and variables of the environment.

    A remark stands after `#`, or after three spaces. A line that ends with a backslash goes on in the next.
    """
    lines = block.text.replace("\\\n", " ").splitlines()
    found = [
        REMARK.sub("", re.sub(r" {2,}(?=\S+=|--)", " ", line.strip())) for line in lines if STARTS.match(line.strip())
    ]
    return [re.sub(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?", "", line).strip() for line in found]


def all_blocks() -> list[Block]:
    """The blocks of all pages."""
    return [block for page in PAGES for block in blocks(page)]
