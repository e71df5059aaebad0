"""Cached = plain: the same gradient however the batch was cut (float64, <= 1e-12)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vembed.losses.late_interaction import MaxSimInfoNCE
from vembed.training import gradient_cache
from vembed.training.gradient_cache import GradientCache
from vembed.training.objective import Embeddings, StepLoss

TOLERANCE = 1e-12


class ToyEncoder(nn.Module):
    """Token embeddings, dropout, a layer, the mean over real tokens."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 8)
        self.dropout = nn.Dropout(dropout)
        self.layer = nn.Linear(8, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.dropout(self.tokens(input_ids))))
        mask = attention_mask.unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)


def contrastive(scale: Tensor):
    def objective(embeddings: Embeddings) -> StepLoss:
        unit = {role: nn.functional.normalize(e, dim=-1) for role, e in embeddings.items()}
        candidates = torch.cat([unit["positive"], unit["negative"]])
        logits = unit["query"] @ candidates.T * scale.exp()
        loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)))
        return StepLoss(loss, {"task": loss.detach()})

    return objective


def batch(rows: int = 7, seed: int = 0) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)
    inputs, lengths = {}, {}
    for role, count in (("query", rows), ("positive", rows), ("negative", 3)):
        of_role = torch.randint(1, 12, (count,), generator=generator)
        ids = torch.randint(0, 50, (count, int(of_role.max())), generator=generator)
        mask = (torch.arange(ids.shape[1]) < of_role.unsqueeze(1)).long()
        inputs[role] = {"input_ids": ids, "attention_mask": mask}
        lengths[role] = of_role.tolist()
    return inputs, lengths


def gradients(cache: GradientCache, encoder: nn.Module, seed: int = 1) -> list[Tensor]:
    inputs, lengths = batch()
    scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    encoder.zero_grad()
    torch.manual_seed(seed)
    cache.backward(
        encode=lambda inputs: encoder(**inputs),
        inputs=inputs,
        lengths=lengths,
        objective=contrastive(scale),
        backward=torch.Tensor.backward,
    )
    return [*(p.grad.clone() for p in encoder.parameters()), scale.grad]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("keep", [True, False])
def test_any_chunking_gives_the_gradient_of_one_graph(double, chunk_size, keep):
    torch.manual_seed(0)
    encoder = ToyEncoder()
    inputs, _ = batch()
    scale = nn.Parameter(torch.tensor(1.0))
    embeddings = {role: encoder(**of_role) for role, of_role in inputs.items()}
    contrastive(scale)(embeddings).total.backward()
    expected = [*(p.grad.clone() for p in encoder.parameters()), scale.grad]

    actual = gradients(GradientCache(chunk_size=chunk_size, keep="all" if keep else 0), encoder)

    assert difference(expected, actual) <= TOLERANCE


@pytest.mark.parametrize("plan", [{"chunk_size": 2}, {"chunk_tokens": 16}])
def test_recomputed_chunks_draw_the_masks_of_the_first_pass(double, plan):
    torch.manual_seed(0)
    encoder = ToyEncoder(dropout=0.3)
    kept = gradients(GradientCache(**plan, keep="all"), encoder)
    recomputed = gradients(GradientCache(**plan), encoder)
    assert difference(kept, recomputed) <= TOLERANCE


def test_without_replay_the_gradient_is_visibly_wrong(double, monkeypatch):
    torch.manual_seed(0)
    encoder = ToyEncoder(dropout=0.3)
    kept = gradients(GradientCache(chunk_size=2, keep="all"), encoder)
    monkeypatch.setattr(gradient_cache.RandomState, "restore", lambda self: None)
    recomputed = gradients(GradientCache(chunk_size=2), encoder)
    assert difference(kept, recomputed) > 1e-3


def test_random_state_goes_on_as_if_nothing_was_recomputed(double):
    encoder = ToyEncoder(dropout=0.3)
    draws = []
    for keep in (True, False):
        gradients(GradientCache(chunk_size=2, keep="all" if keep else 0), encoder)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_backward_scales_once(double):
    """Loss scaling and any divisor reach the encoder through the embeddings, not a second time."""
    torch.manual_seed(0)
    encoder = ToyEncoder()
    plain = gradients(GradientCache(chunk_size=2), encoder)
    inputs, lengths = batch()
    encoder.zero_grad()
    GradientCache(chunk_size=2).backward(
        encode=lambda inputs: encoder(**inputs),
        inputs=inputs,
        lengths=lengths,
        objective=contrastive(torch.tensor(1.0)),
        backward=lambda loss: (loss * 8).backward(),
    )
    scaled = [p.grad / 8 for p in encoder.parameters()]
    assert difference(plain[:-1], scaled) <= TOLERANCE


def test_a_role_that_the_loss_ignores_and_a_frozen_encoder_are_fine(double):
    encoder = ToyEncoder()
    inputs, lengths = batch()

    def only_queries(embeddings: Embeddings) -> StepLoss:
        loss = embeddings["query"].square().sum()
        return StepLoss(loss, {"task": loss.detach()})

    for keep in (True, False):
        cache = GradientCache(chunk_size=2, keep="all" if keep else 0)
        cache.backward(
            encode=lambda inputs: encoder(**inputs),
            inputs=inputs,
            lengths=lengths,
            objective=only_queries,
            backward=torch.Tensor.backward,
        )
        assert encoder.layer.weight.grad.abs().sum() > 0
        encoder.zero_grad()

    encoder.requires_grad_(False)
    scale = nn.Parameter(torch.tensor(1.0))
    GradientCache(chunk_size=2).backward(
        encode=lambda inputs: encoder(**inputs),
        inputs=inputs,
        lengths=lengths,
        objective=contrastive(scale),
        backward=torch.Tensor.backward,
    )
    assert scale.grad.abs() > 0


@pytest.mark.parametrize("keep", [0, 1, 2, 5, "all", "auto"])
def test_any_number_of_kept_chunks_gives_the_same_gradient(double, keep):
    torch.manual_seed(0)
    encoder = ToyEncoder(dropout=0.3)
    all_kept = gradients(GradientCache(chunk_size=2, keep="all"), encoder)
    assert (
        difference(all_kept, gradients(GradientCache(chunk_size=2, keep=keep), encoder))
        <= TOLERANCE
    )


def count_forwards(cache: GradientCache, encoder: nn.Module) -> tuple[int, int]:
    """Forward passes with and without a graph in one step."""
    inputs, lengths = batch()
    seen = []

    def encode(inputs):
        seen.append(torch.is_grad_enabled())
        return encoder(**inputs)

    cache.backward(
        encode=encode,
        inputs=inputs,
        lengths=lengths,
        objective=contrastive(torch.tensor(1.0)),
        backward=torch.Tensor.backward,
    )
    return seen.count(True), seen.count(False)


def test_kept_chunks_are_encoded_once_and_others_twice(double):
    # 7 + 7 + 3 rows in chunks of at most 100 items: however many chunks, each has a forward with a
    # graph; those not kept have one without before.
    plans = GradientCache(chunk_size=2).plan(*batch())
    total = len(plans)
    assert total > 8
    for keep in (0, 3, "all"):
        kept = total if keep == "all" else keep
        counts = count_forwards(GradientCache(chunk_size=2, keep=keep), ToyEncoder())
        assert counts == (total, total - kept)


def test_auto_keeps_what_fits(double, monkeypatch):
    cache = GradientCache(chunk_size=2, keep="auto", memory_share=0.5)
    count_forwards(cache, ToyEncoder())
    plans = cache.plan(*batch())
    needed = [cache._bytes_per_token[p.role] * p.padded_tokens for p in plans]
    assert min(needed) > 0
    # Half of this is room for the first three chunks and no more.
    monkeypatch.setattr(
        gradient_cache, "available_bytes", lambda device, processes: 2 * sum(needed[:3]) + 1
    )
    cache._budget = None
    with_graph, without = count_forwards(cache, ToyEncoder())
    probes = 3  # the longest item of each role, measured again
    assert (with_graph - probes, without) == (len(plans), len(plans) - 3)


class OutOfMemory:
    """An encoder that has memory for so many padded tokens at once."""

    def __init__(self, encoder: nn.Module, tokens: int) -> None:
        self.encoder = encoder
        self.tokens = tokens

    def __call__(self, inputs):
        if inputs["input_ids"].numel() > self.tokens:
            raise torch.OutOfMemoryError("simulated")
        return self.encoder(**inputs)


def cached_with_limit(encoder: nn.Module, tokens: int, **settings) -> tuple[list[Tensor], int]:
    inputs, lengths = batch()
    scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    encoder.zero_grad()
    torch.manual_seed(1)
    cache = GradientCache(chunk_size="auto", **settings)
    cache.backward(
        encode=OutOfMemory(encoder, tokens),
        inputs=inputs,
        lengths=lengths,
        objective=contrastive(scale),
        backward=torch.Tensor.backward,
    )
    return [*(p.grad.clone() for p in encoder.parameters()), scale.grad], cache.chunk_tokens


def test_out_of_memory_in_the_first_pass_backs_off_and_changes_no_gradient(double):
    torch.manual_seed(0)
    encoder = ToyEncoder()
    expected, _ = cached_with_limit(encoder, tokens=10**9)
    actual, tokens = cached_with_limit(encoder, tokens=20, chunk_tokens=80)
    assert tokens <= 20
    assert difference(expected, actual) <= TOLERANCE


def test_one_item_that_does_not_fit_says_what_to_do(double):
    with pytest.raises(torch.OutOfMemoryError, match="max_seq_length"):
        cached_with_limit(ToyEncoder(), tokens=3, chunk_tokens=80)


class TokenEncoder(ToyEncoder):
    """A vector of length one for each token, zeros at padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.dropout(self.tokens(input_ids))))
        unit = nn.functional.normalize(hidden, dim=-1)
        return unit.masked_fill(attention_mask.unsqueeze(-1) == 0, 0)


@pytest.mark.parametrize("chunk_size", [1, 2, 7])
@pytest.mark.parametrize("keep", [0, 2, "all"])
def test_token_vectors_of_any_width(chunk_size, keep, double):
    torch.manual_seed(0)
    encoder = TokenEncoder(dropout=0.0)
    criterion = MaxSimInfoNCE(temperature=0.2)
    inputs, lengths = batch()

    def objective(embeddings: Embeddings) -> StepLoss:
        widths = {role: vectors.shape[1] for role, vectors in embeddings.items()}
        assert widths == {role: max(of_role) for role, of_role in lengths.items()}
        loss = criterion(**embeddings)
        return StepLoss(loss, {"task": loss.detach()})

    def step(cache: GradientCache) -> list[Tensor]:
        encoder.zero_grad()
        cache.backward(
            encode=lambda inputs: encoder(**inputs),
            inputs=inputs,
            lengths=lengths,
            objective=objective,
            backward=torch.Tensor.backward,
        )
        return [p.grad.clone() for p in encoder.parameters()]

    encoder.zero_grad()
    objective({role: encoder(**of_role) for role, of_role in inputs.items()}).total.backward()
    whole = [p.grad.clone() for p in encoder.parameters()]
    cut = step(GradientCache(chunk_size=chunk_size, keep=keep))
    assert difference(cut, whole) <= TOLERANCE
    assert max(float(grad.abs().max()) for grad in whole) > 1e-3
