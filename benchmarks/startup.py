"""Start-up: imports, `--help`, and the time from the start of a program to its first step.

    python benchmarks/startup.py
    python benchmarks/startup.py first-step

Each round starts programs anew. `vembed` is what a user types; of `first-step` both programs load
the model, read the rows and train, and stop when the first loss is asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Bench, Meter, Variant, build_parser, show_machine
from workloads import (
    build_peer,
    longest,
    model_folder,
    read_jsonl,
    read_pairs,
    repeat,
    training_settings,
    write_rows,
)

BATCH = 8
_CLI = (sys.executable, "-c", "import sys; from vembed.cli import main; sys.exit(main())")


class FirstStep:
    """A loss that ends the program when it is asked for."""

    def __init__(self, **_: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Any:
        os._exit(0)


def peer_first_step(rows: str, settings: str) -> None:
    import torch

    class Loss(torch.nn.Module):
        forward = FirstStep.__call__

    build_peer(read_jsonl(Path(rows)), json.loads(settings), lambda _model: Loss()).train()


def run_command(meter: Meter, *, command: list[str], environment: dict[str, str]) -> None:
    for _ in meter:
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def import_of(module: str) -> list[str]:
    return [sys.executable, "-c", f"import {module}"]


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    names = ["import", "help", "first-step"]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(names))
    arguments = parser.parse_args(argv)
    bench = Bench.of(arguments)
    show_machine(bench)
    chosen = arguments.cases or (["import", "help"] if arguments.quick else names)
    environment = {
        "OMP_NUM_THREADS": str(arguments.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }

    def compare(title: str, commands: dict[str, list[str]]) -> None:
        variants = [
            Variant(name, run_command, {"command": command, "environment": environment})
            for name, command in commands.items()
        ]
        bench.compare(title, variants, units=1, unit="starts")

    if "import" in chosen:
        others = () if arguments.quick else ("torch", "sentence_transformers")
        compare(
            "import",
            {
                "vembed": import_of("vembed"),
                "python alone": [sys.executable, "-c", ""],
                **{name: import_of(name) for name in others},
            },
        )
    if "help" in chosen:
        compare(
            "help",
            {"vembed --help": [*_CLI, "--help"], "vembed train --help": [*_CLI, "train", "--help"]},
        )
    if "first-step" in chosen:
        with tempfile.TemporaryDirectory() as folder:
            compare("start to first step", first_step(arguments, Path(folder)))


def first_step(arguments: Any, folder: Path) -> dict[str, list[str]]:
    rows = write_rows(folder / "rows.jsonl", repeat(read_pairs(arguments), 1000))
    settings = training_settings(
        rows,
        model=model_folder(arguments),
        batch=BATCH,
        tokens=longest(arguments, 256),
        precision="no",
        steps=2,
        output=str(folder / "run"),
    ) | {"device": arguments.device}
    file = folder / "train.yaml"
    ours = {**settings, "loss_type": "startup:FirstStep"}
    file.write_text(json.dumps(ours), encoding="utf-8")  # JSON is YAML
    code = "import startup, sys; startup.peer_first_step(*sys.argv[1:])"
    return {
        "vembed": [*_CLI, "train", "--config", str(file)],
        "peer": [sys.executable, "-c", code, str(rows), json.dumps(settings)],
    }


if __name__ == "__main__":
    main()
