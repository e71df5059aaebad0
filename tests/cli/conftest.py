"""Programs as a user types them: in a process of their own, from an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


@pytest.fixture
def shell(tmp_path):
    """Runs a command of the environment in an empty folder; gives the finished process."""

    def run(command: str, *arguments: object, **environment: str):
        return subprocess.run(
            [BIN / command, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


@pytest.fixture
def vembed(shell):
    """Runs the `vembed` command."""
    return lambda *arguments, **environment: shell("vembed", *arguments, **environment)
