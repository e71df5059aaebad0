"""What is frozen: for good, or until a step, as a function of the step."""

from __future__ import annotations

import logging
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from tests.tiny import PAIRS, tiny_sentence_transformer, write_rows
from tests.unit.models.families import MODALITIES, family_path, load, make_trainer, whole_mode
from tests.unit.training.test_trainer import Bag, make_batches
from vembed.errors import ConfigError
from vembed.training.freezing import Unfreezing, freeze
from vembed.training.model_builder import build_model
from vembed.training.optimizer_builder import build_optimizer
from vembed.training.parameters import matches, named_parameters
from vembed.training.run import run_training
from vembed.training.trainer import Trainer


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        self.projection = nn.Linear(3, 2)


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))


def trained(model: nn.Module, criterion: nn.Module | None = None) -> list[str]:
    names = [n for n, p in named_parameters(model, criterion) if p.requires_grad]
    return sorted({name.rpartition(".")[0] or name for name in names})


def test_patterns_freeze_parameters_and_modules():
    model = Model()
    freeze(model, ["backbone.0", "backbone.1.bias", "projection.*"], until_later=[])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "backbone.1.weight", "backbone.2.weight", "backbone.2.bias",
    ]  # fmt: skip


def test_what_is_unfrozen_later_is_left_to_that():
    model = Model()
    freeze(model, ["backbone.*"], until_later=["backbone.2"])
    assert trained(model) == ["backbone.2", "projection"]


def test_a_pattern_that_matches_nothing_is_refused(tiny_bert_path):
    with pytest.raises(ConfigError, match=r"did you mean 'backbone\.embeddings\.\*'"):
        build_model({"model_name": str(tiny_bert_path), "freeze": ["backbone.embedings.*"]})


def test_frozen_is_a_function_of_the_step_alone():
    model, criterion = Model(), Loss()
    steps = {"backbone.*": 4, "backbone.2": 2, "loss.logit_scale": 3}
    unfreezing = Unfreezing(model, criterion, steps)
    expected = {
        0: ["projection"],
        1: ["projection"],
        2: ["backbone.2", "projection"],
        3: ["backbone.2", "loss", "projection"],
        4: ["backbone.0", "backbone.1", "backbone.2", "loss", "projection"],
        9: ["backbone.0", "backbone.1", "backbone.2", "loss", "projection"],
    }
    for step in (0, 1, 2, 3, 4, 9, 3, 0, 9, 2):
        unfreezing.apply(model, criterion, step)
        assert trained(model, criterion) == expected[step], step


def test_what_is_frozen_anyway_stays_frozen():
    model = Model()
    model.backbone[0].requires_grad_(False)
    Unfreezing(model, None, {"backbone.*": 1}).apply(model, None, 5)
    assert trained(model) == ["backbone.1", "backbone.2", "projection"]
    with pytest.raises(ConfigError, match=r"'backbone\.0' matches no trainable parameter"):
        Unfreezing(model, None, {"backbone.0": 1})


def test_nothing_to_train_at_first_is_refused():
    with pytest.raises(ConfigError, match="nothing would train before step 2"):
        Unfreezing(Model(), None, {"backbone.*": 2, "projection.*": 5})


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("freezing")
    model = tiny_sentence_transformer(folder / "st", dense_features=8)
    rows = write_rows(folder / "pairs.jsonl", PAIRS)
    return {"model_name": str(model), "data_path": str(rows), "holdout_ratio": 0, "device": "cpu"}


def changed(before: Path, after: Path) -> set[str]:
    """Parts of the model that differ between two folders."""
    parts = set()
    for file in ("model.safetensors", "2_Dense/model.safetensors"):
        old, new = load_file(before / file), load_file(after / file)
        prefix = "projections." if file.startswith("2_Dense") else ""
        parts |= {prefix + name for name in old if not torch.equal(old[name], new[name])}
    cut = {name: re.match(r"projections|embeddings|encoder\.layer\.\d", name) for name in parts}
    return {name if match is None else match[0] for name, match in cut.items()}


@pytest.mark.parametrize("use_lora", [False, True], ids=["plain", "lora"])
def test_a_run_trains_the_rest_and_later_what_joins(places, tmp_path, caplog, use_lora):
    with caplog.at_level(logging.INFO, logger="vembed"):
        run_training({
            **places,
            "freeze": ["backbone.embeddings.*", "backbone.encoder.*"],
            "unfreeze_at_step": {"backbone.encoder.layer.1.*": 2},
            "use_lora": use_lora,
            "batch_size": 4,
            "max_steps": 3,
            "lr": 0.01,
            "scheduler_type": "constant",
            "save_steps": 1,
            "save_total_limit": None,
            "output_dir": str(tmp_path),
            "progress": False,
        })  # fmt: skip
    steps = [Path(places["model_name"])]
    steps += [tmp_path / "checkpoints" / f"step-00000{step}" for step in (1, 2, 3)]
    found = [changed(*pair) for pair in pairwise(steps)]
    both = {"projections", "encoder.layer.1"}
    assert found == [{"projections"}, {"projections"}, both]
    log = "\n".join(caplog.messages)
    assert re.search(r"frozen +[\d,]+ of [\d,]+ parameters: backbone\.embeddings\.\*", log)
    assert re.search(r"frozen at first [\d,]+ join after step 2", log)
    assert re.search(r"step 2: [\d,]+ more parameters train", log)
    if use_lora:
        assert "LoRA of rank 16 on dense x3, key x1, query x1, value x1;" in log


class Projected(Bag):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.projection(super().forward(input_ids))


class InBatch(nn.Module):
    def forward(self, query, positive):
        return nn.functional.cross_entropy(query @ positive.T, torch.arange(len(query)))


class Noting(Trainer):
    """Notes after each step of how many steps the optimizer has a state, by parameter."""

    def after_update(self) -> None:
        super().after_update()
        names = {id(p): name for name, p in self.model.named_parameters()}
        known = {names[id(p)]: int(s["step"]) for p, s in self.optimizer.state.items()}
        self.seen = [*getattr(self, "seen", []), known]


def test_optimizer_state_begins_with_the_first_gradient(tmp_path):
    config = {
        "unfreeze_at_step": {"words": 2},
        "epochs": 1,
        "output_dir": str(tmp_path),
        "progress": False,
    }
    model, criterion = Projected(), InBatch()
    optimizer = build_optimizer(model, config, criterion)
    trainer = Noting(model, optimizer, make_batches(4), criterion, Accelerator(cpu=True), config)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(list(model.parameters()))
    trainer.train()
    assert [seen.get("words.weight") for seen in trainer.seen] == [None, None, 1, 2]
    assert [seen["projection.weight"] for seen in trainer.seen] == [1, 2, 3, 4]


# Of each family two parts: the first is never trained, the second after one step.
PARTS = {
    "bert": ("backbone.embeddings", "backbone.encoder.layer.1"),
    "modernbert": ("backbone.layers.0", "backbone.final_norm"),
    "qwen3": ("backbone.embed_tokens", "backbone.layers.*.mlp"),
    "clip": ("backbone.text_model.embeddings", "backbone.vision_model.encoder.layers.0"),
    "siglip": ("backbone.vision_model.head", "backbone.text_model.encoder.layers.1"),
    "siglip2": ("backbone.*.embeddings", "backbone.vision_model.head"),
    "vit": ("backbone.embeddings", "backbone.layers.1"),
    "dinov2": ("*.layer_scale?", "backbone.encoder.layer.0.mlp"),
    "dinov2_with_registers": ("backbone.embeddings.register_tokens", "backbone.layernorm"),
    "dinov3": ("backbone.model.layer.0", "backbone.embeddings.cls_tok*"),
    "mae": ("backbone.layers", "backbone.layernorm"),
    "composed": ("image.backbone", "text.backbone.encoder.layer.1"),
    "qwen2_vl": ("backbone.visual.blocks", "backbone.visual.merger"),
    "qwen2_5_vl": ("backbone.visual", "backbone.language_model.layers.0"),
    "qwen3_vl": ("backbone.language_model", "backbone.visual.deepstack_merger_list"),
    "llava": ("backbone.vision_tower", "backbone.multi_modal_projector"),
}


@pytest.mark.parametrize("family", MODALITIES)
def test_parts_of_every_family(family, tmp_path):
    never, later = PARTS[family]
    settings = {"freeze": [never], "unfreeze_at_step": {later: 1}, "lr": 0.1}
    before = dict(load(family_path(family)).named_parameters())
    trainer = make_trainer(
        family_path(family), whole_mode(family), tmp_path, save_steps=1,
        scheduler_type="constant", save_total_limit=None, **settings,
    )  # fmt: skip
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()

    def moved(folder: Path) -> set[str]:
        after = dict(load(folder).named_parameters())
        return {name for name, p in before.items() if not torch.equal(p, after[name])}

    parts = {p: {n for n in before if matches(n, p)} for p in (never, later)}
    assert all(parts.values())
    first, last = moved(tmp_path / "checkpoints" / "step-000001"), moved(tmp_path / "final")
    assert first
    assert not first & (parts[never] | parts[later])
    assert not last & parts[never]
    joined = parts[later] - parts[never]
    # Keys' biases have no effect on attention, so their gradient may be too small to see.
    unseen = {n for n in joined if n.endswith("k_proj.bias") or "key.bias" in n}
    assert joined - unseen <= last
    assert last <= trainable | joined


@pytest.mark.parametrize("family", ["clip", "composed"])
def test_near_names_of_every_family(family):
    start = "text.backbone" if family == "composed" else "backbone"
    with pytest.raises(ConfigError, match=rf"freeze: .* matches no .*did you mean '{start}"):
        build_model({"model_name": str(family_path(family)), "freeze": [f"{start}.embedings.*"],
                     "retrieval_mode": whole_mode(family)})  # fmt: skip
