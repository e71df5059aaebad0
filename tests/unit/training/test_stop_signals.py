"""A signal ends a run after its step, saved, with the status that clusters look for."""

import os
import signal
import threading
import time

import pytest

from tests.launch import run_forked
from tests.unit.training.test_trainer import make_trainer
from vembed.errors import exit_status
from vembed.training.stop_signals import STOPPING, StoppedError, catch_stop_signals
from vembed.training.trainer import Trainer


class Signalled(Trainer):
    """Gets a signal in the middle of its third step."""

    number = signal.SIGTERM

    def _step_standard(self, batch):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            os.kill(os.getpid(), self.number)
        return super()._step_standard(batch)


def train(folder, number):
    trainer = make_trainer(folder, trainer_class=Signalled, epochs=5)
    trainer.number = number
    return exit_status(lambda: trainer.train() and 0)


@pytest.mark.parametrize("number", STOPPING)
def test_the_step_is_finished_and_saved(tmp_path, number):
    ended = run_forked(train, tmp_path, number)
    assert ended.status == 128 + number
    assert f"vembed: stopped by {number.name} after step 3 of 20; saved in " in ended.said
    assert "--resume auto" in ended.said
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    assert not (tmp_path / "final").exists()


def hurry():
    with catch_stop_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.number() == signal.SIGINT
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)


def test_ctrl_c_again_ends_at_once_but_not_the_same_one_twice():
    started = time.monotonic()
    ended = run_forked(hurry)
    assert ended.status == 130
    assert 1 < time.monotonic() - started < 10
    assert ended.said.count("Ctrl-C ends at once") == 1


def test_handlers_come_back_and_what_is_ignored_stays_so():
    before = [signal.getsignal(number) for number in STOPPING]
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with catch_stop_signals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.number() == 0
            assert signal.getsignal(signal.SIGTERM) == signals.receive
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_beside_the_main_thread_nothing_changes():
    numbers = []

    def catch():
        with catch_stop_signals() as signals:
            numbers.append(signals.number())

    thread = threading.Thread(target=catch)
    thread.start()
    thread.join()
    assert numbers == [0]


def test_a_script_that_lets_it_through_ends_with_the_status_of_the_signal():
    with pytest.raises(SystemExit) as caught:
        raise StoppedError("stopped", signal.SIGUSR1)
    assert caught.value.code == 138
