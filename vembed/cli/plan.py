"""`vembed plan`: memory, largest chunk, time and communication of a run, before it is paid for."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vembed.cli.parsing import Parser
from vembed.config import RUN_REQUIRES
from vembed.training.config import load_and_parse_config

if TYPE_CHECKING:
    from vembed.training.planning.plan import Memory, Plan

_PROG = "vembed plan"
_ABOUT = (
    "Predict what a run needs, from the shape of the model (no weight is loaded) and the lengths "
    "of the data. Every setting of vembed train can be given, too."
)
_PARTS = {
    "framework": "framework",
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations of a micro-batch, at most at a time",
    "allocator": "pieces that the allocator cannot use",
    "loss": "similarities",
    "gathered": "embeddings of all processes",
    "exchange": "buffers to exchange gradients",
}


def main(argv: list[str]) -> int:
    """Print the plan, or with `--json` one JSON object; returns 1 if the run would not fit.

    Raises:
        ConfigError: listing all problems of the settings, or of the command line.
        DataError: if a sampled row cannot be used.
    """
    parser = _parser()
    arguments, settings = parser.parse_known_args(argv)
    if arguments.help or not argv:
        parser.print_help()
        return 0 if arguments.help else 2
    config = load_and_parse_config(settings, required=RUN_REQUIRES, prog=_PROG)
    # After the settings are checked, because it imports torch.
    from vembed.training.planning.plan import plan_run

    plan = plan_run(
        config,
        processes=arguments.gpus or config.num_processes or 1,
        memory_limit=None if arguments.memory is None else int(arguments.memory * 2**30),
        flops_per_second=None if arguments.tflops is None else arguments.tflops * 1e12,
        bandwidth=None if arguments.bandwidth is None else arguments.bandwidth * 1e9,
        on_accelerator=True if arguments.gpus and config.device == "auto" else None,
    )
    if arguments.json:
        sys.stdout.write(json.dumps(_as_json(plan)) + "\n")
    else:
        _show(plan)
    return 1 if plan.fits is False else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        usage="%(prog)s --config FILE [--config_override KEY=VALUE ...] [--KEY VALUE ...]\n"
        "       [--gpus N] [--memory GiB] [--tflops N] [--bandwidth GB/s] [--json]",
        description=_ABOUT,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    parser.add_argument(
        "--gpus",
        type=_whole,
        metavar="N",
        help="processes, one for each GPU (default: num_processes, else 1 on this machine)",
    )
    parser.add_argument(
        "--memory", type=_above_zero, metavar="GiB", help="memory that each of them has"
    )
    parser.add_argument(
        "--tflops",
        type=_above_zero,
        metavar="N",
        help="10^12 operations per second that each reaches (default: measured on this machine)",
    )
    parser.add_argument(
        "--bandwidth", type=_above_zero, metavar="GB/s", help="between processes, one way"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1. Received: {text}")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0. Received: {text}")
    return number


def _as_json(plan: Plan) -> dict[str, Any]:
    memory = {**asdict(plan.memory), "total": plan.memory.total}
    return {**asdict(plan), "memory": memory, "fits": plan.fits}


def _show(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for name, fact in _facts(plan).items():
        facts.add_row(Text(name, "bold"), Text(fact))
    console = Console()
    console.print(_memory_table(plan.memory), facts)
    for note in plan.notes:
        console.print(Text(f"note: {note}", "yellow"))
    if plan.fits is not None:
        verdict = "fits" if plan.fits else "does not fit"
        console.print(Text(f"It {verdict}.", "bold green" if plan.fits else "bold red"))


def _memory_table(memory: Memory) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    table.add_column("memory of one process")
    table.add_column("MiB", justify="right")
    for name, label in _PARTS.items():
        if taken := getattr(memory, name):
            table.add_row(label, _mib(taken))
    table.add_section()
    table.add_row("together", _mib(memory.total))
    return table


def _facts(plan: Plan) -> dict[str, str]:
    padding = plan.padded_tokens / max(plan.real_tokens, 1)
    rate = f"{plan.flops_per_second / 1e12:.3g} TFLOP/s"
    source = "measured here on one layer" if plan.is_measured else "as stated"
    facts = {
        "model": plan.model,
        "micro-batch": f"{plan.real_tokens:,} tokens in {plan.chunks} chunks, {padding:.2f} padded "
        "tokens for each real one",
        "step": f"{plan.step_seconds:.3g} s: {plan.flops / 1e12:.3g} TFLOP at {rate} ({source})",
    }
    if plan.communication is not None:
        told = plan.communication
        waiting = "" if told.seconds is None else f"; {told.seconds:.3g} s of the step"
        facts["communication"] = (
            f"{_mib(told.gradient_bytes)} MiB of gradients and {_mib(told.embedding_bytes)} MiB of "
            f"embeddings per step and process{waiting}"
        )
    if plan.largest_chunk is not None and plan.memory_limit is not None:
        chunk = plan.largest_chunk
        facts["largest chunk"] = (
            f"{chunk.items:,} items of {chunk.longest:,} tokens in {_mib(plan.memory_limit)} MiB "
            f"(gradient_cache_chunk_tokens: {chunk.tokens})"
            if chunk.items
            else f"not one item of {chunk.longest:,} tokens fits into {_mib(plan.memory_limit)} MiB"
        )
    return facts


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f}"
