"""The whole contract of a BERT-like class: transformers' own common model tests, of the installed version."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

CASES = Path(__file__).parent / "contract_cases.py"
ROOT = CASES.parents[2]
ABSENT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
"""Files that the common tests import and the source distribution lacks, and the one class of each that they use."""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip {arguments[0]} did not work: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def common_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `transformers_tests` and what it imports."""
    folder = tmp_path_factory.mktemp("common-tests")
    version = f"transformers=={transformers.__version__}"
    pip("download", "-q", "--no-binary", ":all:", "--no-deps", "--no-build-isolation", "-d", str(folder), version)
    pip("install", "-q", "--no-deps", "--target", str(folder), "parameterized")
    package = folder / "transformers_tests"
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        for member in archive.getmembers():
            place = Path(member.name).parts[1:]
            if place[:1] == ("tests",) and member.isfile():
                file = package.joinpath(*place[1:])
                file.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                file.write_bytes(content.read())
    for name, needed in ABSENT.items():
        file = package / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"class {needed}:\n    pass\n")
    for inner in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (inner / "__init__.py").touch()
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_common_model_tests_pass(common_tests: Path) -> None:
    """On every class, with untied and tied heads, VEPS and EPS. What is left out, and why, stands in the cases."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        str(CASES),
    ]
    path = os.pathsep.join(map(str, (common_tests, ROOT, ROOT / "tests")))
    # What the command `sharebert` sets in its process, and so in that of tests that call it, hides expected warnings.
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=common_tests, check=False)
    assert done.returncode == 0, done.stdout[-8000:]
    summary = done.stdout.splitlines()[-1]
    print(summary)
    assert int(summary.split(" passed")[0].split()[-1]) > 200, summary
