"""Turn what a user wrote (a name, `package.module:Name`, or an object) into a callable."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from vembed.errors import ConfigError, did_you_mean

__all__ = ["accepted_arguments", "check_arguments", "construct", "did_you_mean", "resolve"]


def resolve(kind: str, choice: Any, table: Mapping[str, str]) -> Any:
    """Find the callable that `choice` stands for.

    Args:
        kind: What is chosen, as the config names it, such as `"loss_type"`. Used in errors only.
        choice: A name from `table`, a `"package.module:Name"` string, or an object, which is
            returned as it is.
        table: Built-in names, each with the `"package.module:Name"` that implements it.

    Raises:
        ConfigError: if the name is unknown, or the module or attribute cannot be found.
    """
    if not isinstance(choice, str):
        return choice
    if choice in table:
        return _import_object(kind, table[choice])
    if ":" in choice:
        return _import_object(kind, choice)
    raise ConfigError(
        f"{kind}: unknown name {choice!r}{did_you_mean(choice, table)}. "
        f"Built in: {', '.join(sorted(table))}. Your own: write it as 'package.module:Name'"
    )


def construct(kind: str, choice: Any, table: Mapping[str, str], kwargs: Mapping[str, Any]) -> Any:
    """Resolve `choice` and call it with `kwargs`, checked against its signature first.

    An argument that is annotated as a number, a text, a truth value or a choice of words becomes
    one: YAML reads `5e-2` as a text.

    An object that is already an instance (not a class or function) is returned as it is; `kwargs`
    must then be empty.

    Raises:
        ConfigError: as `resolve` does, or if `kwargs` do not fit the signature.
    """
    factory = resolve(kind, choice, table)
    if not isinstance(factory, type) and not inspect.isroutine(factory):
        if kwargs:
            raise ConfigError(
                f"{kind}: an object was given, so keyword arguments {sorted(kwargs)} have no use"
            )
        return factory
    what = f"{kind} {choice!r}"
    check_arguments(what, factory, kwargs)
    hints = _plain_hints(factory)
    return factory(
        **{
            name: _as_hinted(f"{what}: {name}", hints[name], value) if name in hints else value
            for name, value in kwargs.items()
        }
    )


def check_arguments(what: str, factory: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming what is accepted, unless `factory(**kwargs)` can be called."""
    signature = _signature(factory)
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        accepted = ", ".join(name for name in signature.parameters if name != "self")
        raise ConfigError(f"{what}: {error}; it accepts: {accepted}") from None


def accepted_arguments(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """What `function` has parameters for, of `offered`; everything if it takes `**kwargs`."""
    parameters = _signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(offered)
    return {name: value for name, value in offered.items() if name in parameters}


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    NoneType: "null",
}
_WRITTEN = (*_WORDS, list, dict)


def _plain_hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the parameters that take what YAML can say in a word."""
    init = getattr(factory, "__init__", None) if isinstance(factory, type) else factory
    names = getattr(init, "__globals__", {})
    hints = {}
    for name, parameter in _signature(factory).parameters.items():
        # One by one, because one that is imported for type checkers only would spoil all.
        one = SimpleNamespace(__annotations__={name: parameter.annotation})
        try:
            hint = get_type_hints(one, names)[name]
        except (NameError, AttributeError, TypeError, SyntaxError):
            continue
        if all(kind in _WORDS or get_origin(kind) is Literal for kind in _alternatives(hint)):
            hints[name] = hint
    return hints


def _alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) not in (Union, UnionType):
        return [hint]
    return [kind for part in get_args(hint) for kind in _alternatives(part)]


def _as_hinted(place: str, hint: Any, value: Any) -> Any:
    """The value as what the hint says it is; one that YAML cannot write is left as it is."""
    if not isinstance(value, _WRITTEN):
        return value
    # Otherwise true would be the number 1.
    strict = isinstance(value, bool)
    try:
        return TypeAdapter(hint).validate_python(value, strict=strict)
    except ValidationError:
        words = [
            word
            for kind in _alternatives(hint)
            for word in (get_args(kind) if get_origin(kind) is Literal else [_WORDS[kind]])
        ]
        raise ConfigError(
            f"{place}: expected {' or '.join(map(str, words))}. Received: {value!r}"
        ) from None


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The arguments of a function or class; `nn.Module.__init__` claims any and takes none."""
    init = getattr(function, "__init__", None) if isinstance(function, type) else None
    if getattr(init, "__module__", None) == "torch.nn.modules.module":
        return inspect.Signature()
    return inspect.signature(function)


def _import_object(kind: str, path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise ConfigError(
                f"{kind}: importing {module_name!r} needs {error.name!r}, which is not installed"
            ) from error
        raise ConfigError(
            f"{kind}: cannot import module {module_name!r} of {path!r} ({error}); "
            "is it installed or on PYTHONPATH?"
        ) from None
    if not hasattr(module, attribute):
        public = [name for name in dir(module) if not name.startswith("_")]
        raise ConfigError(
            f"{kind}: module {module_name!r} has no {attribute!r}{did_you_mean(attribute, public)}"
        )
    return getattr(module, attribute)
