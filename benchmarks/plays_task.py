"""A small labelled task from the demo's plays: is a passage from a comedy, a history or a tragedy?

The genres are those of the First Folio. Whole plays are held out, so that no name of a character and no scene is in
both splits. Stage directions and the names of speakers are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

GENRES = {
    "comedy": [
        "alls_well_that_ends_well",
        "as_you_like_it",
        "comedy_of_errors",
        "loves_labours_lost",
        "measure_for_measure",
        "merchant_of_venice",
        "merry_wives_of_windsor",
        "midsummer_nights_dream",
        "much_ado_about_nothing",
        "taming_of_the_shrew",
        "tempest",
        "twelfth_night",
        "two_gentlemen_of_verona",
        "winters_tale",
    ],
    "history": [
        "henry_iv_part_1",
        "henry_iv_part_2",
        "henry_v",
        "henry_vi_part_1",
        "henry_vi_part_2",
        "henry_vi_part_3",
        "henry_viii",
        "john",
        "richard_ii",
        "richard_iii",
    ],
    "tragedy": [
        "antony_and_cleopatra",
        "coriolanus",
        "cymbeline",
        "hamlet",
        "julius_caesar",
        "lear",
        "macbeth",
        "othello",
        "romeo_and_juliet",
        "timon_of_athens",
        "tragedy_of_titus_andronicus",
        "troilus_and_cressida",
    ],
}
"""Genre → plays, named as their files are without `_gut.txt`."""

HELD_OUT = frozenset(
    [
        "as_you_like_it",
        "much_ado_about_nothing",
        "tempest",
        "henry_iv_part_1",
        "richard_iii",
        "hamlet",
        "julius_caesar",
        "macbeth",
    ]
)
"""The plays of dev."""

PASSAGE_WORDS = 24
"""Words of a passage, so that most have no more than the demo model's 32 tokens."""

PASSAGES = 200
"""Passages of each play, so that every play counts the same and fine-tuning takes seconds."""

DIRECTION = re.compile(r"\[[^\]]*\]|^\s*(?:ACT|SCENE|Act|Scene)\b.*$", re.MULTILINE)
SPEAKER = re.compile(r"[A-Z][A-Z ]{1,30}|[A-Z][A-Za-z. ]{1,30}\.")
"""A line that is the name of a speaker: `DUKE.` or `Cor. and Volt.` or, in one play, `THESEUS`."""


def speeches(text: str) -> Iterator[str]:
    """What the characters of a play say, without their names."""
    for paragraph in re.split(r"\n\s*\n", DIRECTION.sub("", text)):
        name, _, speech = paragraph.strip().partition("\n")
        if speech and SPEAKER.fullmatch(name.strip()):
            yield " ".join(speech.split())


def passages(text: str) -> list[str]:
    """`PASSAGES` passages, or fewer, spread evenly over a play."""
    words = " ".join(speeches(text)).split()
    count = len(words) // PASSAGE_WORDS
    starts = [PASSAGE_WORDS * (count * number // PASSAGES) for number in range(min(PASSAGES, count))]
    return [" ".join(words[start : start + PASSAGE_WORDS]) for start in starts]


def write_task(texts: Path, folder: Path) -> dict[str, int]:
    """Write `train.jsonl` and `dev.jsonl` with the fields text, label and play; the number of rows of each.

    Args:
        texts: folder of the files of the plays.
        folder: where the task is written; it is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {"train": [], "dev": []}
    for genre, plays in GENRES.items():
        for play in plays:
            text = (texts / f"{play}_gut.txt").read_text(encoding="utf-8", errors="replace")
            split = "dev" if play in HELD_OUT else "train"
            rows[split] += [json.dumps({"text": p, "label": genre, "play": play}) for p in passages(text)]
    for split, lines in rows.items():
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {split: len(lines) for split, lines in rows.items()}
