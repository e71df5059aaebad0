"""A process that hangs or dies ends all of them; each says where it stood."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch import Ended, run_together
from tests.unit.training.test_trainer import make_batches, make_trainer
from vembed.distributed import process_index
from vembed.errors import exit_status


class Troubled(list):
    """Batches; process 1 comes to grief while it reads the third one."""

    trouble = ""

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == 2 and process_index() == 1:
                os.kill(os.getpid(), signal.SIGKILL) if self.trouble == "dies" else time.sleep(60)
            yield batch


def train(folder: str, trouble: str) -> int:
    batches = Troubled(make_batches(8))
    batches.trouble = trouble
    trainer = make_trainer(Path(folder), batches=batches, process_timeout_s=2)
    return exit_status(lambda: trainer.train() and 0)


@pytest.fixture
def ended(tmp_path, request) -> list[Ended]:
    return run_together(train, 2, str(tmp_path), request.param)


@pytest.mark.parametrize("ended", ["hangs"], indirect=True)
def test_each_process_says_where_it_hangs(ended):
    first, second = ended
    assert [first.status, second.status] == [6, 6]
    assert "vembed: process 0 hangs in step 3: nothing happened for 2 s" in first.said
    assert "while it was waiting for the rows of other processes" in first.said
    assert "vembed: process 1 hangs in step 3" in second.said
    assert "while it was reading rows" in second.said
    assert "in __iter__" in second.said


@pytest.mark.parametrize("ended", ["dies"], indirect=True)
def test_who_is_left_alone_says_at_which_step(ended):
    first, second = ended
    assert [first.status, second.status] == [1, -signal.SIGKILL]
    assert "vembed: process 0 lost the others at step 3: one of them ended or hangs" in first.said
    assert "Traceback" not in first.said
