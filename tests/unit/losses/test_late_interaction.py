"""What is special about MaxSim: padding, items without tokens, tiles of tokens, what fits it."""

from __future__ import annotations

import pytest
import torch

from tests.unit.losses.conformance import EMBEDDINGS, EXACT, evaluate, make_tokens, take_queries
from vembed import config
from vembed.errors import ConfigError
from vembed.losses import LOSSES, build_criterion, check_embeddings, comparison, tiling
from vembed.losses.comparison import MaxSim
from vembed.registry import resolve
from vembed.token_vectors import pad_tokens, real_tokens

SETTINGS = {"bidirectional": True, "learn_temperature": True, "temperature": 0.3}


def build(**settings):
    return build_criterion("maxsim", **{**SETTINGS, **settings}).double()


def test_padding_changes_nothing_and_gets_no_gradient():
    batch = make_tokens(0)
    shuffled = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    padded = batch | {role: pad_tokens(batch[role], 13)[:, shuffled] for role in EMBEDDINGS}
    plain, wide = evaluate(build(), batch), evaluate(build(), padded)
    assert abs(plain.loss - wide.loss) <= EXACT
    for role in EMBEDDINGS:
        assert not wide.grads[role][~real_tokens(padded[role])].any()
        there = wide.grads[role][:, shuffled.argsort()][:, : batch[role].shape[1]]
        assert (there - plain.grads[role]).abs().max() <= EXACT


def test_padding_that_counted_would_show():
    batch = make_tokens(0)
    seen = batch | {role: batch[role] + 1e-9 for role in EMBEDDINGS}
    assert abs(evaluate(build(), batch).loss - evaluate(build(), seen).loss) > 1e-3


@pytest.mark.parametrize("role", EMBEDDINGS)
def test_items_without_tokens_are_near_nothing(role):
    batch = make_tokens(0)
    empty = batch | {role: torch.zeros_like(batch[role])}
    outcome = evaluate(build(), empty)
    assert outcome.loss.isfinite()
    assert all(grad.isfinite().all() for grad in outcome.grads.values())
    assert not outcome.grads[role].any()


def test_the_number_of_a_querys_tokens_counts_only_when_scores_are_sums():
    """Every token of the queries twice: sums double, means stay."""
    batch = make_tokens(0)
    twice = batch | {"query": batch["query"].repeat(1, 2, 1)}
    means = [evaluate(build(), b).loss for b in (batch, twice)]
    sums = [evaluate(build(normalize_scores=False), b).loss for b in (batch, twice)]
    assert abs(means[0] - means[1]) <= EXACT
    assert abs(sums[0] - sums[1]) > 0.1


def test_a_tile_never_holds_more_tokens_than_it_may(monkeypatch):
    monkeypatch.setattr(tiling, "CPU_TILE_BYTES", 4 * 8 * 6 * 7)
    monkeypatch.setattr(comparison, "PAIR_BYTES", 1)
    expected = evaluate(build(tile_size=100), make_tokens(0))
    held = []
    compare = MaxSim.compare

    def watch(self, rows, columns, bias, out):
        held.append(rows.shape[0] * rows.shape[1] * columns.shape[0] * columns.shape[1])
        return compare(self, rows, columns, bias, out)

    monkeypatch.setattr(MaxSim, "compare", watch)
    assert evaluate(build(), make_tokens(0)).distance(expected) <= EXACT
    assert max(held) * 8 <= 4 * 8 * 6 * 7
    assert len(held) > 10


def test_one_token_each_is_the_cosine():
    batch = make_tokens(0)
    for role in EMBEDDINGS:
        batch[role] = batch[role][:, :1] + 0.1
    pooled = batch | {role: batch[role][:, 0] for role in EMBEDDINGS}
    tokens = evaluate(build(), batch)
    vectors = evaluate(build_criterion("infonce", **SETTINGS).double(), pooled)
    assert abs(tokens.loss - vectors.loss) <= EXACT
    for role in EMBEDDINGS:
        assert (tokens.grads[role][:, 0] - vectors.grads[role]).abs().max() <= EXACT


def test_one_query_alone_has_a_loss_of_zero():
    batch = take_queries(make_tokens(0), [0])
    assert evaluate(build(), {k: v for k, v in batch.items() if "negative" not in k}).loss == 0


def test_margins_need_the_scale_of_cosines():
    with pytest.raises(ConfigError, match="normalize_scores"):
        build_criterion("maxsim", normalize_scores=False, absolute_margin=0.1)


def test_margins_of_a_guide_are_cosines_whatever_is_added_up():
    build_criterion("maxsim", normalize_scores=False, absolute_margin=0.1, guided=True)


@pytest.mark.parametrize("option", ["query_negatives", "document_negatives"])
def test_queries_are_not_compared_with_queries(option):
    with pytest.raises(ConfigError, match=option):
        build_criterion("maxsim", **{option: True})


def test_the_settings_know_which_losses_take_tokens():
    """`vembed.config` may not import torch, so it has a list of its own."""
    taking = {n: resolve("loss_type", n, LOSSES).takes_tokens for n in LOSSES}
    assert {name for name in taking if not taking[name]} == set(config.POOLED_LOSSES)
    assert {name for name in taking if taking[name]} == set(config.TOKEN_LOSSES)


@pytest.mark.parametrize(
    ("loss", "tokens", "says"),
    [
        ("infonce", True, "Losses that fit it: maxsim, colbert"),
        ("cosent", True, "Losses that fit it: maxsim, colbert"),
        ("maxsim", False, "Losses that fit it: infonce, sigmoid, triplet, .*normalized_softmax;"),
    ],
)
def test_a_loss_that_does_not_fit_the_encoder_names_those_that_do(loss, tokens, says):
    with pytest.raises(ConfigError, match=says):
        check_embeddings(build_criterion(loss), tokens=tokens)
    check_embeddings(build_criterion(loss), tokens=not tokens)
    check_embeddings(lambda query: query.sum(), tokens=tokens)
