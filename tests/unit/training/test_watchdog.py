"""A step that does not end ends the process, which says where it stands."""

import time

from tests.launch import run_forked
from vembed.training.watchdog import EXIT_HUNG, Watchdog


def hang_while_reading_rows():
    with Watchdog(0.3) as watchdog:
        watchdog.see(7, "reading rows")
        time.sleep(30)


def test_a_hang_is_told_with_process_step_and_stack():
    ended = run_forked(hang_while_reading_rows)
    assert ended.status == EXIT_HUNG == 6
    assert "vembed: process 0 hangs in step 7: nothing happened for 0.3 s" in ended.said
    assert "(process_timeout_s) while it was reading rows" in ended.said
    assert "in hang_while_reading_rows" in ended.said


def go_on():
    with Watchdog(0.4) as watchdog:
        for step in range(6):
            watchdog.see(step, "computing")
            time.sleep(0.15)
        watchdog.pause()
        time.sleep(0.8)
    time.sleep(0.6)


def test_steps_a_pause_and_the_end_are_no_hang():
    ended = run_forked(go_on)
    assert (ended.status, ended.said) == (0, "")
