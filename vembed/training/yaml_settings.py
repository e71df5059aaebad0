"""Read YAML settings with the line of each, leaving the text of scalars to the type of the key."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from vembed.config import Setting
from vembed.errors import ConfigError

_NULL_TAG = "tag:yaml.org,2002:null"


class _Loader(yaml.SafeLoader):
    """SafeLoader that takes `1e-3` for a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
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
        loader = _Loader(_read_text(path))
        root = _root(loader, path.name)
    except ConfigError as error:
        return [], [str(error)]
    settings, problems = [], list(_duplicates(root, path.name))
    for key_node, value_node in root.value:
        found = list(_structure_problems(value_node, path.name))
        problems += found
        if found or not isinstance(key_node, ScalarNode):
            continue
        key = key_node.value
        try:
            value = _value(loader, value_node, as_yaml=reads_as_yaml(key))
        except yaml.YAMLError as error:
            problems.append(_syntax_problem(path.name, error))
        else:
            settings.append(Setting(key, value, f"{path.name}:{key_node.start_mark.line + 1}"))
    return settings, problems


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config: cannot read {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name}: not UTF-8 text (byte {error.start})") from error


def _root(loader: _Loader, file: str) -> MappingNode:
    try:
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_problem(file, error)) from error
    if root is None:
        return MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(root, MappingNode):
        raise ConfigError(f"{file}:1: expected settings as KEY: VALUE")
    return root


def read_yaml_value(text: str, *, as_yaml: bool) -> Any:
    """A list or mapping as written on the command line.

    Raises:
        yaml.YAMLError: if it is not valid YAML.
    """
    loader = _Loader(text)
    node = loader.get_single_node()
    if node is None or list(_structure_problems(node, "")):
        raise yaml.YAMLError("a key is written twice")
    return _value(loader, node, as_yaml=as_yaml)


def _value(loader: _Loader, node: Node, *, as_yaml: bool) -> Any:
    if as_yaml:
        return loader.construct_object(node, deep=True)
    if isinstance(node, ScalarNode):
        return None if node.tag == _NULL_TAG else node.value
    if isinstance(node, SequenceNode):
        return [_value(loader, item, as_yaml=False) for item in node.value]
    return {key.value: _value(loader, value, as_yaml=False) for key, value in node.value}


def _structure_problems(node: Node, file: str, inside: tuple[Node, ...] = ()) -> Iterator[str]:
    """Values that contain themselves, and the duplicate keys of every mapping in `node`."""
    if node in inside:
        yield f"{_place(file, node)}a value cannot contain itself"
        return
    children = node.value if isinstance(node, SequenceNode) else []
    if isinstance(node, MappingNode):
        yield from _duplicates(node, file)
        children = [value for _, value in node.value]
    for child in children:
        yield from _structure_problems(child, file, (*inside, node))


def _duplicates(node: MappingNode, file: str) -> Iterator[str]:
    """Keys written twice, of which PyYAML silently keeps the last, and keys that are no words."""
    first: dict[str, Node] = {}
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            yield f"{_place(file, key)}a key must be a word"
        elif key.value in first:
            line = first[key.value].start_mark.line + 1
            yield f"{_place(file, key)}{key.value}: already in line {line}. Keep one of them"
        else:
            first[key.value] = key


def _place(file: str, node: Node) -> str:
    return f"{file}:{node.start_mark.line + 1}: "


def _syntax_problem(file: str, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{file}:{mark.line + 1}:{mark.column + 1}: not valid YAML: {error.problem}"
    return f"{file}: not valid YAML: {' '.join(str(error).split())}"
