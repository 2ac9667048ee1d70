"""The report of `sharebert prep`: lines for the terminal, `report.md`, and a page with histograms."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Table = list[tuple[str, str]]

MARKDOWN, PAGE = "report.md", "report.html"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; } td { padding: .15rem 1.5rem .15rem 0; } td + td { text-align: right; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 2px .75rem; font-size: 13px; }
.bars span:nth-child(3n + 1) { text-align: right; } .bar { background: #4a7ebb; height: 1.1em; min-width: 1px; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } }
"""
_LABELS = {
    "chars_in": "Characters of a document, before cleaning",
    "tokens": "Tokens of a document",
    "symbols": "Share of symbols, in all documents that this rule looked at",
    "repetition": "Share of repeated word 5-grams, in all documents that this rule looked at",
}


def count_sizes(counts: Counter[str], name: str, sizes: Any) -> None:
    """Count sizes by powers of two, for the histogram `name`."""
    powers = np.log2(np.maximum(sizes, 1)).astype(int)
    for power, times in zip(*np.unique(powers, return_counts=True), strict=True):
        counts[f"sizes.{name}.{power}"] += int(times)


def count_shares(counts: Counter[str], name: str, shares: Any) -> None:
    """Count shares (0 to 1) in steps of 0.05, for the histogram `name`."""
    steps = np.minimum(np.asarray(shares) * 20, 19).astype(int)
    for step, times in zip(*np.unique(steps, return_counts=True), strict=True):
        counts[f"shares.{name}.{step}"] += int(times)


class Report:
    """The report of a finished dataset.

    Args:
        counts: the sum over all parts.
        splits: as the manifest has them.
        padding: padding tokens in all rows.
        seq_len: tokens of a row.
    """

    def __init__(self, counts: Mapping[str, int], splits: Mapping[str, Any], padding: int, seq_len: int) -> None:
        self._counts = counts
        self.sections = {
            "Documents": self._documents(),
            "Left out": self._left_out(),
            "Noticed": self._noticed(),
            "Dataset": self._dataset(splits, padding, seq_len),
        }

    def text(self) -> str:
        """The report for the terminal."""
        lines = []
        for title, table in self.sections.items():
            if table:
                lines += ["", title] + [f"  {name:<46} {value:>20}" for name, value in table]
        return "\n".join(lines)

    def markdown(self) -> str:
        """The text of `report.md`."""
        lines = ["# Dataset report"]
        for title, table in self.sections.items():
            if table:
                lines += ["", f"## {title}", "", "| | |", "|---|---:|"]
                lines += [f"| {name} | {value} |" for name, value in table]
        return "\n".join(lines) + "\n"

    def page(self) -> str:
        """The text of `report.html`: one file, without scripts and without links to other files."""
        body = ["<h1>Dataset report</h1>"]
        for title, table in self.sections.items():
            if table:
                rows = "".join(f"<tr><td>{html.escape(n)}</td><td>{html.escape(v)}</td></tr>" for n, v in table)
                body.append(f"<h2>{title}</h2><table>{rows}</table>")
        body += [f"<h2>{html.escape(title)}</h2>{bars}" for title, bars in self._histograms()]
        head = f'<meta charset="utf-8"><title>Dataset report</title><style>{_STYLE}</style>'
        return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'

    def _documents(self) -> Table:
        kept = self._counts.get("documents_kept", 0)
        return [
            ("documents read", _number(self._counts.get("documents_in", 0))),
            ("bytes of text read", _number(self._counts.get("bytes_in", 0))),
            ("documents kept", f"{_number(kept)} ({_share(kept, self._counts.get('documents_in', 0))})"),
        ]

    def _left_out(self) -> Table:
        table = [
            (_RULES.get(name, name), f"{_number(count)} ({_number(self._counts[f'dropped_bytes.{name}'])} bytes)")
            for name, count in self._group("dropped.")
        ]
        skipped = [("not readable", "bad_documents"), ("over max_document_bytes", "long_documents")]
        return table + [(name, _number(self._counts[key])) for name, key in skipped if self._counts.get(key)]

    def _noticed(self) -> Table:
        names = [
            ("documents with invalid bytes, repaired", "invalid_utf8"),
            ("cuts made in long documents", "splits"),
            ("documents that overlap with evaluation sets", "overlap"),
        ]
        return [(name, _number(self._counts[key])) for name, key in names if key in self._counts]

    def _dataset(self, splits: Mapping[str, Any], padding: int, seq_len: int) -> Table:
        table = []
        for name, split in splits.items():
            table.append((f"{name}: documents", _number(split["documents"])))
            table.append((f"{name}: tokens", _number(split["tokens"])))
            table.append((f"{name}: rows of {seq_len}", _number(split["rows"])))
        cells = sum(split["rows"] for split in splits.values()) * seq_len
        table.append(("fill of the rows", _share(cells - padding, cells)))
        tokens = self._counts.get("tokens", 0)
        table.append(("unknown tokens", _share(self._counts.get("unknown", 0), tokens)))
        table.append(("tokens a byte of kept text", f"{tokens / max(self._counts.get('bytes_kept', 0), 1):.3f}"))
        return table

    def _histograms(self) -> list[tuple[str, str]]:
        found = []
        for key, label in _LABELS.items():
            sizes = [(int(power), count) for power, count in self._group(f"sizes.{key}.")]
            shares = [(int(step), count) for step, count in self._group(f"shares.{key}.")]
            if sizes:
                found.append((label, _bars([(f"{_size(1 << p)} – {_size(2 << p)}", n) for p, n in _filled(sizes)])))
            if shares:
                found.append((label, _bars([(f"{s * 5} – {s * 5 + 5} %", n) for s, n in _filled(shares)])))
        languages = sorted(self._group("language."), key=lambda item: (-item[1], item[0]))
        if languages:
            rest = sum(count for _, count in languages[15:])
            found.append(("Languages", _bars([*languages[:15], *([("others", rest)] if rest else [])])))
        return found

    def _group(self, prefix: str) -> list[tuple[str, int]]:
        return [(k.removeprefix(prefix), self._counts[k]) for k in sorted(self._counts) if k.startswith(prefix)]


_RULES = {
    "short": "shorter than min_chars",
    "long": "longer than max_chars",
    "symbols": "too many symbols",
    "repetition": "too much repetition",
    "language": "another language, or unsure",
    "evaluation": "overlap with evaluation sets",
    "exact duplicate": "same text as an earlier document",
    "near duplicate": "nearly the same text as an earlier document",
}


def _filled(bins: list[tuple[int, int]]) -> list[tuple[int, int]]:
    counts = dict(bins)
    return [(bin_, counts.get(bin_, 0)) for bin_ in range(min(counts), max(counts) + 1)]


def _bars(bins: Sequence[tuple[str, int]]) -> str:
    most = max(count for _, count in bins)
    cells = (
        f'<span>{html.escape(label)}</span><div><div class="bar" style="width:{100 * count / most:.2f}%"></div></div>'
        f"<span>{_number(count)}</span>"
        for label, count in bins
    )
    return f'<div class="bars">{"".join(cells)}</div>'


def _size(number: int) -> str:
    for unit in ("", "k", "M"):
        if number < 1024:
            return f"{number}{unit}"
        number //= 1024
    return f"{number}G"


def _number(value: int) -> str:
    return f"{value:,}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.2f} %"
