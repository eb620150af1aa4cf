"""What is installed is what is in the tree, the layers point one way, and the files CI relies on are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("planner", "rewrite", "cost_models")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the tree: built in place, the stale files of a build folder would join the next wheel."""
    import shutil

    root, copy = Path(__file__).parent.parent, tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(root / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / file, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (built,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_the_modules_of_the_tree(wheel: zipfile.ZipFile, root: Path) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    tree = {
        f"colrow/{file.relative_to(root).as_posix()}"
        for package in PACKAGES
        for file in (root / package).rglob("*")
        if file.is_file() and file.suffix in {".py", ".json", ".typed"}
    }
    assert files == tree


def test_wheel_installs_no_top_level_package_but_colrow(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"colrow"}


def test_wheel_carries_the_licence_and_the_command(wheel: zipfile.ZipFile) -> None:
    (licence,) = (name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    assert b"Apache License" in wheel.read(licence)
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert b"colrow = colrow.rewrite.cli:main" in wheel.read(entry_points)


def test_no_file_bears_the_name_of_what_its_package_exports(root: Path) -> None:
    """With planner/plan.py, ``from colrow.planner import plan`` would return the module."""
    exported = {
        "planner": {"plan", "Plan"},
        "rewrite": {"parallelize", "verify", "count_collectives"},
        "cost_models": set(),
    }
    for package, names in exported.items():
        assert not names & {file.stem for file in (root / package).glob("*")}, package


def test_every_dependency_is_constrained_to_a_public_version(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pinned = {}
    for line in (root / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version and "+" not in version, line
            pinned[name.lower().replace("_", "-")] = version
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    missing = {name.partition(">")[0] for name in [*project["dependencies"], *extras]} - set(pinned)
    assert not missing
    assert pinned["torch"] == "2.13.0" and "torch==2.13.0 " in (root / "Makefile").read_text()


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_does_not_import_torch(package: str) -> None:
    """``colrow --help`` may not take seconds."""
    code = f"import sys, colrow.{package}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ci_needs_neither_terminal_nor_folder(root: Path) -> None:
    ci = root / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert subprocess.run(["bash", "-n", str(ci)], check=False).returncode == 0
    dry = subprocess.run(["make", "-n", "-C", str(root), "test"], capture_output=True, text=True, check=True).stdout
    steps = ("ruff check", "mypy -p colrow", "lint-imports", "pytest")
    assert [dry.find(step) for step in steps] == sorted(dry.find(step) for step in steps) and "pytest" in dry


@pytest.mark.parametrize("file", sorted((Path(__file__).parent.parent / "examples" / "configs").glob("*.json")))
def test_shipped_configurations_are_plain_facts(file: Path) -> None:
    content = json.loads(file.read_text())
    assert content["model_type"] == "llama" and "_name_or_path" not in content and "auto_map" not in content
