"""Read the documented public API of installed packages from their sources; nothing is imported."""

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

# Folders and modules that hold no public API, or that not every distribution of Python has.
_SKIPPED_NAMES = frozenset({
    *("test", "tests", "_tests", "testing", "test_utils", "testing_utils", "conftest", "examples"),
    *("idlelib", "lib2to3", "distutils", "ensurepip", "tkinter", "turtledemo", "pydoc_data"),
    *("_vendor", "vendor", "vendored", "_distutils_hack", "externals", "deprecated", "v1"),
})  # fmt: skip
# transformers generates modeling_x.py from modular_x.py: one of the two is enough.
_SKIPPED_PREFIXES = ("test_", "modular_", "convert_")

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = ast.ClassDef | _Function


@dataclass(frozen=True)
class DocumentedObject:
    """A public module, class, function or method that has a docstring.

    Attributes:
        name: Name to import it by, such as `numpy.linalg.norm`.
        signature: Arguments as the source has them, such as `(x, ord=None)`; empty for a module,
            a property, or a class without `__init__`.
        docstring: Its docstring without indentation.
    """

    name: str
    signature: str
    docstring: str


def read_package(package: str, *, max_objects: int) -> list[DocumentedObject]:
    """Read the documented public objects of a package, or of the standard library.

    A package with more than `max_objects` is sampled by file, in an order that depends on nothing
    but the file names.

    Args:
        package: Import name, or `STANDARD_LIBRARY`.
        max_objects: Most objects to return.

    Raises:
        ConfigError: if the package is not installed.
    """
    root, prefix = _locate(package)
    exports = _Exports.of(root, prefix)
    files = (file.relative_to(root) for file in root.rglob("*.py"))
    paths = [file.as_posix() for file in files if _is_product_code(file)]
    objects: list[DocumentedObject] = []
    for path in sorted(paths, key=stable_hash):
        objects += _read_file(root / path, _module_name(path, prefix), exports)
        if len(objects) >= max_objects:
            break
    return objects[:max_objects]


def stable_hash(text: str) -> int:
    """A 64-bit hash of `text`: the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _locate(package: str) -> tuple[Path, str]:
    """The folder of a package, and the name that its modules start with."""
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib")), ""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"quickstart: makes its data from installed packages, and {package!r} is not "
            "installed. Install all that it needs: pip install 'vembed[quickstart]'"
        )
    return Path(spec.submodule_search_locations[0]), package


def _is_product_code(file: Path) -> bool:
    """Whether a file, relative to the package, is a module of it; not tests, not another's code."""
    names = (*file.parts[:-1], file.stem)
    if file.stem.startswith(_SKIPPED_PREFIXES) or file.stem.endswith("_test"):
        return False
    # site-packages, which may lie inside the standard library, is no identifier.
    return all(name.isidentifier() and name not in _SKIPPED_NAMES for name in names)


def _module_name(path: str, prefix: str) -> str:
    parts = path.removesuffix(".py").split("/")
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
        if isinstance(node, _Definition):
            name = exports.public_name(module, node.name, tree)
            if name is not None:
                yield from _read_definition(node, name)


def _read_definition(node: _Definition, name: str) -> Iterator[DocumentedObject]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield DocumentedObject(name, _signature(node), docstring)
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, _Function) and not member.name.startswith("_"):
                yield from _read_definition(member, f"{name}.{member.name}")


def _parse(file: Path) -> ast.Module | None:
    """The syntax tree; None for a file that is not of this Python's language, as templates are."""
    try:
        with warnings.catch_warnings():
            # Invalid escapes in other people's strings are no concern of ours.
            warnings.simplefilter("ignore")
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _signature(node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, _Function) and n.name == "__init__"]
        return _arguments(inits[0]) if inits else ""
    if any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list):
        return ""
    return _arguments(node)


def _arguments(function: _Function) -> str:
    names = [a.arg for a in function.args.posonlyargs + function.args.args]
    written = ast.unparse(function.args)
    if names and names[0] in ("self", "cls"):
        written = written.removeprefix(names[0]).removeprefix(", /").removeprefix(", ")
    return f"({written})"


def _is_private(module: str) -> bool:
    return any(part.startswith("_") for part in module.split("."))


@dataclass
class _Exports:
    """What the public `__init__.py` files of a package import from its private modules.

    The functions of numpy, scipy or scikit-learn are written in private modules and re-exported:
    `numpy._core.fromnumeric.sum` is documented, and known to everybody, as `numpy.sum`.

    Attributes:
        names: (module, name in it) to public name.
        stars: Module from which all names are imported, to the public package that does so.
    """

    names: dict[tuple[str, str], str] = field(default_factory=dict)
    stars: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, prefix: str) -> _Exports:
        exports = cls()
        for file in sorted(root.rglob("__init__.py")):
            path = file.relative_to(root)
            package = _module_name(path.as_posix(), prefix)
            # The name of the file itself is none of a module's; that of its folder is.
            if not _is_private(package) and _is_product_code(path.with_name("module")):
                tree = _parse(file)
                for node in tree.body if tree else ():
                    if isinstance(node, ast.ImportFrom):
                        exports._add(package, node)
        return exports

    def _add(self, package: str, node: ast.ImportFrom) -> None:
        parents = package.split(".")
        base = parents[: len(parents) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        if not _is_private(source):
            return
        for alias in node.names:
            if alias.name == "*":
                self.stars.setdefault(source, package)
            else:
                public = f"{package}.{alias.asname or alias.name}"
                self.names.setdefault((source, alias.name), public)

    def public_name(self, module: str, name: str, tree: ast.Module) -> str | None:
        """The name by which users know `name`, defined in `module`; None when it is private."""
        if name.startswith("_"):
            return None
        if not _is_private(module):
            return f"{module}.{name}"
        source = module
        while source:
            if (source, name) in self.names:
                return self.names[source, name]
            source = source.rpartition(".")[0]
        if module in self.stars and name in _declared_names(tree):
            return f"{self.stars[module]}.{name}"
        return None


def _declared_names(tree: ast.Module) -> set[str]:
    """The strings of the `__all__` of a module."""
    return {
        constant.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
        for constant in ast.walk(node.value)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }
