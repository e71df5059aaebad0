"""Two processes go on from a checkpoint as if they had never been interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState

from tests.launch import run_on_processes
from tests.unit.training.resuming import digests, later, make_places, settings_of
from vembed.errors import CheckpointError, ConfigError
from vembed.training.run import run_training

# 22 rows in batches of 2 x 4 are 3 steps a pass, the last of which is uneven.
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "bf16, LoRA, accumulation, validation, workers": (
        1, {"mixed_precision": "bf16", "use_lora": True, "lora_dropout": 0.2, "batch_size": 2,
            "gradient_accumulation_steps": 3, "max_steps": 3, "num_workers": 2,
            "val_data_path": "<pairs>", "eval_steps": 2},
    ),
    "stream, cache": (
        3, {"streaming": True, "shuffle_buffer_size": 5, "use_gradient_cache": True,
            "gradient_cache_chunk_size": 2, "max_steps": 5},
    ),
    "fsdp2": (2, {"distributed_strategy": "fsdp2", "learn_temperature": True, "max_steps": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("resume"))


def reset() -> None:
    # The process group stays.
    AcceleratorState._reset_state()
    GradientState._reset_state()


def cut_and_whole(places: dict[str, str], folder: str) -> dict[str, list[str]]:
    """For each variant, what differs between a run and the rest of it after a break."""
    import torch.distributed as dist

    different = {}
    for name, (cut, changes) in VARIANTS.items():
        root = Path(folder) / name
        settings = settings_of(places, root / "whole", **changes, save_steps=cut)
        reset()
        run_training({**settings, "num_workers": 0})
        start = root / "whole" / "checkpoints" / f"step-{cut:06d}"
        reset()
        run_training({**settings, "output_dir": str(root / "rest"), "resume": str(start)})
        dist.barrier()
        whole, rest = later(digests(root / "whole"), cut), digests(root / "rest")
        names = whole.keys() | rest.keys()
        different[name] = [n for n in names if whole.get(n) != rest.get(n)]
    return different


def alone_after(places: dict[str, str], folder: str, strategy: str) -> str:
    settings = settings_of(
        places, Path(folder) / "run", max_steps=2, save_steps=1, resume="auto",
        distributed_strategy=strategy,
    )  # fmt: skip
    reset()
    run_training(settings)
    return settings["output_dir"]


def test_bit_identical(places, tmp_path):
    found = run_on_processes(cut_and_whole, 2, places, str(tmp_path))
    assert found == [{name: [] for name in VARIANTS}] * 2


def test_another_number_of_processes(places, tmp_path):
    run_on_processes(alone_after, 2, places, str(tmp_path / "ddp"), "ddp")
    settings = settings_of(places, tmp_path / "ddp" / "run", max_steps=3, save_steps=1)
    settings["resume"] = "auto"
    with pytest.raises(ConfigError, match="processes: 1, were 2"):
        run_training({**settings, "max_steps": 2})
    inexact = {**settings, "allow_inexact_resume": True}
    assert run_training(inexact).state.step == 3


def test_shares_of_weights_fit_as_many_processes_only(places, tmp_path):
    run_on_processes(alone_after, 2, places, str(tmp_path), "fsdp2")
    settings = settings_of(places, tmp_path / "run", max_steps=2, save_steps=1)
    settings |= {"resume": "auto", "allow_inexact_resume": True}
    with pytest.raises(CheckpointError, match="written by 2 processes with .*: fsdp2"):
        run_training(settings)
