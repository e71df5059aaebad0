from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.unit.models.families import family_path, load
from tests.unit.training.test_dropout import tiny
from vembed.errors import ConfigError
from vembed.training.optimizer_builder import (
    build_optimizer,
    build_scheduler,
    describe_groups,
    resolve_tracker,
    trainable_parameters,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))


class OwnOptimizer(torch.optim.SGD):
    def __init__(self, params, lr: float, twist: int = 0) -> None:
        super().__init__(params, lr=lr)
        self.twist = twist


def test_decay_spares_biases_norms_and_scalars():
    model = Model()
    optimizer = build_optimizer(model, {"lr": 0.1, "weight_decay": 0.5})
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    spared = [model.layer.bias, model.norm.weight, model.norm.bias, model.logit_scale]
    assert decay[id(model.layer.weight)] == 0.5
    assert [decay[id(p)] for p in spared] == [0.0] * 4
    assert len(decay) == 5


@pytest.mark.parametrize("model_type", ["qwen3", "bert"])
def test_decay_of_real_models_is_for_matrices_and_tables(model_type):
    model = tiny(model_type)
    optimizer = build_optimizer(model, {"weight_decay": 0.5})
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    decayed = {name for name, p in model.named_parameters() if decay[id(p)] == 0.5}
    spared = {name for name, p in model.named_parameters() if decay[id(p)] == 0.0}
    assert decayed
    assert not [n for n in decayed if n.endswith(".bias") or "norm" in n.lower()]
    assert all(n.endswith(".bias") or "norm" in n.lower() for n in spared)


@pytest.mark.parametrize("family", ["siglip", "vit", "dinov3", "composed", "qwen3_vl"])
def test_decay_spares_the_tokens_of_image_models(family):
    model = load(family_path(family))
    optimizer = build_optimizer(model, {"weight_decay": 0.5})
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            last = name.rpartition(".")[2]
            is_spared = parameter.ndim <= 1 or last in ("cls_token", "probe")
            assert decay[id(parameter)] == (0.0 if is_spared else 0.5), name
    assert len({decay[id(p)] for p in model.parameters() if p.requires_grad}) == 2


class Layered(nn.Module):
    """A backbone of three layers, with something before, something after, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(5, 2)
        self.backbone.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        self.backbone.norm = nn.LayerNorm(2, bias=False)
        self.projections = nn.ModuleList([nn.Linear(2, 2)])


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))


def rates(optimizer: torch.optim.Optimizer, *modules: nn.Module) -> dict[str, float]:
    """Learning rates by parameter."""
    by_id = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    named = [pair for module in modules for pair in module.named_parameters()]
    return {name: by_id[id(p)] for name, p in named}


def test_learning_rates_by_pattern_and_layer():
    model, criterion = Layered(), Scale()
    config = {
        "lr": 1.0,
        "layerwise_lr_decay": 0.5,
        "lr_groups": {
            "projections": 10,
            "projections.*.bias": 20,  # the last one that matches wins
            "backbone.layers.0.*": {"lr": 7},
            "backbone.layers.1.*": 3,
            "loss.*": {"lr": 0.25},
        },
    }
    optimizer = build_optimizer(model, config, criterion)
    assert rates(optimizer, model, criterion) == {
        "backbone.embeddings.weight": 1 / 8,
        "backbone.layers.0.weight": 7.0,
        "backbone.layers.1.weight": 3 / 2,
        "backbone.layers.2.weight": 1.0,
        "backbone.norm.weight": 1.0,
        "projections.0.weight": 10.0,
        "projections.0.bias": 20.0,
        "logit_scale": 0.25,
    }
    # What the log calls lr.
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_one_learning_rate_makes_the_same_groups_as_none():
    groups = [
        [(g["lr"], g["weight_decay"], len(g["params"])) for g in of.param_groups]
        for of in (
            build_optimizer(Layered(), {"lr": 0.5}, Scale()),
            build_optimizer(Layered(), {"lr": 0.5, "lr_groups": {"*": 1}}, Scale()),
            build_optimizer(Layered(), {"lr": 0.5, "layerwise_lr_decay": 1.0}, Scale()),
        )
    ]
    assert groups[0] == groups[1] == groups[2] == [(0.5, 0.01, 5), (0.5, 0.0, 2), (0.5, 0.0, 1)]


def test_a_schedule_scales_every_group():
    optimizer = build_optimizer(Layered(), {"lr": 1.0, "lr_groups": {"projections": 10}})
    settings = {"scheduler_type": "linear", "warmup_steps": 2}
    scheduler, _ = build_scheduler(optimizer, settings, num_epochs=1, steps_per_epoch=6)
    seen = []
    for _ in range(6):
        seen.append({g["lr"] for g in optimizer.param_groups})
        optimizer.step()
        scheduler.step()
    assert seen == [{0.0}, {0.5, 5.0}, {1.0, 10.0}, {0.75, 7.5}, {0.5, 5.0}, {0.25, 2.5}]


def test_an_optimizers_own_lr_is_what_factors_multiply():
    settings = {"lr": 1.0, "optimizer_kwargs": {"lr": 0.5}, "lr_groups": {"projections": 2}}
    model = Layered()
    assert set(rates(build_optimizer(model, settings), model).values()) == {0.5, 1.0}


def test_wrong_patterns_are_named():
    with pytest.raises(ConfigError, match=r"did you mean 'projections\.\*'"):
        build_optimizer(Layered(), {"lr_groups": {"projection.*": 2}})
    frozen = Layered()
    frozen.projections.requires_grad_(False)
    with pytest.raises(ConfigError, match="lr_groups: 'projections' matches no trainable param"):
        build_optimizer(frozen, {"lr_groups": {"projections": 2}})


def test_groups_are_told_with_rate_and_decay():
    optimizer = build_optimizer(Layered(), {"lr": 0.5, "lr_groups": {"projections": 2}}, Scale())
    build_scheduler(optimizer, {"warmup_steps": 5}, 1, 10)  # it starts at 0, which is no news
    assert describe_groups(optimizer) == [
        "4 parameters: lr 1, weight decay 0.01",
        "2 parameters: lr 1, weight decay 0",
        "22 parameters: lr 0.5, weight decay 0.01",
        "3 parameters: lr 0.5, weight decay 0",
    ]


def test_frozen_parameters_are_left_out_and_those_of_the_loss_taken_in():
    model, criterion = Model(), nn.Linear(1, 1)
    model.layer.requires_grad_(False)
    optimizer = build_optimizer(model, {"lr": 0.1}, criterion)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in trainable_parameters(model, criterion)}
    assert id(model.layer.weight) not in held
    assert id(criterion.weight) in held


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"optimizer": "adamw"}, torch.optim.AdamW),
        ({"optimizer": "adam"}, torch.optim.Adam),
        ({"optimizer": "sgd", "optimizer_kwargs": {"momentum": 0.9}}, torch.optim.SGD),
        ({"optimizer": "rmsprop"}, torch.optim.RMSprop),
        ({"optimizer": "adafactor"}, torch.optim.Adafactor),
    ],
)
def test_every_optimizer_takes_a_step(settings, kind):
    model = Model()
    optimizer = build_optimizer(model, {"lr": 0.01, **settings})
    assert isinstance(optimizer, kind)
    before = model.layer.weight.detach().clone()
    model.norm(model.layer(torch.ones(2, 4))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.layer.weight)


def test_betas_eps_and_own_arguments_reach_the_optimizer():
    settings = {"optimizer_betas": [0.5, 0.6], "optimizer_eps": 1e-3, "lr": 0.25}
    group = build_optimizer(Model(), settings).param_groups[0]
    assert (group["betas"], group["eps"], group["lr"]) == ((0.5, 0.6), 1e-3, 0.25)
    own = {"optimizer": f"{__name__}:OwnOptimizer", "optimizer_kwargs": {"twist": 3}}
    if __name__ in __import__("sys").modules:
        assert build_optimizer(Model(), own).twist == 3


def test_wrong_optimizers_are_named():
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        build_optimizer(Model(), {"optimizer": "adamww"})
    with pytest.raises(ConfigError, match="momentum"):
        build_optimizer(Model(), {"optimizer": "adamw", "optimizer_kwargs": {"momentum": 0.9}})
    with pytest.raises(ConfigError, match="frozen"):
        build_optimizer(Model().requires_grad_(False), {})


def lr_after(steps: int, **settings) -> float:
    optimizer = build_optimizer(Model(), {"lr": 1.0})
    scheduler, _ = build_scheduler(optimizer, settings, num_epochs=2, steps_per_epoch=10)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return scheduler.get_last_lr()[0]


def test_linear_schedule_by_hand():
    # 20 steps, 4 of them warm-up: 2/4 at step 2, 1 at step 4, (20-12)/16 at step 12.
    settings = {"scheduler_type": "linear", "warmup_ratio": 0.2}
    assert [lr_after(s, **settings) for s in (2, 4, 12, 20)] == pytest.approx([0.5, 1, 0.5, 0])


def test_warmup_steps_win_over_the_ratio_and_max_steps_over_epochs():
    optimizer = build_optimizer(Model(), {})
    built = build_scheduler(optimizer, {"warmup_steps": 7, "warmup_ratio": 0.5}, 2, 10)
    assert built.warmup_steps == 7
    assert build_scheduler(optimizer, {"max_steps": 40, "warmup_ratio": 0.5}, 2, 10)[1] == 20


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "cosine", "polynomial"])
def test_schedules_by_name(name):
    assert 0 <= lr_after(10, scheduler_type=name) <= 1


def test_wrong_schedules_are_named():
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        build_scheduler(build_optimizer(Model(), {}), {"scheduler_type": "cosin"}, 1, 1)
    with pytest.raises(ConfigError, match="scheduler_kwargs"):
        lr_after(1, scheduler_type="cosine", scheduler_kwargs={"nonsense": 1})


def test_trackers_are_resolved(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_API_KEY", "SWANLAB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_tracker(report_to="none") == ([], {})
    log_with, init_kwargs = resolve_tracker(report_to="wandb", run_name="r", tags=["a"])
    assert log_with == ["wandb"]
    assert init_kwargs["wandb"]["mode"] == "offline"
    assert init_kwargs["wandb"]["name"] == "r"
    assert resolve_tracker("all").log_with == ["wandb", "tensorboard", "swanlab"]
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert "mode" not in resolve_tracker("wandb").init_kwargs["wandb"]
    with pytest.raises(ConfigError, match="wandbb"):
        resolve_tracker("wandbb")
