"""FSDP2: two processes with a share of the weights each train like one process with all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.test_training import folder, largest_difference, train
from tests.launch import ChildFailed, run_on_processes
from vembed.errors import ConfigError

__all__ = ["folder"]

# Adam divides by the size of a gradient: where that is zero but for rounding, so is its step, and
# two runs would part. This eps keeps such steps small.
ADAMW = {"optimizer": "adamw", "lr": 1e-3, "optimizer_eps": 1e-2}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, **ADAMW},
        {
            "use_gradient_cache": True,
            "gradient_cache_chunk_size": 1,
            "gradient_cache_keep": 2,
            "learn_temperature": True,
            **ADAMW,
        },
        {"use_lora": True, "lora_dropout": 0.0, "gradient_checkpointing": True},
    ],
    ids=["plain", "accumulation", "cached", "lora"],
)
def test_trains_like_one_process(folder, settings, request):
    name = request.node.callspec.id
    one = train(str(folder), f"{name}-fsdp-1", {"batch_size": 6, **settings})
    shared = {"batch_size": 3, "distributed_strategy": "fsdp2", **settings}
    two = run_on_processes(count_collectives, 2, str(folder), f"{name}-fsdp-2", shared, timeout=240)
    assert len(one["history"]) == len(two[0]["history"]) > 2
    for expected, actual in zip(one["history"], two[0]["history"], strict=True):
        assert actual == pytest.approx(expected, rel=2e-4, abs=2e-5)
    assert largest_difference(one["weights"], two[0]["weights"]) < 2e-5
    steps = max(line["step"] for line in one["history"])
    assert [found["reduce_scatters"] for found in two] == [steps, steps]


def count_collectives(*args: Any) -> dict[str, Any]:
    from vembed import distributed

    original, calls = distributed._reduce_scatter, []

    def counted(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        return original(*args, **settings)

    distributed._reduce_scatter = counted
    return {**train(*args), "reduce_scatters": len(calls)}


def test_every_process_holds_half_of_everything(folder):
    for found in run_on_processes(look_inside, 2, str(folder)):
        assert found["own_elements"] < 0.55 * found["all_elements"]
        assert found["state_elements"] == 2 * found["own_elements"]  # Adam has two averages


def look_inside(folder: str) -> dict[str, int]:
    from torch.distributed.tensor import DTensor

    from vembed.training.training_loop import optimizer_step

    trainer = build(folder, learn_temperature=True, **ADAMW)
    trainer.prepare()
    optimizer_step(trainer, [next(iter(trainer.dataloader))])
    shares = [p.detach() for p in trainer.model.parameters()]
    assert all(isinstance(share, DTensor) for share in shares)
    state = [v for of in trainer.optimizer.state.values() for v in of.values()]
    return {
        "all_elements": sum(share.numel() for share in shares),
        "own_elements": sum(share.to_local().numel() for share in shares),
        "state_elements": sum(v.to_local().numel() for v in state if isinstance(v, DTensor)),
    }


def build(folder: str, **settings: Any) -> Any:
    from vembed.config import TrainConfig
    from vembed.training.model_builder import apply_lora, build_model
    from vembed.training.run import build_accelerator, build_trainer
    from vembed.training.run_data import load_run_data

    config = TrainConfig.coerce(
        {
            "model_name": f"{folder}/bert",
            "data_path": f"{folder}/pairs.jsonl",
            "holdout_ratio": 0,
            "batch_size": 3,
            "distributed_strategy": "fsdp2",
            "device": "cpu",
            **settings,
        }
    )
    accelerator = build_accelerator(config)
    encoder = build_model(config)
    apply_lora(encoder, config, accelerator)
    return build_trainer(config, accelerator, encoder, load_run_data(config))


def test_one_process_is_no_strategy(folder, monkeypatch):
    with pytest.raises(ConfigError, match="Received: one process"):
        build(str(folder)).prepare()


def test_an_optimizer_that_mixes_shares_with_whole_parameters_is_refused(folder):
    with pytest.raises(ChildFailed, match="both kinds in one group"):
        run_on_processes(mix, 2, str(folder))


def mix(folder: str) -> None:
    trainer = build(folder, learn_temperature=True)
    trainer.optimizer = torch.optim.SGD(trainer.parameters(), lr=0.1)
    trainer.prepare()


def test_clipping_counts_every_share_once(folder):
    (clipped, norm), (_, other) = run_on_processes(clip, 2)
    assert norm == other == pytest.approx(13.0)  # 3, 4 in the shares, 12 beside them
    assert clipped == pytest.approx([3 / 13, 12 / 13])


def clip() -> tuple[list[float], float]:
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from vembed.training.sharding import clip_gradients, own_parts

    mesh = init_device_mesh("cpu", (2,))
    shared = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Shard(0)]))
    shared.grad = distribute_tensor(torch.tensor([3.0, 4.0]), mesh, [Shard(0)])
    whole = nn.Parameter(torch.zeros(()))
    whole.grad = torch.tensor(12.0)
    norm = clip_gradients([shared, whole], 1.0)
    return [float(part) for part in own_parts([shared.grad, whole.grad])], float(norm)
