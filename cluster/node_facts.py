"""What must be the same on every node of a job."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from cluster.allocation import Allocation
from cluster.launch import Training
from sharebert_common.import_path import ROOT

PACKAGES = ("sharebert", "torch", "deepspeed", "numpy", "triton")
"""Installed packages whose versions are compared."""


def facts_of(training: Training, environment: Mapping[str, str]) -> dict[str, Any]:
    """This node's facts: for each name, which people read, a value that is equal on all nodes."""
    facts: dict[str, Any] = {"Python": platform.python_version()}
    facts |= {package: _version(package) for package in PACKAGES}
    facts["this project's code"] = code_digest(ROOT)
    facts["config"] = _digest(training.run / "cluster" / "train.yaml")
    facts |= {f"dataset {path}": _dataset(path) for path in training.datasets}
    facts |= {name: environment.get(name) for name in sorted(training.recipe.env)}
    return facts


def differences(allocation: Allocation, number: int, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first fact in which node `number` differs from the first node, in a line; None where there is none."""
    for name, value in ours.items():
        if name not in ("node", "door") and theirs.get(name) != value:
            return (
                f"{name} is not the same on all nodes: {value} on {allocation.nodes[0]}, "
                f"{theirs.get(name)} on {allocation.nodes[number]}"
            )
    return None


def code_digest(root: Path) -> str:
    """Digest of the names and contents of this project's sources below `root`."""
    digest = hashlib.sha256()
    for file in sources(root):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0")
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def sources(root: Path) -> list[Path]:
    """The Python files of all packages and modules of this project, sub-packages included.

    In a checkout these are the modules in `root` and the packages beside each other there; an installed wheel lies
    among other projects' packages, and lists its files.
    """
    if (root / "pyproject.toml").is_file():
        packages = [file.parent for file in root.glob("*/__init__.py")]
        return sorted([*root.glob("*.py"), *(file for package in packages for file in package.rglob("*.py"))])
    files = [root / file for file in distribution("sharebert").files or []]
    return sorted(file for file in files if file.suffix == ".py" and file.is_file())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError as error:
        return str(error.strerror)


def _dataset(folder: Path) -> str:
    """A dataset's manifest, which holds checksums of all else, and the sizes of the shards on this node."""
    manifest = _digest(folder / "manifest.json")
    sizes = sorted((file.parent.name, file.name, file.stat().st_size) for file in folder.glob("*/*.tar"))
    return f"{manifest} ({len(sizes)} shards, {sum(size for *_, size in sizes)} bytes)"
