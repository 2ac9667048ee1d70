"""The tokenizer files of an export: `tokenizer.json`, and `tokenizer_config.json` for transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from exports.files import TOKENIZER, TOKENIZER_CONFIG, write_json
from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


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


def write_tokenizer(folder: Path, tokenizer: Path, config: ShareBertConfig) -> int:
    """Write the two files of `tokenizer` (a `tokenizer.json`) for a model; returns the id of [PAD].

    Raises BadInput, naming the file: unreadable, another model's, or without the special tokens.
    """
    loaded = load_tokenizer(tokenizer)
    words = vocabulary_size(loaded)
    if not 0 <= config.vocab_size - words < config.vocab_pad_multiple:
        raise BadInput(
            f"{tokenizer}: {words} words, but the model has {config.vocab_size} (a multiple of "
            f"{config.vocab_pad_multiple}): this is another model's tokenizer"
        )
    lacking = [token for token in SPECIAL_TOKENS.values() if loaded.token_to_id(token) is None]
    if lacking:
        raise BadInput(f"{tokenizer}: lacks the special tokens {', '.join(lacking)}")
    shutil.copyfile(tokenizer, folder / TOKENIZER)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **SPECIAL_TOKENS,
    }
    write_json(folder / TOKENIZER_CONFIG, settings)
    return int(loaded.token_to_id("[PAD]"))
