"""The tensor files of an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from exports.tensor_file import Spec
from exports.weight_files import INDEX, plan_files, read_weights, stream_weights, write_weights
from exports.weight_source import TensorWeights
from sharebert_common.errors import BadInput

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.randn(5, 2).T,  # not contiguous
    "c": torch.randn(7).bfloat16(),
    "d": torch.tensor(1.5, dtype=torch.float16),
}


def same(read: dict[str, Tensor]) -> bool:
    return read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)


def test_one_file_round_trips_with_its_metadata(tmp_path: Path) -> None:
    write_weights(tmp_path, TensorWeights(TENSORS), {"run": "out/run", "step": "7"})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert same(read_weights(tmp_path))
    assert same(load_file(tmp_path / "model.safetensors"))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["step"] == "7"
    assert json.loads(metadata["crc32"]).keys() == TENSORS.keys()


def test_large_models_take_several_files_and_an_index(tmp_path: Path) -> None:
    write_weights(tmp_path, TensorWeights(TENSORS), max_file_bytes=60)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"]["b"] == "model-00002-of-00002.safetensors"
    assert index["metadata"]["total_size"] == 48 + 40 + 14 + 2
    assert same(read_weights(tmp_path))


def test_tensors_of_any_dtype_are_aligned(tmp_path: Path) -> None:
    """Readers map them: one that begins between two of its values could not be viewed."""
    tensors = {
        "bytes": torch.arange(3, dtype=torch.int8),
        "halves": torch.ones(3, dtype=torch.float16),
        "floats": torch.arange(5.0),
    }
    write_weights(tmp_path, TensorWeights(tensors))
    for read in (read_weights(tmp_path), load_file(tmp_path / "model.safetensors")):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_stream_in_pieces_is_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "pieces").mkdir()
    tensors = {"a": torch.randn(7, 3), "b": torch.randn(5)}
    write_weights(tmp_path / "whole", TensorWeights(tensors), {"step": "3"})
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    pieces = [(name, piece) for name, tensor in tensors.items() for piece in tensor.double().view(-1).split(4)]
    stream_weights(tmp_path / "pieces", specs, pieces, {"step": "3"})
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "pieces/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="'a' needs 1 more values, but the next piece is 4 values of 'b'"):
        stream_weights(tmp_path / "pieces", specs, [("a", torch.zeros(20)), ("b", torch.zeros(4))])


def test_a_tensor_larger_than_a_file_has_one_of_its_own() -> None:
    files = plan_files({"a": 10, "b": 100, "c": 10}, max_file_bytes=60)
    assert list(files.values()) == [["a"], ["b"], ["c"]]


def test_every_damaged_byte_is_found_and_the_file_named(tmp_path: Path) -> None:
    write_weights(tmp_path, TensorWeights(TENSORS))
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    data_start = 8 + int.from_bytes(whole[:8], "little")
    for place in (data_start, data_start + 60, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(BadInput, match=r"model.safetensors: damaged \(the checksum of '[abcd]'"):
            read_weights(tmp_path)
    for cut in (whole[:-1], whole[:20], b"", b"\xff" * 100):
        path.write_bytes(cut)
        with pytest.raises(BadInput, match=r"model.safetensors: not readable as safetensors"):
            read_weights(tmp_path)
    path.unlink()
    with pytest.raises(BadInput, match=r"model.safetensors: missing"):
        read_weights(tmp_path)


def test_index_that_is_wrong(tmp_path: Path) -> None:
    write_weights(tmp_path, TensorWeights(TENSORS), max_file_bytes=60)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match=r"model-00002-of-00002.safetensors: missing"):
        read_weights(tmp_path)
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../elsewhere.safetensors"}}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(BadInput, match=INDEX):
            read_weights(tmp_path)
