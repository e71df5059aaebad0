"""Every import, constructor and call that the specification of `vembed.training` writes down."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn

from tests.tiny import PAIRS, tiny_bert, write_rows
from vembed.data import Collator, build_dataloader, load_dataset_records
from vembed.losses import build_criterion, build_distillation_loss
from vembed.training import Trainer, load_and_parse_config
from vembed.training.checkpoint import save_checkpoint
from vembed.training.config import get_distributed_config
from vembed.training.data_utils import (
    concat_batches,
    maybe_first,
    unpack_positive_batch,
    unpack_query_batch,
)
from vembed.training.evaluator import Evaluator
from vembed.training.model_builder import (
    apply_lora,
    build_model,
    build_teacher_model,
    enable_static_graph,
)
from vembed.training.optimizer_builder import build_optimizer, build_scheduler, resolve_tracker

YAML = """
# Model
model_name: {model}
encoder_mode: auto

# Training
epochs: 3
batch_size: 256
lr: 5e-5
weight_decay: 0.01

# Optimization
scheduler_type: cosine
warmup_ratio: 0.1
max_grad_norm: 1.0

# Checkpointing
save_steps: 500
logging_steps: 10

# Memory optimization
gradient_checkpointing: false
use_gradient_cache: false

# Knowledge distillation
teacher_model_name: null
distillation_alpha: 0.5

# LoRA
use_lora: false
lora_r: 16

# not in the specification
data_path: {data}
output_dir: {output}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """What a user's file says, read from the command line as the quick start does."""
    model = tiny_bert(tmp_path / "bert")
    data = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    file = tmp_path / "train.yaml"
    file.write_text(YAML.format(model=model, data=data, output=tmp_path / "out"))
    arguments = ["--config", str(file), "--config_override", "epochs=1", "batch_size=8"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return load_and_parse_config()


def make_loader(model, config):
    records = load_dataset_records(config["data_path"])
    return build_dataloader(records, Collator(model.processor), batch_size=8, seed=0)


def test_the_yaml_says_what_it_says(config):
    assert config["lr"] == 5e-5
    assert config["scheduler_type"] == "cosine"
    assert config["save_steps"] == 500
    assert config["teacher_model_name"] is None
    assert yaml.safe_load(YAML)["lr"] == "5e-5", "the trap: YAML alone reads a string"


def test_quick_start(config, tmp_path):
    model = build_model(config)
    optimizer = build_optimizer(model, config)
    accelerator = Accelerator(cpu=True)
    train_loader = make_loader(model, config)
    scheduler, warmup_steps = build_scheduler(optimizer, config, num_epochs=10, steps_per_epoch=100)
    assert warmup_steps == 100
    before = model.backbone.embeddings.word_embeddings.weight.detach().clone()
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        dataloader=train_loader,
        criterion=build_criterion("infonce"),
        accelerator=accelerator,
        config=config,
        scheduler=scheduler,
    )
    trainer.train()
    assert not torch.equal(before, model.backbone.embeddings.word_embeddings.weight)
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()


def test_get_distributed_config(config):
    use_grad_ckpt, use_grad_cache, find_unused = get_distributed_config(config)
    assert (use_grad_ckpt, use_grad_cache, find_unused) == (False, False, False)
    config["use_gradient_cache"] = True
    config["gradient_checkpointing"] = True
    config["ddp_find_unused_parameters"] = True
    assert get_distributed_config(config) == (True, True, True)


def test_data_utils():
    batch = {
        "query_input_ids": torch.tensor([[1, 2, 3]]),
        "query_attention_mask": torch.tensor([[1, 1, 1]]),
        "pos_pixel_values": torch.rand(1, 3, 4, 4),
    }
    q_inputs = unpack_query_batch(batch, retrieval_mode="t2i")
    p_inputs = unpack_positive_batch(batch, retrieval_mode="t2i")
    assert (set(q_inputs), set(p_inputs)) == ({"input_ids", "attention_mask"}, {"pixel_values"})
    concat_input, batch_sizes = concat_batches([q_inputs, q_inputs])
    assert concat_input["input_ids"].shape == (2, 3)
    assert batch_sizes == [1, 1]
    model_output = (torch.ones(1, 2), None)
    assert maybe_first(model_output).shape == (1, 2)
    assert set(unpack_query_batch(batch, "t2i")) == set(q_inputs)


def test_trackers():
    log_with, init_kwargs = resolve_tracker(report_to="wandb")
    assert log_with == ["wandb"]
    assert "wandb" in init_kwargs


def test_model_builder_with_every_feature(config, tmp_path):
    for settings in (
        {"use_gradient_cache": True, "gradient_cache_chunk_size": 1},
        {"teacher_model_name": config["model_name"], "distillation_alpha": 0.5},
        {"use_lora": True, "lora_r": 16, "lora_alpha": 32},
        {"report_to": "wandb"},
        {"gradient_checkpointing": True},
        {"ddp_find_unused_parameters": True},
    ):
        for key, value in settings.items():
            config[key] = value
    accelerator = Accelerator(cpu=True)
    model = build_model(config)
    teacher = build_teacher_model(config)
    apply_lora(model, config, accelerator)
    enable_static_graph(model, config, accelerator)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora" in name for name in trainable)
    criterion = build_criterion("infonce")
    frozen = [p.detach().clone() for p in teacher.parameters()]
    evaluator = Evaluator(
        model=model,
        criterion=criterion,
        accelerator=accelerator,
        retrieval_mode="t2t",
        log_with="wandb",
    )
    val_loader = make_loader(model, config)
    trainer = Trainer(
        model=model,
        optimizer=build_optimizer(model, config),
        dataloader=make_loader(model, config),
        criterion=criterion,
        accelerator=accelerator,
        config=config,
        scheduler=None,
        teacher_model=teacher,
        distillation_loss_fn=build_distillation_loss("similarity_kl", temperature=0.05),
        evaluator=evaluator,
        val_dataloader=val_loader,
    )
    state = trainer.train()
    assert "loss_distillation" in state.history[-2] | state.history[-1]
    assert all(torch.equal(a, b) for a, b in zip(frozen, teacher.parameters(), strict=True))
    avg_loss = evaluator.evaluate(val_loader, global_step=100)
    assert isinstance(avg_loss, float)


def test_checkpoint(config, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = build_model(config)
    processor = model.processor.tokenizer
    path = tmp_path / "checkpoints" / "step-1000"
    save_checkpoint(
        path=str(path), model=model, accelerator=accelerator, processor=processor, config=config
    )
    assert {"config.json", "model.safetensors", "tokenizer.json", "vembed_config.json"} <= {
        p.name for p in path.iterdir()
    }
    save_checkpoint(str(path), model, accelerator, config=config)
    assert [p.name for p in path.parent.iterdir()] == ["step-1000"], "no temporary folder is left"


class TwoTowers(nn.Module):
    """A user's own text and image encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(20, 4)
        self.pixels = nn.Linear(12, 4)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        return (
            self.words(input_ids) if pixel_values is None else self.pixels(pixel_values.flatten(1))
        )

    def save_pretrained(self, path: str | Path) -> None:
        torch.save(self.state_dict(), Path(path) / "towers.pt")


def test_evaluator_and_own_step_on_text_to_image(tmp_path):
    config = {"retrieval_mode": "t2i", "epochs": 2, "output_dir": str(tmp_path), "progress": False}
    batches = [
        {
            "query_input_ids": torch.randint(0, 20, (4, 3)),
            "pos_pixel_values": torch.rand(4, 3, 2, 2),
        }
        for _ in range(3)
    ]
    accelerator, model = Accelerator(cpu=True), TwoTowers()
    criterion = build_criterion("infonce")
    evaluator = Evaluator(
        model=model,
        criterion=criterion,
        accelerator=accelerator,
        retrieval_mode="t2i",
        log_with="wandb",
    )
    seen = []

    class CustomTrainer(Trainer):
        def _step_standard(self, batch):
            seen.append(len(batch["query_input_ids"]))
            return super()._step_standard(batch)

    trainer = CustomTrainer(
        model, build_optimizer(model, config), batches, criterion, accelerator, config
    )
    before = evaluator.evaluate(batches, global_step=100)
    trainer.train()
    assert seen == [4] * 6
    assert evaluator.evaluate(batches, global_step=100) != before
