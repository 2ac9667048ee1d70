"""A page of headings, tables and plots, as one HTML file that needs no network, or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 0 12px 40px; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 3px 12px 3px 0; border-bottom: 1px solid #eee; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 4em; }
td:first-child { overflow-wrap: normal; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 8px; }
svg { width: 100%; height: auto; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading of a part."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; cells are shown as their `str`."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Plots:
    """SVG elements, side by side where there is room."""

    svgs: Sequence[str]


Block = Heading | Table | Plots


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<h2>{escape(text)}</h2>")
            case Plots(svgs):
                parts.append(f'<div class="plots">{"".join(svgs)}</div>')
            case Table(header, rows):
                head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
                body = "\n".join(
                    "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
                )
                parts.append(f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def to_markdown(title: str, blocks: Sequence[Block], pictures: Sequence[str]) -> str:
    """The page as Markdown. Its plots are files of their own, `pictures`."""
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Plots():
                parts += [f"![curve]({picture})" for picture in pictures]
            case Table(header, rows):
                lines = [header, ["---"] * len(header), *rows]
                parts.append("\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
