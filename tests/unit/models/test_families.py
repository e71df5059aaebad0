"""What holds for every model: one battery over all families and modes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from tests.unit.models.families import (
    FAMILY_MODALITY,
    FAMILY_MODE,
    FLOAT32_INSIDE,
    MODALITIES,
    TELLING_MODES,
    family_path,
    gradients,
    items,
    load,
    make_trainer,
    vectors,
)
from vembed.chunking import count_rows, count_tokens, padded_length
from vembed.training.data_utils import unpack_roles

FAMILIES = list(MODALITIES)


@pytest.fixture(scope="module")
def encoders():
    """Every family, loaded once, for tests that change nothing."""
    return {family: load(family_path(family)) for family in FAMILIES}


@pytest.mark.parametrize(("family", "letter"), FAMILY_MODALITY)
def test_the_batch_changes_no_vector(family, letter, encoders):
    encoder = encoders[family]
    together = vectors(encoder, items(letter))
    alone = np.concatenate([vectors(encoder, [item]) for item in items(letter)])

    assert together.shape == (4, encoder.embedding_dim)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert (together @ together.T - np.eye(4)).max() < 0.9999, "two items have the same vector"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [f for f, letters in MODALITIES.items() if "t" in letters])
def test_the_side_that_a_tokenizer_pads_on_changes_no_vector(family, side, encoders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(family_path(family), folder)
    written = list(folder.rglob("tokenizer_config.json"))
    for file in written:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": side}))
    encoder = load(folder)
    for letter in sorted({"t", "m"} & set(MODALITIES[family])):
        alone = np.concatenate([vectors(encoders[family], [item]) for item in items(letter)])
        np.testing.assert_allclose(vectors(encoder, items(letter)), alone, atol=1e-6)
    assert written


@pytest.mark.parametrize(("family", "letter"), FAMILY_MODALITY)
def test_a_vector_is_the_same_every_time_and_draws_no_random_number(family, letter, encoders):
    before = torch.get_rng_state()
    first, second = (vectors(encoders[family], items(letter)) for _ in range(2))
    assert np.array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_embeds_is_what_it_says(family, encoders):
    assert encoders[family].modalities == frozenset(MODALITIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_what_was_saved_changes_no_file(family, encoders, tmp_path):
    encoders[family].save_pretrained(tmp_path / "one")
    vectors(encoders[family], items(MODALITIES[family][0]))
    load(tmp_path / "one").save_pretrained(tmp_path / "two")

    files = [f.relative_to(tmp_path / "one") for f in (tmp_path / "one").rglob("*") if f.is_file()]
    assert len(files) > 5
    for file in files:
        one, two = ((tmp_path / folder / file).read_bytes() for folder in ("one", "two"))
        assert one == two, file


@pytest.mark.parametrize(("family", "mode"), FAMILY_MODE)
def test_three_steps_then_saved_and_loaded_the_vectors_are_equal(family, mode, tmp_path):
    trainer = make_trainer(family_path(family), mode, tmp_path)
    encoder, letters = trainer.model, sorted({mode[0], mode[2]})
    before = {letter: vectors(encoder, items(letter)) for letter in letters}

    history = trainer.train().history

    assert history[-1]["loss"] < history[0]["loss"]
    again = load(tmp_path / "final")
    for letter in letters:
        after = vectors(encoder, items(letter))
        assert np.abs(after - before[letter]).max() > 1e-4, "training must change the vectors"
        np.testing.assert_allclose(vectors(again, items(letter)), after, atol=1e-6)


@pytest.mark.parametrize(("family", "mode"), TELLING_MODES)
def test_cached_gradients_are_the_plain_ones(family, mode, tmp_path):
    """And every trainable parameter has one: what the mode leaves unused is frozen."""
    path = family_path(family)
    plain = gradients(make_trainer(path, mode, tmp_path))
    cached = gradients(
        make_trainer(path, mode, tmp_path, use_gradient_cache=True, gradient_cache_chunk_size=3)
    )

    assert plain.keys() == cached.keys()
    tolerance = 1e-5 if family in FLOAT32_INSIDE else 1e-12
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in plain.items():
        assert float((gradient - cached[name]).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family, tmp_path):
    mode = f"{MODALITIES[family][-1]}2{MODALITIES[family][0]}"
    plain = gradients(make_trainer(family_path(family), mode, tmp_path))
    trainer = make_trainer(family_path(family), mode, tmp_path, gradient_checkpointing=True)
    assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules())
    recomputed = gradients(trainer)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_train_and_are_merged_into_what_is_saved(family, tmp_path):
    mode = f"{MODALITIES[family][0]}2{MODALITIES[family][-1]}"
    trainer = make_trainer(family_path(family), mode, tmp_path, use_lora=True, lr=0.1)
    encoder = trainer.model
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    beside = (".lora_", ".modules_to_save.", "projections.")  # heads train as they are
    assert all(any(part in name for part in beside) for name in trained)
    trainer.train()
    letter = mode[2]
    trained = vectors(encoder, items(letter))
    assert np.abs(trained - vectors(load(family_path(family)), items(letter))).max() > 1e-5
    np.testing.assert_allclose(vectors(load(tmp_path / "final"), items(letter)), trained, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, encoders, tmp_path):
    mode = f"{MODALITIES[family][0]}2{MODALITIES[family][-1]}"
    rough = load(family_path(family), torch_dtype="bfloat16")
    for letter in MODALITIES[family]:
        exact = vectors(encoders[family], items(letter))
        assert 1e-5 < np.abs(vectors(rough, items(letter)) - exact).max() < 0.2
    trainer = make_trainer(family_path(family), mode, tmp_path, torch_dtype="bfloat16")
    assert all(np.isfinite(line["loss"]) for line in trainer.train().history)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_precision(family, encoders, tmp_path):
    letter = MODALITIES[family][-1]
    exact = vectors(encoders[family], items(letter))
    mixed = vectors(encoders[family], items(letter), autocast_dtype=torch.bfloat16)
    assert 1e-5 < np.abs(mixed - exact).max() < 0.2
    settings = {"use_gradient_cache": True, "gradient_cache_chunk_size": 3}
    mode = f"{MODALITIES[family][0]}2{letter}"
    trainer = make_trainer(family_path(family), mode, tmp_path, mixed_precision="bf16", **settings)
    history = trainer.train().history
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "composed"])
def test_vectors_of_another_size(family, tmp_path):
    letter = MODALITIES[family][0]
    trainer = make_trainer(
        family_path(family), f"{letter}2{letter}", tmp_path, projection_dim=12, lr=0.1
    )
    assert trainer.model.embedding_dim == 12
    trainer.train()
    trained = vectors(trainer.model, items(letter))
    again = load(tmp_path / "final")
    assert trained.shape == (4, 12)
    np.testing.assert_allclose(vectors(again, items(letter)), trained, atol=1e-6)
    assert load(tmp_path / "final", projection_dim=12).describe() == again.describe()


@pytest.mark.parametrize(("family", "mode"), [("clip", "i2i"), ("composed", "m2m"), ("vit", "i2i")])
def test_the_token_budget_cuts_images_in_training_as_in_evaluation(
    family, mode, tmp_path, monkeypatch
):
    trainer = make_trainer(family_path(family), mode, tmp_path, max_steps=1)
    (batch,) = trainer.dataloader
    inputs = unpack_roles(batch, mode)
    costs = {role: count_tokens(of_role) for role, of_role in inputs.items()}
    assert {role: batch[f"lengths_{role}"] for role in inputs} == costs
    budget = 2 * max(max(of_role) for of_role in costs.values())
    trainer = make_trainer(family_path(family), mode, tmp_path, max_steps=1, chunk_tokens=budget)
    chunks = []
    encode = trainer._embed
    monkeypatch.setattr(trainer, "_embed", lambda chunk: chunks.append(chunk) or encode(chunk))
    trainer.step(batch)
    assert sum(map(count_rows, chunks)) == 8
    assert all(count_rows(chunk) * padded_length(chunk) <= budget for chunk in chunks)
