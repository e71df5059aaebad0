"""Compiled layers: the same gradients, no new code for another length, and plain names."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch._dynamo.utils import counters

from vembed.config import TrainConfig, find_conflicts
from vembed.errors import ConfigError
from vembed.losses import build_criterion
from vembed.training.compiling import compile_layers, repeated_layers
from vembed.training.gradient_cache import GradientCache
from vembed.training.model_builder import apply_lora, build_model
from vembed.training.objective import Objective
from vembed.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def encoder_of(path, *, compiled, **settings):
    config = TrainConfig(
        model_name=str(path),
        torch_compile=compiled is not None,
        torch_compile_backend=compiled or "inductor",
        **settings,
    )
    encoder = build_model(config)
    apply_lora(encoder, config, Accelerator(cpu=True))
    compile_layers(encoder, config)
    return encoder


def batch_of(rows: int, tokens: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(rows * 100 + tokens)
    inputs = {}
    for role in ("query", "positive"):
        ids = torch.randint(5, 100, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, tokens // 2 :] = 0
        inputs[role] = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}
    return inputs


def gradients(encoder, inputs, *, seed=0, **cache):
    torch.manual_seed(seed)
    encoder.zero_grad()
    GradientCache(**cache).backward(
        encode=lambda taken: encoder(**taken),
        inputs=inputs,
        lengths={role: of["attention_mask"].sum(1).tolist() for role, of in inputs.items()},
        objective=lambda rows: Objective(build_criterion("infonce"), None, 1.0)(rows, {}, None),
        backward=torch.Tensor.backward,
    )
    return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


def difference(one, other) -> float:
    assert one.keys() == other.keys()
    squares = [(((one[n] - other[n]) ** 2).sum(), (one[n] ** 2).sum()) for n in one]
    return float((sum(d for d, _ in squares) / sum(s for _, s in squares)) ** 0.5)


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("aot_eager", {}),
        ("eager", {"use_lora": True}),
        pytest.param("inductor", {}, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
    ids=["traced backward", "lora", "compiled"],
)
def test_gradients_are_those_of_the_layers_uncompiled(tiny_st_path, backend, settings):
    """With dropout, whose masks a chunk that is encoded twice has to draw again."""
    inputs = batch_of(8, 12)
    settings = {"dropout": 0.2, **settings}
    torch.manual_seed(5)
    plain = encoder_of(tiny_st_path, compiled=None, **settings)
    torch.manual_seed(5)
    compiled = encoder_of(tiny_st_path, compiled=backend, **settings)
    for cache in ({"keep": "all", "chunk_size": 4}, {"keep": 0, "chunk_size": 4}):
        expected = gradients(plain, inputs, **cache)
        assert difference(expected, gradients(compiled, inputs, **cache)) < 1e-5
        # Other masks would show.
        assert difference(expected, gradients(compiled, inputs, seed=1, **cache)) > 0.01
    assert counters["stats"]["unique_graphs"] > 0


def test_other_lengths_and_sizes_need_no_new_code(tiny_st_path):
    encoder = encoder_of(tiny_st_path, compiled="eager")
    gradients(encoder, batch_of(8, 12), keep=0, chunk_size=4)
    gradients(encoder, batch_of(6, 10), keep=0, chunk_size=3)
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    for rows, tokens in ((9, 7), (10, 17), (12, 23), (15, 31)):
        gradients(encoder, batch_of(rows, tokens), keep=0, chunk_size=5)
    assert counters["stats"]["unique_graphs"] == before
    assert not counters["recompile_limit"]


def test_names_are_plain_and_the_model_can_be_saved(tiny_st_path, tmp_path):
    encoder = encoder_of(tiny_st_path, compiled="eager")
    plain = encoder_of(tiny_st_path, compiled=None)
    assert list(encoder.state_dict()) == list(plain.state_dict())
    gradients(encoder, batch_of(4, 6), keep="all")
    encoder.save_pretrained(tmp_path)
    again = encoder_of(tmp_path, compiled=None)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_every_layer_is_compiled_once(tiny_st_path):
    encoder = encoder_of(tiny_st_path, compiled="eager")
    layers = list(repeated_layers(encoder))
    assert layers == list(encoder.backbone.encoder.layer)
    before = [layer._compiled_call_impl for layer in layers]
    assert all(before)
    config = {"torch_compile": True, "torch_compile_backend": "eager"}
    compile_layers(encoder, TrainConfig(**config))
    assert [layer._compiled_call_impl for layer in layers] == before


def test_without_layers_it_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    with pytest.raises(ConfigError, match="a stack of layers"):
        compile_layers(model, TrainConfig(torch_compile=True))


@pytest.mark.parametrize(
    "other", [{"distributed_strategy": "fsdp2"}, {"gradient_checkpointing": True}]
)
def test_what_it_does_not_go_with(other):
    config = TrainConfig(torch_compile=True, **other)
    assert "torch_compile" in {problem.keys[0] for problem in find_conflicts(config)}
    assert not find_conflicts(TrainConfig(torch_compile=True))


def test_the_trainer_compiles(tiny_st_path, tmp_path):
    config = {
        "model_name": str(tiny_st_path),
        "output_dir": str(tmp_path),
        "torch_compile": True,
        "torch_compile_backend": "eager",
    }
    encoder = build_model(config)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    trainer = Trainer(
        encoder, optimizer, [], build_criterion("infonce"), Accelerator(cpu=True), config
    )
    trainer.prepare()
    assert all(layer._compiled_call_impl for layer in repeated_layers(encoder))
