"""A run that died is started again from its newest checkpoint, until that no longer helps."""

import pytest

from vembed.cli.train import replace_flags
from vembed.training import supervisor
from vembed.training.supervisor import supervise

GO_ON = ["--resume", "auto", "--overwrite_output_dir", "false"]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(supervisor, "_PAUSE_S", 0)


@pytest.fixture
def run(tmp_path):
    """A program that ends with each status in turn; a pair with a step leaves its checkpoint."""

    class Run:
        def __init__(self, *ends):
            self.ends, self.asked = list(ends), []

        def __call__(self, more):
            self.asked.append(list(more))
            status, step = self.ends.pop(0)
            (tmp_path / "config.yaml").touch()
            if step is not None:
                (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
            return status

        def supervised(self, max_restarts=100, resume="auto"):
            return supervise(
                self, output_dir=str(tmp_path), resume=resume, max_restarts=max_restarts
            )

    return Run


def test_it_goes_on_until_the_end(run, capsys):
    program = run((1, 5), (6, 10), (1, None), (0, None))
    assert program.supervised() == 0
    assert program.asked == [[], GO_ON, GO_ON, GO_ON]
    assert "ended with status 6; restart 2 of 100, from step 10" in capsys.readouterr().err


def test_a_named_checkpoint_is_where_it_starts_again_until_there_is_a_newer_one(run):
    program = run((1, None), (1, 5), (0, None))
    assert program.supervised(resume="runs/other/checkpoints/step-000030") == 0
    assert program.asked == [[], [], GO_ON]


@pytest.mark.parametrize("status", [2, 3, 5, 130, 138, 143])
def test_what_would_come_again_or_was_asked_for_is_not_restarted(run, status):
    program = run((status, None))
    assert program.supervised() == status
    assert len(program.asked) == 1


def test_without_progress_it_gives_up(run, capsys):
    program = run((1, 5), (1, None), (1, 7), (1, None), (1, None), (1, None))
    assert program.supervised() == 1
    assert not program.ends
    assert "3 times in a row without a new checkpoint (the newest is of step 7)" in (
        capsys.readouterr().err
    )


def test_max_restarts_is_a_limit(run, capsys):
    program = run((1, 1), (1, 2), (1, 3))
    assert program.supervised(max_restarts=2) == 1
    assert not program.ends
    assert "started again 2 times (max_restarts: 2)" in capsys.readouterr().err


def test_a_run_that_died_before_it_had_its_folder_starts_as_it_was_asked_to(tmp_path):
    """`overwrite_output_dir` must not go on with the run that it was to replace."""
    (tmp_path / "checkpoints" / "step-000009").mkdir(parents=True)
    (tmp_path / "config.yaml").touch()
    asked, statuses = [], [1, 0]

    def run(more):
        asked.append(list(more))
        return statuses.pop(0)

    assert supervise(run, output_dir=str(tmp_path), resume="auto", max_restarts=3) == 0
    assert asked == [[], []]


def test_flags_are_replaced_wherever_they_stood():
    argv = ["--resume", "never", "--lr", "1", "--overwrite-output-dir", "--seed=2", "--resume=x"]
    assert replace_flags(argv, GO_ON) == ["--lr", "1", "--seed=2", *GO_ON]
