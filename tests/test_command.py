"""The `sharebert` command: where its words may stand, and what it says of wrong ones."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sharebert_cli
from sharebert_cli.parser import EXAMPLES
from sharebert_common.errors import BAD_INPUT, FAILED, BadInput, CommandError
from sharebert_common.recipe import find


@pytest.mark.parametrize("words", [["demo", "stepz=3", "--gpus", "4"], ["demo", "--gpus", "4", "stepz=3"]])
def test_keys_may_stand_behind_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sharebert_cli.main(["plan", *words]) == BAD_INPUT
    assert "stepz: unknown key; did you mean 'steps'?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["plan", "demo", "--gpuz", "4"], ["fill", "a [MASK]", "export", "steps=3"]])
def test_what_no_verb_knows_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sharebert_cli.main(words)
    assert f"unrecognized arguments: {words[-1] if 'fill' in words else '--gpuz'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(BadInput("wrong"), BAD_INPUT), (CommandError("failed"), FAILED), (KeyError("x"), FAILED)]
)
def test_the_exit_code_is_that_of_the_error(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(given: object) -> int:
        raise error

    monkeypatch.setattr("sharebert_cli.verbs.stop", stop)
    assert sharebert_cli.main(["stop", "run"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code == FAILED)


def test_an_error_of_the_model_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    import sharebert

    def fill(given: object) -> int:
        raise sharebert.ShareBertError("no such size")

    monkeypatch.setattr("sharebert_cli.verbs.fill", fill)
    assert sharebert_cli.main(["fill", "a [MASK]", "export"]) == BAD_INPUT


def test_without_a_verb_the_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert sharebert_cli.main([]) == BAD_INPUT
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 24
    assert any(line.split()[:1] == ["report"] for line in shown)


def test_every_example_is_a_command_that_parses() -> None:
    """Each names a recipe that exists, and options that the verb has."""
    parser = sharebert_cli.build_parser()
    verbs = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert set(verbs) == set(EXAMPLES)
    for verb, example in EXAMPLES.items():
        words = shlex.split(example)
        assert words[0] == verb
        given, _ = parser.parse_known_args(words)
        if hasattr(given, "config") and isinstance(given.config, str):
            find(given.config)


def completions(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of `words`, with the script that the command prints."""
    script = folder / "completion.sh"
    if not script.exists():
        done = subprocess.run(
            [sys.executable, "-m", "sharebert_cli", "--complete", "bash"],
            capture_output=True,
            text=True,
            check=True,
        )
        script.write_text(done.stdout)
    shell = f"""
    source {script}
    COMP_WORDS=({shlex.join(("sharebert", *words))}); COMP_CWORD={len(words)}
    _shtab_sharebert sharebert {shlex.quote(words[-1])}
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", shell], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_shell_completes_verbs_flags_choices_and_paths(tmp_path: Path) -> None:
    (tmp_path / "recipe-of-mine.yaml").touch()
    assert completions(tmp_path, "con") == ["consolidate"]
    assert completions(tmp_path, "consolidate", "--fo") == ["--form"]
    assert completions(tmp_path, "consolidate", "--form", "d") == ["dense"]
    assert "recipe-of-mine.yaml" in completions(tmp_path, "train", "recipe-")


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sharebert_cli.main(["--complete", "fishy"])
    assert "the shells are bash, zsh and tcsh" in capsys.readouterr().err
