"""A tokenizer that gives for a text what a training row holds.

Training needs of a `tokenizer.json` only the ids of a text: it adds [CLS] and [SEP] itself, and puts the id of [MASK]
in the place of a word. At inference the same file has to do all of it: a row is `[CLS] document [SEP] document [SEP]`,
and whoever writes `The capital of [MASK] is` expects the ids of a row in which that word is masked. So its special
tokens have to be special, its post-processor has to add [CLS] and [SEP], and [MASK] has to leave no token for the space
before it and no mark of a new word behind it. What is missing is added here; ids of plain text stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice, product
from typing import Any

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
CLS, SEP, MASK = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"], SPECIAL_TOKENS["mask"]

_BEFORE, _BEHIND = ("", "a ", "the a, "), ("", " a", ".", ", the")
_WORDS = ("the", "a", "is", "12", "é")
"""Texts on which [MASK] is tried: a beginning, a word that is masked, and an end."""

_TRIED_IDS = 4096  # of the vocabulary, for more words to try; to decode and encode them takes some 10 ms


def for_inference(tokenizer: Any, pair_type: int = 1) -> tuple[Any, list[str]]:
    """Correct a tokenizer so that it gives what a training row holds.

    Args:
        tokenizer: a `tokenizers.Tokenizer` whose vocabulary holds the special tokens.
        pair_type: token type of the second text of a pair.

    Returns `tokenizer` itself where nothing is wrong, else a changed copy; and a line for each change.
    """
    changes = []
    state = json.loads(tokenizer.to_str())
    special, ordinary = _with_special_tokens(state, tokenizer)
    if ordinary:
        changes.append(f"made {', '.join(ordinary)} special tokens, which a text can spell out")
        tokenizer, state = _made(tokenizer, special), special
    wrong = wrong_masks(tokenizer)
    if wrong:
        before = tokenizer
        for changed in (_made(tokenizer, other) for other in _other_masks(state)):
            if (left := wrong_masks(changed)) < wrong:
                tokenizer, wrong = changed, left
        if tokenizer is not before:
            changes.append(f"made {MASK} take the space beside it, as a masked word of a training row does")
    if not _adds_special_tokens(tokenizer, pair_type):
        changes.append(f"set the post-processor to {CLS} text {SEP}, as in training rows")
        tokenizer = _made(tokenizer, json.loads(tokenizer.to_str()))
        tokenizer.post_processor = training_template(tokenizer, pair_type)
    return tokenizer, changes


def training_template(tokenizer: Any, pair_type: int = 1) -> Any:
    """The post-processor that adds the special tokens of a training row to a text and to a pair."""
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:{pair_type} {SEP}:{pair_type}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)],
    )


def _made(like: Any, state: Mapping[str, Any]) -> Any:
    return type(like).from_str(json.dumps(state))


def _with_special_tokens(state: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
    """The state of a tokenizer in which every special token is one, found in any text; and those that were not."""
    added = {entry["content"]: entry for entry in state["added_tokens"]}
    wanted = {"special": True, "normalized": False, "single_word": False}
    ordinary = []
    for token in SPECIAL_TOKENS.values():
        known = added.get(
            token, {"id": tokenizer.token_to_id(token), "content": token, "lstrip": False, "rstrip": False}
        )
        if not wanted.items() <= known.items():
            added[token] = known | wanted
            ordinary.append(token)
    return {**state, "added_tokens": sorted(added.values(), key=lambda entry: entry["id"])}, ordinary


def _other_masks(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The state with other rules for the spaces beside [MASK] and for the mark of a new word, least changed first."""
    for first, right, left in product((False, True), (False, True), (True, False)):
        flags = {"lstrip": left, "rstrip": right}
        added = [entry | flags if entry["content"] == MASK else entry for entry in state["added_tokens"]]
        splitter = _marks_first_word_only(state["pre_tokenizer"]) if first else state["pre_tokenizer"]
        yield {**state, "added_tokens": added, "pre_tokenizer": splitter}


def _marks_first_word_only(part: Any) -> Any:
    """A pre-tokenizer that marks a new word at the start of the text, and not after each special token as well."""
    if isinstance(part, dict) and part.get("type") == "Metaspace" and part.get("prepend_scheme") == "always":
        return {**part, "prepend_scheme": "first"}
    if isinstance(part, dict) and part.get("type") == "Sequence":
        return {**part, "pretokenizers": [_marks_first_word_only(inner) for inner in part["pretokenizers"]]}
    return part


def wrong_masks(tokenizer: Any) -> int:
    """In how many sample texts [MASK] gives other ids than a training row in which that word is masked."""
    mask, wrong = tokenizer.token_to_id(MASK), 0
    words = (*_WORDS, *islice(_words_of_one_token(tokenizer), 3))
    for before, word, behind in product(_BEFORE, words, _BEHIND):
        if not _knows(tokenizer, before + word + behind):
            continue
        begin, end = len(before.rstrip()), len(before) + len(word)  # the word with the space before it
        plain = tokenizer.encode(before + word + behind, add_special_tokens=False)
        spans = list(plain.offsets)
        masked = [_covers(span, begin, end) for span in spans]
        shared = any(
            gone and (_covers(span, 0, begin) or _covers(span, end, end + len(behind)))
            for span, gone in zip(spans, masked, strict=True)
        )
        if shared or True not in masked:
            continue  # no training row has this word masked alone
        expected = [number for number, gone in zip(plain.ids, masked, strict=True) if not gone]
        expected.insert(masked.index(True), mask)
        wrong += tokenizer.encode(f"{before}{MASK}{behind}", add_special_tokens=False).ids != expected
    return wrong


def _words_of_one_token(tokenizer: Any) -> Iterator[str]:
    """Words of the vocabulary, whatever its script, that are one token inside a row."""
    for token_id in range(min(tokenizer.get_vocab_size(), _TRIED_IDS)):
        word = tokenizer.decode([token_id]).strip()
        row = f"{word} {word} {word}"
        if word.isalnum() and _knows(tokenizer, row):
            ids = tokenizer.encode(row, add_special_tokens=False).ids
            if len(ids) >= 3 and ids[-1] == ids[-2] == token_id:
                yield word


def _knows(tokenizer: Any, text: str) -> bool:
    """False where the tokenizer fails for a text, because its model names no token for unknown words."""
    try:
        tokenizer.encode(text, add_special_tokens=False)
    except Exception:  # the library raises nothing more exact
        return False
    return True


def _covers(span: tuple[int, int], begin: int, end: int) -> bool:
    return span[0] < end and span[1] > begin


def _adds_special_tokens(tokenizer: Any, pair_type: int) -> bool:
    cls, sep = (tokenizer.token_to_id(token) for token in (CLS, SEP))
    first, second = ("the a", "a") if _knows(tokenizer, "the a") else ("", "")
    a, b = (tokenizer.encode(text, add_special_tokens=False).ids for text in (first, second))
    one, two = tokenizer.encode(first), tokenizer.encode(first, second)
    types = [0] * (len(a) + 2) + [pair_type] * (len(b) + 1)
    return (
        one.ids == [cls, *a, sep]
        and not any(one.type_ids)
        and two.ids == [cls, *a, sep, *b, sep]
        and two.type_ids == types
    )
