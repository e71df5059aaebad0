"""Two processes train models with towers, and with flat patches, like one process does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_training import largest_difference
from tests.launch import run_on_processes
from tests.unit.models.families import family_path, load, make_trainer
from vembed.chunking import take_rows
from vembed.training.data_utils import unpack_roles

CASES = {
    "two towers": ("clip", "t2i", {}),
    "one tower": ("clip", "i2i", {"use_gradient_cache": True, "gradient_cache_chunk_size": 1}),
    "shared out": ("siglip", "t2i", {"distributed_strategy": "fsdp2"}),
    "composed, shared out": ("composed", "t2m", {"distributed_strategy": "fsdp2"}),
    "flat patches": (
        "qwen3_vl",
        "t2m",
        {"use_gradient_cache": True, "gradient_checkpointing": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_like_one_process(case, tmp_path):
    family, mode, settings = CASES[case]
    path = str(family_path(family))
    one = train(path, mode, str(tmp_path / "one"), {**settings, "distributed_strategy": "ddp"})
    two = run_on_processes(train, 2, path, mode, str(tmp_path / "two"), settings, timeout=240)

    assert two[0]["scale"] == pytest.approx(two[1]["scale"], abs=1e-7)
    assert two[0]["scale"] == pytest.approx(one["scale"], abs=1e-5)
    before, alone, shared = (
        load(folder).state_dict()
        for folder in (path, tmp_path / "one" / "final", tmp_path / "two" / "final")
    )
    assert largest_difference(alone, before) > 1e-3, "training must have moved something"
    assert largest_difference(alone, shared) < 2e-5


def train(path: str, mode: str, output_dir: str, settings: dict[str, Any]) -> dict[str, float]:
    """Three steps on this process's share of one batch of four rows."""
    from pathlib import Path

    trainer = make_trainer(
        path, mode, Path(output_dir), learn_temperature=True, lr=0.05, **settings
    )
    accelerator = trainer.accelerator
    count = 4 // accelerator.num_processes
    rows = range(accelerator.process_index * count, (accelerator.process_index + 1) * count)
    (batch,) = trainer.dataloader
    trainer.dataloader = [
        {
            f"{role}_{name}": tensor
            for role, inputs in unpack_roles(batch, mode).items()
            for name, tensor in take_rows(inputs, list(rows)).items()
        }
    ]
    trainer.train()
    return {"scale": float(trainer.criterion.logit_scale.detach())}
