"""Each command and Python block of the docs is taken by the real parser, and the way from text to model is run.

Only the stage at the end of a command is replaced where nothing is run: words, flags, recipes and keys are checked by
the code that a user's command would meet.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
from doc_commands import ROOT, Block, all_blocks, commands

import sharebert_cli
from cluster.recipe import ClusterRecipe
from comparison.recipe import CompareRecipe
from compress.recipe import CompressRecipe
from data_prep.recipe import PrepRecipe
from pretrain.recipe import TrainRecipe
from pretrain.sweep.recipe import SweepRecipe
from scoring.recipe import EvaluateRecipe
from sharebert_common.recipe import keys, load

BLOCKS = all_blocks()
COMMANDS = sorted({(block.page, command) for block in BLOCKS for command in commands(block) if " " in command})
PYTHON = [block for block in BLOCKS if block.language == "python" or block.text.startswith(("from ", "import "))]
FILES = ("json", "jsonl", "png", "onnx", "yaml", "html", "md", "data", "safetensors")
RECIPES = (PrepRecipe, TrainRecipe, SweepRecipe, EvaluateRecipe, CompressRecipe, CompareRecipe, ClusterRecipe)

STAGES = {
    "data_prep.pipeline.prepare": "",
    "pretrain.distill.cache_maker.make_cache": "",
    "pretrain.plan.command.plan": "",
    "pretrain.report.report.report": "",
    "pretrain.sweep.runner.run_all": 0,
    "pretrain.sweep.summary.summarise": "",
    "pretrain.export.consolidate.consolidate": "",
    "exports.authors.import_authors": None,
    "scoring.score.evaluate": "",
    "compress.run.compress": "",
    "compress.report.check": "",
    "comparison.run.compare": (0, ""),
    "exports.fill.fill": [],
    "cluster.submit.submit": [],
    "cluster.submit.submit_prep": [],
    "cluster.status.all_runs": "",
    "cluster.status.stop": "",
    "cluster.logs.newest_failure": "",
    "cluster.logs.rank_0": [],
}
"""Stage → what it returns here."""

TRAIN_EXAMPLE = "run: runs/x\ndata: {dataset: data/x, global_batch: 8, micro_batch: 8}\n"


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that were called, in a folder with the recipes that the docs name and do not ship."""
    called: list[str] = []

    def replace(name: str, value: Any) -> None:
        def stage(*_: Any, **__: Any) -> Any:
            called.append(name)
            return value

        module, _, attribute = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), attribute, stage)

    for name, value in STAGES.items():
        replace(name, value)

    def launch(config: str, overrides: list[str], *, debug: bool) -> int:
        load(TrainRecipe, config, overrides)
        called.append("launch")
        return 0

    class Status:
        def text(self) -> str:
            called.append("status")
            return ""

    monkeypatch.setattr("pretrain.__main__.launch", launch)
    monkeypatch.setattr(TrainRecipe, "check", lambda *_: None)  # it opens the dataset
    monkeypatch.setattr("cluster.status.status", lambda _: Status())
    monkeypatch.chdir(tmp_path)
    for name in "CONFIG", "RECIPE":
        Path(name).write_text(TRAIN_EXAMPLE)
    shown = {name: block.text for block in BLOCKS for name in re.findall(r"\A# (\S+\.yaml)\n", block.text)}
    for name, text in {**shown, "recipe.yaml": "steps: [trim]\n"}.items():
        Path(name).write_text(text)
    return called


def without_synopsis(command: str) -> list[str]:
    """The words of a command; what a synopsis puts in brackets is optional, and left out."""
    return shlex.split(re.sub(r" \[(?:[A-Z]+ \.\.\.|key=value \.\.\.|flags)\]", "", command))


def test_the_docs_hold_the_commands_of_every_verb() -> None:
    shown = {command.split()[1] for _, command in COMMANDS if command.startswith("sharebert ")}
    assert shown >= {"prep", "train", "plan", "submit", "status", "logs", "stop", "report", "consolidate", "sweep"}
    assert shown >= {"evaluate", "compress", "compare", "fill"}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_right(page: str, command: str, stages: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = without_synopsis(command)
    if program == "sharebert":
        code = sharebert_cli.main(words)
        said = capsys.readouterr().err
        assert code == 0, said
        assert stages, f"{command}: called no stage"
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words)
        assert given.module
        assert given.training_script == "pretrain"
        recipe, *overrides = given.training_script_args
        with_dataset = overrides if any("dataset" in word for word in overrides) else [*overrides, "data.dataset=x"]
        load(TrainRecipe, recipe, [*with_dataset, *([] if any("run=" in w for w in overrides) else ["run=x"])])
    elif program == "python" and words[0] == "-m":
        check_module(words[1], words[2:])
    elif program == "python":
        assert words[0] == "-c"
        check_imports(words[1])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(words) <= set(targets)
    elif program == "pip":
        check_install(words)
    else:
        assert program in ("tensorboard", "sbatch", "srun", "docker", "apptainer"), command


def check_module(module: str, words: list[str]) -> None:
    """`python -m MODULE` exists, and its source names each flag."""
    if module == "pip":
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    path = Path(str(spec.origin))
    sources = path.parent.glob("*.py") if path.name == "__init__.py" else [path]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    for flag in (word for word in words if word.startswith("--")):
        assert f'"{flag.partition("=")[0]}"' in text, f"{module} knows no {flag}"


def check_install(words: list[str]) -> None:
    """`pip install 'sharebert[EXTRA]'` names extras that exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for wanted in re.findall(r"^sharebert\[(.*)\]$", word):
            assert set(wanted.split(",")) <= set(extras)


def check_imports(code: str) -> None:
    """Every name that a piece of Python imports exists."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}-{len(block.text)}")
def test_what_a_python_block_imports_exists(block: Block) -> None:
    check_imports(block.text)


def test_every_key_in_backticks_is_a_key() -> None:
    known = {name for schema in RECIPES for name, *_ in keys(schema)}
    structures = {name.rpartition(".")[0] for name in known} - {""}
    wrong = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for code in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", page.read_text(encoding="utf-8")):
            names = code.split(".")
            if names[0] not in structures or names[-1] in FILES or code in known | structures or is_python(code):
                continue
            wrong.append(f"{page.name}: {code}")
    assert not wrong


def is_python(code: str) -> bool:
    """Whether a dotted name is a file of the project, or the name of something in a module."""
    module, _, attribute = code.rpartition(".")
    if (ROOT / code).exists() or list(ROOT.glob(f"{code.replace('.', '/')}*")):
        return True
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


def test_a_wrong_command_is_found(stages: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sharebert_cli.main(["train", "demo", "data.global_batsh=3"]) == 2
    assert "global_batch" in capsys.readouterr().err
    assert sharebert_cli.main(["train", "demoo"]) == 2
    with pytest.raises(SystemExit):
        sharebert_cli.main(["consolidate", "RUN", "OUT", "--from", "dense"])
    with pytest.raises(AssertionError):
        check_module("benchmarks.train_step", ["--bach", "4"])
    with pytest.raises(AssertionError):
        check_imports("from exports.forms import write_exports")
    assert not stages


SMALL = {
    "prep": ["seq_len=32", "tokenizer.train.vocab_size=400", "validation=0.1"],
    "torchrun": [
        *("model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2"),
        *("model.num_attention_heads=2", "model.factor_size=16", "model.mlm_head=tied", "model.size=null"),
        *("data.global_batch=8", "data.micro_batch=4", "steps=4", "validate.every=2", "checkpoint.every=4"),
        "precision=fp32",
    ],
    "compress": ["report.latency=[]"],
    "evaluate": ["finetune.epochs=1", "finetune.max_length=32", "seeds=1"],
}
"""Verb → the keys that make its command small."""

AFTER_THE_RUN = [
    ("docs/watching.md", "sharebert report RUN"),
    ("docs/exports.md", "sharebert consolidate RUN OUT --form dense"),
    ("docs/exports.md", "sharebert consolidate RUN OUT --form onnx"),
    ("docs/compression.md", "sharebert compress EXPORT compress/int8 OUT validation=DATASET"),
    ("docs/compression.md", "sharebert compress --check OUT"),
    ("docs/scoring.md", "sharebert evaluate EXPORT data.text=review"),
    ("docs/data.md", "python -c"),
]
"""Commands of the docs that run on what README's commands have made."""


def made_text(count: int) -> list[str]:
    """Sentences of 20 words out of 600, which have enough pieces for a vocabulary."""
    import random

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=6)) for _ in range(600)]
    return [" ".join(draw.choices(words, k=20)) + "." for _ in range(count)]


def run_here(words: list[str], folder: Path) -> str:
    """Run a command in `folder` with this environment's programs, and return what it printed."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
    }
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_way_from_text_to_model_is_run(tmp_path: Path) -> None:
    """README's commands for a corpus of your own, on a small one; then its Python block and commands of other pages."""
    import json

    import zstandard

    data = tmp_path / "data"
    (data / "text").mkdir(parents=True)
    lines = "\n".join(json.dumps({"text": text}) for text in made_text(400))
    (data / "text" / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    reviews = [f"{text},{stars}" for text, stars in zip(made_text(60), ["good", "bad"] * 30, strict=True)]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,stars", *reviews]) + "\n")

    def run(command: str, **places: str) -> str:
        words = without_synopsis(re.sub(r"--nproc-per-node 8", "--nproc-per-node 2", command))
        for name, place in places.items():
            words = [re.sub(rf"(^|=){name}$", rf"\1{place}", word) for word in words]
        words = [re.sub(r"(^|=)/data/", rf"\1{data}/", word) for word in words]
        verb = words[1] if words[0] == "sharebert" else words[0]
        keys = SMALL.get(verb, []) if "--check" not in words else []
        return run_here(words + keys, tmp_path)

    own = [command for page, command in from_page("README.md") if "/data/" in command and "submit" not in command]
    assert [command.split()[1 if command.startswith("sharebert") else 0] for command in own] == [
        "prep",
        "torchrun",
        "consolidate",
    ]
    for command in own:
        run(command)
    places = {"RUN": "/data/runs/base", "EXPORT": "/data/exports/base", "DATASET": "/data/dataset"}
    shutil.copytree(data / "dataset", tmp_path / "data" / "corpus")
    for page, start in AFTER_THE_RUN:
        (command,) = [c for _, c in from_page(page) if c.startswith(start)]
        form = command.partition("--form ")[2]
        run(command, OUT=f"out/{'small' if 'compress' in command else form}", **places)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    (fill,) = [command for _, command in from_page("README.md") if command.startswith("sharebert fill")]
    run(fill.replace("out/demo/export", "/data/exports/base"))
    stand_ins = {"/data/exports/base": f"{data}/exports/base", "out/demo/export": f"{data}/exports/base"}
    stand_ins |= {"out/demo/dense": f"{tmp_path}/out/dense", "out/demo/encoder": f"{tmp_path}/out/encoder"}
    stand_ins |= {"OUT": f"{tmp_path}/out/onnx"}
    stand_ins |= {"train/shard-": f"{data}/dataset/train/shard-"}
    codes = [block.text for block in PYTHON]
    for shown, here in stand_ins.items():
        codes = [code.replace(f'"{shown}', f'"{here}') for code in codes]
    each_alone = "import webdataset\nfor code in {!r}:\n    exec(code, {{'webdataset': webdataset}})"
    run_here([sys.executable, "-c", each_alone.format(codes)], tmp_path)
    assert (tmp_path / "out" / "encoder" / "model.safetensors").exists()


def from_page(page: str) -> list[tuple[str, str]]:
    """The commands of a page, in its order."""
    return [(page, command) for block in BLOCKS if block.page == page for command in commands(block) if " " in command]
