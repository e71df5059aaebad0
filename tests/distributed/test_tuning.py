"""Adapters and partial training: two processes train like one, with DDP and with shares (FSDP2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.test_image_models import train as train_towers
from tests.distributed.test_training import folder, largest_difference, train
from tests.launch import run_on_processes
from tests.unit.models.families import family_path, load

__all__ = ["folder"]

FIRST_LAYER = {"backbone.encoder.layer.0": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "dora": {
        "use_lora": True, "use_dora": True, "use_rslora": True, "lora_dropout": 0.0,
        "unfreeze_at_step": FIRST_LAYER,
    },
    "partial": {
        "freeze": ["backbone.embeddings"],
        "unfreeze_at_step": {**FIRST_LAYER, "loss.*": 3},
        "lr_groups": {"*.bias": 2, "loss.*": {"lr": 0.01}},
        "layerwise_lr_decay": 0.5,
        "dropout": 0.0,
        "learn_temperature": True,
        "use_gradient_cache": True,
        "gradient_cache_chunk_size": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(folder):
    """What one process makes of the settings, which is the same for every strategy."""
    return {
        name: train(str(folder), f"alone-{name}", {"batch_size": 6, **settings})
        for name, settings in SETTINGS.items()
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_like_one(folder, alone, name, strategy):
    settings = {"batch_size": 3, "distributed_strategy": strategy, **SETTINGS[name]}
    two = run_on_processes(train, 2, str(folder), f"{name}-{strategy}", settings, timeout=240)[0]
    one = alone[name]
    assert len(one["history"]) == len(two["history"]) > 4
    for expected, actual in zip(one["history"], two["history"], strict=True):
        assert actual == pytest.approx(expected, rel=2e-4, abs=2e-5)
    assert largest_difference(one["weights"], two["weights"]) < 2e-5
    if strategy == "ddp":
        # Once in each step, also in those before parameters join, and after.
        assert set(two["reductions"]) == {1}


TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    # LiT: of the image tower its projection trains, of the text tower adapters and projection.
    "locked tower": (
        "composed",
        {"use_lora": True, "use_dora": True, "lora_dropout": 0.0, "freeze_towers": ["image"]},
    ),
    "locked by a pattern": (
        "composed",
        {
            "freeze": ["image.backbone"],
            "unfreeze_at_step": {"text.backbone.encoder.layer.0": 1},
            "lr_groups": {"projections.*": 2},
            "layerwise_lr_decay": 0.5,
            "dropout": 0.0,
        },
    ),
    "parts of both": (
        "siglip",
        {"freeze": ["*.embeddings"], "unfreeze_at_step": {"backbone.vision_model.head": 2}},
    ),
}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("locked tower", "fsdp2"), ("locked by a pattern", "ddp"), ("parts of both", "fsdp2")],
)
def test_two_towers_train_like_on_one_process(name, strategy, tmp_path):
    family, settings = TOWERS[name]
    path = str(family_path(family))
    train_towers(path, "t2i", str(tmp_path / "one"), settings)
    settings = {**settings, "distributed_strategy": strategy}
    run_on_processes(train_towers, 2, path, "t2i", str(tmp_path / "two"), settings, timeout=240)

    before, one, two = (
        load(folder).state_dict()
        for folder in (path, tmp_path / "one" / "final", tmp_path / "two" / "final")
    )
    assert largest_difference(one, before) > 1e-3
    assert largest_difference(one, two) < 2e-5
    locked = {n: t for n, t in before.items() if n.startswith("image.") and family == "composed"}
    assert all(torch.equal(two[n], tensor) for n, tensor in locked.items())


def test_the_comparison_sees_a_step(folder, alone):
    later = {
        **SETTINGS["partial"],
        "unfreeze_at_step": {"backbone.encoder.layer.0": 3, "loss.*": 3},
    }
    other = train(str(folder), "later", {"batch_size": 6, **later})
    assert largest_difference(alone["partial"]["weights"], other["weights"]) > 1e-4


def test_a_failed_check_of_a_saved_model_ends_all_processes(folder):
    messages = run_on_processes(save_unmerged, 2, str(folder))
    assert "it is the base model" in messages[0]
    assert messages[1].endswith("unmerged: the main process could not save the model")


def save_unmerged(folder: str) -> str:
    from accelerate import Accelerator

    from vembed.errors import CheckpointError
    from vembed.models import merging, weights
    from vembed.training.checkpoint import save_checkpoint
    from vembed.training.model_builder import apply_lora, build_model

    config = {"model_name": f"{folder}/bert", "use_lora": True}
    accelerator, encoder = Accelerator(cpu=True), build_model(config)
    apply_lora(encoder, config, accelerator)
    for name, parameter in encoder.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.ones_(parameter)
    weights.merged = lambda backbone: merging.plain_copy(backbone).unload()
    try:
        save_checkpoint(f"{folder}/unmerged", encoder, accelerator, config=config)
    except CheckpointError as error:
        return str(error)
    return "saved"
