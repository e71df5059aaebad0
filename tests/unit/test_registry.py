"""A name, `package.module:Name` or an object becomes a callable; all else an error that helps."""

import collections

import pytest

from vembed.errors import ConfigError
from vembed.registry import accepted_arguments, check_arguments, construct, resolve

TABLE = {"ordered": "collections:OrderedDict", "counter": "collections:Counter"}


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
