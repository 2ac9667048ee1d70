"""The tokenizer files of an export: `tokenizer.json`, and `tokenizer_config.json` for transformers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from exports.files import TOKENIZER, TOKENIZER_CONFIG, write_json
from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256
from sharebert_common.inference_tokenizer import SPECIAL_TOKENS, for_inference, wrong_masks

TRAINED_WITH = "training_tokenizer_sha256"
"""Key of `tokenizer_config.json`: SHA-256 of the `tokenizer.json` of the training, where the export has another one."""


def load_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` in `path`, without the truncation and padding that transformers may have saved.

    Raises BadInput, naming the file.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BadInput("needs the tokenizers package: pip install tokenizers") from error
    if not path.is_file():
        raise BadInput(f"{path}: missing")
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise BadInput(f"{path}: not readable as a tokenizer.json ({error})") from error
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the highest id of a tokenizer."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def require_special_tokens(tokenizer: Any, path: Path) -> None:
    """Raise BadInput, naming `path`, where the vocabulary lacks one of the special tokens."""
    missing = [token for token in SPECIAL_TOKENS.values() if tokenizer.token_to_id(token) is None]
    if missing:
        raise BadInput(f"{path}: lacks the special tokens {', '.join(missing)}")


def write_tokenizer(folder: Path, tokenizer: Path, config: ShareBertConfig) -> int:
    """Write the two files of `tokenizer` (a `tokenizer.json`) for a model; returns the id of [PAD].

    The file is copied as it is, unless it gives for a text something else than a training row holds.

    Raises BadInput, naming the file: unreadable, another model's, or without the special tokens.
    """
    loaded = load_tokenizer(tokenizer)
    words = vocabulary_size(loaded)
    if not 0 <= config.vocab_size - words < config.vocab_pad_multiple:
        raise BadInput(
            f"{tokenizer}: {words} words, but the model has {config.vocab_size} (a multiple of "
            f"{config.vocab_pad_multiple}): this is another model's tokenizer"
        )
    require_special_tokens(loaded, tokenizer)
    ready, _ = for_inference(loaded, pair_type(config))
    given = json.loads(tokenizer.read_text(encoding="utf-8"))
    if ready is loaded and not given.get("truncation") and not given.get("padding"):
        shutil.copyfile(tokenizer, folder / TOKENIZER)
    else:
        ready.save(str(folder / TOKENIZER))
    if wrong_masks(ready):
        print(f"{tokenizer}: beside some words, [MASK] gives other ids than in training", file=sys.stderr)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **transformers_settings(config)}
    trained_with = training_tokenizer_sha256(tokenizer)
    if trained_with != file_sha256(folder / TOKENIZER):
        settings[TRAINED_WITH] = trained_with
    write_json(folder / TOKENIZER_CONFIG, settings)
    return int(ready.token_to_id("[PAD]"))


def pair_type(config: ShareBertConfig) -> int:
    """Token type of the second text of a pair: 1, or 0 for a model that has one type only."""
    return min(1, config.type_vocab_size - 1)


def transformers_settings(config: ShareBertConfig) -> dict[str, Any]:
    """What a tokenizer of transformers has to know beside its `tokenizer.json`."""
    return {
        "model_max_length": config.max_position_embeddings,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **{f"{key}_token": token for key, token in SPECIAL_TOKENS.items()},
    }


def training_tokenizer_sha256(tokenizer: Path) -> str:
    """SHA-256 of the `tokenizer.json` of the training, for the `tokenizer` of a run or of an export."""
    try:
        kept = json.loads(tokenizer.with_name(TOKENIZER_CONFIG).read_text(encoding="utf-8"))[TRAINED_WITH]
    except (OSError, ValueError, KeyError, TypeError):
        return file_sha256(tokenizer)
    return str(kept)
