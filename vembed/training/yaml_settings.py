"""Read YAML settings with the line of each, leaving the text of scalars to the type of the key.

A file of settings may come from anybody: tags construct nothing, and neither aliases nor brackets
can make a small file a large value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from vembed.config import Setting
from vembed.errors import ConfigError, find_control_character, shorten

MOST_BYTES = 2**20
"""A larger file is no file of settings."""

_MOST_SETTINGS = 1000
_MOST_VALUES = 10_000
_MOST_LEVELS = 50

_YAML = "tag:yaml.org,2002:"
_NULL_TAG = f"{_YAML}null"
_TAGS = {
    f"{_YAML}{kind}" for kind in ("map", "seq", "str", "null", "bool", "int", "float", "merge")
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that takes `1e-3` for a number, as YAML 1.2 does, and a date for a text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    f"{_YAML}float",
    re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml_settings(
    path: Path, reads_as_yaml: Callable[[str], bool]
) -> tuple[list[Setting], list[str]]:
    """Settings of a YAML file in its order, and the problems of the file.

    Args:
        path: The file.
        reads_as_yaml: Whether YAML decides the types of the scalars in a key's value; elsewhere
            they stay text, for the type of the setting to decide.
    """
    try:
        loader, root = _parse(_read_text(path), path.name)
    except ConfigError as error:
        return [], [str(error)]
    structure = _Structure(path.name)
    settings, problems = [], list(_key_problems(root, path.name))
    for key_node, value_node in root.value:
        extent = structure.look_at(value_node)
        if extent.is_bad or not _is_word(key_node):
            continue
        key = key_node.value
        try:
            value = _value(loader, value_node, as_yaml=reads_as_yaml(key))
        except yaml.YAMLError as error:
            problems.append(_syntax_problem(path.name, error))
        else:
            settings.append(Setting(key, value, f"{path.name}:{key_node.start_mark.line + 1}"))
    return settings, problems + structure.problems


def read_yaml_value(text: str, *, as_yaml: bool) -> Any:
    """A list or mapping as written on the command line.

    Raises:
        yaml.YAMLError: if it is not valid YAML.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    if node is None or _Structure("").look_at(node).is_bad:
        raise yaml.YAMLError("not a value that a setting can have")
    return _value(loader, node, as_yaml=as_yaml)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--config: cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--config: cannot read {str(path)!r}: {error}") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(
            f"--config: {str(path)!r} must not be larger than {MOST_BYTES // 2**20} MB"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path.name}:{line}: not UTF-8 text (byte {error.start})") from error


def _parse(text: str, file: str) -> tuple[_Loader, MappingNode]:
    """The loader of a file, and the mapping that the file is.

    Raises:
        ConfigError: if it is none.
    """
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{file}:{line}: not valid YAML: the character {chr(error.character)!a} is not allowed"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_problem(file, error)) from error
    except RecursionError:
        line = 1 if loader is None else loader.line + 1
        raise ConfigError(f"{file}:{line}: {_TOO_DEEP}") from None
    if root is None:
        return loader, MappingNode(f"{_YAML}map", [])
    if not isinstance(root, MappingNode):
        raise ConfigError(f"{file}:1: expected settings as KEY: VALUE")
    if len(root.value) > _MOST_SETTINGS:
        raise ConfigError(
            f"{file}:{root.value[_MOST_SETTINGS][0].start_mark.line + 1}: a file must not have "
            f"more than {_MOST_SETTINGS} settings. Received: {len(root.value):,}"
        )
    return loader, root


def _value(loader: _Loader, node: Node, *, as_yaml: bool) -> Any:
    if as_yaml:
        try:
            return loader.construct_object(node, deep=True)
        except (ValueError, LookupError) as error:
            # A scalar that is not what its tag says, such as `!!int x`.
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None
    if isinstance(node, ScalarNode):
        return None if node.tag == _NULL_TAG else node.value
    if isinstance(node, SequenceNode):
        return [_value(loader, item, as_yaml=False) for item in node.value]
    return {key.value: _value(loader, value, as_yaml=False) for key, value in node.value}


class _Extent(NamedTuple):
    """What a value is when all aliases are written out."""

    values: int
    levels: int
    is_bad: bool


_TOO_DEEP = f"a value must not have more than {_MOST_LEVELS} levels"


class _Structure:
    """Looks at values, at each node once, however many aliases repeat it.

    Attributes:
        problems: What was found: values that contain themselves or grow too large, duplicate keys,
            tags.
    """

    def __init__(self, file: str) -> None:
        self.problems: list[str] = []
        self._file = file
        self._known: dict[int, _Extent] = {}
        self._inside: set[int] = set()

    def look_at(self, node: Node) -> _Extent:
        """How far a value extends, noting what is wrong with it."""
        if id(node) in self._inside:
            return self._refuse(node, "a value cannot contain itself")
        if id(node) in self._known:
            return self._known[id(node)]
        self._inside.add(id(node))
        # Depth first, and an alias comes behind its anchor: the recursion is never deeper than the
        # brackets of the file, which the parser could follow.
        parts = [self.look_at(part) for part in _parts(node)]
        self._inside.discard(id(node))
        extent = _Extent(
            1 + sum(part.values for part in parts),
            1 + max((part.levels for part in parts), default=0),
            any(part.is_bad for part in parts),
        )
        self._known[id(node)] = extent if extent.is_bad else self._judged(node, extent)
        return self._known[id(node)]

    def _judged(self, node: Node, extent: _Extent) -> _Extent:
        if node.tag not in _TAGS:
            tag = shorten(node.tag.removeprefix(_YAML), quote=True)
            return self._refuse(node, f"the tag {tag} has no meaning in settings. Remove it")
        if extent.levels > _MOST_LEVELS:
            return self._refuse(node, _TOO_DEEP)
        if extent.values > _MOST_VALUES:
            return self._refuse(node, f"a value must not be of more than {_MOST_VALUES:,} values")
        problems = list(_key_problems(node, self._file)) if isinstance(node, MappingNode) else []
        self.problems += problems
        return extent._replace(is_bad=bool(problems))

    def _refuse(self, node: Node, rule: str) -> _Extent:
        self.problems.append(f"{_place(self._file, node)}{rule}")
        return _Extent(1, 1, is_bad=True)


def _parts(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, SequenceNode) else []


def _key_problems(node: MappingNode, file: str) -> Iterator[str]:
    """Keys written twice, of which PyYAML silently keeps the last, and keys that are no words."""
    first: dict[str, Node] = {}
    for key, _ in node.value:
        if not _is_word(key):
            yield f"{_place(file, key)}a key must be a word"
        elif key.value in first:
            line = first[key.value].start_mark.line + 1
            name = shorten(key.value)
            yield f"{_place(file, key)}{name}: already in line {line}. Keep one of them"
        else:
            first[key.value] = key


def _is_word(key: Node) -> bool:
    return isinstance(key, ScalarNode) and find_control_character(key.value) is None


def _place(file: str, node: Node) -> str:
    return f"{file}:{node.start_mark.line + 1}: "


def _syntax_problem(file: str, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        problem = shorten(str(error.problem), most=200)
        return f"{file}:{mark.line + 1}:{mark.column + 1}: not valid YAML: {problem}"
    return f"{file}: not valid YAML: {shorten(' '.join(str(error).split()), most=200)}"
