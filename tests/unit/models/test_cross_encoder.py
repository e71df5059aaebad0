"""Cross-encoders as teachers: a pair of any length has a score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny import tiny_cross_encoder
from vembed.models.cross_encoder import CrossEncoder

LONG = ("a query", "the sun " * 100)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_pairs_longer_than_the_position_table_are_cut_to_it(tmp_path, family):
    """RoBERTa counts positions from behind its padding index: two rows of the table are no use."""
    path = tiny_cross_encoder(tmp_path, family=family, max_length=10**9)
    model = CrossEncoder(str(path))
    scores = model.score([LONG, ("a query", "the sun")], chunk_tokens=64)
    assert np.isfinite(scores).all()
    first = 0 if family == "Bert" else model.model.config.pad_token_id + 1
    inputs = model.tokenizer(*LONG, truncation=True, max_length=64 - first, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 64 - first
    with torch.no_grad():
        assert scores[0] == pytest.approx(float(model.model(**inputs).logits), abs=1e-6)


def test_how_pairs_are_chunked_changes_no_score(tmp_path):
    model = CrossEncoder(str(tiny_cross_encoder(tmp_path)))
    pairs = [LONG, ("a query", "the sun"), ("the sun", "a")]
    whole, one_by_one = (model.score(pairs, chunk_tokens=n) for n in (10_000, 1))
    np.testing.assert_allclose(whole, one_by_one, rtol=0, atol=1e-6)
