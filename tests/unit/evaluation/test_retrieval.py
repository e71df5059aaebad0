import math

import numpy as np
import pytest

from tests.unit.evaluation.fakes import constant_encode, hashing_encode, table_encode
from vembed.data import Record
from vembed.errors import DataError, VembedError
from vembed.evaluation import EvalTask, RetrievalTask, write_beir
from vembed.modes import Item


def items(*texts):
    return {text: Item(text) for text in texts}


def angle(degrees):
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def record(query, positives, negatives=()):
    return Record(Item(query), tuple(map(Item, positives)), tuple(map(Item, negatives)))


def test_metrics_of_a_ranking_computed_by_hand():
    # q points to 0 degrees: the order is a (10), b (20), c (30), d (40). Relevant: b with grade 2,
    # d with grade 1.
    table = {"q": angle(0), "a": angle(10), "b": angle(20), "c": angle(30), "d": angle(40)}
    task = RetrievalTask(items("q"), items("d", "c", "b", "a"), {"q": {"b": 2, "d": 1, "c": 0}})
    result = task.evaluate(table_encode(table))
    best = 2 + 1 / math.log2(3)
    assert result.metrics["ndcg@10"] == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / best)
    assert result.metrics["mrr@10"] == pytest.approx(1 / 2)
    assert result.metrics["recall@1"] == 0
    assert result.metrics["recall@10"] == 1
    assert result.metrics["map@100"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert result.metrics["hit_rate@10"] == 1
    assert result.metrics["precision@10"] == pytest.approx(2 / 10)
    assert result.main_metric == "ndcg@10"
    assert result.headline == ("ndcg@10", "mrr@10", "recall@1", "recall@10")
    assert len(result) == 1


def test_vector_length_does_not_matter():
    table = {"q": [5, 0], "near": [0.01, 0], "far": [90, 60]}
    task = RetrievalTask(items("q"), items("near", "far"), {"q": {"near": 1}})
    assert task.evaluate(table_encode(table)).metrics["recall@1"] == 1


def test_a_collapsed_model_gets_no_credit():
    texts = [f"document {i}" for i in range(200)]
    task = RetrievalTask(items("q"), items(*texts), {"q": {"document 0": 1, "document 7": 3}})
    metrics = task.evaluate(constant_encode).metrics
    assert metrics == dict.fromkeys(metrics, 0.0)
    assert task.evaluate(constant_encode).rankings.neighbours.right_rank_Q.tolist() == [199]


def test_a_document_with_the_id_of_the_query_is_no_candidate():
    corpus = items("q", "near", "far")
    table = {"q": angle(0), "near": angle(10), "far": angle(60)}
    result = RetrievalTask(items("q"), corpus, {"q": {"near": 1}}).evaluate(table_encode(table))
    assert result.metrics["recall@1"] == 1
    assert result.rankings.neighbours.documents_QK.tolist() == [[1, 2, -1]]


def test_the_same_text_under_another_id_is_a_candidate():
    corpus = {"other": Item("q"), "near": Item("near")}
    table = {"q": angle(0), "near": angle(10)}
    result = RetrievalTask(items("q"), corpus, {"q": {"near": 1}}).evaluate(table_encode(table))
    assert result.metrics["recall@1"] == 0


def test_ids_that_are_two_numberings_lose_no_relevant_document():
    queries, corpus = {"1": Item("q1"), "2": Item("q2")}, {"1": Item("a1"), "2": Item("a2")}
    table = {"q1": angle(0), "a1": angle(1), "q2": angle(80), "a2": angle(81)}
    task = RetrievalTask(queries, corpus, {"1": {"1": 1}, "2": {"2": 1}})
    assert task.evaluate(table_encode(table)).metrics["recall@1"] == 1


def test_a_query_without_a_relevant_document_is_not_counted():
    task = RetrievalTask(items("q", "r", "s"), items("a"), {"q": {"a": 1}, "r": {"a": 0}})
    assert task.describe() == {"queries": 1, "documents": 1, "relevant pairs": 1}
    with pytest.raises(DataError, match="at least one query with a relevant document"):
        RetrievalTask(items("r"), items("a"), {"r": {"a": 0}})


def test_each_query_and_each_document_is_encoded_once():
    seen = []

    def encode(encoded, role):
        seen.append((role, [item.text for item in encoded]))
        return hashing_encode(encoded, role)

    records = [
        record("q1", ["a", "b"], ["c"]),
        record("q2", ["c"], ["a"]),
        record("q1", ["d", "a"]),
    ]
    result = RetrievalTask.from_records(records).evaluate(encode)
    assert seen == [("query", ["q1", "q2"]), ("document", ["a", "b", "c", "d"])]
    assert all(len(values) == 2 for values in result.per_item.values())


def test_from_records_joins_the_positives_of_rows_with_the_same_query():
    table = {"q1": angle(0), "a": angle(5), "x": angle(10), "b": angle(15), "q2": angle(90)}
    records = [record("q1", ["a"]), record("q2", ["x"]), record("q1", ["b"])]
    result = RetrievalTask.from_records(records).evaluate(table_encode(table))
    # q1: a first, x second, b third: (1/1 + 2/3) / 2. q2: b (75 away), x (80): 1/2.
    assert result.per_item["map@100"] == pytest.approx([(1 + 2 / 3) / 2, 1 / 2])


def test_from_records_a_query_that_is_another_rows_document_does_not_find_itself():
    records = [record("one", ["two"]), record("two", ["one"]), record("three", ["four"])]
    table = {"one": angle(0), "two": angle(20), "three": angle(80), "four": angle(85)}
    assert (
        RetrievalTask.from_records(records).evaluate(table_encode(table)).metrics["recall@1"] == 1
    )


def test_from_records_a_negative_that_is_also_the_positive_stays_relevant():
    task = RetrievalTask.from_records([record("q", ["a"], ["a", "b"])])
    assert task.describe() == {"queries": 1, "documents": 2, "relevant pairs": 1}


def test_from_beir_agrees_with_the_maps_it_was_written_from(tmp_path):
    queries = {f"q{i}": f"word{i} common" for i in range(8)}
    corpus = {f"d{i}": f"word{i} word{i + 1} other" for i in range(8)}
    qrels = {f"q{i}": {f"d{i}": 2, f"d{(i + 3) % 8}": 1} for i in range(8)}
    write_beir(tmp_path / "set", queries, corpus, qrels)
    from_folder = RetrievalTask.from_beir(tmp_path / "set").evaluate(hashing_encode)
    in_memory = RetrievalTask(
        {key: Item(text) for key, text in queries.items()},
        {key: Item(text) for key, text in corpus.items()},
        qrels,
    ).evaluate(hashing_encode)
    assert from_folder.task == "set"
    assert from_folder.metrics == in_memory.metrics
    assert 0.3 < from_folder.metrics["ndcg@10"] < 1


def test_the_order_of_queries_and_documents_does_not_matter():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), size=4)) + f" {i}" for i in range(60)]
    records = [record(texts[i], [texts[i + 1]], [texts[i + 2]]) for i in range(0, 57, 3)]
    forward = RetrievalTask.from_records(records).evaluate(hashing_encode)
    backward = RetrievalTask.from_records(records[::-1]).evaluate(hashing_encode)
    assert backward.metrics == pytest.approx(forward.metrics, abs=1e-12)
    assert 0 < forward.metrics["mrr@10"] < 1


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda items, role: np.full((len(items), 4), np.nan), "NaN or infinity for 1 of 1 items"),
        (lambda items, role: np.ones((len(items) + 1, 4)), r"one row per item, \[1, D\]"),
        (lambda items, role: np.ones(len(items)), r"Received: shape \[1\]"),
    ],
)
def test_what_cannot_be_ranked_is_refused(encode, message):
    with pytest.raises(VembedError, match=message):
        RetrievalTask(items("q"), items("a"), {"q": {"a": 1}}).evaluate(encode)


def test_it_is_an_eval_task():
    assert isinstance(RetrievalTask(items("q"), items("a"), {"q": {"a": 1}}), EvalTask)
