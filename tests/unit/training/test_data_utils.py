from __future__ import annotations

import pytest
import torch

from vembed.training.data_utils import (
    concat_batches,
    maybe_first,
    row_lengths,
    unpack_extras,
    unpack_positive_batch,
    unpack_query_batch,
    unpack_roles,
)

TEXT_BATCH = {
    "query_input_ids": torch.tensor([[1, 2]]),
    "query_attention_mask": torch.tensor([[1, 1]]),
    "positive_input_ids": torch.tensor([[3, 4, 5]]),
    "positive_attention_mask": torch.tensor([[1, 1, 0]]),
    "ids_query": torch.tensor([7]),
    "lengths_positive": [2],
    "teacher_scores": torch.tensor([[1.0]]),
    "teacher_query_input_ids": torch.tensor([[9]]),
}


def test_unpack_strips_the_prefix_of_the_role():
    query = unpack_query_batch(TEXT_BATCH, retrieval_mode="t2t")
    assert set(query) == {"input_ids", "attention_mask"}
    assert query["input_ids"].tolist() == [[1, 2]]
    positive = unpack_positive_batch(TEXT_BATCH, retrieval_mode="t2t")
    assert positive["input_ids"].tolist() == [[3, 4, 5]]


def test_short_prefix_is_understood():
    batch = {"query_input_ids": torch.ones(1, 1), "pos_pixel_values": torch.ones(1, 3, 2, 2)}
    assert set(unpack_positive_batch(batch, "t2i")) == {"pixel_values"}


def test_a_text_side_gives_no_pixels_and_an_image_side_needs_them():
    batch = {"query_input_ids": torch.ones(1, 1), "query_pixel_values": torch.ones(1, 3, 2, 2)}
    assert set(unpack_query_batch(batch, "t2t")) == {"input_ids"}
    assert set(unpack_query_batch(batch, "m2t")) == {"input_ids", "pixel_values"}
    with pytest.raises(KeyError, match="query_pixel_values"):
        unpack_query_batch(TEXT_BATCH, "i2t")


def test_roles_that_the_batch_lacks_are_left_out():
    assert set(unpack_roles(TEXT_BATCH, "t2t")) == {"query", "positive"}
    labelled = {"query_input_ids": torch.ones(2, 3), "labels": torch.tensor([0, 1])}
    assert set(unpack_roles(labelled, "t2t")) == {"query"}


def test_extras_are_what_is_not_an_input():
    assert set(unpack_extras(TEXT_BATCH)) == {"ids_query", "lengths_positive", "teacher_scores"}


def test_lengths_come_from_the_collator_or_from_the_mask():
    roles = unpack_roles(TEXT_BATCH, "t2t")
    assert row_lengths(TEXT_BATCH, roles) == {"query": [2], "positive": [2]}
    images = {"pixel_values": torch.ones(2, 3, 32, 32)}
    assert row_lengths({}, {"query": images}) == {"query": [4, 4]}


def test_concat_pads_tokens_and_reports_sizes():
    a = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1]])}
    b = {"input_ids": torch.tensor([[3], [4]]), "attention_mask": torch.tensor([[1], [1]])}
    stacked, sizes = concat_batches([a, b], pad_token_id=9)
    assert sizes == [1, 2]
    assert stacked["input_ids"].tolist() == [[1, 2], [3, 9], [4, 9]]
    assert stacked["attention_mask"].tolist() == [[1, 1], [1, 0], [1, 0]]


def test_concat_counts_items_and_not_patches():
    ids, mask = torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64)
    image = {
        "pixel_values": torch.ones(8, 5),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
        "input_ids": ids,
        "attention_mask": mask,
    }
    stacked, sizes = concat_batches([image, image])
    assert sizes == [1, 1]
    assert stacked["pixel_values"].shape == (16, 5)


def test_concat_refuses_different_keys_and_nothing():
    with pytest.raises(ValueError, match="same keys"):
        concat_batches([{"a": torch.ones(1)}, {"b": torch.ones(1)}])
    with pytest.raises(ValueError, match="at least one"):
        concat_batches([])


def test_maybe_first():
    tensor = torch.ones(2, 3)
    assert maybe_first(tensor) is tensor
    assert maybe_first((tensor, None)) is tensor
    with pytest.raises(TypeError, match="str"):
        maybe_first("no tensor")
