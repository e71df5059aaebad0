"""Experiment trackers, through Accelerate. A tracker that fails is dropped; training goes on."""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vembed.errors import ConfigError
from vembed.redaction import HIDDEN, command_line_redacted, redact, redact_text

logger = logging.getLogger(__name__)

_GIT_TIMEOUT_S = 5
_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "swanlab": "swanlab"}


def tracker_arguments(
    name: str, *, run_name: str | None, tags: Sequence[str], output_dir: str
) -> dict[str, Any]:
    """What Accelerate passes on when it starts the tracker `name`.

    Raises:
        ConfigError: if the tracker's package is not installed.
    """
    if importlib.util.find_spec(_PACKAGES[name]) is None:
        raise ConfigError(
            f"report_to: {name!r} needs the package {_PACKAGES[name]!r}, which is not installed. "
            "Install it with: pip install 'vembed[trackers]'"
        )
    run_name, tags = redact(run_name), redact(list(tags))
    if name == "wandb":
        arguments = {"name": run_name, "tags": tags, "dir": output_dir}
        return arguments if _wandb_knows_the_user() else {**arguments, "mode": "offline"}
    if name == "swanlab":
        logdir = str(Path(output_dir) / "swanlog")
        arguments = {"experiment_name": run_name, "tags": tags, "logdir": logdir}
        # It reads the command and the repository by itself, whatever sys.argv says.
        probe = {"runtime": redact(sys.argv) == sys.argv, "git": not _repository_has_secret()}
        if not all(probe.values()):
            arguments["settings"] = {"probe": probe}
        return arguments if _swanlab_knows_the_user() else {**arguments, "mode": "offline"}
    return {}


def start_trackers(
    accelerator: Accelerator,
    *,
    project_name: str,
    settings: Mapping[str, Any],
    init_kwargs: Mapping[str, dict[str, Any]],
) -> None:
    """Start every tracker that the Accelerator was built with, each on its own.

    Accelerate starts them in one go, so that one that fails would take the others along. They get
    no secret, neither in the settings nor in the command line, which some of them keep.
    """
    flat = {key: _plain(value) for key, value in redact(settings).items()}
    # Not every tracker takes brackets in a project's name.
    project_name = redact_text(project_name).replace(HIDDEN, HIDDEN.strip("[]"))
    wanted, started = list(accelerator.log_with), []
    for tracker in wanted:
        accelerator.log_with, accelerator.trackers = [tracker], []
        try:
            with command_line_redacted():
                accelerator.init_trackers(project_name, config=flat, init_kwargs=dict(init_kwargs))
            started.extend(accelerator.trackers)
        except Exception as error:  # noqa: BLE001 - trackers raise anything, and must not stop training
            _report_failure(str(getattr(tracker, "value", tracker)), error)
    accelerator.log_with, accelerator.trackers = wanted, started


def log_to_trackers(accelerator: Accelerator, values: Mapping[str, Any], step: int) -> None:
    """Log numbers at an optimizer step; a tracker that fails is dropped for the rest of the run."""
    for tracker in list(accelerator.trackers):
        try:
            tracker.log(dict(values), step=step)
        except Exception as error:  # noqa: BLE001 - as above
            _report_failure(tracker.name, error)
            accelerator.trackers.remove(tracker)


def stop_trackers(accelerator: Accelerator) -> None:
    """Let every tracker finish writing."""
    for tracker in list(accelerator.trackers):
        try:
            tracker.finish()
        except Exception as error:  # noqa: BLE001 - as above
            _report_failure(tracker.name, error)
    accelerator.trackers = []


def _report_failure(name: str, error: Exception) -> None:
    logger.warning("tracker %s failed and is dropped; training goes on: %s", name, error)


def _plain(value: Any) -> Any:
    """Tensorboard takes scalars and strings only."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def _repository_has_secret() -> bool:
    """Whether the address of the repository that this is run in holds a password."""
    try:
        found = subprocess.run(
            ["git", "config", "--get", "remote.origin.url"],
            capture_output=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    url = found.stdout.decode("utf-8", "replace")
    return redact_text(url) != url


def _wandb_knows_the_user() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"):
        return True
    return _netrc_has("api.wandb.ai", Path.home() / ".netrc")


def _swanlab_knows_the_user() -> bool:
    if os.environ.get("SWANLAB_API_KEY") or os.environ.get("SWANLAB_MODE"):
        return True
    return (Path.home() / ".swanlab" / ".netrc").exists()


def _netrc_has(host: str, path: Path) -> bool:
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
