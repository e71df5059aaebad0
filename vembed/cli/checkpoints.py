"""`vembed checkpoints`: what a run can go on from, checked file by file, and what may go."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vembed.cli.parsing import Parser
from vembed.errors import CheckpointError, ConfigError
from vembed.training.manifest import Damage, find_damage, read_manifest, remove_folder
from vembed.training.output_lock import OutputLock
from vembed.training.rotation import (
    BEST,
    CHECKPOINTS,
    DAMAGED,
    FINAL,
    list_checkpoints,
    rotate,
)

_PROG = "vembed checkpoints"


@dataclass(frozen=True)
class Found:
    """A folder that a run has written.

    Attributes:
        path: Where it is.
        can_resume: Whether it is a checkpoint, not only a model.
        damage: What is wrong with it; None if all files are as they were written.
        total_bytes: Of all files; None if the manifest cannot be read.
        facts: What its writer noted.
    """

    path: Path
    can_resume: bool
    damage: Damage | None
    total_bytes: int | None
    facts: dict[str, Any]

    @classmethod
    def at(cls, path: Path, *, can_resume: bool) -> Found:
        """Look at every file of a folder."""
        damage = find_damage(path)
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            return cls(path, can_resume, damage, None, {})
        return cls(path, can_resume, damage, manifest.total_bytes, manifest.facts)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "path": str(self.path),
            "can_resume": self.can_resume,
            "whole": self.damage is None,
            "damage": None if self.damage is None else str(self.damage),
            "bytes": self.total_bytes,
            **self.facts,
        }


def main(argv: list[str]) -> int:
    """List and check; with `--keep`, remove what is not needed. Returns 1 if anything is damaged.

    Raises:
        ConfigError: if the folder is not that of a run.
        CheckpointError: if `--keep` would leave no checkpoint that is whole.
    """
    parser = _parser()
    if not argv:
        parser.print_help()
        return 2
    arguments = parser.parse_args(argv)
    if arguments.help:
        parser.print_help()
        return 0
    folder = Path(arguments.output_dir or "")
    if arguments.output_dir is None or not folder.is_dir():
        raise ConfigError(f"{_PROG}: expected the output_dir of a run. Received: {folder}")
    if arguments.keep is not None:
        with OutputLock(folder) as lock:
            lock.take()
            _prune(folder, newest=arguments.keep, best=arguments.keep_best)
    found = _look(folder)
    if not found:
        raise ConfigError(
            f"{_PROG}: {folder} holds no model and no checkpoint of a run. Name the output_dir, "
            "not a folder in it; checkpoints are written where save_steps is set"
        )
    if arguments.json:
        content = {"folders": [one.as_json() for one in found], "resume": _newest_whole(found)}
        sys.stdout.write(json.dumps(content) + "\n")
    else:
        _show(found)
    return 1 if any(one.damage for one in found) else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        allow_abbrev=False,
        add_help=False,
        description="List the checkpoints and models of a run, and check every file of them "
        "against the size and the SHA-256 that it was written with. Exit status: 0 if all are "
        "whole, 1 if one is damaged.",
    )
    add = parser.add_argument
    add("output_dir", nargs="?", metavar="OUTPUT_DIR", help="folder of a run")
    add("-h", "--help", action="store_true", help="show this and stop")
    add(
        "--keep",
        type=_count,
        metavar="N",
        help="remove damaged checkpoints, and all but the N newest (at least 1). Not while the run "
        "is going on",
    )
    best = "with --keep: also keep the N of the best validation values (default: 1)"
    add("--keep_best", type=partial(_count, least=0), default=1, metavar="N", help=best)
    add("--json", action="store_true", help="print one JSON object, nothing else")
    return parser


def _count(text: str, *, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"expected a number of at least {least}. Received: {text!r}"
        )
    return int(text)


def _look(folder: Path) -> list[Found]:
    steps = [one.path for one in reversed(list_checkpoints(folder))]
    aside = sorted((folder / CHECKPOINTS).glob(f"step-*{DAMAGED}"))
    models = [folder / name for name in (BEST, FINAL) if (folder / name).is_dir()]
    return [
        *(Found.at(path, can_resume=True) for path in [*aside, *steps]),
        *(Found.at(path, can_resume=False) for path in models),
    ]


def _prune(folder: Path, *, newest: int, best: int) -> None:
    checkpoints = list_checkpoints(folder)
    damaged = [one.path for one in checkpoints if find_damage(one.path)]
    if checkpoints and len(damaged) == len(checkpoints):
        raise CheckpointError(
            f"{_PROG}: {folder}: no checkpoint is whole, so none is removed; the newest: "
            f"{find_damage(damaged[0])}"
        )
    for path in [*damaged, *(folder / CHECKPOINTS).glob(f"step-*{DAMAGED}")]:
        remove_folder(path)
    rotate(folder, newest=newest, best=best)


def _newest_whole(found: list[Found]) -> str | None:
    usable = [one for one in found if one.can_resume and one.damage is None]
    return str(usable[-1].path) if usable else None


def _show(found: list[Found]) -> None:
    console = Console()
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("folder", no_wrap=True)
    for name in ("step", "epoch", "value", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("files")
    for one in found:
        size = "" if one.total_bytes is None else f"{one.total_bytes / 1e6:,.1f}"
        value = one.facts.get("value")
        state = Text("whole", "green")
        if one.damage is not None:
            state = Text(f"{one.damage.file.relative_to(one.path)}: {one.damage.reason}", "red")
        table.add_row(
            one.path.name,
            str(one.facts.get("step", "")),
            str(one.facts.get("epoch", "")),
            "" if value is None else f"{value:.4f}",
            size,
            state,
        )
    console.print(table)
    newest = _newest_whole(found)
    if newest is not None:
        console.print(f"resume: auto goes on from {newest}", soft_wrap=True, highlight=False)
    elif any(one.can_resume for one in found):
        console.print("No checkpoint is whole: nothing to go on from.", style="red")
