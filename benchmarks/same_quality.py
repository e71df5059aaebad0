"""Train with vembed and with sentence-transformers for the same steps, and measure both models.

    python benchmarks/same_quality.py

The task is that of `make quickstart`, with its settings: the same rows in the same batches. What is
fast must be good too; dropout differs, so that the models do.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation import write_beir
from harness import Bench, Meter, Variant, build_parser, show_machine
from workloads import (
    DATA,
    build_peer,
    build_vembed,
    longest,
    model_folder,
    read_jsonl,
    read_pairs,
    training_settings,
    write_rows,
)

METRICS = ("ndcg@10", "recall@1")


def run_vembed(meter: Meter, *, settings: dict[str, Any], test: str) -> None:
    trainer = build_vembed(settings)
    meter.start()
    trainer.train()
    meter.stop()
    measure(meter, f"{settings['output_dir']}/final", test)


def run_peer(meter: Meter, *, settings: dict[str, Any], test: str) -> None:
    trainer = build_peer(read_jsonl(Path(settings["data_path"])), settings)
    meter.start()
    trainer.train()
    meter.stop()
    trainer.save_model()
    measure(meter, settings["output_dir"], test)


def measure(meter: Meter, model: str, test: str) -> None:
    """Measure either model in the same way, and have done."""
    from vembed import Predictor
    from vembed.evaluation import load_eval_task

    predictor = Predictor(model, max_seq_length=96)
    metrics = load_eval_task(test).evaluate(predictor.encode_items).metrics
    meter.tell(**{name: metrics[name] for name in METRICS})
    meter.start()


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--steps", type=int, help="(default 52)")
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16")
    arguments = parser.parse_args(argv)
    bench = replace(Bench.of(arguments), rounds=1)
    steps = arguments.steps or (2 if arguments.quick else 52)
    show_machine(bench)
    rows = [{k: row[k] for k in ("query", "positive")} for row in read_pairs(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        test = DATA / "test"
        if arguments.pairs:
            test = write_beir(Path(folder) / "test", rows)
        settings = training_settings(
            write_rows(Path(folder) / "rows.jsonl", rows),
            model=model_folder(arguments),
            batch=8 if arguments.quick else 64,
            tokens=longest(arguments, 96),
            precision=arguments.precision,
            steps=steps,
            output="",
        ) | {"device": arguments.device, "lr": 1e-4}

        def variant(name: str, run: Any) -> Variant:
            own = settings | {"output_dir": f"{folder}/{name}"}
            return Variant(name, run, {"settings": own, "test": str(test)})

        bench.compare(
            f"{steps} steps of {settings['batch_size']}, {arguments.precision}",
            [variant("vembed", run_vembed), variant("peer", run_peer)],
            units=steps * settings["batch_size"],
            unit="pairs",
            warm_up=False,
        )


if __name__ == "__main__":
    main()
