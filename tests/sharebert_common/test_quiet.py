"""Warnings of libraries do not reach the terminal, unless the user asks for them."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import logging, warnings
from sharebert_common.quiet import quiet_libraries
quiet_libraries()
warnings.warn("deprecated collective", FutureWarning)
logging.getLogger("torchao").warning("skipped an extension")
warnings.warn("a driver that is too old", UserWarning)
"""


def said(*options: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, *options, "-c", CODE], capture_output=True, text=True, check=True, env=environment
    )
    return done.stderr


def test_what_a_user_can_do_nothing_about_is_hidden() -> None:
    text = said()
    assert "deprecated collective" not in text
    assert "skipped an extension" not in text
    assert "a driver that is too old" in text


def test_a_choice_of_the_user_stays() -> None:
    assert "deprecated collective" in said("-W", "default")


def test_transformers_is_quiet_unless_the_user_chose() -> None:
    code = "import os; from sharebert_common.quiet import quiet_libraries as q; q(); print(os.environ['{}'])"
    name = "TRANSFORMERS_VERBOSITY"
    for chosen, expected in ({}, "error"), ({name: "info"}, "info"):
        environment = {key: value for key, value in os.environ.items() if key != name} | chosen
        done = subprocess.run(
            [sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=True, env=environment
        )
        assert done.stdout.strip() == expected
