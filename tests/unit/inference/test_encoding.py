from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny import PAIRS
from vembed.inference import encode_items, encoding
from vembed.models import load_encoder
from vembed.modes import Item

ITEMS = [Item(text=text) for pair in PAIRS for text in pair.values()]


@pytest.fixture(scope="module")
def encoder(tiny_bert_path):
    return load_encoder(str(tiny_bert_path))


@pytest.fixture
def forwards(encoder):
    """Shape of the token ids of each forward pass."""
    shapes = []
    hook = encoder.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    yield shapes
    hook.remove()


def test_input_order_and_values_do_not_depend_on_chunks_or_windows(encoder, monkeypatch):
    alone = np.concatenate([encode_items(encoder, [item], role="query") for item in ITEMS])
    for budget, most, window in [(4096, None, 8192), (40, None, 8192), (None, 5, 8192), (64, 3, 7)]:
        monkeypatch.setattr(encoding, "_WINDOW_ITEMS", window)
        together = encode_items(encoder, ITEMS, role="query", chunk_tokens=budget, max_items=most)
        np.testing.assert_allclose(together, alone, atol=1e-6)


def test_chunks_keep_to_the_budget_of_padded_tokens_and_items(encoder, forwards):
    encode_items(encoder, ITEMS, role="query", chunk_tokens=48, max_items=6)
    assert len(forwards) > 8
    assert all(rows <= 6 and (rows * width <= 48 or rows == 1) for rows, width in forwards)
    widths = [width for _, width in forwards]
    assert widths == sorted(widths, reverse=True)


def test_equal_items_are_encoded_once(encoder, forwards):
    repeated = [ITEMS[0], ITEMS[1], ITEMS[0], ITEMS[0]]
    vectors = encode_items(encoder, repeated, role="query")
    assert sum(rows for rows, _ in forwards) == 2
    assert np.array_equal(vectors[0], vectors[2])
    assert np.array_equal(vectors[0], vectors[3])
    assert not np.allclose(vectors[0], vectors[1])


def test_progress_counts_every_item(encoder):
    done = []
    encode_items(encoder, [*ITEMS, *ITEMS[:5]], role="query", max_items=4, progress=done.append)
    assert sum(done) == len(ITEMS) + 5
    assert len(done) >= len(ITEMS) / 4


def test_no_items_give_no_rows(encoder):
    assert encode_items(encoder, [], role="query").shape == (0, encoder.embedding_dim)


def test_result_is_float32_without_gradient_whatever_the_model_runs_in(encoder):
    exact = encode_items(encoder, ITEMS, role="query")
    rough = encode_items(encoder, ITEMS, role="query", autocast_dtype=torch.bfloat16)
    assert exact.dtype == rough.dtype == np.float32
    assert 1e-5 < np.abs(exact - rough).max() < 0.1


def test_modes_are_restored_one_by_one(encoder):
    encoder.train()
    encoder.backbone.embeddings.eval()
    before = [module.training for module in encoder.modules()]

    first = encode_items(encoder, ITEMS[:3], role="query")
    second = encode_items(encoder, ITEMS[:3], role="query")

    assert [module.training for module in encoder.modules()] == before
    assert len(set(before)) == 2
    assert np.array_equal(first, second), "dropout must be off"
    encoder.eval()


def test_modes_are_restored_after_an_error(encoder):
    encoder.train()
    with pytest.raises(ValueError, match="text is expected"):
        encode_items(encoder, [Item()], role="query")
    assert encoder.training
    encoder.eval()


def test_random_state_is_left_alone(encoder):
    before = torch.get_rng_state()
    encode_items(encoder, ITEMS[:3], role="query")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prompt_replaces_that_of_the_role(tiny_st_path):
    encoder = load_encoder(str(tiny_st_path))
    item, prompted = Item(text="a dog"), Item(text="find a dog")
    plain = encode_items(encoder, [item], role="query", prompt="")
    assert not np.allclose(plain, encode_items(encoder, [item], role="query"))
    np.testing.assert_allclose(
        encode_items(encoder, [item], role="query", prompt="find "),
        encode_items(encoder, [prompted], role="query", prompt=""),
        atol=1e-6,
    )
