"""The rules of the house: who imports whom, what travels with an export, and what importing costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MAY_IMPORT: dict[str, set[str]] = {
    "sharebert_common": set(),
    "sharebert": set(),
    "data_prep": {"sharebert_common"},
    "exports": {"sharebert_common", "sharebert"},
    "pretrain": {"sharebert_common", "sharebert", "exports", "data_prep.shards"},
    "scoring": {"sharebert_common", "sharebert", "exports"},
    "compress": {"sharebert_common", "sharebert", "exports", "data_prep", "pretrain", "scoring"},
    "comparison": {"sharebert_common", "sharebert", "exports", "data_prep", "pretrain", "scoring", "compress"},
    "cluster": {"sharebert_common"},
}
"""The floors, from the ground up. A dotted name allows that module alone."""

OURS = {*MAY_IMPORT, "sharebert_cli"}


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every absolute import in a file, wherever it stands: (statement, dotted module)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_floor_imports_only_the_floors_below(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for statement, module in imports(parsed(file)):
            top = module.split(".")[0]
            if top not in OURS or top == package:
                continue
            allowed = MAY_IMPORT[package]
            fits = top in allowed or any(module == name or module.startswith(f"{name}.") for name in allowed)
            assert fits, f"{file.relative_to(ROOT)}:{statement.lineno} imports {module}"


def test_training_can_use_shards_without_the_rest_of_data_prep() -> None:
    for file in sorted((ROOT / "data_prep" / "shards").glob("*.py")):
        for statement, module in imports(parsed(file)):
            inside = not module.startswith("data_prep") or module.startswith("data_prep.shards.")
            assert inside, f"{file.relative_to(ROOT)}:{statement.lineno} imports {module}"


def files_imported(file: Path, package: str) -> set[Path]:
    """The files of the same package that a file imports, absolutely or relatively, at its top or in a function."""
    here = file.relative_to(ROOT).with_suffix("").parts
    names = [module for _, module in imports(parsed(file))]
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join((*here[: -node.level], *(node.module or "").split("."))).rstrip(".")
            names += [f"{base}.{alias.name}" for alias in node.names]
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] != package:
            continue
        candidates = [ROOT.joinpath(*parts), ROOT.joinpath(*parts[:-1])]  # the last part may be a name in a module
        files = [path for c in candidates for path in (c.with_suffix(".py"), c / "__init__.py") if path.is_file()]
        found.update(files[:1])
    return found - {file}


@pytest.mark.parametrize("package", sorted(OURS))
def test_no_circle_of_files(package: str) -> None:
    imported = {file: files_imported(file, package) for file in sorted((ROOT / package).rglob("*.py"))}
    while free := [file for file, others in imported.items() if not others & imported.keys()]:
        for file in free:
            del imported[file]
    assert not imported, f"in a circle, or above one: {sorted(str(file.relative_to(ROOT)) for file in imported)}"


def test_nothing_imports_the_command() -> None:
    for file in ROOT.glob("*/**/*.py"):
        if file.relative_to(ROOT).parts[0] in MAY_IMPORT:
            assert all(not module.startswith("sharebert_cli") for _, module in imports(parsed(file))), file


def test_what_travels_imports_itself_relatively_and_needs_only_torch() -> None:
    """Hugging Face allows remote code relative imports of one level, and optional packages inside `try`."""
    needed = {"torch", "safetensors", "tokenizers"} | set(sys.stdlib_module_names)
    for file in sorted((ROOT / "sharebert").glob("*.py")):
        tree = parsed(file)
        guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        for statement, module in imports(tree):
            top = module.split(".")[0]
            assert top != "sharebert", f"{file.name}:{statement.lineno}: write `from .name import …`"
            assert top in needed or id(statement) in guarded, f"{file.name}:{statement.lineno}: {module} outside `try`"
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{file.name}:{node.lineno}"
                assert node.module is None or "." not in node.module, f"{file.name}:{node.lineno}"
    assert not [folder for folder in (ROOT / "sharebert").iterdir() if folder.is_dir() and folder.name != "__pycache__"]


def test_importing_the_model_takes_nothing_heavy_with_it() -> None:
    code = "import sys, sharebert; print([m for m in ('deepspeed', 'triton', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_help_of_the_command_takes_no_torch() -> None:
    code = "import sys, sharebert_cli; sharebert_cli.build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_only_hub_imports_transformers() -> None:
    for file in ROOT.glob("*/**/*.py"):
        if file.relative_to(ROOT).parts[0] == "sharebert" and file.name != "hub.py":
            assert all(not module.startswith("transformers") for _, module in imports(parsed(file))), file


def test_tests_configs_and_docker_are_no_packages(tmp_path: Path) -> None:
    """None of these folders is what `import` of its name finds; another package may have the name."""
    code = (
        "import importlib.util as u\n"
        "specs = filter(None, map(u.find_spec, ('tests', 'configs', 'docker')))\n"
        "print(*[place for spec in specs for place in spec.submodule_search_locations], sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not {str(ROOT / name) for name in ("tests", "configs", "docker")} & set(done.stdout.splitlines())


def test_the_main_road_of_pretrain_stays_in_sight() -> None:
    """Machinery goes into its folders, so that a reader finds the algorithm at once."""
    assert len(list((ROOT / "pretrain").glob("*.py"))) <= 10


def test_nothing_but_the_engine_names_private_parts_of_deepspeed() -> None:
    private = re.compile(
        r"_hp_mapping|basic_optimizer|fp32_partitioned_groups_flat|grad_position|_global_grad_norm|update_lp_params"
        r"|torch_autocast_z0_gradscaler|skipped_steps \+=|_reassign_or_swap"
    )
    for file in sorted((ROOT / "pretrain").rglob("*.py")):
        if "engine" not in file.relative_to(ROOT).parts:
            found = private.search(file.read_text(encoding="utf-8"))
            assert found is None, f"{file.relative_to(ROOT)} names {found and found[0]}"
