from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vembed.errors import ConfigError
from vembed.quickstart.docstrings import STANDARD_LIBRARY, read_package

SOURCES = {
    "__init__.py": '"""Top of it."""\nfrom ._core import add\nfrom ._stars import *\n',
    "_core/__init__.py": "from .maths import add\n",
    "_core/maths.py": (
        'def add(x, /, y: int = 1, *rest, key=None) -> int:\n    """Add numbers."""\n'
        'def secret():\n    """Not exported."""\n'
    ),
    "_stars.py": (
        '__all__ = ["star"]\n'
        'def star():\n    """Shine."""\n'
        'def dust():\n    """Not in __all__."""\n'
    ),
    "shapes.py": (
        'class Shape:\n    """A shape."""\n'
        "    def __init__(self, size=2):\n        pass\n"
        '    def area(self, unit):\n        """Its area."""\n'
        '    @property\n    def size(self):\n        """Its size."""\n'
        '    @classmethod\n    def unit(cls):\n        """A shape of size one."""\n'
        '    def _hidden(self):\n        """Not public."""\n'
        "    def undocumented(self):\n        pass\n"
    ),
    "tests/test_shapes.py": 'def helper():\n    """Part of a test."""\n',
    "_vendor/other.py": 'def copied():\n    """Of another package."""\n',
    "python2.py": 'print "no longer Python"\n',
    "explodes.py": '"""Documented, and must not be imported."""\nraise SystemExit("imported")\n',
}


@pytest.fixture
def package(tmp_path, monkeypatch) -> str:
    for path, source in SOURCES.items():
        file = tmp_path / "fakepackage" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return "fakepackage"


def test_public_names_with_their_signatures(package):
    objects = read_package(package, max_objects=100)

    assert {o.name: o.signature for o in objects} == {
        "fakepackage": "",
        "fakepackage.add": "(x, /, y: int=1, *rest, key=None)",
        "fakepackage.star": "()",
        "fakepackage.shapes.Shape": "(size=2)",
        "fakepackage.shapes.Shape.area": "(unit)",
        "fakepackage.shapes.Shape.size": "",
        "fakepackage.shapes.Shape.unit": "()",
        "fakepackage.explodes": "",
    }
    assert "Add numbers." in {o.docstring for o in objects}


def test_nothing_is_imported(package):
    read_package(package, max_objects=100)

    assert package not in sys.modules


def test_sample_of_a_large_package_does_not_depend_on_the_order_of_the_folder(package, monkeypatch):
    sample = read_package(package, max_objects=3)
    forwards = Path.rglob
    monkeypatch.setattr(
        Path, "rglob", lambda self, pattern: reversed(list(forwards(self, pattern)))
    )

    assert len(sample) == 3
    assert read_package(package, max_objects=3) == sample


def test_standard_library_is_read_without_what_is_installed_in_it():
    names = {o.name for o in read_package(STANDARD_LIBRARY, max_objects=10**6)}

    assert {"textwrap.dedent", "json.dumps", "pathlib.PurePath.with_suffix"} <= names
    assert not any(
        "site-packages" in name or name.startswith(("pytest", "test.")) for name in names
    )


def test_missing_package_says_what_to_install():
    with pytest.raises(ConfigError, match=r"'not_installed_anywhere' is not.*vembed\[quickstart\]"):
        read_package("not_installed_anywhere", max_objects=1)
