"""What may be wrong with a machine, an installation or a shell, found before a run meets it.

Each check is a function of what it looks at, so that a test can show it what this machine has not;
it imports neither torch nor what it judges.
"""

from __future__ import annotations

from collections.abc import Iterator

from vembed.config import TrainConfig
from vembed.training.environment.finding import Finding
from vembed.training.environment.launching import check_launcher, check_leftovers
from vembed.training.environment.machine import (
    check_files,
    check_locale,
    check_output_dir,
    check_shared_memory,
    check_threads,
    check_tokenizers,
)
from vembed.training.environment.network import check_hub
from vembed.training.environment.packages import (
    check_extras,
    check_gpu,
    check_python,
    check_torchvision,
    check_versions,
)

__all__ = ["Finding", "examine"]


def examine(config: TrainConfig) -> Iterator[Finding]:
    """All checks, one after another, for a run with these settings."""
    yield check_python()
    yield check_versions()
    yield check_extras(config)
    yield check_torchvision()
    yield check_gpu(config)
    yield check_launcher()
    yield check_leftovers()
    yield check_threads(config)
    yield check_tokenizers(config)
    yield check_shared_memory(config)
    yield check_files(config)
    yield check_output_dir(config)
    yield check_hub(config)
    yield check_locale()
