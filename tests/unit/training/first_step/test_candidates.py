from __future__ import annotations

import math

import pytest
import torch

from tests.unit.training.first_step.batches import hand_made, healthy, report_on
from vembed.losses.comparison import MaxSim
from vembed.losses.info_nce import InfoNCE
from vembed.losses.late_interaction import MaxSimInfoNCE
from vembed.losses.margins import Margins
from vembed.token_vectors import pad_tokens
from vembed.training.first_step.candidates import Spread, look_at_candidates, mean_softmax


def look(student, extras, **settings):
    return look_at_candidates(student, extras, **{"softmax_temperature": 0.1, **settings})


def spread(*values: float) -> Spread:
    return Spread.of(torch.tensor(values))


def test_counts_by_hand():
    """Eight documents: a b a d e, and the hard ones x b a; own positives are not negatives."""
    found = look(*hand_made([0, 1, 2, 3]))
    assert found.queries == 4
    assert found.local == spread(3, 4, 3, 3)
    assert found.other_processes == spread(0)
    assert found.hard == spread(2, 2, 2, 3)
    assert found.masked == spread(2, 1, 2, 0)
    assert found.negatives == spread(5, 6, 5, 6)
    assert found.few == 0
    assert found.chance == pytest.approx((2 * math.log(6) + 2 * math.log(7)) / 4)


def test_margins_by_hand():
    """Query 0 has the similarities 0.6 (own), 0.8, 0.5, 0 to the documents."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    positive = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.5, 0.75**0.5]])
    student = {"query": query, "positive": positive, "negative": torch.tensor([[0.0, 1.0]])}
    found = look(student, {}, margins=Margins(absolute=0.05))
    # Limits 0.55, 0.55 and 0.816: 0.8; 0.8, 0.866 and 1; 1.
    assert found.too_similar == spread(1, 3, 1)
    assert found.local == spread(1, 0, 2)
    assert found.hard == spread(1, 0, 0)
    assert found.negatives == spread(2, 0, 2)
    assert found.few == 1
    assert found.chance == pytest.approx(2 * math.log(3) / 3)
    assert look(student, {}, margins=Margins(absolute=0.05), bidirectional=True).chance is None
    assert look(student, {}, margins=Margins()).too_similar is None
    equal = look({**student, "query": query * 0 + 1}, {}, margins=Margins(absolute=-1.0))
    assert equal.chance == pytest.approx(math.log(4))


def test_a_query_that_is_a_negative_of_another_row_meets_itself():
    student, extras = hand_made([0, 1, 2, 3])
    assert look(student, extras).own_text == 1
    extras["ids_query"] = torch.tensor([1, 2, 3, 4])
    assert look(student, extras).own_text == 0


def test_a_query_that_is_its_own_positive_is_masked():
    """In a t2t batch with dropout as the only noise, every text is its own positive."""
    student, extras = healthy()
    extras["ids_positive"] = extras["ids_query"].clone()
    assert look(student, extras).own_text == 0
    extras["ids_positive"] = extras["ids_query"].roll(1)
    assert look(student, extras).own_text == 16


def test_without_ids_nothing_is_known_of_texts_and_all_differ():
    student, extras = hand_made([0, 1, 2, 3])
    found = look(student, {"counts_positive": extras["counts_positive"]})
    assert found.own_text is None
    assert found.masked == spread(0)
    assert found.negatives == spread(7, 7, 7, 6)


def test_without_hard_negatives():
    found = look(*hand_made([1, 2]))
    assert (found.hard, found.negatives, found.few) == (spread(0), spread(1), 2)


def test_a_batch_of_one_has_no_negatives():
    found = look(*hand_made([1]))
    assert (found.negatives, found.few, found.chance) == (spread(0), 1, 0)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_chance_is_the_loss_of_equal_embeddings(bidirectional):
    student, extras = hand_made([0, 1, 2, 3])
    alike = {role: torch.ones_like(rows) for role, rows in student.items()}
    ids = {name: rows for name, rows in extras.items() if name not in ("labels", "scores")}
    loss = InfoNCE(bidirectional=bidirectional)(
        alike["query"], alike["positive"], alike["negative"], **ids
    )
    found = look(alike, extras, bidirectional=bidirectional)
    assert found.chance == pytest.approx(float(loss), rel=1e-6)
    assert found.softmax.evenness == pytest.approx(1)
    assert found.softmax.decided == 0


def test_the_softmax_is_that_of_the_loss():
    """At a low temperature one candidate has all the weight."""
    student, extras = healthy()
    evenness = [look(student, extras, softmax_temperature=t).softmax.evenness for t in (9, 1, 1e-5)]
    assert evenness == sorted(evenness, reverse=True)
    assert evenness[-1] == pytest.approx(1 / 16, rel=1e-3)
    assert look(student, extras, softmax_temperature=1e-5).softmax.decided == 1
    assert look(student, extras, softmax_temperature=None).softmax is None


def test_mean_softmax_by_hand():
    """Weights 3/4 and 1/4, then one candidate alone; infinity is no candidate."""
    logits = torch.tensor([[math.log(3), 0.0, -torch.inf], [50.0, 0.0, 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    found = mean_softmax(logits)
    assert found.evenness == pytest.approx((math.exp(entropy) / 2 + 1 / 3) / 2)
    assert found.decided == 0.5


def test_a_spread_reads_as_one_number_where_it_is_one():
    assert str(spread(7, 7)) == "7"
    assert str(spread(1.00000001, 0.99999999)) == "1"
    assert str(spread(12, 20, 31)) == "21 (12 to 31)"


def test_tokens_are_compared_by_the_similarity_of_the_loss():
    """One token for each item: the numbers are those of one vector for each."""
    student, extras = healthy()
    tokens = {role: vectors[:, None] for role, vectors in student.items()}
    padded = {role: pad_tokens(vectors, 3) for role, vectors in tokens.items()}
    margins = Margins(absolute=0.1)
    expected = look(student, extras, margins=margins)
    assert look(padded, extras, margins=margins, comparison=MaxSim(mean=True)) == expected
    report = report_on(padded, extras, MaxSimInfoNCE(temperature=0.1))
    assert report.candidates == look(student, extras)
    assert report.embeddings is None
    assert report.temperature.value == pytest.approx(0.1)
