from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vembed.chunking import (
    chunk_tokens_on,
    count_rows,
    count_tokens,
    plan_chunks,
    take_rows,
)

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


@given(LENGTHS, st.none() | st.integers(1, 20), st.none() | st.integers(1, 500))
def test_every_row_is_in_one_chunk_and_every_chunk_within_its_budget(lengths, items, tokens):
    chunks = plan_chunks(lengths, max_items=items, max_tokens=tokens)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        assert items is None or len(chunk) <= items
        padded = len(chunk) * max(lengths[row] for row in chunk)
        assert tokens is None or padded <= tokens or len(chunk) == 1


@pytest.mark.parametrize(
    ("device", "given", "tokens"),
    [("cpu", None, 2048), ("cuda", None, 4096), ("cpu", 64, 64), ("cuda", 10_000, 10_000)],
)
def test_a_cpu_takes_smaller_chunks_unless_told(device, given, tokens):
    assert chunk_tokens_on(device, given) == tokens


@given(LENGTHS)
def test_the_longest_come_first_and_ties_keep_their_order(lengths):
    order = [row for chunk in plan_chunks(lengths, max_tokens=64) for row in chunk]
    assert order == sorted(range(len(lengths)), key=lambda row: -lengths[row])


def cost(lengths: list[int], chunks: list[list[int]], overhead: int) -> int:
    return sum(len(c) * max(lengths[row] for row in c) + overhead for c in chunks)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(1, 30))
def test_no_other_cut_of_the_sorted_sequences_costs_less(lengths, overhead):
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    cuts = [
        [order[i:j] for i, j in zip((0, *where), (*where, len(order)), strict=True)]
        for count in range(len(order))
        for where in combinations(range(1, len(order)), count)
    ]
    planned = cost(lengths, plan_chunks(lengths, overhead=overhead), overhead)
    assert planned == min(cost(lengths, chunks, overhead) for chunks in cuts)


def test_a_large_overhead_makes_one_chunk_and_a_small_one_many():
    lengths = [50, 10, 9, 8]
    assert plan_chunks(lengths, overhead=1000) == [[0, 1, 2, 3]]
    assert plan_chunks(lengths, overhead=5) == [[0], [1, 2, 3]]
    assert plan_chunks([], overhead=5) == []


def padded(rows: list[list[int]], left: bool) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = [[0] * (width - len(r)) + r if left else r + [0] * (width - len(r)) for r in rows]
    mask = [[int(token > 0) for token in row] for row in ids]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def test_rows_are_cut_to_their_longest_on_either_side():
    rows = [[1, 2, 3, 4], [5], [6, 7]]
    for left in (False, True):
        taken = take_rows(padded(rows, left), [2, 1])
        expected = padded([[6, 7], [5]], left)
        assert torch.equal(taken["input_ids"], expected["input_ids"])
        assert torch.equal(taken["attention_mask"], expected["attention_mask"])
        known = take_rows(padded(rows, left), [2, 1], longest=2)
        assert torch.equal(known["input_ids"], expected["input_ids"])


def test_inputs_without_a_mask_or_of_other_shape_are_only_indexed():
    images = {"pixel_values": torch.arange(12).reshape(3, 2, 2)}
    assert torch.equal(take_rows(images, [2])["pixel_values"], images["pixel_values"][2:])
    both = {**padded([[1, 2, 3], [4]], left=False), "pixel_values": torch.ones(2, 3, 5)}
    assert take_rows(both, [1])["pixel_values"].shape == (1, 3, 5)


def flat_patches() -> dict[str, torch.Tensor]:
    """Three items with images of 4, 8 and 4 patches, the n-th patch being full of n."""
    grids = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 2, 2]])
    return {
        "pixel_values": torch.arange(16.0).repeat_interleave(5).reshape(16, 5),
        "image_grid_thw": grids,
        **padded([[1, 2, 3], [4, 5], [6]], left=True),
    }


def test_patches_follow_their_item():
    inputs = flat_patches()
    taken = take_rows(inputs, [2, 1])
    assert taken["pixel_values"][:, 0].tolist() == [12, 13, 14, 15, 4, 5, 6, 7, 8, 9, 10, 11]
    assert taken["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 4]]
    assert taken["input_ids"].tolist() == [[0, 6], [4, 5]]
    assert (count_rows(inputs), count_rows(taken)) == (3, 2)


def test_an_item_without_its_image_is_refused():
    inputs = flat_patches() | {"image_grid_thw": torch.tensor([[1, 2, 2]])}
    with pytest.raises(ValueError, match="1 images for 3 items"):
        take_rows(inputs, [0])


def test_what_items_cost():
    text = padded([[1, 2, 3], [4]], left=False)
    photos = {"pixel_values": torch.ones(2, 3, 32, 48)}
    assert count_tokens(text) == [3, 1]
    assert count_tokens(photos) == [6, 6]
    assert count_tokens({**text, **photos}) == [9, 7]
    assert count_tokens({"input_ids": torch.ones(2, 64)}) == [64, 64]
    assert count_tokens({"pixel_values": torch.ones(2, 5, 3, 32, 48)}) == [30, 30]
    cut_up = {"pixel_values": torch.ones(2, 9, 48), "spatial_shapes": torch.ones(2, 2)}
    assert count_tokens(cut_up) == [9, 9]
    assert count_tokens(flat_patches()) == [3, 2, 1]


def test_texts_beside_images_are_cut_to_the_longest_text_whatever_the_item_costs():
    inputs = {**padded([[1, 2, 3], [4, 5]], left=False), "pixel_values": torch.ones(2, 3, 16, 32)}
    for longest in (None, count_tokens(inputs)[1]):
        taken = take_rows(inputs, [1], longest)
        assert taken["input_ids"].tolist() == [[4, 5]]


def test_facts_about_images_are_not_taken_for_tokens():
    inputs = {**padded([[1, 2], [3]], left=False), "spatial_shapes": torch.tensor([[1, 2], [3, 4]])}
    assert take_rows(inputs, [1])["spatial_shapes"].tolist() == [[3, 4]]
