from __future__ import annotations

from typing import get_args

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

from vembed.config import PoolingMethod
from vembed.errors import ConfigError
from vembed.models.checkpoint_format import NO_POOLING, OWN_POOLING, POOLING_NAMES
from vembed.models.pooling import POOLINGS, check_pooling_method, pool

# One full row, one row of a single token, one in between; padded on the right.
RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
LEFT = RIGHT.flip(1)


def hidden_states(dtype=torch.float32):
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def moved_left(hidden):
    """The same real tokens in the same order, with the padding in front of them."""
    rows = zip(hidden, RIGHT.sum(1).tolist(), strict=True)
    return torch.stack([row.roll(5 - length, dims=0) for row, length in rows])


@pytest.mark.parametrize("theirs", POOLING_NAMES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_agrees_with_sentence_transformers(theirs, side):
    hidden = hidden_states() if side == "right" else moved_left(hidden_states())
    mask = RIGHT if side == "right" else LEFT
    features = {"token_embeddings": hidden, "attention_mask": mask}
    expected = Pooling(8, pooling_mode=theirs)(features)["sentence_embedding"]

    torch.testing.assert_close(pool(POOLING_NAMES[theirs], hidden, mask), expected)


@pytest.mark.parametrize("method", POOLINGS)
def test_padding_side_changes_nothing(method):
    hidden = hidden_states()
    torch.testing.assert_close(pool(method, hidden, RIGHT), pool(method, moved_left(hidden), LEFT))


@pytest.mark.parametrize("method", POOLINGS)
@pytest.mark.parametrize("junk", [1e6, float("nan"), float("inf")])
def test_what_stands_at_padding_reaches_neither_result_nor_gradient(method, junk):
    clean = hidden_states().requires_grad_()
    dirty = torch.where(RIGHT.bool().unsqueeze(-1), hidden_states(), junk).requires_grad_()

    pool(method, clean, RIGHT).square().sum().backward()
    pool(method, dirty, RIGHT).square().sum().backward()

    torch.testing.assert_close(pool(method, dirty, RIGHT), pool(method, clean, RIGHT))
    torch.testing.assert_close(dirty.grad, clean.grad)


@pytest.mark.parametrize("method", POOLINGS)
def test_half_precision_is_summed_in_float32(method):
    hidden = hidden_states(torch.bfloat16)
    pooled = pool(method, hidden, RIGHT)

    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, pool(method, hidden.float(), RIGHT), rtol=1e-6, atol=1e-6)


def test_double_precision_stays_double():
    assert pool("mean", hidden_states(torch.float64), RIGHT).dtype == torch.float64


def test_the_configuration_offers_exactly_these():
    assert set(get_args(PoolingMethod)) == {*POOLINGS, OWN_POOLING, NO_POOLING}
    assert set(POOLINGS) == set(POOLING_NAMES.values())


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'last_token'"):
        check_pooling_method("lasttoken")
