"""Values of recipes that are paths: what YAML or a shell would change."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

import pytest
from pydantic.dataclasses import dataclass

from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT, find, load, split_words


@dataclass(config=STRICT, kw_only=True)
class Inner:
    path: str = ""
    paths: list[str] = field(default_factory=list)


@dataclass(config=STRICT, kw_only=True)
class Example:
    run: str = ""
    steps: int = 1
    data: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    "run", ["/x/run #7", "/x/run#7", "#7", "/x/a b ", "/x/ö #1: \"quoted\" 'too'", "/x/a=b #c", "/x/tab\t#7"]
)
def test_the_command_line_has_no_comments(run: str) -> None:
    assert load(Example, None, [f"run={run}"]).run == run
    assert load(Example, None, [f"data.path={run}"]).data.path == run


def test_yaml_in_overrides_still_works(tmp_path: Path) -> None:
    made = load(Example, None, ["data.paths=[a, 'b #2', \"c\"]", "steps= 3", 'run="7"'])
    assert (made.data.paths, made.steps, made.run) == (["a", "b #2", "c"], 3, "7")
    with pytest.raises(BadInput, match="steps"):
        load(Example, None, ["steps=3 #four"])
    file = tmp_path / "example.yaml"
    file.write_text("run: /x/run #7 is a comment here\n")
    assert load(Example, file).run == "/x/run"


def test_the_home_is_expanded_in_every_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "example.yaml"
    file.write_text("run: ~/runs/a\ndata:\n  paths: [~/b, c~/d, ~nobody-at-all/e]\n")
    made = load(Example, "~/example.yaml", ["data.path=~/c #1"])
    assert made.run == f"{tmp_path}/runs/a"
    assert made.data.paths == [f"{tmp_path}/b", "c~/d", "~nobody-at-all/e"]
    assert made.data.path == f"{tmp_path}/c #1"
    assert find("~/example.yaml") == file


def test_a_path_with_an_equals_sign_is_no_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-3").mkdir()
    (tmp_path / "steps=3").mkdir()
    words = ["/runs/lr=1e-3/export", "random:/runs/a=b", "./steps=3", "lr=1e-3", "steps=3", "data.path=/a=b", "stepz=3"]
    paths, overrides = split_words(words, Example)
    assert paths == ["/runs/lr=1e-3/export", "random:/runs/a=b", "./steps=3", "lr=1e-3"]
    assert overrides == ["steps=3", "data.path=/a=b", "stepz=3"], "a wrong key is told to the user"
