"""Make a tokenizer give at inference what a training row holds.

A training row is `[CLS] document [SEP] document [SEP] …`, in which a masked token takes the place of one token. Whoever
uses the tokenizer later writes `The capital of [MASK] is` and expects the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice, product
from typing import Any

from tokenizers import Tokenizer, processors

from data_prep.shards.format import SPECIAL_TOKENS

_TRIED_WORDS = 4096  # of the vocabulary; to encode them takes some 10 ms

CLS, SEP, MASK = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"], SPECIAL_TOKENS["mask"]


def as_in_training(tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """Correct a tokenizer, which has all special tokens. Returns the text of a tokenizer.json, and a line a change.

    The special tokens become special: found in any text, whatever the normaliser does, and left out when ids are
    decoded. The post-processor becomes the template of training rows, unless it has the same effect. [MASK] takes the
    space before or after it, where the vocabulary has the space as a part of a word (byte-level BPE, SentencePiece).
    A tokenizer that needs none of this keeps its text, byte for byte.
    """
    changes = []
    config = json.loads(tokenizer.to_str())
    if ordinary := _make_special(config, tokenizer):
        changes.append(f"made {', '.join(ordinary)} special tokens, which a text can spell out")
        tokenizer = Tokenizer.from_str(json.dumps(config))
    if not _adds_cls_and_sep(tokenizer):
        changes.append(f"set the post-processor to {CLS} text {SEP}, as in training rows")
        tokenizer.post_processor = training_template(tokenizer)
    if (stripped := _with_mask_stripped(tokenizer)) is not None:
        changes.append(f"made {MASK} take the space beside it, as a masked word of a training row does")
        tokenizer = stripped
    return str(tokenizer.to_str()), changes


def training_template(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    """The post-processor that adds the special tokens of a training row to a text and to a pair."""
    ids = {token: tokenizer.token_to_id(token) for token in (CLS, SEP)}
    return processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=list(ids.items())
    )


def _make_special(config: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Make the special tokens special in a parsed tokenizer.json; returns those that were not."""
    added = {token["content"]: token for token in config["added_tokens"]}
    changed = []
    for token in SPECIAL_TOKENS.values():
        wanted = {"special": True, "normalized": False, "single_word": False}
        entry = added.get(token)
        if entry is None:
            config["added_tokens"].append(
                wanted | {"id": tokenizer.token_to_id(token), "content": token, "lstrip": False, "rstrip": False}
            )
        elif wanted.items() <= entry.items():
            continue
        else:
            entry.update(wanted)
        changed.append(token)
    config["added_tokens"].sort(key=lambda entry: entry["id"])
    return changed


def _adds_cls_and_sep(tokenizer: Tokenizer) -> bool:
    cls, sep = tokenizer.token_to_id(CLS), tokenizer.token_to_id(SEP)
    one, two = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("a b", "b"))
    single, pair = tokenizer.encode("a b"), tokenizer.encode("a b", "b")
    return bool(single.ids == [cls, *one, sep] and pair.ids == [cls, *one, sep, *two, sep])


def _with_mask_stripped(tokenizer: Tokenizer) -> Tokenizer | None:
    """The tokenizer whose ids for `word [MASK] word` are those of `word word word` with the second one masked.

    None if this one does so already, or if no choice does.
    """
    rows = list(islice(_rows_of_one_word(tokenizer), 3))
    mask_id = tokenizer.token_to_id(MASK)

    def fits(candidate: Tokenizer) -> bool:
        asked = [candidate.encode(f"{word} {MASK} {word}", add_special_tokens=False).ids for word, _ in rows]
        return asked == [[*ids[:-2], mask_id, ids[-1]] for _, ids in rows]

    if fits(tokenizer):
        return None
    config = json.loads(tokenizer.to_str())
    (mask,) = (token for token in config["added_tokens"] if token["content"] == MASK)
    for lstrip, rstrip in product((True, False), (False, True)):
        mask.update(lstrip=lstrip, rstrip=rstrip)
        candidate = Tokenizer.from_str(json.dumps(config))
        if fits(candidate):
            return candidate
    return None


def _rows_of_one_word(tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """(word, ids of `word word word`) for words that are one token inside a row, with the space before them."""
    for token_id in range(min(tokenizer.get_vocab_size(), _TRIED_WORDS)):
        word = tokenizer.decode([token_id]).strip()
        if word.isalnum():
            ids = tokenizer.encode(f"{word} {word} {word}", add_special_tokens=False).ids
            if len(ids) >= 3 and ids[-1] == ids[-2] == token_id:
                yield word, ids
