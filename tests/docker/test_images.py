"""What the images pin is what constraints.txt pins, and they do the same. No engine is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE, APPTAINER, INSTALL = (
    (ROOT / "docker" / name).read_text() for name in ("Dockerfile", "sharebert.def", "install.sh")
)


def test_both_images_start_from_one_base_and_its_version_is_pinned() -> None:
    (docker,) = re.findall(r"^ARG BASE=(.*)\nFROM \$\{BASE\}$", DOCKERFILE, re.MULTILINE)
    (apptainer,) = re.findall(r"^From: (.*)$", APPTAINER, re.MULTILINE)
    assert docker == apptainer
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d\d\.\d\d", docker)


def test_both_images_install_the_same() -> None:
    docker, apptainer = (
        set(re.findall(r"(?:apt-get|/src/docker/install.sh) [^&\\\n]*", text)) for text in (DOCKERFILE, APPTAINER)
    )
    assert {line.strip() for line in docker} == {line.strip() for line in apptainer}


def test_all_that_pip_installs_is_held_by_the_constraints() -> None:
    assert "--constraint" in INSTALL
    assert INSTALL.count("pip install") == 1
    pinned = set(re.findall(r"^([\w.-]+)==[\w.+]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    needed = project[project.index("dependencies = [") : project.index("[project.optional-dependencies]")]
    wanted = set(re.findall(r'"([\w.-]+)[><=]', needed)) | {"transformers"}
    assert wanted <= pinned, f"not pinned: {wanted - pinned}"


def test_a_linter_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("text", [INSTALL, re.findall(r"%post\n(.*?)\n\n", APPTAINER, re.DOTALL)[0]])
def test_the_shell_parses(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
