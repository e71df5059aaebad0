"""What a model without weights says it takes is what the same model with weights takes."""

import pytest
import torch
from accelerate import Accelerator

from vembed.config import TrainConfig
from vembed.errors import ConfigError
from vembed.training.memory import SavedBytes
from vembed.training.model_builder import apply_lora, build_model
from vembed.training.planning.tracing import Tracer, Watch

VARIANTS = {
    "plain": {},
    "lora": {"use_lora": True},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"mixed_precision": "bf16"},
    "eager": {"attn_implementation": "eager"},
    "projection": {"projection_dim": 8},
}


def make_inputs(rows: int = 6, tokens: int = 10) -> dict[str, torch.Tensor]:
    ids = torch.ones(rows, tokens, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids.clone(), "token_type_ids": ids * 0}


def built(tiny_st_path, tracer=None, **settings):
    config = TrainConfig(model_name=str(tiny_st_path), **settings)
    if tracer is None:
        encoder = build_model(config)
        apply_lora(encoder, config, Accelerator(cpu=True))
        return encoder
    with tracer.building():
        encoder = build_model(config)
    apply_lora(encoder, config, Accelerator(cpu=True))
    tracer.empty(encoder)
    return encoder


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_bytes_are_those_of_the_real_model(tiny_st_path, name):
    settings = VARIANTS[name]
    autocast = torch.bfloat16 if settings.get("mixed_precision") == "bf16" else None
    tracer = Tracer(autocast=autocast)
    planned = built(tiny_st_path, tracer, **settings)
    cost = tracer.cost(planned, lambda inputs: planned(**inputs), make_inputs())
    real = built(tiny_st_path, **settings)
    with SavedBytes() as saved, torch.autocast("cpu", autocast, enabled=autocast is not None):
        real(**make_inputs())
    inputs = sum(t.numel() * t.element_size() for t in make_inputs().values())
    # Inputs are saved too, but are there anyway.
    assert saved.total - inputs <= cost.saved * 1.05
    assert cost.saved <= saved.total * 1.15
    assert cost.peak >= cost.saved > 0
    assert cost.backward_flops > cost.forward_flops * (0.5 if name == "lora" else 1.5)


def test_recomputed_layers_save_less_and_compute_more(tiny_st_path):
    costs = {}
    for name in ("plain", "checkpointing"):
        tracer = Tracer()
        model = built(tiny_st_path, tracer, **VARIANTS[name])
        costs[name] = tracer.cost(model, lambda inputs, m=model: m(**inputs), make_inputs())
    assert costs["checkpointing"].saved < costs["plain"].saved / 3
    assert costs["checkpointing"].peak < costs["plain"].peak
    assert costs["checkpointing"].backward_flops > costs["plain"].backward_flops


def test_nothing_takes_memory(tiny_st_path):
    tracer = Tracer()
    model = built(tiny_st_path, tracer, use_lora=True, projection_dim=8)
    assert all(type(p.data).__name__ == "FakeTensor" for p in model.parameters())


def test_a_model_that_looks_at_values_cannot_be_planned():
    class Curious(torch.nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x

    model = Curious()
    with pytest.raises(ConfigError, match="vembed check"):
        Tracer().cost(model, lambda inputs: model(**inputs), {"x": torch.ones(2, 2)})


def test_watch_counts_what_lives():
    weight = torch.ones(10, 10)
    with Watch([weight]) as watch:
        one = torch.empty(100)
        assert watch.bytes == 400
        two = one.view(10, 10) @ weight
        assert (watch.bytes, watch.flops) == (800, 2000)
        del one
        assert watch.bytes == 400
        del two
    assert (watch.bytes, watch.most_bytes) == (0, 800)
