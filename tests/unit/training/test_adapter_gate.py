"""A model whose adapters were merged wrongly, or learned nothing, is not saved."""

from __future__ import annotations

import itertools
import random
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from torch import nn

from tests.tiny import PAIRS, tiny_sentence_transformer, write_rows
from tests.unit.models.families import family_path, make_trainer, whole_mode
from vembed.errors import CheckpointError
from vembed.models import load_encoder, merging, weights
from vembed.modes import Item
from vembed.training import adapter_gate, training_loop
from vembed.training.adapter_gate import ROWS_PER_ROLE, Probe, shortest_rows
from vembed.training.checkpoint import save_checkpoint
from vembed.training.model_builder import apply_lora, build_model
from vembed.training.run import run_training
from vembed.training.training_loop import optimizer_step


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny_sentence_transformer(tmp_path_factory.mktemp("model") / "st", dense_features=8)


@pytest.fixture
def adapted(model_path):
    def build(**settings):
        config = {"model_name": str(model_path), "use_lora": True, **settings}
        encoder = build_model(config)
        apply_lora(encoder, config, Accelerator(cpu=True))
        return encoder

    return build


def learn(encoder: nn.Module, size: float = 0.05) -> nn.Module:
    """As if adapters had been trained."""
    torch.manual_seed(1)
    for name, parameter in encoder.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=size)
    return encoder


def save(encoder, path, *, updated: bool = True, config=None) -> None:
    inputs = encoder.processor([Item(text=pair["query"]) for pair in PAIRS[:3]], role="query")
    save_checkpoint(
        path, encoder, Accelerator(cpu=True), config=config, probe=Probe([inputs], updated)
    )


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"torch_dtype": "bfloat16"}])
def test_a_trained_model_is_saved(adapted, settings, tmp_path):
    encoder = learn(adapted(**settings))
    save(encoder, tmp_path / "one")
    save_checkpoint(tmp_path / "two", encoder, Accelerator(cpu=True))  # on a list of texts
    for name in ("one", "two"):
        assert (tmp_path / name / "adapter" / "adapter_model.safetensors").is_file()
        load_encoder(str(tmp_path / name))


def test_one_that_was_not_trained_yet_is_saved(adapted, tmp_path):
    save(adapted(), tmp_path / "a", updated=False)
    save_checkpoint(tmp_path / "b", adapted(), Accelerator(cpu=True))


def test_a_small_step_is_no_fault(adapted, tmp_path):
    """The first steps of a warm-up change hardly anything."""
    save(learn(adapted(), size=1e-7), tmp_path / "a")


@pytest.fixture
def merge(monkeypatch):
    """Puts a function in the place of what merges, where encoders are saved."""
    right = merging.merged

    def replace(wrong) -> None:
        monkeypatch.setattr(weights, "merged", lambda backbone: wrong(right, backbone))

    return replace


def not_at_all(_, backbone):
    return merging.plain_copy(backbone).unload()


def twice(right, backbone):
    copied = merging.plain_copy(backbone)
    for name, parameter in copied.named_parameters():
        if ".lora_B." in name:
            parameter.data *= 2
    return right(copied)


def without_one_layer(right, backbone):
    copied = merging.plain_copy(backbone)
    next(p for n, p in copied.named_parameters() if ".lora_B." in n).data.zero_()
    return right(copied)


@pytest.mark.parametrize("wrong", [not_at_all, twice, without_one_layer])
def test_a_wrong_merge_is_not_saved(adapted, merge, wrong, tmp_path):
    encoder = learn(adapted())
    save(encoder, tmp_path / "model")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    merge(wrong)
    with pytest.raises(CheckpointError) as caught:
        save(encoder, tmp_path / "model")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'model'}: the merged model differs from the one with")
    assert "1e-05 is allowed for float32" in message
    assert ("it is the base model" in message) == (wrong is not_at_all)
    # What was there before is still there, whole.
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_an_unmerged_model_is_found_however_little_was_learned(adapted, merge, tmp_path):
    merge(not_at_all)
    encoder = learn(adapted(), size=1e-6)
    with pytest.raises(CheckpointError, match="it is the base model"):
        save(encoder, tmp_path / "model")


def test_an_unmerged_model_need_not_be_bit_equal_to_the_base(merge, tmp_path):
    merge(not_at_all)
    trainer = make_trainer(family_path("siglip"), "t2i", tmp_path, use_lora=True)
    encoder = learn(trainer.model, size=3e-7)
    with pytest.raises(CheckpointError, match=r"by up to .*e-06 .*it is the base model"):
        save_checkpoint(tmp_path / "model", encoder, trainer.accelerator)


def test_adapters_that_steps_did_not_change(adapted, tmp_path):
    with pytest.raises(
        CheckpointError, match="steps were taken, but the adapters are as they were"
    ):
        save(adapted(), tmp_path / "model")


def test_adapters_without_effect(adapted, tmp_path):
    encoder = learn(adapted())
    for layer in encoder.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] = 0.0
    with pytest.raises(CheckpointError, match="same vectors with its adapters and without"):
        save(encoder, tmp_path / "model")


def test_what_16_bits_do_not_hold_yet_is_said(adapted, tmp_path, caplog):
    encoder = adapted(torch_dtype="bfloat16")
    save(learn(encoder, size=1e-7), tmp_path / "model")
    (warning,) = caplog.messages
    assert "rounding to bfloat16 weights changes vectors by up to" in warning
    caplog.clear()
    save(learn(encoder), tmp_path / "model")
    assert caplog.messages == []


def test_an_unmerged_model_of_16_bits_is_found(adapted, merge, tmp_path):
    merge(not_at_all)
    with pytest.raises(CheckpointError, match=r"allowed for bfloat16 .* it is the base model"):
        save(learn(adapted(torch_dtype="bfloat16"), size=5e-3), tmp_path / "model")


def test_a_look_changes_nothing_in_a_run(adapted, tmp_path):
    encoder = learn(adapted())
    names = dict(encoder.named_parameters())
    frozen = next(name for name in names if ".lora_A." in name)
    names[frozen].requires_grad_(False)
    encoder.backbone.eval()
    encoder.train()
    state = {name: p.detach().clone() for name, p in names.items()}
    flags = {name: p.requires_grad for name, p in names.items()}
    modes = [module.training for module in encoder.modules()]
    random_states = torch.get_rng_state(), random.getstate()
    save(encoder, tmp_path / "model")
    assert {name: p.requires_grad for name, p in encoder.named_parameters()} == flags
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(p, state[name]) for name, p in encoder.named_parameters())
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]


def test_the_copy_is_gone_before_the_folder_is_loaded(adapted, tmp_path, monkeypatch):
    copies, found = [], []
    make, load = adapter_gate._in_float32, adapter_gate.load_encoder

    def make_it(encoder):
        copied = make(encoder)
        assert copied is not encoder
        copies.extend(weakref.ref(p) for p in copied.parameters())
        return copied

    def load_it(*args, **options):
        found.append(sum(copy() is not None for copy in copies))
        return load(*args, **options)

    monkeypatch.setattr(adapter_gate, "_in_float32", make_it)
    monkeypatch.setattr(adapter_gate, "load_encoder", load_it)
    save(learn(adapted(torch_dtype="bfloat16")), tmp_path / "model")
    assert copies
    assert found == [0]


def test_what_is_looked_at_are_the_shortest_rows_of_each_role():
    lengths = {"query": [9, 2, 3, 8, 4, 5, 6, 7], "positive": [3, 1]}
    inputs = {
        role: {
            "input_ids": torch.arange(len(of)).repeat(9, 1).T,
            "attention_mask": (torch.arange(9) < torch.tensor(of)[:, None]).long(),
        }
        for role, of in lengths.items()
    }
    query, positive = shortest_rows(inputs, lengths)
    assert query["input_ids"][:, 0].tolist() == [1, 2, 4, 5, 6, 7]
    assert query["input_ids"].shape == (ROWS_PER_ROLE, 7)
    assert positive["input_ids"].shape == (2, 3)


@pytest.fixture
def run(model_path, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    seen: list[bool] = []
    check = adapter_gate._find_fault

    def spy(vectors, *, updated):
        seen.append(updated)
        return check(vectors, updated=updated)

    monkeypatch.setattr(adapter_gate, "_find_fault", spy)
    # Every validation finds the best model yet.
    values = itertools.count()
    monkeypatch.setattr(training_loop, "_judge", lambda *_: (next(values), True))

    def train(*, validated: bool = False, **settings) -> list[bool]:
        """Of each model that was looked at, whether steps had changed its adapters."""
        seen.clear()
        if validated:
            settings |= {"val_data_path": str(rows), "eval_steps": 2}  # and at the end, after 3
        run_training({
            "model_name": str(model_path), "data_path": str(rows),
            "output_dir": str(tmp_path / "o"), "overwrite_output_dir": True,
            "use_lora": True, "max_steps": 3, "batch_size": 4, "device": "cpu",
            "holdout_ratio": 0, "progress": False, **settings,
        })  # fmt: skip
        return list(seen)

    return train


def test_warm_up_begins_with_a_step_that_changes_nothing(run):
    assert run(warmup_steps=1, max_steps=1) == [False]
    assert run(warmup_steps=1, max_steps=2) == [True]


def test_adapters_that_join_later_are_not_missed_before(run):
    joining = {"backbone": 2}
    assert run(unfreeze_at_step=joining, warmup_steps=0, validated=True) == [False, True, True]


def test_a_run_whose_adapters_never_move_ends_with_the_reason(run, monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: None)
    with pytest.raises(CheckpointError, match="final: optimizer steps were taken, but"):
        run(optimizer="sgd", warmup_steps=0)


def test_of_a_run_only_what_it_recommends_is_looked_at(run, tmp_path):
    assert run(save_steps=1) == [True]
    assert (tmp_path / "o" / "checkpoints" / "step-000003").is_dir()
    assert run(save_steps=1, validated=True, warmup_steps=0) == [True] * 3


def test_without_adapters_nothing_is_looked_at(run, tmp_path):
    assert run(use_lora=False) == []
    assert not list(Path(tmp_path / "o").rglob("adapter*"))


@pytest.mark.parametrize("probed", [True, False], ids=["a batch", "literal inputs"])
@pytest.mark.parametrize("family", ["siglip2", "mae", "qwen3_vl"])
def test_a_wrong_merge_of_other_families(family, probed, merge, tmp_path):
    trainer = make_trainer(family_path(family), whole_mode(family), tmp_path, use_lora=True)
    encoder = learn(trainer.model)
    if probed:
        trainer.prepare()
        trainer.step(trainer.dataloader[0])
    assert (trainer.adapter_probe() is not None) == probed

    def save_it() -> None:
        save_checkpoint(
            tmp_path / "model", encoder, trainer.accelerator, probe=trainer.adapter_probe()
        )

    save_it()
    merge(not_at_all)
    with pytest.raises(CheckpointError, match="it is the base model"):
        save_it()


@pytest.mark.parametrize("tower", ["text", "image"])
def test_a_wrong_merge_of_one_tower(tower, merge, tmp_path):
    trainer = make_trainer(family_path("composed"), "t2i", tmp_path, use_lora=True)
    encoder = learn(trainer.model)
    wrong = getattr(encoder, tower).backbone
    merge(lambda right, b: not_at_all(right, b) if b is wrong else right(b))
    with pytest.raises(CheckpointError, match="merging went wrong"):
        save_checkpoint(tmp_path / "model", encoder, trainer.accelerator)


@pytest.mark.parametrize("family", ["siglip2", "dinov3", "composed", "qwen2_5_vl"])
def test_half_precision_of_every_family(family, tmp_path):
    settings = {"use_lora": True, "torch_dtype": "bfloat16"}
    trainer = make_trainer(family_path(family), whole_mode(family), tmp_path, **settings)
    save_checkpoint(tmp_path / "model", learn(trainer.model), trainer.accelerator)


@pytest.mark.parametrize("probed", [True, False], ids=["a batch", "literal inputs"])
def test_token_vectors_of_roles_with_different_lengths(probed, merge, tmp_path):
    settings = {"use_lora": True, "pooling_method": "none", "loss_type": "maxsim"}
    mode, model = ("t2t", "bert") if probed else ("t2m", "qwen3_vl")
    trainer = make_trainer(family_path(model), mode, tmp_path, **settings)
    encoder = learn(trainer.model)
    probe = None
    if probed:
        trainer.prepare()
        trainer.step(trainer.dataloader[0])
        probe = trainer.adapter_probe()
        widths = {rows["input_ids"].shape[1] for rows in probe.inputs}
        assert len(widths) > 1

    def save_it() -> None:
        save_checkpoint(tmp_path / "model", encoder, trainer.accelerator, probe=probe)

    save_it()
    merge(without_one_layer)
    with pytest.raises(CheckpointError, match="merging went wrong"):
        save_it()


@pytest.mark.parametrize("scale", [2.0**127, 1.0], ids=["skipped", "taken"])
def test_a_step_that_the_gradient_scaler_skipped_is_none(scale, tmp_path):
    """Gradients overflow, as the first ones of fp16 may; the optimizer leaves weights alone."""
    trainer = make_trainer(family_path("bert"), "t2t", tmp_path, use_lora=True)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.prepare()
    optimizer_step(trainer, [trainer.dataloader[0]])
    skipped = trainer.accelerator.optimizer_step_was_skipped
    assert skipped == (scale > 1)
    assert trainer.adapter_probe().updated != skipped
    save_checkpoint(
        tmp_path / "model", trainer.model, trainer.accelerator, probe=trainer.adapter_probe()
    )
