"""The step `awq` on dense exports and BERT: the authors' formula by hand, and the file as transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_folders import hub_folder
from numpy.typing import NDArray
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import Tensor

from compress.dense.awq import Awq
from compress.dense.awq_search import Grid, rounded
from compress.dense.pack_quantised import stored, unpacked
from compress.dense.to_dense import ToDense
from compress.measure import counts
from compress.recipe import CompressRecipe
from compress.report import check
from compress.run import compress as run
from compress.source import open_hub_model, open_source
from compress.step import Source
from exports.compact import Compact
from exports.export import Export
from exports.forms import write_export
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

pytest.importorskip("compressed_tensors")

Array = NDArray[np.float32]


def rows(seed: int, count: int = 24) -> Tensor:
    found = torch.randint(5, 250, (count, 16), generator=torch.Generator().manual_seed(seed))
    found[::3, 11:] = 0  # padding
    return found


class FewTools:
    seed = 0

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def calibration(self) -> Tensor:
        return self.tokens

    def say(self, line: str) -> None:
        pass


def dense_folder(folder: Path, seed: int = 0) -> Path:
    """A dense export whose norms have loud channels, as trained models have."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 1200, "num_attention_heads": 4}
    model = tiny_model(seed, mlm_head="tied", factor_size=16, **sizes).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.sharebert.layers:
            for norm in (layer.attention_norm, layer.ffn_norm):
                norm.weight.copy_(torch.exp(torch.randn(64, generator=generator)))
                norm.bias.copy_(0.3 * torch.randn(64, generator=generator))
    compact = folder.parent / f"{folder.name}-compact"
    write_export(Export.of_model(model), compact, Compact())
    ToDense().check(Source(compact, "compact"))
    ToDense().apply(Source(compact, "compact"), FewTools(rows(0)), folder)  # type: ignore[arg-type]
    return folder


def inputs_of(model: Any, name: str, tokens: Tensor) -> Array:
    """What the product `name` reads at real tokens, [tokens, in]."""
    found: list[Tensor] = []
    module = model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _, given: found.append(given[0][tokens != 0]))
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=(tokens != 0).long())
    hook.remove()
    return found[0].numpy()


def pseudo_quantise(w: Array, bits: int, group: int) -> Array:
    """llm-awq's `pseudo_quantize_tensor` without zero points; scales as float16 has them."""
    parts = w.reshape(-1, group)
    largest = 2 ** (bits - 1) - 1
    scales = np.maximum(np.abs(parts).max(1, keepdims=True), 1e-5) / largest
    scales = scales.astype(np.float16).astype(np.float32)
    found: Array = np.clip(np.round(parts / scales), -largest, largest) * scales
    return found.reshape(w.shape)


def test_the_factors_of_a_layer_are_llm_awqs(tmp_path: Path) -> None:
    """s = mean|x|^α / √(max·min), α by grid search on the output error, computed from the activations themselves."""
    source = dense_folder(tmp_path / "dense")
    tokens, bits, group = rows(1), 3, 32
    model = open_hub_model(source)
    x = inputs_of(model, "encoder.layer.0.attention.self.query", tokens)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    start = "encoder.layer.0.attention."
    weights = [state[f"{start}self.{name}.weight"] for name in ("query", "key", "value")]
    mean = np.abs(x).mean(0)
    best = (np.inf, 0.0, np.ones(1, np.float32))
    for ratio in range(20):
        s = np.maximum(mean ** (ratio / 20), 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        error = sum(float(((x @ (pseudo_quantise(w * s, bits, group) / s - w).T) ** 2).sum()) for w in weights)
        best = min(best, (error, ratio / 20, s), key=lambda found: found[0])
    _, alpha, s = best
    assert 0 < alpha < 1
    said = Awq(bits=bits, group=group, rest="fp32", clip=False).apply(
        Source(source, "dense"),
        FewTools(tokens),  # type: ignore[arg-type]
        tmp_path / "out",
    )
    assert said["alphas"][f"{start}self.query"] == alpha
    found = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(found[f"bert.{start}ln.weight"], state[f"{start}ln.weight"] / s, rtol=1e-5)
    np.testing.assert_allclose(found[f"bert.{start}ln.bias"], state[f"{start}ln.bias"] / s, rtol=1e-5, atol=1e-7)
    values = unpacked(json.loads((tmp_path / "out" / "config.json").read_text()), found)
    query = values[f"bert.{start}self.query.weight"].numpy()
    np.testing.assert_allclose(query, pseudo_quantise(weights[0] * s, bits, group), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_transformers_reads_codes_times_scales(tmp_path: Path, bits: int) -> None:
    """By its own loader; the numbers are recomputed by numpy from the bits of the file."""
    from transformers import AutoModelForMaskedLM

    source, out = dense_folder(tmp_path / "dense"), tmp_path / "out"
    Awq(bits=bits, group=32).apply(Source(source, "dense"), FewTools(rows(1)), out)  # type: ignore[arg-type]
    model = AutoModelForMaskedLM.from_pretrained(out, dtype=torch.float32).eval()
    tokens = rows(2)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        expected = open_hub_model(source, "MaskedLM")(input_ids=tokens).logits
    difference = float((logits - expected).norm() / expected.norm())
    assert difference < {3: 0.5, 4: 0.2, 8: 0.02}[bits]
    stored_tensors = load_file(out / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense"
    packed = stored_tensors[f"{name}.weight_packed"].numpy()
    stream = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")[:, : 128 * bits]
    codes = stream.reshape(64, 128, bits) @ (1 << np.arange(bits)) - 2 ** (bits - 1)
    scales = stored_tensors[f"{name}.weight_scale"].float().numpy().repeat(32, axis=1)
    np.testing.assert_allclose(model.get_submodule(name).weight.detach(), codes * scales, rtol=1e-6)
    assert counts(out) == (counts(source)[0], pytest.approx(counts(source)[1], rel=0.3))
    assert (tmp_path / "out" / "README.md").read_text().count("## Quantised") == 1


def test_it_beats_plain_rounding_on_other_rows(tmp_path: Path) -> None:
    """For every seed, the hidden states are nearer to those of fp32."""
    for seed in range(3):
        source = dense_folder(tmp_path / f"dense-{seed}", seed)
        given = {"input_ids": rows(100 + seed), "attention_mask": (rows(100 + seed) != 0).long()}
        errors = {}
        with torch.no_grad():
            expected = open_hub_model(source)(**given).last_hidden_state
            for name, on in (("awq", True), ("plain", False)):
                out = tmp_path / f"{name}-{seed}"
                Awq(bits=3, group=32, scale=on, clip=on).apply(Source(source, "dense"), FewTools(rows(1)), out)  # type: ignore[arg-type]
                errors[name] = (open_hub_model(out)(**given).last_hidden_state - expected).norm()
        assert errors["awq"] < errors["plain"]


def test_in_bert_only_the_value_takes_factors(tmp_path: Path) -> None:
    """Its residual stream reads the norms. In 8 bits the function stays."""
    source, out = hub_folder(tmp_path / "bert", "MaskedLM", hidden_size=64), tmp_path / "out"
    step = Awq(bits=8, group=32, rest="fp32")
    step.check(open_source(source))
    said = step.apply(open_source(source), FewTools(rows(1)), out)  # type: ignore[arg-type]
    assert set(said["alphas"]) == {f"encoder.layer.{n}.attention.output.dense" for n in range(2)}
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for name in before:
        if "LayerNorm" in name:
            assert after[name].equal(before[name]), name
    tokens = rows(2)
    with torch.no_grad():
        ours, theirs = (open_hub_model(folder, "MaskedLM")(input_ids=tokens).logits for folder in (out, source))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_is_exact_for_odd_numbers_of_rows(bits: int) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(bits))
    grid = Grid(bits, 32)
    codes = rounded(weight, grid)
    config = {"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}}}
    assert unpacked(config, stored("w", codes, grid))["w.weight"].equal(codes.values())


def test_a_recipe_and_its_check(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "bert", "MaskedLM", hidden_size=64)
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: [{awq: {group: 32, scale: false, clip: false}}]\nreport: {latency: []}\n")
    run(source, load(CompressRecipe, file), tmp_path / "out")
    assert "1 awq: parameters, nonzeros, bytes, gzip_bytes are right" in check(tmp_path / "out")
    with pytest.raises(BadInput, match="is quantised already"):
        Awq(group=32).check(open_source(tmp_path / "out"))


def test_what_it_cannot_take_is_one_line(tmp_path: Path) -> None:
    source = open_source(hub_folder(tmp_path / "bert", ""))
    with pytest.raises(BadInput, match=r"awq\.group: 128 does not divide hidden_size, which is 32"):
        Awq().check(source)
    with pytest.raises(BadInput, match="awq: takes a dense export or a BERT of Hugging Face, this one is compact"):
        Awq().check(Source(tmp_path, "compact"))
    config = json.loads((source.folder / "config.json").read_text())
    (source.folder / "config.json").write_text(json.dumps(config | {"model_type": "distilbert"}))
    with pytest.raises(BadInput, match="awq: takes the model types bert, megatron-bert, this one is distilbert"):
        Awq(group=32).check(source)
