"""An export: what it holds, that it round-trips, and that it is whole or refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model, tiny_tokenizer

import sharebert
import sharebert_cli
from exports.export import Export, tensor_shapes
from exports.forms import new_export, write_export
from exports.kinds import MaskedLM
from exports.read import load_model, read_config
from exports.weight_source import TensorWeights
from sharebert import ShareBertForMaskedLM
from sharebert_common.errors import BadInput


def export(model: ShareBertForMaskedLM, out: Path, tokenizer: Path | None = None) -> Path:
    write_export(Export.of_model(model, tokenizer=tokenizer, card_sections={"Data": "Made-up words."}), out)
    return out


@pytest.mark.parametrize("head", ["untied", "tied", "none"])
@pytest.mark.parametrize("sharing", ["veps", "eps"])
def test_round_trip(tmp_path: Path, head: str, sharing: str) -> None:
    model = tiny_model(mlm_head=head, sharing=sharing)
    again = load_model(export(model, tmp_path / "export"))
    assert again.config == model.config == read_config(tmp_path / "export")
    assert not again.training
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert b.requires_grad


def test_gains_and_pairs_are_in_the_export(tmp_path: Path) -> None:
    options = {"vocab_size": 500, "ffn_pairs": 2, "branch_gain": 0.4, "learned_branch_gains": True}
    model = tiny_model(**options).eval()
    out = export(model, tmp_path / "export")
    assert json.loads((out / "config.json").read_text()).items() >= options.items() - {("vocab_size", 500)}
    assert "| values of the 8 generated matrices | 6,144 |" in (out / "README.md").read_text()
    tokens = torch.randint(5, 250, (2, 9))
    assert torch.equal(load_model(out).logits(tokens), model.logits(tokens))


@pytest.mark.parametrize(
    ("sharing", "said"),
    [("none", "matrices of its own, as in BERT"), ("layers", "one set of weight matrices, as ALBERT's")],
)
def test_the_card_of_a_peer_speaks_of_its_own_matrices(tmp_path: Path, sharing: str, said: str) -> None:
    card = (export(tiny_model(sharing=sharing), tmp_path / "export") / "README.md").read_text()
    assert said in card
    assert "six matrices of a layer" in card
    assert "generated" not in card
    assert "(NONE)" not in card


def test_holds_everything(tmp_path: Path) -> None:
    model = tiny_model()
    out = export(model, tmp_path / "export", tiny_tokenizer(tmp_path))
    code = {path.name: path.read_bytes() for path in Path(sharebert.__file__).parent.glob("*.py")}
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files.keys() == code.keys() | {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"
    }  # fmt: skip
    assert all(files[name] == content for name, content in code.items())
    assert files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()
    config = json.loads(files["config.json"])
    assert config.items() >= model.config.to_dict().items()
    for target in config["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}(".encode() in code[f"{module}.py"]
    assert json.loads(files["tokenizer_config.json"])["mask_token"] == "[MASK]"
    card = files["README.md"].decode()
    for part in ("| vocabulary | 256 ", "## Data\n\nMade-up words.\n", "trust_remote_code=True", "fill-mask"):
        assert part in card
    parameters = sum(p.numel() for p in model.parameters())
    assert f"| {parameters:,} |" in card


def test_half_precision_is_kept_in_the_file_and_read_as_float32(tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    again = load_model(export(model, tmp_path / "export"))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.float(), b)
    size = (tmp_path / "export/model.safetensors").stat().st_size
    assert size < 1.5 * sum(p.nbytes for p in model.parameters())


def test_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    export(tiny_model(seed=0), tmp_path / "export")
    second = tiny_model(seed=1)
    export(second, tmp_path / "export")
    assert torch.equal(load_model(tmp_path / "export").sharebert.pooler_bias, second.sharebert.pooler_bias)
    (tmp_path / "empty").mkdir()
    export(second, tmp_path / "empty")

    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    for path in (tmp_path / "home", tmp_path / "home/letter.txt", tmp_path / "bert"):
        with pytest.raises(BadInput, match="exists and is no export"):
            export(second, path)
    assert (tmp_path / "home/letter.txt").read_text() == "dear"
    (tmp_path / "export/__pycache__").mkdir()
    (tmp_path / "export/model.onnx.data").touch()  # the weights of a large ONNX file
    export(second, tmp_path / "export")
    assert not (tmp_path / "export/__pycache__").exists()
    assert not (tmp_path / "export/model.onnx.data").exists()
    for name in ("checkpoint-500", "notes.txt"):  # as beside a model that was trained further
        (tmp_path / "export" / name).mkdir()
        with pytest.raises(BadInput, match=f"holds {name} beside an export"):
            export(second, tmp_path / "export")
        (tmp_path / "export" / name).rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "empty", "export", "home"]


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    def begin_and_stop() -> None:
        with new_export(tmp_path / "export") as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin_and_stop()
    assert not any(tmp_path.iterdir())


def test_tensors_of_another_model_are_not_written(tmp_path: Path) -> None:
    tensors = tiny_model().state_dict()
    tensors["sharebert.pooler_bias"] = torch.zeros(3)
    with pytest.raises(BadInput, match=r"'sharebert.pooler_bias' is \[3\], the model in config.json has \[24\]"):
        write_export(Export(tiny_config(), MaskedLM(), TensorWeights(tensors)), tmp_path / "export")
    del tensors["sharebert.pooler_bias"]
    tensors["more"] = torch.zeros(3)
    with pytest.raises(BadInput, match=r"lacks sharebert.pooler_bias and has unknown more"):
        write_export(Export(tiny_config(), MaskedLM(), TensorWeights(tensors)), tmp_path / "export")
    assert not any(tmp_path.iterdir())


def test_tokenizer_must_fit(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    with pytest.raises(BadInput, match=r"tokenizer.json: 250 words, but the model has 264"):
        export(tiny_model(vocab_size=264), tmp_path / "export", tokenizer)
    tokenizer.write_text(tokenizer.read_text().replace("[MASK]", "[MUSK]"))
    with pytest.raises(BadInput, match=r"lacks the special tokens \[MASK\]"):
        export(tiny_model(), tmp_path / "export", tokenizer)
    tokenizer.write_text("{")
    with pytest.raises(BadInput, match=r"tokenizer.json: not readable"):
        export(tiny_model(), tmp_path / "export", tokenizer)


def test_damage_is_named(tmp_path: Path) -> None:
    out = export(tiny_model(), tmp_path / "export")
    config = json.loads((out / "config.json").read_text())

    def refuses(says: str) -> None:
        with pytest.raises(BadInput, match=says) as caught:
            load_model(out)
        assert "\n" not in str(caught.value)

    (out / "config.json").write_text(json.dumps(config | {"hidden_sise": 24}))
    refuses(r"config.json: hidden_sise: unknown key; did you mean 'hidden_size'\?")
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refuses("has unknown sharebert.layers.1")
    (out / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 17}))
    refuses(r"position_embeddings.weight' is \[16, 24\], the model in config.json has \[17, 24\]")
    (out / "config.json").write_text("[]")
    refuses("config.json: not a mapping")
    (out / "config.json").write_text("{")
    refuses("config.json: not readable as JSON")
    (out / "config.json").unlink()
    refuses("config.json: missing; is .*export an export")


def test_integer_tensors_are_no_weights(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(shape, dtype=torch.int8) for name, shape in tensor_shapes(tiny_config()).items()}
    write_export(Export(tiny_config(), MaskedLM(), TensorWeights(tensors)), tmp_path / "export")
    with pytest.raises(BadInput, match=r"is torch\.int8, not of a floating dtype"):
        load_model(tmp_path / "export")


def test_the_command_names_a_missing_or_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2, whichever file it is."""
    tokenizer = tiny_tokenizer(tmp_path)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-50])):
            out = export(tiny_model(), tmp_path / "export", tokenizer)
            damage(out / file)
            code = sharebert_cli.main(["fill", "w1 [MASK]", str(out)])
            text = capsys.readouterr().err
            assert (code, text.count("\n")) == (2, 1), text
            assert f"{file}: " in text
            shutil.rmtree(out)


def test_a_full_disk_is_one_clear_line_and_nothing_is_left(tmp_path: Path) -> None:
    """A disk of 64 kB, on which the files of the model's code alone have no room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        with pytest.raises(BadInput, match=r"out: cannot be written \(No space left on device\)"):
            export(tiny_model(), disk / "out")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
