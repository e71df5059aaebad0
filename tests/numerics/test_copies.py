"""Identical items are encoded once, and the gradient is that of encoding each (float64, 1e-12)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.numerics.test_gradient_cache import ToyEncoder, contrastive, difference
from vembed.training.copies import Copies, CopiesOf
from vembed.training.gradient_cache import GradientCache

TOLERANCE = 1e-12
KEYS = {
    "query": [0, 1, 0, 2, 3, 0],
    "positive": [4, 5, 6, 4, 5, 7],
    # The first two are positives of other rows; the last is a copy of the third.
    "negative": [7, 5, 8, 8],
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class TokenEncoder(ToyEncoder):
    """A vector for each token, zeros where there is none."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.dropout(self.tokens(input_ids))))
        return hidden * attention_mask.unsqueeze(-1)


def batch() -> tuple[dict, dict]:
    """Rows of one key have the same tokens; each role is padded to its own longest row."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(1, 12, (9,), generator=generator).tolist()
    items = [torch.randint(0, 50, (size,), generator=generator) for size in sizes]
    inputs, lengths = {}, {}
    for role, keys in KEYS.items():
        lengths[role] = [sizes[key] for key in keys]
        ids = nn.utils.rnn.pad_sequence([items[key] for key in keys], batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor(lengths[role]).unsqueeze(1)
        inputs[role] = {"input_ids": ids, "attention_mask": mask.long()}
    return inputs, lengths


def of_tokens(embeddings):
    """A loss that no padding changes: of the sum of each item's token vectors."""
    return contrastive(torch.tensor(1.0))({role: e.sum(1) for role, e in embeddings.items()})


def gradients(cache: GradientCache, encoder: nn.Module, *, keys=None, objective=None):
    inputs, lengths = batch()
    counts = []

    def encode(inputs):
        counts.append(len(inputs["input_ids"]))
        return encoder(**inputs)

    encoder.zero_grad()
    torch.manual_seed(1)
    cache.backward(
        encode=encode,
        inputs=inputs,
        lengths=lengths,
        keys=keys,
        objective=objective or contrastive(torch.tensor(1.0)),
        backward=torch.Tensor.backward,
    )
    return [p.grad.clone() for p in encoder.parameters()], sum(counts)


@pytest.mark.parametrize("plan", [{}, {"chunk_size": 1}, {"chunk_size": 2}, {"chunk_tokens": 16}])
@pytest.mark.parametrize("keep", [0, 1, "all"])
def test_the_gradient_is_that_of_encoding_every_copy(plan, keep):
    torch.manual_seed(0)
    encoder = ToyEncoder()
    expected, _ = gradients(GradientCache(keep="all"), encoder)
    actual, _ = gradients(GradientCache(**plan, keep=keep), encoder, keys=KEYS)
    assert difference(expected, actual) <= TOLERANCE


def test_wrong_keys_give_another_gradient():
    torch.manual_seed(0)
    encoder = ToyEncoder()
    expected, _ = gradients(GradientCache(keep="all"), encoder)
    wrong = {**KEYS, "negative": [7, 5, 8, 4]}
    assert difference(expected, gradients(GradientCache(keep="all"), encoder, keys=wrong)[0]) > 1e-3


def test_token_vectors_of_roles_with_other_widths():
    torch.manual_seed(0)
    encoder = TokenEncoder()
    expected, _ = gradients(GradientCache(keep="all"), encoder, objective=of_tokens)
    cache = GradientCache(chunk_size=2)
    actual, _ = gradients(cache, encoder, objective=of_tokens, keys=KEYS)
    assert difference(expected, actual) <= TOLERANCE


def test_every_input_is_encoded_once():
    encoder = ToyEncoder()
    assert gradients(GradientCache(keep="all"), encoder)[1] == 16
    assert gradients(GradientCache(keep="all"), encoder, keys=KEYS)[1] == 9
    inputs, lengths = batch()
    embeddings = GradientCache(chunk_size=2).embed(
        encode=lambda inputs: encoder(**inputs), inputs=inputs, lengths=lengths, keys=KEYS
    )
    for role, of_role in inputs.items():
        assert torch.allclose(embeddings[role], encoder(**of_role), atol=TOLERANCE)


def test_copies_share_a_dropout_mask_but_never_a_query_and_a_document():
    torch.manual_seed(0)
    encoder = ToyEncoder(dropout=0.5)
    seen = {}

    def objective(embeddings):
        seen.update({role: e.detach() for role, e in embeddings.items()})
        return contrastive(torch.tensor(1.0))(embeddings)

    kept, _ = gradients(GradientCache(keep="all"), encoder, keys=KEYS, objective=objective)
    assert torch.equal(seen["query"][0], seen["query"][2])
    assert torch.equal(seen["positive"][1], seen["negative"][1])
    recomputed, _ = gradients(GradientCache(), encoder, keys=KEYS, objective=objective)
    assert difference(kept, recomputed) <= TOLERANCE


def test_copies_are_added_up_in_rounds_without_a_row_twice():
    lengths = {role: [1] * len(keys) for role, keys in KEYS.items()}
    copies = Copies.find(lengths, KEYS)
    assert copies.encoded == {"query": [0, 1, 3, 4], "positive": [0, 1, 2, 5], "negative": [2]}
    assert list(copies.rounds("query", [0, 1])) == [
        CopiesOf("query", [2], [0]),
        CopiesOf("query", [5], [0]),
    ]
    assert list(copies.rounds("positive", [5, 1])) == [
        CopiesOf("negative", [0], [0]),
        CopiesOf("positive", [4], [1]),
        CopiesOf("negative", [1], [1]),
    ]
    assert list(Copies.find(lengths, {}).rounds("query", [0, 2])) == []
