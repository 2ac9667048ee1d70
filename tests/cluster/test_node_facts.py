"""The check that all nodes run the same code sees every source file of the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.node_facts import code_digest, sources
from sharebert_common.import_path import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "tool.py", "a/__init__.py", "a/b/__init__.py", "a/b/deep.py", "docs/example.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x = 1\n")
    return tmp_path


@pytest.mark.parametrize("name", ["tool.py", "a/__init__.py", "a/b/deep.py"])
def test_a_changed_file_shows_also_in_a_sub_package(checkout: Path, name: str) -> None:
    before = code_digest(checkout)
    (checkout / name).write_text("x = 2\n")
    assert code_digest(checkout) != before


def test_a_new_and_a_moved_file_show(checkout: Path) -> None:
    before = code_digest(checkout)
    (checkout / "a" / "b" / "deep.py").rename(checkout / "a" / "deep.py")
    moved = code_digest(checkout)
    (checkout / "a" / "b" / "new.py").write_text("")
    assert len({before, moved, code_digest(checkout)}) == 3


def test_what_is_no_code_of_the_project_does_not_show(checkout: Path) -> None:
    before = code_digest(checkout)
    (checkout / "docs" / "example.py").write_text("x = 2\n")
    (checkout / "a" / "notes.txt").write_text("x")
    assert code_digest(checkout) == before


def test_every_package_of_this_project_counts() -> None:
    names = {file.relative_to(ROOT).parts[0] for file in sources(ROOT)}
    assert {"cluster", "data_prep", "exports", "pretrain", "sharebert", "sharebert_common", "sharebert_cli"} <= names
    assert not {"tests", "benchmarks"} & names
    assert ROOT / "pretrain" / "checkpoint" / "writer.py" in sources(ROOT)


def test_an_installed_wheel_counts_its_own_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ours/a.py", "theirs/b.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x = 1\n")

    class Installed:
        files = (Path("ours/a.py"), Path("ours/a.yaml"), Path("../../bin/sharebert"))

    monkeypatch.setattr("cluster.node_facts.distribution", lambda name: Installed())
    assert sources(tmp_path) == [tmp_path / "ours" / "a.py"]
