"""What the documents name is there: links, make targets, dependencies, packaged files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from tests.docs.readme import REPOSITORY, commands, links

DOCUMENTS = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_names(requirements: list[str]) -> set[str]:
    return {normalized(re.match(r"[\w.-]+", r).group()) for r in requirements}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document):
    local = [link for link in links(document) if not link.startswith(("http", "#"))]

    assert not [link for link in local if not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS[:2], ids=lambda document: document.name)
def test_make_targets_exist(document):
    named = {words[1] for words in commands("make", document=document)}
    named |= set(re.findall(r"`make ([\w-]+)", document.read_text()))
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))

    assert named
    assert named <= targets


def test_make_says_what_python_it_needs(tmp_path):
    done = subprocess.run(
        ["make", "-s", "-C", REPOSITORY, "test", "PYTHON=no-such-python", f"VENV={tmp_path}/venv"],
        capture_output=True,
        check=False,
        text=True,
    )

    assert done.returncode != 0
    assert "Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_make_keeps_a_venv_that_works(tmp_path):
    """A stamp is missing, the environment is not: nothing is thrown away."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    kept = tmp_path / "kept"
    kept.touch()

    subprocess.run(
        ["make", "-s", "-C", REPOSITORY, f"{tmp_path}/.created", f"VENV={tmp_path}"], check=True
    )

    assert kept.exists()
    assert (tmp_path / ".created").exists()


def test_every_import_of_the_package_is_declared():
    declared = requirement_names(PROJECT["dependencies"])
    distributions = packages_distributions()
    imported = set()
    for file in (REPOSITORY / "vembed").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"vembed"}
    extras = PROJECT["optional-dependencies"]
    optional = requirement_names([*extras["mining"], *extras["trackers"]])

    undeclared = {
        name
        for name in third_party
        if not {normalized(d) for d in distributions.get(name, [name])} & (declared | optional)
    }
    assert len(third_party) > 8
    assert undeclared <= {"pydantic_core"}  # the other half of pydantic


def test_every_dependency_is_pinned():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = {normalized(line.split("==")[0]) for line in lines if "==" in line}
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]

    assert requirement_names([r for group in groups for r in group]) <= pins | {"vembed"}


def test_every_file_of_the_package_is_packaged():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = REPOSITORY / "vembed"
    packaged = {f for glob in settings["package-data"]["vembed"] for f in package.glob(glob)}
    files = {
        f
        for f in package.rglob("*")
        if f.is_file() and f.suffix not in (".py", ".pyc") and "__pycache__" not in f.parts
    }

    assert files == packaged
