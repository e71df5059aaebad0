"""`vembed evaluate`: measure a model on a test set, or two models against each other."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vembed.cli.image_options import add_image_options, image_rules
from vembed.cli.row_options import add_row_options, read_column_mapping, resolve_retrieval_mode
from vembed.cli.terminal import progress_bar
from vembed.errors import ConfigError
from vembed.modes import RetrievalMode

if TYPE_CHECKING:
    from vembed.evaluation import EvalResult, EvalTask, Reduction


def main(argv: list[str]) -> int:
    """Measure, and print one JSON object (`--json`) or a table.

    Raises:
        ConfigError: if a model cannot be found.
        DataError: if the test set cannot be used.
    """
    arguments = _parser().parse_args(argv)
    mapping = read_column_mapping(arguments.column_mapping)
    rules = image_rules(arguments)
    # After the arguments are checked, because it imports torch.
    from vembed.evaluation import ReducedTask, compare, load_eval_task

    mode = resolve_retrieval_mode(arguments.retrieval_mode, arguments.model)
    task: EvalTask = load_eval_task(
        arguments.data,
        column_mapping=mapping,
        retrieval_mode=mode,
        images=rules,
        split=arguments.split,
    )
    _warn_of_file_names(task, mode, arguments)
    if reductions := _reductions(arguments):
        task = ReducedTask(task, reductions)
    result = _measure(arguments.model, task, arguments)
    if arguments.before is None:
        return _print_one(result, arguments)
    earlier = _measure(arguments.before, task, arguments)
    changes = compare(earlier, result)
    if arguments.json:
        _print_json({change.metric: asdict(change) for change in changes})
    else:
        from vembed.evaluation.report import render_table

        title = f"{task.name}: {arguments.before} and then {arguments.model}"
        Console().print(render_table(changes, title=title))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vembed evaluate",
        allow_abbrev=False,
        description="Measure a model. What the rows hold decides how: pairs or a BEIR folder: "
        "retrieval; pairs with scores: correlation; labelled items: nearest neighbours.",
    )
    add = parser.add_argument
    add("--model", required=True, help="folder, package:NAME[/subdir] or hub id")
    add("--data", required=True, help="BEIR folder, or a file of rows as for training")
    add("--before", metavar="MODEL", help="also measure this model, and show what changed")
    add("--split", default="test", help="qrels of a BEIR folder, or split of a hub data set")
    add_row_options(parser)
    add_image_options(parser)
    add("--encoder_mode", default="auto", help="what loads the model: auto (from its files), a "
        "name as in configs/train.yaml, or package.module:Name for your own")  # fmt: skip
    add("--truncate_dim", nargs="+", type=int, metavar="N", default=[],
        help="also measure the first N numbers of each vector, for each N a row")  # fmt: skip
    add("--precision", nargs="+", choices=["float32", "int8", "binary"], default=[],
        help="also measure vectors that are kept so: int8, or binary, whose 40 nearest by Hamming "
        "distance are put in order by the query's own numbers")  # fmt: skip
    add("--batch_size", type=int, help="most items in a forward pass; their length decides else")
    add("--device", help="such as cpu or cuda:1; an accelerator is taken when there is one")
    add("--json", action="store_true", help="print one JSON object of all metrics, nothing else")
    return parser


def _warn_of_file_names(task: EvalTask, mode: RetrievalMode, arguments: argparse.Namespace) -> None:
    from vembed.data.file_names import data_folder, file_name_warning

    folder = arguments.image_root or data_folder(arguments.data)
    warning = file_name_warning(arguments.data, mode, task.sides, folder)
    if warning is not None:
        sys.stderr.write(f"warning: {warning}\n")


def _reductions(arguments: argparse.Namespace) -> list[Reduction]:
    """Each size in each precision; not the vectors as they come, which are measured anyway."""
    from vembed.evaluation import Reduction

    if any(dim < 1 for dim in arguments.truncate_dim):
        raise ConfigError(f"--truncate_dim: must be at least 1. Received: {arguments.truncate_dim}")
    found = [
        Reduction(dim, precision)
        for dim in dict.fromkeys(arguments.truncate_dim or [None])
        for precision in dict.fromkeys(arguments.precision or ["float32"])
    ]
    return [reduction for reduction in found if reduction != Reduction()]


def _measure(model: str, task: EvalTask, arguments: argparse.Namespace) -> EvalResult:
    from vembed.inference import Predictor, encode_items

    predictor = Predictor(model, device=arguments.device, encoder_mode=arguments.encoder_mode)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ConfigError(f"--batch_size: must be at least 1. Received: {arguments.batch_size}")

    def encode(items: Any, role: Any) -> Any:
        with progress_bar(f"{model}: {role}", len(items)) as advance:
            return encode_items(
                predictor.encoder,
                items,
                role=role,
                max_items=arguments.batch_size,
                progress=advance,
            )

    return task.evaluate(encode)


def _print_one(result: EvalResult, arguments: argparse.Namespace) -> int:
    from vembed.evaluation import confidence_intervals, metric_label
    from vembed.evaluation.results import count_items

    if arguments.json:
        _print_json(result.metrics)
        return 0
    table = Table(title=f"{result.task}: {arguments.model}", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, interval in confidence_intervals(result).items():
        value, low, high = (f"{n:.4f}" for n in (result.metrics[name], interval.low, interval.high))
        table.add_row(Text(metric_label(name)), value, f"{low} to {high}")
    table.caption = f"{count_items(len(result), result.items)}; all metrics: --json"
    Console().print(table)
    return 0


def _print_json(values: dict[str, Any]) -> None:
    Console(soft_wrap=True).print(json.dumps(values), markup=False, highlight=False)
