"""Packed tensors: bits without gaps, the three formulas, and the weights recomputed by numpy from the file."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_models import tiny_export, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tiny_models import tiny_model

from compress.quantise.hessians import collect, of_embedding
from compress.quantise.rounding import searched
from compress.quantise.step import EMBEDDING, PROJECTION, Quantise, frequent_rows
from compress.source import open_source
from exports.export import Export
from exports.forms import write_export
from exports.read import load_model, read_export
from exports.rounding import codes_of, grid, to_nearest
from sharebert.packed import Packing, code, decode, pack_bits, unpack_bits
from sharebert_common.errors import BadInput


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 67), st.integers(0, 2**32))
def test_bits_are_packed_exactly(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    assert unpack_bits(packed, bits, count).equal(codes)
    stream = np.unpackbits(packed.numpy(), bitorder="little")[: count * bits].reshape(count, bits)
    assert (stream @ (1 << np.arange(bits)) == codes.numpy()).all()
    assert decode(code(codes, bits), bits, count).equal(codes)


def test_huffman_gets_near_the_entropy() -> None:
    codes = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).mul(1.2).round().clamp(-4, 3).add(4)
    counts = torch.bincount(codes.long()).double() / len(codes)
    entropy = float(-(counts[counts > 0] * counts[counts > 0].log2()).sum())
    assert entropy < len(code(codes, 3)) * 8 / len(codes) < 1.03 * entropy


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_each_scheme_is_its_formula(bits: int) -> None:
    row = torch.tensor([[-1.3, 0.4, 2.1, 0.0, -0.2]])
    low, high = -1.3, 2.1

    def half(x: float) -> float:
        return float(np.float16(x))

    scales, offsets = grid(row, Packing((1, 5), bits, "symmetric"))
    s = half(2.1 / (2 ** (bits - 1) - 1))
    assert (float(scales), offsets) == (pytest.approx(s, rel=2e-3), None)
    codes = codes_of(row, Packing((1, 5), bits, "symmetric"), scales, None)
    assert codes.tolist() == [[round(x / float(scales)) + 2 ** (bits - 1) for x in row[0].tolist()]]

    scales, offsets = grid(row, Packing((1, 5), bits, "asymmetric"))
    assert float(scales) == pytest.approx(half((high - low) / (2**bits - 1)), rel=2e-3)
    assert float(offsets) == pytest.approx(half(low), rel=2e-3)

    scales, offsets = grid(row, Packing((1, 5), bits, "midpoint"))
    sigma, gamma = float(scales), float(offsets)
    assert sigma == pytest.approx((high - low) / 2**bits, rel=2e-3)
    assert gamma == pytest.approx((high + low) / 2, rel=2e-3)
    codes = codes_of(row, Packing((1, 5), bits, "midpoint"), scales, offsets)
    expected = [round((x - gamma) / sigma) + 2 ** (bits - 1) for x in row[0].tolist()]
    assert codes.tolist() == [[min(2**bits - 1, q) for q in expected]]


def test_the_search_is_never_worse_than_the_whole_range() -> None:
    matrix = torch.randn(20, 37, generator=torch.Generator().manual_seed(0)) ** 3
    for scheme in ("symmetric", "asymmetric", "midpoint"):
        for group in (-1, 0, 8):
            packing = Packing((20, 37), 4, scheme, group)
            plain, best = (to_nearest(matrix, packing, keep) for keep in (None, searched(matrix, packing)))
            errors = [float((found.values(packing) - matrix).norm()) for found in (plain, best)]
            assert errors[1] < errors[0] if group >= 0 else errors[1] <= errors[0]


CASES: list[dict[str, Any]] = [
    {"bits": 8},
    {"bits": 4, "scheme": "symmetric", "group": -1},
    {"bits": 3, "scheme": "midpoint", "group": 5, "coded": True},
    {"bits": 4, "small_bits": 6, "vectors": 8, "centre": True, "frequent": 7, "coded": True},
    {"bits": 5, "rotate": True},
    {"bits": 4, "rounding": "nearest", "rotate": True, "centre": True, "group": 3},
    {"bits": 4, "rounding": "gptq"},
    {"bits": 4, "rounding": "gptq", "rotate": True, "small_bits": 6, "centre": True, "frequent": 7, "group": 3},
]


class Rows:
    """Tools with calibration rows alone."""

    seed = 3

    def calibration(self) -> torch.Tensor:
        return tokens_of(None, rows=50)  # type: ignore[arg-type]


def quantised(tmp_path: Path, keys: dict[str, Any], **changes: Any) -> tuple[Path, Path]:
    source, out = tiny_export(tmp_path / "source", **changes), tmp_path / "out"
    out.mkdir()
    Quantise(**keys).apply(open_source(source), Rows(), out)  # type: ignore[arg-type]
    return source, out


def by_numpy(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a packed export as docs and `sharebert/packed.py` describe the file, without our code."""
    file = load_file(folder / "model.safetensors")
    packing = json.loads((folder / "config.json").read_text())["packing"]

    def matrix(name: str, entry: dict[str, Any]) -> np.ndarray:
        shape, bits = entry["shape"], entry["bits"]
        rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], int(np.prod(shape[1:])))
        if entry["coded"]:
            together = 8 // bits
            symbols = np.frombuffer(zlib.decompress(file[f"{name}.codes"].tobytes(), wbits=-15), np.uint8)
            q = ((symbols[:, None] >> (bits * np.arange(together))) & (2**bits - 1)).ravel()
        else:
            stream = np.unpackbits(file[f"{name}.codes"], bitorder="little")[: rows * columns * bits]
            q = stream.reshape(-1, bits) @ (1 << np.arange(bits))
        q = q[: rows * columns].reshape(rows, columns).astype(np.float64)
        group = entry["group"]
        index = np.arange(columns) // group if group > 0 else np.zeros(columns, int)
        spread = lambda a: np.broadcast_to(a.astype(np.float64)[:, index], (rows, columns))  # noqa: E731
        zero = 0 if entry["scheme"] == "asymmetric" else 2 ** (bits - 1)
        w = (q - zero) * spread(file[f"{name}.scales"])
        if entry["scheme"] != "symmetric":
            w = w + spread(file[f"{name}.offsets"])
        if entry["exact"]:
            inner = {"shape": [entry["exact"], columns], "bits": 8, "coded": False, "group": 0, "scheme": "asymmetric"}
            w[file[f"{name}.exact_rows"]] = matrix(f"{name}.exact", inner | {"exact": 0, "centred": False})
        if entry["centred"]:
            w = w + file[f"{name}.mean"].astype(np.float64)
        return w.reshape(shape)

    found = {name: matrix(name, entry) for name, entry in packing["tensors"].items()}
    if packing["rotated"]:
        for name in ("sharebert.word_embeddings.weight", "sharebert.factor_linear_all.weight"):
            found[name] = found[name] @ file["packing.rotation"].astype(np.float64).T
    return found | {name: value for name, value in file.items() if value.dtype == np.float16 and name.count(".") and
                    not name.endswith(("scales", "offsets", ".mean", "rotation"))}  # fmt: skip


@pytest.mark.parametrize("keys", CASES, ids=str)
def test_the_model_uses_what_the_file_says(tmp_path: Path, keys: dict[str, Any]) -> None:
    source, out = quantised(tmp_path, keys)
    model, expected = load_model(out).state_dict(), by_numpy(out)
    assert expected.keys() == model.keys()
    for name, tensor in model.items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=2e-5, atol=2e-6, err_msg=name)
    plain = load_model(source).state_dict()
    error = (model["sharebert.word_embeddings.weight"] - plain["sharebert.word_embeddings.weight"]).norm()
    assert 0 < error < 0.25 * plain["sharebert.word_embeddings.weight"].norm()


def test_gptq_in_the_step_costs_less_than_the_nearest(tmp_path: Path) -> None:
    """Measured by what an error costs, on the model before: the step hands each row its own Hessian."""
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    model, tokens = load_model(source), Rows().calibration()
    statistics = collect(model, tokens, tokens > 0)
    before = {name: model.get_parameter(name).detach() for name in (EMBEDDING, PROJECTION)}
    costs = {}
    for rounding in ("search", "gptq"):
        out = tmp_path / rounding
        out.mkdir()
        Quantise(bits=3, small_bits=8, rounding=rounding).apply(open_source(source), Rows(), out)  # type: ignore[arg-type]
        error = load_model(out).get_parameter(EMBEDDING).detach() - before[EMBEDDING]
        hessians = of_embedding(model, statistics, before[PROJECTION])(slice(0, len(error)))
        costs[rounding] = float(torch.einsum("vf,vfg,vg->", error, hessians, error))
    assert costs["gptq"] < 0.97 * costs["search"]


def test_transformers_loads_it(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    _, out = quantised(tmp_path, CASES[3], mlm_head="tied")
    expected = load_model(out)
    model = AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=True).eval()
    tokens = tokens_of(expected.config)
    torch.testing.assert_close(model(tokens).logits, expected.logits(tokens))
    model.save_pretrained(tmp_path / "copy")
    assert "packing" not in json.loads((tmp_path / "copy" / "config.json").read_text())
    copy = load_model(tmp_path / "copy").state_dict()
    assert all(tensor.equal(copy[name]) for name, tensor in expected.state_dict().items())


def test_trimmed_and_packed(tmp_path: Path) -> None:
    from compress.trim import Trim

    source = tiny_export(tmp_path / "source")
    for name in ("trimmed", "out"):
        (tmp_path / name).mkdir()
    Trim().apply(open_source(source), None, tmp_path / "trimmed")  # type: ignore[arg-type]
    Quantise(bits=8, vectors=8).apply(open_source(tmp_path / "trimmed"), Rows(), tmp_path / "out")  # type: ignore[arg-type]
    tokens = tokens_of(read_export(source).config)
    before, after = (load_model(folder).logits(tokens) for folder in (source, tmp_path / "out"))
    assert (after - before).abs().max() < 0.1 * before.abs().max()
    file = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in file if "key_bias" in name]


@pytest.mark.parametrize("keys", [{"rounding": "gptq"}, {"awq": True}, {"frequent": 7}])
def test_padding_in_calibration_rows_changes_nothing(tmp_path: Path, keys: dict[str, Any]) -> None:
    class Padded(Rows):
        def calibration(self) -> torch.Tensor:
            return torch.nn.functional.pad(super().calibration(), (0, 7))

    source, files = tiny_export(tmp_path / "source"), []
    for rows in (Rows(), Padded()):
        out = tmp_path / type(rows).__name__
        out.mkdir()
        Quantise(bits=4, **keys).apply(open_source(source), rows, out)  # type: ignore[arg-type]
        files.append(load_model(out).state_dict())
    for name, tensor in files[0].items():
        same = (tensor - files[1][name]).abs() < 1e-3 * tensor.abs().max()
        assert same.float().mean() > 0.99, name  # a number at the edge of two codes may take the other one


def test_the_rows_of_frequent_words_keep_8_bits(tmp_path: Path) -> None:
    source, out = quantised(tmp_path, {"bits": 3, "frequent": 7})
    rows = frequent_rows(Rows().calibration().flatten(), 256, 7)
    counts = torch.bincount(Rows().calibration().flatten(), minlength=256)
    assert counts[rows].min() >= counts[[n for n in range(256) if n not in rows.tolist()]].max()
    name = "sharebert.word_embeddings.weight"
    error = (load_model(out).state_dict()[name] - load_model(source).state_dict()[name]).norm(dim=1)
    assert error[rows].max() < 0.2 * error.median()


@pytest.mark.parametrize("damage", ["missing", "short", "config"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    from safetensors.numpy import save_file

    _, out = quantised(tmp_path, {"bits": 4, "coded": damage == "short"})
    file, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    name = "sharebert.word_embeddings.weight"
    if damage == "missing":
        del file[f"{name}.scales"]
    elif damage == "short":
        file[f"{name}.codes"] = file[f"{name}.codes"][:-40]
    else:
        config["packing"]["tensors"][name]["shape"] = [250, 9]
    save_file(file, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=name):
        load_model(out)


@pytest.mark.parametrize("sharing", ["eps", "layers", "none"])
def test_every_way_to_share_is_packed(tmp_path: Path, sharing: str) -> None:
    source, out = quantised(tmp_path, {"bits": 8}, sharing=sharing)
    tokens = tokens_of(read_export(source).config)
    before, after = (load_model(folder).logits(tokens) for folder in (source, out))
    assert (after - before).abs().max() < 0.05 * before.abs().max()
    with pytest.raises(BadInput, match=rf"quantise\.rotate: .* sharing: {sharing} has none"):
        Quantise(rotate=True).check(open_source(source))
    with pytest.raises(BadInput, match=r"quantise\.rounding: gptq is for sharing: veps"):
        Quantise(rounding="gptq").check(open_source(source))


def test_gains_and_pairs_are_packed_by_what_needs_no_input(tmp_path: Path) -> None:
    gains = {"branch_gain": 0.4, "learned_branch_gains": True}
    source, out = quantised(tmp_path, {"bits": 8}, intermediate_size=20, ffn_pairs=2, **gains)
    tokens = tokens_of(read_export(source).config)
    before, after = (load_model(folder).logits(tokens) for folder in (source, out))
    assert (after - before).abs().max() < 0.05 * before.abs().max()
    for step in (Quantise(rounding="gptq"), Quantise(awq=True)):
        with pytest.raises(BadInput, match="nor with ffn_pairs; use search"):
            step.check(open_source(source))


def test_arguments_that_change_the_config_reach_a_packed_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    _, out = quantised(tmp_path, {"bits": 8})
    model = AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True, num_labels=5)
    assert model.classifier.weight.shape == (5, 24)


@pytest.mark.parametrize(
    ("value", "message"),
    [(3e7, "word_embeddings.weight has numbers so large"), (float("nan"), "word_embeddings.weight has .*NaN")],
)
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_numbers_that_float16_cannot_scale_are_refused(tmp_path: Path, scheme: Any, value: float, message: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.sharebert.word_embeddings.weight[7, 2] = value
    write_export(Export.of_model(model), tmp_path / "source")
    with pytest.raises(BadInput, match=message):
        Quantise(scheme=scheme).apply(open_source(tmp_path / "source"), None, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_vectors_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.sharebert.final_norm.weight[0] = 1e5
    write_export(Export.of_model(model), tmp_path / "source")
    with pytest.raises(BadInput, match=r"final_norm\.weight has numbers above the range of float16; use vectors: 8"):
        Quantise().apply(open_source(tmp_path / "source"), None, tmp_path / "out")  # type: ignore[arg-type]


def test_a_new_model_of_a_packed_export_does_not_claim_to_be_packed(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    source = tiny_export(tmp_path / "source")
    Quantise().apply(open_source(source), None, tmp_path / "packed")  # type: ignore[arg-type]
    config = AutoConfig.from_pretrained(tmp_path / "packed", trust_remote_code=True)
    new = AutoModel.from_config(config, trust_remote_code=True)
    new.save_pretrained(tmp_path / "saved")
    assert "packing" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again.sharebert.word_embeddings.weight.equal(new.sharebert.word_embeddings.weight)
