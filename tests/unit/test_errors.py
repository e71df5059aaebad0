"""How a program ends: one message, and a status that says what kind of failure it was."""

import pytest

from vembed import errors
from vembed.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    DistributedError,
    NonFiniteError,
    VembedError,
    did_you_mean,
    exit_status,
)


def raises(error):
    def program():
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "status", "builtin"),
    [
        (ConfigError, 2, ValueError),
        (DataError, 2, ValueError),
        (CheckpointError, 2, OSError),
        (DistributedError, 1, RuntimeError),
        (DiskError, 3, OSError),
        (NonFiniteError, 5, ArithmeticError),
        (VembedError, 1, Exception),
    ],
)
def test_each_error_has_its_status_and_is_a_builtin(error, status, builtin, capsys):
    assert issubclass(error, builtin)
    assert exit_status(raises(error("what went wrong"))) == status
    assert capsys.readouterr().err == "vembed: what went wrong\n"


def test_success_interruption_and_the_unexpected(capsys):
    assert exit_status(lambda: 0) == 0
    assert exit_status(raises(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        exit_status(raises(ZeroDivisionError()))


def test_other_processes_wait_for_the_first_to_speak(monkeypatch, capsys):
    waited = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    assert exit_status(raises(DataError("x"))) == 2
    assert waited == [errors._WAIT_FOR_FIRST_PROCESS_S]
    assert capsys.readouterr().err == "vembed (process 3): x\n"


def test_what_the_first_process_tells_too_is_told_once(monkeypatch, capsys):
    error = DataError("x")
    error.is_shared = True
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: None)
    assert exit_status(raises(error)) == 2
    assert capsys.readouterr().err == "vembed: x\n"
    monkeypatch.setenv("RANK", "3")
    assert exit_status(raises(error)) == 2
    assert capsys.readouterr().err == ""


def test_did_you_mean():
    assert did_you_mean("epoch", ["epochs", "lr"]) == " (did you mean 'epochs'?)"
    assert did_you_mean("zzz", ["epochs", "lr"]) == ""
