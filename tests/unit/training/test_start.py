"""What a start imports: modules are counted, because times depend on the machine."""

import gc
import json
import subprocess
import sys

# Not needed by a run whose settings do not ask for them.
NEEDLESS = ("faiss", "matplotlib", "scipy.stats", "sklearn", "swanlab", "tensorboard", "wandb")

# Runs the training program and prints what was imported when the first step began.
TRAIN = f"""
import json, sys
from vembed.training.program import train_program
import vembed.training.training_loop as loop
step = loop.optimizer_step
def first_step(*args, **kwargs):
    print(json.dumps([name for name in {NEEDLESS} if name in sys.modules]))
    return step(*args, **kwargs)
loop.optimizer_step = first_step
sys.exit(train_program(sys.argv[1:]))
"""

# Hides packages as if they were not installed, and trains on a loader of its own.
STEP = """
import json, sys
from importlib.machinery import PathFinder

HIDDEN = {
    "PIL", "datasets", "faiss", "fsspec", "matplotlib", "multiprocess", "pandas", "peft",
    "pyarrow", "rich", "scipy", "sentence_transformers", "sklearn", "swanlab", "tensorboard",
    "torchvision", "wandb",
}

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding

import torch
from accelerate import Accelerator
from vembed.losses import build_criterion
from vembed.training import Trainer, build_model, build_optimizer, build_scheduler

model_name, output_dir = sys.argv[1:]
config = {
    "model_name": model_name, "output_dir": output_dir, "use_gradient_cache": True, "epochs": 1,
}
model = build_model(config)
texts = ["a red apple", "the sea", "a house", "trees"]
tokens = model.processor.tokenizer(texts, padding=True, return_tensors="pt")
batch = {f"{role}_{name}": tokens[name] for role in ("query", "positive")
         for name in ("input_ids", "attention_mask")}
criterion = build_criterion("infonce")
optimizer = build_optimizer(model, config, criterion)
scheduler, _ = build_scheduler(optimizer, config, num_epochs=1, steps_per_epoch=2)
trainer = Trainer(model, optimizer, [batch, batch], criterion, Accelerator(cpu=True), config,
                  scheduler)
state = trainer.train()
loaded = sorted({name.partition(".")[0] for name in sys.modules} & HIDDEN)
print(json.dumps({"steps": state.step, "hidden": loaded}))
"""


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[0]


def test_a_run_imports_only_what_its_settings_ask_for(tiny_st_path, pairs_path, tmp_path):
    settings = {
        "model_name": tiny_st_path,
        "data_path": pairs_path,
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "holdout_ratio": 0,
        "device": "cpu",
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    assert json.loads(run(TRAIN, *flags)) == []


def test_a_step_needs_only_torch_transformers_accelerate_and_pydantic(tiny_st_path, tmp_path):
    found = json.loads(run(STEP, tiny_st_path, tmp_path / "run"))
    assert found == {"steps": 2, "hidden": []}


def test_garbage_collection_pauses_for_imports_only():
    from vembed.training.program import _imports

    with _imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.unfreeze()
