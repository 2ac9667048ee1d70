"""The `sharebert` command: where its words may stand, and what it says of wrong ones."""

from __future__ import annotations

import pytest

import sharebert_cli


@pytest.mark.parametrize("words", [["demo", "stepz=3", "--gpus", "4"], ["demo", "--gpus", "4", "stepz=3"]])
def test_keys_may_stand_behind_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sharebert_cli.main(["plan", *words]) == sharebert_cli.BAD_INPUT
    assert "stepz: unknown key; did you mean 'steps'?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["plan", "demo", "--gpuz", "4"], ["fill", "a [MASK]", "export", "steps=3"]])
def test_what_no_verb_knows_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sharebert_cli.main(words)
    assert f"unrecognized arguments: {words[-1] if 'fill' in words else '--gpuz'}" in capsys.readouterr().err
