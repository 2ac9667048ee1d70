"""What must be the same on every node of a job."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.allocation import Place
from cluster.launch import Training

PACKAGES = ("sharebert", "torch", "deepspeed", "numpy", "triton")
CODE = ("sharebert", "sharebert_common", "data_prep", "pretrain", "cluster")


def facts_of(training: Training, environment: Mapping[str, str]) -> dict[str, Any]:
    """This node's facts: a word for people → a value that is equal on all nodes."""
    facts: dict[str, Any] = {"Python": platform.python_version()}
    facts |= {package: _version(package) for package in PACKAGES}
    facts["this project's code"] = _code()
    facts["config"] = _digest(training.run / "cluster" / "train.yaml")
    facts |= {f"dataset {path}": _dataset(path) for path in training.datasets}
    facts |= {name: environment.get(name) for name in sorted(training.recipe.env)}
    return facts


def differences(place: Place, number: int, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """How node `number` differs from the first one, in a line."""
    for name, value in ours.items():
        if name not in ("node", "door") and theirs.get(name) != value:
            return (
                f"{name} is not the same on all nodes: {value} on {place.nodes[0]}, "
                f"{theirs.get(name)} on {place.nodes[number]}"
            )
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _code() -> str:
    """Digest of the sources of the packages that a training runs."""
    digest = hashlib.sha256()
    for package in CODE:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted(Path(folder).glob("*.py")):
                digest.update(f"{package}/{file.name}".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError as error:
        return str(error.strerror)


def _dataset(folder: Path) -> str:
    """A dataset's manifest, which names and sums up all else, with the sizes of the shards as they lie there."""
    manifest = _digest(folder / "manifest.json")
    sizes = sorted((file.parent.name, file.name, file.stat().st_size) for file in folder.glob("*/*.tar"))
    return f"{manifest} ({len(sizes)} shards, {sum(size for *_, size in sizes)} bytes)"
