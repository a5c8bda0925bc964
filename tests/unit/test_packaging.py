"""pyproject.toml and constraints.txt: all packages are shipped, all dependencies pinned and explained."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
NOT_SHIPPED = {"tests", "benchmarks", "scripts", "docs"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def requirements(project: dict[str, Any]) -> list[Requirement]:
    extras = project["project"]["optional-dependencies"].values()
    return [
        Requirement(text) for text in [*project["project"]["dependencies"], *(one for extra in extras for one in extra)]
    ]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): one for one in found}


def test_every_package_of_the_tree_is_listed(project: dict[str, Any]) -> None:
    folders = [path.parent.relative_to(ROOT) for path in ROOT.glob("[a-z]*/**/__init__.py")]
    present = {".".join(folder.parts) for folder in folders if folder.parts[0] not in NOT_SHIPPED}
    # Alembic loads the migrations as files: package data.
    shipped_as_data = {name for name in present if name.startswith("registry.migrations")}
    assert present - shipped_as_data == set(project["tool"]["setuptools"]["packages"])


def test_every_dependency_is_pinned_to_a_version_that_its_range_allows(requirements: list[Requirement]) -> None:
    pinned = pins()
    for requirement in requirements:
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        (specifier,) = pin.specifier
        assert requirement.specifier.contains(specifier.version), f"{pin} is outside of {requirement}"


def test_a_pin_is_one_exact_public_version_and_names_no_place() -> None:
    for pin in pins().values():
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert pin.url is None
        assert Version(specifier.version).local is None


@pytest.mark.parametrize("name", ["fastapi", "sqlalchemy", "prefect", "torch"])
def test_what_is_installed_is_what_is_pinned(name: str) -> None:
    (specifier,) = pins()[name].specifier
    assert Version(version(name)).public == specifier.version


def test_every_direct_dependency_is_explained(requirements: list[Requirement]) -> None:
    explained = {
        canonicalize_name(name)
        for line in (ROOT / "docs" / "DEPENDENCIES.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
    assert {canonicalize_name(requirement.name) for requirement in requirements} == explained


def test_every_program_that_a_test_asks_for_is_among_the_system_packages() -> None:
    lines = (ROOT / "scripts" / "system-packages.txt").read_text(encoding="utf-8").splitlines()
    installed = {line.split()[0] for line in lines if line and not line.startswith("#")}
    theirs = {"redis-cli": "redis-server", "initdb": "postgres"}
    of_every_debian = {"mount", "umount"}
    asked = {
        name
        for path in ROOT.glob("tests/**/*.py")
        for name in re.findall(r'\bprogram\("([a-z0-9-]+)"\)', path.read_text(encoding="utf-8"))
    }
    assert {"chromium", "redis-server"} <= asked
    assert {theirs.get(name, name) for name in asked} - of_every_debian <= installed
