"""A name, `package.module:Name` or an object becomes a callable; all else an error that helps."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any, Literal

import pytest

from vembed.errors import ConfigError
from vembed.registry import accepted_arguments, check_arguments, construct, resolve

TABLE = {"ordered": "collections:OrderedDict", "counter": "collections:Counter"}


if TYPE_CHECKING:
    from vembed.data import RecordDataset


def _annotated(
    size: float = 1.0,
    count: int | Literal["auto"] | None = None,
    is_on: bool = True,
    unknown: RecordDataset | None = None,
    anything: Any = None,
) -> dict[str, Any]:
    defaults = {"size": 1.0, "count": None, "is_on": True, "unknown": None, "anything": None}
    given = {
        "size": size, "count": count, "is_on": is_on, "unknown": unknown, "anything": anything
    }  # fmt: skip
    return {k: v for k, v in given.items() if v != defaults[k]} or {"count": None}


class TestResolve:
    def test_a_name_of_the_table(self):
        assert resolve("kind", "counter", TABLE) is collections.Counter

    def test_a_path(self):
        assert resolve("kind", "collections:deque", TABLE) is collections.deque

    def test_an_object_is_itself(self):
        thing = object()
        assert resolve("kind", thing, TABLE) is thing

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            (
                "countr",
                r"kind: unknown name 'countr' \(did you mean 'counter'\?\)\. Built in: counter",
            ),
            (
                "collections:deqe",
                r"kind: module 'collections' has no 'deqe' \(did you mean 'deque'",
            ),
            ("no_such_module:X", "kind: cannot import module 'no_such_module'"),
        ],
    )
    def test_errors_help(self, choice, message):
        with pytest.raises(ConfigError, match=message):
            resolve("kind", choice, TABLE)

    def test_a_module_that_needs_another_one_says_which(self, tmp_path, monkeypatch):
        (tmp_path / "needy_module.py").write_text("import not_installed_anywhere\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ConfigError, match="needs 'not_installed_anywhere', which is not inst"):
            resolve("kind", "needy_module:X", TABLE)


class TestConstruct:
    def test_arguments_are_passed(self):
        assert construct("kind", "counter", TABLE, {"a": 2}) == collections.Counter(a=2)

    def test_an_instance_is_itself_and_takes_no_arguments(self):
        instance = collections.Counter(a=1)
        assert construct("kind", instance, TABLE, {}) is instance
        with pytest.raises(ConfigError, match=r"an object was given, so keyword arguments \['b'\]"):
            construct("kind", instance, TABLE, {"b": 1})

    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ({"size": "5e-2"}, {"size": 0.05}),
            ({"size": 5}, {"size": 5.0}),
            ({"count": "auto"}, {"count": "auto"}),
            ({"count": "64"}, {"count": 64}),
            ({"count": None}, {"count": None}),
            ({"is_on": "no"}, {"is_on": False}),
            ({"unknown": "5e-2"}, {"unknown": "5e-2"}),
            ({"anything": ["5e-2"]}, {"anything": ["5e-2"]}),
        ],
    )
    def test_what_yaml_wrote_becomes_what_is_annotated(self, written, meant):
        assert construct("kind", _annotated, {}, written) == meant

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"size": "five"}, "size: expected a number. Received: 'five'"),
            ({"size": True}, "size: expected a number. Received: True"),
            ({"size": None}, "size: expected a number. Received: None"),
            ({"count": 2.5}, "count: expected a whole number or auto or null. Received: 2.5"),
            ({"is_on": "maybe"}, "is_on: expected true or false. Received: 'maybe'"),
        ],
    )
    def test_a_value_of_another_kind_is_an_error_in_words(self, wrong, message):
        with pytest.raises(ConfigError, match=message):
            construct("kind", _annotated, {}, wrong)

    def test_a_value_that_no_yaml_can_write_is_passed_on(self):
        thing = object()
        assert construct("kind", _annotated, {}, {"size": thing}) == {"size": thing}

    def test_arguments_are_checked_before_the_call(self):
        def factory(size):
            raise AssertionError("must not be called")

        with pytest.raises(ConfigError, match="unexpected keyword argument 'sise'.* accepts: size"):
            construct("kind", factory, TABLE, {"size": 1, "sise": 1})


def test_check_arguments_accepts_what_can_be_called():
    check_arguments("what", lambda a, b=1: None, {"a": 1})
    with pytest.raises(ConfigError, match="missing a required argument: 'a'"):
        check_arguments("what", lambda a: None, {})


def test_accepted_arguments():
    offered = {"a": 1, "b": 2}
    assert accepted_arguments(lambda a: None, offered) == {"a": 1}
    assert accepted_arguments(lambda **kwargs: None, offered) == offered
