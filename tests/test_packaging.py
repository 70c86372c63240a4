# SPDX-License-Identifier: Apache-2.0
"""What the wheel, the sdist and the Flower app bundle hold."""

from __future__ import annotations

import ast
import io
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).parents[1]
PACKAGE = "fedfusion_flwr"
NOT_BUNDLED = {"experiments", "cli.py"}
"""Parts of the package that no run needs."""


def sources(pattern: str = "*") -> set[str]:
    """Files of the package, relative to the root."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / PACKAGE).rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def bundle() -> set[str]:
    """Files of the bundle that `flwr run .` delivers."""
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as archive:
        return set(archive.namelist())


def test_bundle_holds_what_a_run_needs_and_nothing_else(bundle: set[str]) -> None:
    needed = {path for path in sources("*.py") if PurePosixPath(path).parts[1] not in NOT_BUNDLED}
    beside = {"client_app.py", "server_app.py", "pyproject.toml", "README.md", "LICENSE"}
    assert bundle == needed | beside | {".info/CONTENT"}


def test_bundled_modules_import_bundled_modules_only(bundle: set[str]) -> None:
    modules = {name for name in bundle if name.endswith(".py")}
    assert len(modules) > 50
    for name in modules:
        for module in imported((ROOT / name).read_text(encoding="utf-8")):
            path = module.replace(".", "/")
            assert {f"{path}.py", f"{path}/__init__.py"} & bundle, f"{name} imports {module}"


def imported(source: str) -> set[str]:
    """Names of the package's modules that a source file imports, at any level."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == PACKAGE}


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (wheel,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == sources()


def test_sdist_holds_the_sources_and_no_results(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.sdist").SdistBuilder(str(ROOT))
    (sdist,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in names if name.startswith(("results/", "benchmarks/results/"))]
    assert sources() <= names
    assert {"client_app.py", "server_app.py", "pyproject.toml", "tests/test_packaging.py"} <= names
