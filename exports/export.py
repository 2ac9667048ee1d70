"""An export: the folder that pretraining ends in, and that everything else takes.

    EXPORT/model.safetensors (index + files where large)  config.json  tokenizer.json  tokenizer_config.json
    README.md (the model card)  and the files of this package, byte for byte

The code travels along, so that `AutoModel.from_pretrained(EXPORT, trust_remote_code=True)` works where this
project is not installed.
"""

from __future__ import annotations

import errno
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

import sharebert
from exports.cards import model_card
from exports.shapes import without_weights
from exports.weights import read_weights, write_weights
from sharebert.config import ShareBertConfig, ShareBertError
from sharebert.heads import ShareBertForMaskedLM

CONFIG, TOKENIZER, TOKENIZER_CONFIG, CARD = "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"

AUTO_MAP = {
    "AutoConfig": "hub.ShareBertHubConfig",
    "AutoModel": "hub.ShareBertModel",
    "AutoModelForMaskedLM": "hub.ShareBertForMaskedLM",
    "AutoModelForMultipleChoice": "hub.ShareBertForMultipleChoice",
    "AutoModelForQuestionAnswering": "hub.ShareBertForQuestionAnswering",
    "AutoModelForSequenceClassification": "hub.ShareBertForSequenceClassification",
    "AutoModelForTokenClassification": "hub.ShareBertForTokenClassification",
}
"""Where Hugging Face's Auto classes find the code, in the export's own files."""

HUGGING_FACE_KEYS = frozenset(
    {
        "architectures",
        "auto_map",
        "chunk_size_feed_forward",
        "classifier_pooling",
        "dtype",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "transformers_version",
    }
)
"""Keys of a `config.json` saved by transformers that say nothing about the encoder and the MLM head."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def tensor_shapes(config: ShareBertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in an export of such a model."""
    with without_weights():
        model = ShareBertForMaskedLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def write_export(
    out: Path,
    config: ShareBertConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: Path | None = None,
    sections: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write an export, whole or not at all; an export that was there before is replaced.

    Args:
        out: the folder to make.
        config: of the model.
        tensors: by the names of `tensor_shapes(config)`, in any floating dtype, which the export keeps.
        tokenizer: a `tokenizer.json`; None for an export without one.
        sections: what the model card says beyond sizes and loading: heading → text in Markdown.
        metadata: what the safetensors files say about where the tensors come from.
        settings: further keys of `config.json`, which transformers reads. With `id2label`, the export is a
            classifier: `tensors` then hold `classifier.weight` [labels, H] and `classifier.bias` [labels] too.

    Raises ShareBertError: tensors that are not the model's, a tokenizer that does not fit, `out` is something else.
    """
    labels = len((settings or {}).get("id2label", ()))
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, str(out), labels)
    with new_export(out) as folder:
        write_export_files(folder, config, tokenizer, sections, settings)
        write_weights(folder, tensors, metadata)


@contextmanager
def new_export(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, which takes its place when the block ends, and goes if the block raises.

    Raises ShareBertError where the disk is full, and where `out` is there and is no export: nothing else is replaced.
    """
    out = Path(out)
    if out.exists() and not _replaceable(out):
        raise ShareBertError(f"{out}: exists and is no export; choose another folder, or remove it first")
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()  # with the mode that the umask leaves; a folder of tempfile would be for its owner alone
    except OSError as error:
        raise ShareBertError(f"{out}: cannot be made ({error.strerror}: {error.filename})") from error
    try:
        yield folder
        old = folder.with_name(f"{folder.name}.old")
        if out.exists():
            out.replace(old)
        folder.replace(out)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise ShareBertError(f"{out}: cannot be written ({error.strerror}); nothing was left there") from error
        raise


def write_export_files(
    folder: Path,
    config: ShareBertConfig,
    tokenizer: Path | None = None,
    sections: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write everything of an export but its tensors into `folder`; arguments as in `write_export`."""
    pad_token_id = 0 if tokenizer is None else write_tokenizer(folder, tokenizer, config)
    added = {"architectures": [_architecture(config, settings or {})], "auto_map": AUTO_MAP}
    write_json(folder / CONFIG, {**config.to_dict(), **added, "pad_token_id": pad_token_id, **(settings or {})})
    (folder / CARD).write_text(model_card(config, sections or {}), encoding="utf-8")
    for source in sorted(Path(sharebert.__file__).parent.glob("*.py")):
        shutil.copyfile(source, folder / source.name)


def read_config(folder: Path) -> ShareBertConfig:
    """The config of the export in `folder`, or in a `config.json` itself. Raises ShareBertError, naming the file."""
    path = Path(folder) / CONFIG if not Path(folder).is_file() else Path(folder)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShareBertError(f"{path}: missing; is {folder} an export?") from None
    except (ValueError, OSError) as error:
        raise ShareBertError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise ShareBertError(f"{path}: not a mapping of keys to values")
    ours = {
        key: value for key, value in values.items() if key not in HUGGING_FACE_KEYS and not key.endswith("_token_id")
    }
    try:
        return ShareBertConfig.from_dict(ours)
    except ShareBertError as error:
        raise ShareBertError(f"{path}: {error}") from error


def read_export(folder: Path) -> ShareBertForMaskedLM:
    """The model of an export, in float32, on the CPU, in evaluation mode.

    Raises ShareBertError, naming the file: something missing, damaged, or not of the config's shape.
    """
    config = read_config(folder)
    tensors = read_weights(Path(folder))
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, str(folder))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ShareBertError(f"{folder}: tensor '{name}' is {tensor.dtype}, not of a floating dtype")
    with without_weights():
        model = ShareBertForMaskedLM(config)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def check_tensors(shapes: Mapping[str, tuple[int, ...]], config: ShareBertConfig, where: str, labels: int = 0) -> None:
    """Raises ShareBertError, naming `where`, unless names and shapes are exactly those of `config`'s model.

    With `labels`, the model has a classifier of so many labels.
    """
    expected = tensor_shapes(config)
    if labels:
        expected |= {"classifier.weight": (labels, config.hidden_size), "classifier.bias": (labels,)}
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing or unknown:
        parts = [f"{what} {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
                 for what, names in (("lacks", missing), ("has unknown", unknown)) if names]  # fmt: skip
        raise ShareBertError(f"{where}: not the tensors of the model in config.json: {' and '.join(parts)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ShareBertError(
                f"{where}: '{name}' is {list(shapes[name])}, the model in config.json has {list(shape)}"
            )


def load_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` in `path`. Raises ShareBertError, naming the file."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ShareBertError("needs the tokenizers package: pip install tokenizers") from error
    if not path.is_file():
        raise ShareBertError(f"{path}: missing")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise ShareBertError(f"{path}: not readable as a tokenizer.json ({error})") from error


def words_of(tokenizer: Any) -> int:
    """Words of a tokenizer: one more than its highest id."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def write_tokenizer(folder: Path, tokenizer: Path, config: ShareBertConfig) -> int:
    """Write the two files of `tokenizer` (a `tokenizer.json`) for a model; returns the id of [PAD].

    Raises ShareBertError, naming the file: unreadable, another model's, or without the special tokens.
    """
    loaded = load_tokenizer(tokenizer)
    words = words_of(loaded)
    if not 0 <= config.vocab_size - words < config.vocab_pad_multiple:
        raise ShareBertError(
            f"{tokenizer}: {words} words, but the model has {config.vocab_size} (a multiple of "
            f"{config.vocab_pad_multiple}): this is another model's tokenizer"
        )
    lacking = [token for token in SPECIAL_TOKENS.values() if loaded.token_to_id(token) is None]
    if lacking:
        raise ShareBertError(f"{tokenizer}: lacks the special tokens {', '.join(lacking)}")
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


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write `values` as indented JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replaceable(out: Path) -> bool:
    """An empty folder, or an export in either form."""
    if not out.is_dir() or not any(out.iterdir()):
        return out.is_dir()
    try:
        return json.loads((out / CONFIG).read_text(encoding="utf-8"))["model_type"] in ("sharebert", "megatron-bert")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _architecture(config: ShareBertConfig, settings: Mapping[str, Any]) -> str:
    if "id2label" in settings:
        return "ShareBertForSequenceClassification"
    return "ShareBertModel" if config.mlm_head == "none" else "ShareBertForMaskedLM"
