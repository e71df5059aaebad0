"""The `vembed` command. A subcommand is a module with `main(argv) -> int`, imported if chosen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from vembed import __version__
from vembed.errors import ConfigError, did_you_mean, exit_status

COMMANDS = {
    "train": ("vembed.cli.train", "fine-tune a model: settings from a YAML file and flags"),
    "evaluate": ("vembed.cli.evaluate", "measure a model on a test set"),
    "encode": ("vembed.cli.encode", "turn the rows of a file into vectors (.npy)"),
    "mine": ("vembed.cli.mine", "find hard negatives for the rows of a file"),
    "teach": ("vembed.cli.teach", "store what a teacher says about the training rows"),
    "checkpoints": ("vembed.cli.checkpoints", "list, check and prune the checkpoints of a run"),
    "check": ("vembed.cli.check", "check settings and all data without training"),
    "plan": ("vembed.cli.plan", "predict memory, time and communication without training"),
    "verify": (
        "vembed.cli.verify",
        "prove, for your settings, that gradients or resuming are exact",
    ),
    "doctor": ("vembed.cli.doctor", "find what is wrong with the machine or the installation"),
    "quickstart": ("vembed.quickstart", "the main job in minutes, on its own data: text or images"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status: 0, 2 (settings or data), 1 (else)."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if command in ("", "-h", "--help"):
        sys.stdout.write(_usage())
        return 0 if command else 2
    if command == "--version":
        sys.stdout.write(f"vembed {__version__}\n")
        return 0
    return exit_status(lambda: _run(command, rest))


def _run(command: str, argv: list[str]) -> int:
    if command not in COMMANDS:
        raise ConfigError(
            f"unknown command {command!r}{did_you_mean(command, COMMANDS)}. "
            f"One of: {', '.join(COMMANDS)}"
        )
    status: int = import_module(COMMANDS[command][0]).main(argv)
    return status


def _usage() -> str:
    commands = "\n".join(f"  {name:<13}{summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: vembed COMMAND ...\n\n"
        "Fine-tune embedding models, and measure that they got better.\n\n"
        f"commands:\n{commands}\n\n"
        "`vembed COMMAND --help` says more. `vembed --version` prints the version.\n"
    )
