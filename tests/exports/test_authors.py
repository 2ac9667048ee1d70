"""Parity with the authors' own implementation, on a tiny model that it made (golden/), and their checkpoint files.

The golden folder holds a checkpoint under the authors' names and, evaluated in float64 by their code, hidden
states, pooled output, logits, loss and the gradient of every parameter.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_paths import PATHS, kernels_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from exports.authors import import_authors
from exports.read import load_model
from sharebert import ShareBertForMaskedLM
from sharebert_common.errors import BadInput

GOLDEN = Path(__file__).parent / "golden"

OURS = {
    "bert.embeddings.": "sharebert.",
    "bert.encoder.FinalLayerNorm.": "sharebert.final_norm.",
    "bert.encoder.layer.": "sharebert.layers.",
    ".PreAttentionLayerNorm.": ".attention_norm.",
    ".PostAttentionLayerNorm.": ".ffn_norm.",
    ".block.self.": ".",
    ".block.output.bias": ".attention_output_bias",
    ".intermediate.bias": ".intermediate_bias",
    ".output.bias": ".output_bias",
    "bert.pooler.bias": "sharebert.pooler_bias",
    "cls.predictions.transform.LayerNorm.": "mlm_head.norm.",
    "cls.predictions.transform.dense_act.": "mlm_head.",
    "cls.predictions.decoder.": "mlm_head.decoder.",
}


def our_name(theirs: str) -> str:
    for old, new in OURS.items():
        theirs = theirs.replace(old, new)
    return theirs


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture
def imported(tmp_path: Path) -> ShareBertForMaskedLM:
    import_authors(GOLDEN, tmp_path / "export")
    return load_model(tmp_path / "export")


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.detach().double() - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
@pytest.mark.parametrize("path", PATHS)
def test_parity(
    imported: ShareBertForMaskedLM, expected: dict[str, Tensor], dtype: torch.dtype, bar: float, path: str
) -> None:
    with kernels_of(path):
        check_parity(imported, expected, dtype, bar)


def check_parity(imported: ShareBertForMaskedLM, expected: dict[str, Tensor], dtype: torch.dtype, bar: float) -> None:
    model = imported.to(dtype)
    inputs = expected["input_ids"], expected["attention_mask"], expected["token_type_ids"]
    labels = expected["labels"].flatten()
    positions = (labels >= 0).nonzero().flatten()

    encoded = model.sharebert(*inputs)
    assert encoded.pooled is not None
    assert difference(encoded.hidden, expected["last_hidden_state"]) <= bar
    assert difference(encoded.pooled, expected["pooled_output"]) <= bar
    assert difference(model.logits(*inputs), expected["logits"]) <= bar

    weights = torch.full((len(positions),), 1 / len(positions), dtype=dtype)
    output = model(*inputs, positions=positions, labels=labels[positions], loss_weights=weights)
    assert difference(output.loss_sum, expected["loss"]) <= bar
    output.loss_sum.backward()
    parameters = dict(model.named_parameters())
    theirs = {our_name(k.removeprefix("grad.")): v for k, v in expected.items() if k.startswith("grad.")}
    assert not theirs.pop("cls.predictions.bias").any()  # never read by their forward pass
    assert theirs.keys() == parameters.keys()
    for name, gradient in theirs.items():
        ours = parameters[name].grad
        if not gradient.any():
            assert ours is None or not ours.any(), name
        elif name.endswith("key_bias"):
            # Softmax does not see a key bias: its gradient is 0, and theirs (1e-18) is rounding.
            query = theirs[name.replace("key", "query")]
            assert gradient.abs().max() <= 1e-12 * query.abs().max()
            assert ours is not None
            assert ours.abs().max() <= bar * query.abs().max()
        else:
            assert ours is not None
            assert difference(ours, gradient) <= bar, name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the authors' folder, to be changed."""
    copy = tmp_path / "authors"
    copy.mkdir()
    shutil.copy(GOLDEN / "config.json", copy)
    shutil.copy(GOLDEN / "authors_checkpoint.safetensors", copy / "model.safetensors")
    return copy


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_pickled_checkpoint_in_half_precision(folder: Path, tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in tensors(folder).items()}
    (folder / "model.safetensors").unlink()
    torch.save(halves, folder / "pytorch_model.bin")
    import_authors(folder, tmp_path / "export")
    for name, tensor in load_model(tmp_path / "export").named_parameters():
        theirs = next(value for key, value in halves.items() if our_name(key) == name)
        assert torch.equal(tensor, theirs.float()), name


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_pickled_code_is_never_run(folder: Path, tmp_path: Path, save: object) -> None:
    bomb = tmp_path / "went off"
    values = {**tensors(folder), "bomb": Bomb(bomb)}
    (folder / "model.safetensors").unlink()
    save(values, folder / "pytorch_model.bin")  # type: ignore[operator]
    with pytest.raises(BadInput, match=r"pytorch_model.bin: holds more than tensors"):
        import_authors(folder, tmp_path / "export")
    assert not bomb.exists()
    assert not (tmp_path / "export").exists()


def test_encoder_alone(folder: Path, tmp_path: Path) -> None:
    encoder = {name: tensor for name, tensor in tensors(folder).items() if not name.startswith("cls.")}
    save_file(encoder, folder / "model.safetensors")
    import_authors(folder, tmp_path / "export")
    assert load_model(tmp_path / "export").config.mlm_head == "none"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_models_are_refused(folder: Path, tmp_path: Path) -> None:
    def refuses(says: str) -> None:
        with pytest.raises(BadInput, match=says) as caught:
            import_authors(folder, tmp_path / "export")
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)

    change_config(folder, encoder_ln_mode="post-ln")
    refuses("encoder_ln_mode: 'post-ln' is not supported")
    change_config(folder, encoder_ln_mode="pre-ln", num_hidden_layers=3)
    refuses("lacks sharebert.layers.2")
    change_config(folder, num_hidden_layers=2, num_attention_heads=5)
    refuses(r"config.json: num_attention_heads \(5\) must divide")
    change_config(folder, num_attention_heads=3, vocab_size=400)
    refuses("config.json: vocab_size: 400, but the embedding has 521 rows")
    (folder / "config.json").write_text("{")
    refuses("config.json: not readable as JSON")
    (folder / "config.json").unlink()
    refuses("config.json: missing")

    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    refuses("model.safetensors: not readable as safetensors")
    (folder / "model.safetensors").write_bytes(whole)
    save_file(tensors(folder) | {"bert.extra": torch.zeros(1)}, folder / "model.safetensors")
    refuses("'bert.extra' is not a tensor of the authors' model")
    (folder / "second.safetensors").write_bytes(whole)
    refuses("more than one .safetensors file")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    refuses("neither pytorch_model.bin nor a .safetensors file")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut short")
    refuses("pytorch_model.bin: not readable")
