"""`vembed doctor`: what may be wrong with this machine, installation or shell, in seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vembed.redaction import redact
from vembed.training.config import load_and_parse_config
from vembed.training.environment import Finding, examine

ABOUT = (
    "Look for what costs people days: packages that do not fit each other, a driver too old for "
    "torch, launchers that start one process, shared memory, disks, limits. Settings are optional; "
    "with them, what they need is looked at. --json prints one JSON object."
)

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def main(argv: list[str]) -> int:
    """Examine; returns 1 if there is a problem.

    Raises:
        ConfigError: listing all problems of the settings.
    """
    as_json = "--json" in argv
    settings = [argument for argument in argv if argument != "--json"]
    config = load_and_parse_config(settings, prog="vembed doctor [--json]", about=ABOUT)
    findings = list(examine(config))
    healthy = all(finding.level != "problem" for finding in findings)
    if as_json:
        content = {"ok": healthy, "findings": [asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(redact(content)) + "\n")
    else:
        _show(findings)
    return 0 if healthy else 1


def _show(findings: Sequence[Finding]) -> None:
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        style = _STYLES[finding.level]
        found = Text(redact(finding.found))
        if finding.remedy:
            found.append(f"\n{redact(finding.remedy)}", "bold")
        level = "OK" if finding.level == "ok" else finding.level
        table.add_row(Text(level, style), Text(finding.name, "bold"), found)
    console = Console()
    console.print(table)
    counts = {level: sum(f.level == level for f in findings) for level in _STYLES}
    told = [
        f"{counts[level]} {level}{'s' * (counts[level] != 1)}" for level in ("problem", "warning")
    ]
    console.print(f"\n{', '.join(told)}, {counts['ok']} in order")
