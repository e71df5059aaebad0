"""A task on smaller vectors: measured as if they had been given, encoded once."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.evaluation.fakes import hashing_encode
from vembed.errors import ConfigError
from vembed.evaluation import (
    GradedPairsTask,
    LabelledTask,
    ReducedTask,
    Reduction,
    RetrievalTask,
    compare,
    metric_label,
)
from vembed.modes import Item
from vembed.quantized_vectors import BinaryVectors
from vembed.token_vectors import TokenVectors

WORDS = [
    "red",
    "blue",
    "king",
    "apple",
    "sea",
    "old",
    "book",
    "sun",
    "moon",
    "tree",
    "river",
    "stone",
]
TEXTS = [f"{a} {b}" for a in WORDS for b in WORDS if a != b]
ITEMS = [Item(text=text) for text in TEXTS]
TASKS = {
    "retrieval": RetrievalTask(
        {f"q{i}": Item(text=text.split()[0]) for i, text in enumerate(TEXTS)},
        {f"d{i}": item for i, item in enumerate(ITEMS)},
        {f"q{i}": {f"d{i}": 1.0} for i in range(len(TEXTS))},
    ),
    "pairs": GradedPairsTask(ITEMS[:60], ITEMS[1:61], [n % 7 for n in range(60)]),
    "labelled": LabelledTask(ITEMS, [text.split()[0] for text in TEXTS]),
}
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def encode(items, role):
    words = hashing_encode(items, role) @ np.random.default_rng(0).normal(size=(64, 32))
    own = [np.random.default_rng([*item.text.encode()]).normal(size=32) for item in items]
    return (words + np.array(own)).astype(np.float32)


@every_task
def test_a_prefix_is_measured_as_if_it_were_all_there_is(task):
    calls = []

    def counted(items, role):
        calls.append(role)
        return encode(items, role)

    result = ReducedTask(task, [Reduction(16), Reduction(4)]).evaluate(counted)
    main = task.main_metric
    assert len(calls) == len(set(calls))
    assert result.headline[-2:] == (f"{main}[16]", f"{main}[4]")
    whole = task.evaluate(encode)
    for dim in (16, 4):
        alone = task.evaluate(lambda items, role, dim=dim: encode(items, role)[:, :dim])
        assert result.metrics[f"{main}[{dim}]"] == pytest.approx(alone.metrics[main], abs=1e-12)
        assert alone.metrics[main] != whole.metrics[main]
    assert result.metrics[main] == whole.metrics[main]


@every_task
@pytest.mark.parametrize("precision", ["int8", "binary", "ubinary"])
def test_quantised_vectors_lose_a_little_and_are_compared(task, precision):
    result = ReducedTask(task, [Reduction(None, precision), Reduction(8, precision)]).evaluate(
        encode
    )
    main = task.main_metric
    whole, quantised = result.metrics[main], result.metrics[f"{main}[{precision}]"]
    assert f"{main}[8 {precision}]" in result.metrics
    assert quantised == pytest.approx(whole, abs=0.02 if precision == "int8" else 0.5)
    changes = compare(result, result)
    assert [change.metric for change in changes][-1] == f"{main}[8 {precision}]"
    assert changes[-1].before_low <= changes[-1].before <= changes[-1].before_high


def test_int8_documents_come_as_their_codes_stand_for_and_queries_as_they_are():
    seen = {}

    class Spy:
        name, main_metric = "spy", "ndcg@10"

        def evaluate(self, encode):
            seen["query"], seen["document"] = encode(ITEMS[:9], "query"), encode(ITEMS, "document")
            return TASKS["retrieval"].evaluate(hashing_encode)

        def describe(self):
            return {}

    ReducedTask(Spy(), [Reduction(None, "int8")]).evaluate(encode)
    np.testing.assert_array_equal(seen["query"], encode(ITEMS[:9], "query"))
    whole = encode(ITEMS, "document")
    assert (seen["document"] != whole).any()
    assert len(np.unique(seen["document"][:, 0])) <= 256
    assert np.abs(seen["document"] - whole).max() <= (whole.max(0) - whole.min(0)).max() / 255
    ReducedTask(Spy(), [Reduction(None, "binary")]).evaluate(encode)
    assert isinstance(seen["query"], BinaryVectors)


def test_names_of_metrics():
    assert metric_label("ndcg@10[256 int8]") == "nDCG@10 [256 int8]"
    assert metric_label("spearman") == "Spearman"


def _tokens(items, role):
    return TokenVectors.from_arrays([np.eye(3, dtype=np.float32)] * len(items))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Reduction(0), "Received: 0"),
        (lambda: Reduction(None, "int4"), "int4"),
        (lambda: ReducedTask(TASKS["pairs"], [Reduction(99)]).evaluate(encode), "32 numbers"),
        (lambda: ReducedTask(TASKS["pairs"], [Reduction(2)]).evaluate(_tokens), "each token"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
