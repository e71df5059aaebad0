"""Read the documented public API of installed packages from their source files, without importing them."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vembed.errors import ConfigError

STANDARD_LIBRARY = "python"
"""Stands for the standard library where a package is named."""

_SKIPPED_PARTS = frozenset(
    "test tests _tests testing test_utils testing_utils conftest idlelib lib2to3 distutils ensurepip tkinter turtledemo pydoc_data "
    "site-packages dist-packages _vendor vendor vendored _distutils_hack externals examples deprecated v1 __pycache__".split()
)
# transformers writes modular_x.py and generates modeling_x.py from it: one of the two is enough.
_SKIPPED_STEMS = ("test_", "modular_", "convert_")


@dataclass(frozen=True)
class DocumentedObject:
    """A public module, class, function or method that has a docstring.

    Attributes:
        name: Name to import it by, such as `numpy.linalg.norm`.
        signature: Arguments as they are written in the source, such as `(x, ord=None)`; empty for a module or property.
        docstring: Its docstring without indentation.
    """

    name: str
    signature: str
    docstring: str


def read_package(package: str, *, max_objects: int) -> list[DocumentedObject]:
    """Read the documented public objects of a package, or of the standard library (`STANDARD_LIBRARY`).

    A package with more than `max_objects` is sampled by file, in an order that depends on nothing but the file names.

    Raises:
        ConfigError: if the package is not installed.
    """
    root, prefix = _locate(package)
    exports = _Exports.of(root, prefix)
    files = [f for f in root.rglob("*.py") if _is_product_code(f.relative_to(root))]
    relative = {f: f.relative_to(root).as_posix() for f in files}
    objects: list[DocumentedObject] = []
    for file in sorted(files, key=lambda f: stable_hash(relative[f])):
        objects += _read_file(file, _module_name(relative[file], prefix), exports)
        if len(objects) >= max_objects:
            break
    return objects[:max_objects]


def stable_hash(text: str) -> int:
    """A 64-bit hash of `text`: the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _locate(package: str) -> tuple[Path, str]:
    """The folder of a package and the name that its modules start with."""
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib")), ""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"quickstart: builds its data from the docstrings of installed packages, and {package!r} is not installed. "
            "Install what it needs: pip install 'vembed[quickstart]'"
        )
    return Path(spec.submodule_search_locations[0]), package


def _is_product_code(file: Path) -> bool:
    parts = (*file.parts[:-1], file.stem)
    if file.stem.startswith(_SKIPPED_STEMS) or file.stem.endswith("_test"):
        return False
    return not any(part in _SKIPPED_PARTS or not part.isidentifier() for part in parts)


def _module_name(relative: str, prefix: str) -> str:
    parts = relative.removesuffix(".py").split("/")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join([prefix, *parts] if prefix else parts)


def _read_file(file: Path, module: str, exports: _Exports) -> Iterator[DocumentedObject]:
    tree = _parse(file)
    if tree is None:
        return
    docstring = ast.get_docstring(tree)
    if docstring and not _is_private(module):
        yield DocumentedObject(module, "", docstring)
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        name = exports.public_name(module, node.name, tree)
        if name is not None:
            yield from _read_definition(node, name)


def _read_definition(
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[DocumentedObject]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield DocumentedObject(name, _signature(node), docstring)
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            is_method = isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef))
            if is_method and not member.name.startswith("_"):
                yield from _read_definition(member, f"{name}.{member.name}")


def _parse(file: Path) -> ast.Module | None:
    """The syntax tree, or None for a file of another Python version (templates, Python 2 fixtures)."""
    try:
        with warnings.catch_warnings():
            # Invalid escapes in other people's strings are no concern of the reader's.
            warnings.simplefilter("ignore")
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return _arguments(inits[0]) if inits else ""
    if any(_decorator_name(d).endswith("property") for d in node.decorator_list):
        return ""
    return _arguments(node)


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    names = [a.arg for a in function.args.posonlyargs + function.args.args]
    written = ast.unparse(function.args)
    if names and names[0] in ("self", "cls"):
        written = written.removeprefix(names[0]).removeprefix(", /").removeprefix(", ")
    return f"({written})"


def _decorator_name(decorator: ast.expr) -> str:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def _is_private(module: str) -> bool:
    return any(part.startswith("_") for part in module.split("."))


@dataclass
class _Exports:
    """What the `__init__.py` files of a package re-export from its private modules.

    The functions of numpy, scipy or scikit-learn are written in private modules and imported into public packages:
    `numpy._core.fromnumeric.sum` is documented, and known to everybody, as `numpy.sum`.

    Attributes:
        names: (module, name in it) to public name.
        stars: Module whose names are all imported, to the public package that imports it.
    """

    names: dict[tuple[str, str], str] = field(default_factory=dict)
    stars: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, prefix: str) -> _Exports:
        exports = cls()
        for file in sorted(root.rglob("__init__.py")):
            relative = file.relative_to(root)
            package = _module_name(relative.as_posix(), prefix)
            if _is_product_code(relative.parent / "x.py") and not _is_private(package):
                tree = _parse(file)
                for node in tree.body if tree else ():
                    if isinstance(node, ast.ImportFrom):
                        exports._add(package, node)
        return exports

    def _add(self, package: str, node: ast.ImportFrom) -> None:
        base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        if not _is_private(source):
            return
        for alias in node.names:
            public = f"{package}.{alias.asname or alias.name}"
            if alias.name == "*":
                self.stars.setdefault(source, package)
            elif not alias.name.startswith("_"):
                self.names.setdefault((source, alias.name), public)

    def public_name(self, module: str, name: str, tree: ast.Module) -> str | None:
        """The name by which users import `name`, defined in `module`; None when it is private."""
        if name.startswith("_"):
            return None
        if not _is_private(module):
            return f"{module}.{name}"
        ancestor = module
        while ancestor:
            if (ancestor, name) in self.names:
                return self.names[ancestor, name]
            ancestor = ancestor.rpartition(".")[0]
        if module in self.stars and name in _declared_names(tree):
            return f"{self.stars[module]}.{name}"
        return None


def _declared_names(tree: ast.Module) -> frozenset[str]:
    """The strings of a literal `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return frozenset(
                c.value
                for c in ast.walk(node.value)
                if isinstance(c, ast.Constant) and isinstance(c.value, str)
            )
    return frozenset()
