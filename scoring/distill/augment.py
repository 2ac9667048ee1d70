"""Further train rows: copies in which a masked language model replaced words.

TinyBERT (Jiao et al., 2020, algorithm 1) replaces a word, with some probability, by one of the K words that BERT finds
the likeliest where the word is masked. For words of several pieces TinyBERT takes neighbours in GloVe; here they get
one mask token as well. A copy keeps the label of its row.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from scoring.blimp.masked_lm import MaskedLM, open_masked_lm
from scoring.data import Split, TaskData, Texts
from scoring.recipe import AugmentRecipe
from sharebert_common.errors import BadInput
from sharebert_common.files import make_folders, write_atomically
from sharebert_common.progress import progress

WINDOW = 256
"""Rows that are worked on at once: their masked versions, sorted by length, fill the batches."""
BATCH = 64
"""Masked rows in one forward pass; each needs a float for every word."""

Text = tuple[str, ...]

KEPT: TypeAdapter[list[Text]] = TypeAdapter(list[Text])
"""A line of a file of copies: the copies of a row."""


def augmented(
    data: TaskData, recipe: AugmentRecipe, device: torch.device, folder: Path, max_length: int = 128
) -> TaskData:
    """A task with copies of its train rows behind the rows.

    Args:
        data: the task.
        recipe: with `model`.
        device: where the masked language model runs.
        folder: keeps the copies for later calls; a file for each combination of rows, model and settings.
        max_length: words behind so many tokens of a row are not replaced.

    Memory beside the masked language model: the texts of all copies, and the masked versions of `WINDOW` rows.

    Raises BadInput, naming the key: no masked language model, or more rows than `most_rows`.
    """
    assert recipe.model is not None
    rows = len(data.train) * (1 + recipe.copies)
    if rows > recipe.most_rows:
        raise BadInput(
            f"data.augment.copies: {len(data.train):,} rows with {recipe.copies} copies each are {rows:,}, and at "
            f"most {recipe.most_rows:,} are allowed; lower copies or data.train_rows, or raise data.augment.most_rows"
        )
    lm = open_masked_lm(recipe.model, device, needed_by="data.augment.model")
    file = folder / f"{_fingerprint(lm, data.train.texts, recipe, max_length)}.jsonl"
    if (kept := _read(file, len(data.train))) is None:
        make_folders(folder)
        copies = progress(copies_of(lm, data.train.texts, recipe, max_length), "augment", len(data.train))
        kept = [json.dumps(row, ensure_ascii=False) for row in copies]
        write_atomically(file, "".join(f"{line}\n" for line in kept))
    texts, labels = list(data.train.texts), [data.train.labels]
    for line, label in zip(kept, data.train.labels, strict=True):
        found = [tuple(text) for text in json.loads(line)]
        texts += found
        labels.append(np.repeat(label, len(found)))
    train = Split(data.train.where, texts, np.concatenate(labels))
    added = len(train) - len(data.train)
    note = f"{data.train.where}: {len(data.train):,} rows, and {added:,} copies by {recipe.model}"
    return replace(data, train=train, notes=[*data.notes, note])


def _read(file: Path, rows: int) -> list[str] | None:
    """The lines that were kept for `rows` rows; None where there are none, or the file is damaged."""
    if not file.is_file():
        return None
    try:
        *lines, rest = file.read_text(encoding="utf-8").split("\n")
        for line in lines:
            KEPT.validate_json(line)
    except ValueError:
        lines, rest = [], ""
    if len(lines) == rows and not rest:
        return lines
    print(f"{file}: damaged; the copies are made again", file=sys.stderr)
    return None


@dataclass(frozen=True)
class _Row:
    """A row with what is replaced in it."""

    texts: Text
    ids: list[int]
    pieces: list[range]
    """For each word that may be replaced: its tokens in `ids`,"""
    spans: list[tuple[int, int, int]]
    """and which text it is in, with its first character and the one behind its last."""
    chosen: NDArray[np.bool_]
    """[copies, words]."""
    picks: NDArray[np.int64]
    """[copies, words], the number of the candidate."""


def copies_of(lm: MaskedLM, texts: Texts, recipe: AugmentRecipe, max_length: int) -> Iterator[list[Text]]:
    """For each row its copies, different from the row and from each other."""
    words = _Words(lm)
    for start in range(0, len(texts), WINDOW):
        window = texts[start : start + WINDOW]
        rows = [_row(lm, row, start + number, recipe, max_length) for number, row in enumerate(window)]
        wanted = [(row, int(word)) for row in rows for word in np.flatnonzero(row.chosen.any(0))]
        candidates: dict[tuple[int, int], list[str]] = {}
        lengths = [len(_masked(lm, *item)) for item in wanted]
        for same in _batches(sorted(range(len(wanted)), key=lengths.__getitem__), lengths):
            items = [wanted[n] for n in same]
            for item, found in zip(items, words.likeliest(items, recipe.candidates), strict=True):
                candidates[id(item[0]), item[1]] = found
        for row in rows:
            yield _copies(row, {word: candidates[id(row), word] for word in np.flatnonzero(row.chosen.any(0)).tolist()})


def _row(lm: MaskedLM, texts: Text, number: int, recipe: AugmentRecipe, max_length: int) -> _Row:
    encoded = lm.tokenizer(
        *texts, truncation=True, max_length=min(max_length, lm.positions), return_offsets_mapping=True
    )
    encoding = encoded.encodings[0]
    if max(encoding.ids) >= lm.words:
        raise BadInput(f"data.augment.model: {lm.folder}: its tokenizer gives ids that its model does not have")
    pieces: list[range] = []
    spans: list[tuple[int, int, int]] = []
    previous = None
    for place, (word, text) in enumerate(zip(encoding.word_ids, encoding.sequence_ids, strict=True)):
        if word is None or text is None:
            previous = None
            continue
        begin, end = encoding.offsets[place]
        if previous == (text, word):
            pieces[-1] = range(pieces[-1].start, place + 1)
            spans[-1] = (text, spans[-1][1], end)
        else:
            pieces.append(range(place, place + 1))
            spans.append((text, begin, end))
        previous = (text, word)
    real = [n for n, (text, begin, end) in enumerate(spans) if _has_letters(texts[text][begin:end])]
    generator = np.random.default_rng([recipe.seed, number])
    shape = (recipe.copies, len(real))
    chosen = generator.random(shape) < recipe.probability
    picks = generator.integers(0, recipe.candidates, shape)
    return _Row(texts, encoding.ids, [pieces[n] for n in real], [spans[n] for n in real], chosen, picks)


def _has_letters(text: str) -> bool:
    """Whether a text is a word: numbers and marks are neither replaced nor put in place of words."""
    return any(character.isalpha() for character in text)


def _masked(lm: MaskedLM, row: _Row, word: int) -> list[int]:
    """The row's ids with one mask token in place of a word."""
    place = row.pieces[word]
    return [*row.ids[: place.start], lm.tokenizer.mask_token_id, *row.ids[place.stop :]]


def _batches(order: list[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Runs of at most `BATCH` numbers whose lengths are equal: the model is given no padding."""
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) == BATCH or lengths[batch[0]] != lengths[number]):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _copies(row: _Row, candidates: dict[int, list[str]]) -> list[Text]:
    found: dict[Text, None] = {}
    for chosen, picks in zip(row.chosen, row.picks, strict=True):
        texts = list(row.texts)
        for word in np.flatnonzero(chosen)[::-1].tolist():  # from the right, so that earlier places stay
            if not candidates[word]:
                continue
            text, begin, end = row.spans[word]
            old = texts[text][begin:end]
            space = old[: len(old) - len(old.lstrip())]
            new = candidates[word][picks[word] % len(candidates[word])]
            texts[text] = texts[text][:begin] + space + new + texts[text][end:]
        found[tuple(texts)] = None
    found.pop(row.texts, None)
    return list(found)


class _Words:
    """The whole words of a masked language model's vocabulary."""

    def __init__(self, lm: MaskedLM) -> None:
        self._lm = lm
        tokenizer = lm.tokenizer
        pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), lm.words))))
        # Byte-level BPE and SentencePiece mark the pieces that begin a word, WordPiece those that continue one (##).
        begins = next((mark for mark in ("Ġ", "▁") if any(piece.startswith(mark) for piece in pieces)), "")
        self._texts = [piece.removeprefix(begins) if piece.startswith(begins) else "" for piece in pieces]
        special = set(tokenizer.all_special_ids)
        allowed = [
            _has_letters(text) and not text.startswith("##") and number not in special
            for number, text in enumerate(self._texts)
        ]
        self._forbidden = torch.ones(lm.words, dtype=torch.bool)
        self._forbidden[: len(allowed)] = ~torch.tensor(allowed)
        if not any(allowed):
            raise BadInput(f"data.augment.model: {lm.folder}: there are no whole words in its vocabulary")

    @torch.inference_mode()
    def likeliest(self, items: Sequence[tuple[_Row, int]], count: int) -> list[list[str]]:
        """For each row and word the likeliest `count` other words at its place; rows of one length."""
        lm = self._lm
        device = next(lm.model.parameters()).device
        ids = torch.tensor([_masked(lm, row, word) for row, word in items], device=device)
        positions = torch.tensor([row.pieces[word].start for row, word in items], device=device)
        logits = lm.logits(ids, positions).float().masked_fill(self._forbidden.to(device), -torch.inf)
        best = logits.topk(min(count + 1, logits.shape[1])).indices.cpu().tolist()
        found = []
        for (row, word), numbers in zip(items, best, strict=True):
            text, begin, end = row.spans[word]
            old = row.texts[text][begin:end].strip().lower()
            words = [self._texts[n] for n in numbers if not self._forbidden[n]]
            found.append([new for new in words if new.lower() != old][:count])
        return found


def _fingerprint(lm: MaskedLM, texts: Texts, recipe: AugmentRecipe, max_length: int) -> str:
    """Of everything that the copies depend on."""
    keys = {name: value for name, value in asdict(recipe).items() if name not in ("model", "most_rows")}
    digest = hashlib.sha256(json.dumps([lm.fingerprint(), keys, max_length]).encode())
    for row in texts:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:16]
