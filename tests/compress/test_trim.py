"""The step `trim`: fewer parameters, the same function, and all of it again for further training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compress_models import tiny_export, tokens_of
from tiny_models import tiny_config
from torch.nn.utils import parameters_to_vector

from compress.measure import counts
from compress.source import open_source
from compress.trim import Trim
from exports.compact import Compact
from exports.export import tensor_shapes
from exports.forms import write_export
from exports.read import load_model, read_export
from sharebert import SIZES, ShareBertConfig
from sharebert.stored import stored_tensors
from sharebert.virtual import used_rows
from sharebert_common.errors import BadInput


def trimmed(folder: Path, **changes: object) -> tuple[Path, Path]:
    source = tiny_export(folder / "source", **changes)
    out = folder / "trimmed"
    out.mkdir()
    Trim().apply(open_source(source), None, out)  # type: ignore[arg-type]
    return source, out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sharing": "eps"},
        {"sharing": "none"},
        {"sharing": "layers"},
        {"mlm_head": "tied"},
        {"attention_scale": "standard"},
        {"branch_gain": 0.4, "learned_branch_gains": True, "intermediate_size": 20, "ffn_pairs": 2},
        {"kept_heads": (0, 2), "kept_columns": tuple(range(20))},
    ],
)
def test_the_logits_stay(tmp_path: Path, changes: dict[str, object]) -> None:
    source, out = trimmed(tmp_path, **changes)
    before, after = load_model(source), load_model(out)
    tokens = tokens_of(before.config)
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    expected = before.logits(tokens, mask)
    assert (after.logits(tokens, mask) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert counts(out)[0] < counts(source)[0]


def test_it_leaves_out_what_it_says_of_the_published_size() -> None:
    config = ShareBertConfig.from_dict({**SIZES["sharebert-small"], "mlm_head": "none"})
    all_tensors = {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(config).items()}
    stored = stored_tensors(all_tensors, used_rows(config, pooler=False), pooler=False)
    before, after = (sum(t.numel() for t in tensors.values()) for tensors in (all_tensors, stored))
    assert before == 4_983_040
    assert (before - after) / before >= 0.044
    assert len(stored["sharebert.factor_linear_all.weight"]) == 2048 - 946
    assert used_rows(config, pooler=True) == 2048 - 808
    pairs = ShareBertConfig.from_dict({**SIZES["sharebert-small"], "ffn_pairs": 2})
    assert used_rows(pairs, pooler=False) == 2048 - 946 + 550


def test_the_file_lacks_what_was_left_out_and_reading_fills_it_in(tmp_path: Path) -> None:
    _, out = trimmed(tmp_path)
    export = read_export(out)
    assert not export.weights.read("sharebert.layers.0.key_bias", 0, 24).any()
    config = json.loads((out / "config.json").read_text())
    assert config["trimmed"] is True
    again = tmp_path / "again"
    write_export(export, again)
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_transformers_loads_it_and_saves_a_whole_copy(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    _, out = trimmed(tmp_path)
    expected = load_model(out)
    remote = {"trust_remote_code": True}
    model = AutoModelForMaskedLM.from_pretrained(out, **remote).eval()
    tokens = tokens_of(expected.config)
    torch.testing.assert_close(model(tokens).logits, expected.logits(tokens))
    model.save_pretrained(tmp_path / "copy")
    copy = AutoModelForMaskedLM.from_pretrained(tmp_path / "copy", **remote).eval()
    assert parameters_to_vector(copy.parameters()).equal(parameters_to_vector(model.parameters()))
    assert "trimmed" not in json.loads((tmp_path / "copy" / "config.json").read_text())


def test_a_dense_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="trim: takes a compact export, this one is dense"):
        Trim().result_form("dense")


def test_a_pooler_that_is_used_is_kept(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="none")
    (tmp_path / "out").mkdir()
    notes = Trim().apply(open_source(source), None, tmp_path / "out")  # type: ignore[arg-type]
    assert notes["pooler_kept"]
    before, after = load_model(source), load_model(tmp_path / "out")
    tokens = tokens_of(tiny_config())
    torch.testing.assert_close(after.sharebert(tokens).pooled, before.sharebert(tokens).pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_keeps_its_function(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is folded is stored in float32: rounded to 16 bits, it would change the hidden states by more."""
    source = tmp_path / "source"
    write_export(read_export(tiny_export(tmp_path / "wide")), source, Compact(dtype))
    out = tmp_path / "trimmed"
    out.mkdir()
    Trim().apply(open_source(source), None, out)  # type: ignore[arg-type]
    before, after = load_model(source), load_model(out)
    tokens = tokens_of(before.config)
    expected = before.sharebert(tokens).hidden
    assert (after.sharebert(tokens).hidden - expected).abs().max() <= 1e-5 * expected.abs().max()
    dtypes = {name: spec.dtype for name, spec in read_export(out).weights.specs.items()}
    assert dtypes["sharebert.layers.0.query_bias"] == torch.float32
    assert dtypes["sharebert.word_embeddings.weight"] == dtype
