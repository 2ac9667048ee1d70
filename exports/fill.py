"""The likeliest words for each [MASK] of a text: a look at what a model learned."""

from __future__ import annotations

from pathlib import Path

import torch

from exports.files import TOKENIZER
from exports.read import load_model
from exports.tokenizer import load_tokenizer, require_special_tokens, vocabulary_size
from sharebert_common.errors import BadInput
from sharebert_common.inference_tokenizer import for_inference


def fill(folder: Path, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
    """The `top` likeliest words for each [MASK] of `text`, each with its probability, in falling order.

    Args:
        folder: an export, with its tokenizer.
        text: holds at least one [MASK].
        top: how many words to give for each.

    Raises BadInput: no [MASK], an export that is not whole. Raises ShareBertError: a text longer than the positions
    of the model.
    """
    path = Path(folder) / TOKENIZER
    tokenizer = load_tokenizer(path)
    require_special_tokens(tokenizer, path)
    tokenizer, _ = for_inference(tokenizer)
    cls, sep, mask = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[MASK]"))
    ids = [cls, *tokenizer.encode(text, add_special_tokens=False).ids, sep]
    positions = [i for i, token in enumerate(ids) if token == mask]
    if not positions:
        raise BadInput(f"'{text}': no [MASK] to fill")
    model = load_model(folder)
    if model.mlm_head is None:
        raise BadInput(f"{folder}: has no MLM head, which fills [MASK]; take the pretrained export")

    with torch.inference_mode():
        logits = model.logits(torch.tensor([ids]), positions=torch.tensor(positions))
        real_words = logits[:, : vocabulary_size(tokenizer)]
        best = real_words.float().softmax(-1).topk(min(top, real_words.shape[1]))
    return [
        [
            (tokenizer.decode([word], skip_special_tokens=False).strip(), value)
            for word, value in zip(words, values, strict=True)
        ]
        for words, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
