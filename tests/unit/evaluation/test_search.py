import numpy as np
import pytest

from vembed.errors import VembedError
from vembed.evaluation import search
from vembed.evaluation.metrics import order_by_score
from vembed.evaluation.results import encode_checked
from vembed.evaluation.search import Judgements, find_neighbours, paired_cosines
from vembed.modes import Item
from vembed.token_vectors import TokenVectors


def judge_by(gains_QN):
    """Judgements from a dense matrix; 0 is not told."""

    def judge(block):
        rows, documents = np.nonzero(gains_QN[block.start : block.stop])
        return Judgements(rows, documents, gains_QN[block.start : block.stop][rows, documents])

    return judge


def random_case(seed=0, queries=37, documents=53, size=6):
    rng = np.random.default_rng(seed)
    gains = rng.choice([0.0, 0, 0, 1, 2], size=(queries, documents))
    # Few different vectors, so that exact ties abound.
    vectors = rng.integers(-1, 2, size=(queries + documents, size)).astype(np.float32) + 0.5
    return vectors[:queries], vectors[queries:], gains


def slow_ranks(queries, documents, gains):
    unit = lambda rows: rows.astype(np.float64) / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    cosines = np.round(unit(queries) @ unit(documents).T, 5)
    return np.stack([order_by_score(c, g) for c, g in zip(cosines, gains, strict=True)]), cosines


def test_ranks_as_sorting_everything_does_whatever_the_block(monkeypatch):
    queries, documents, gains = random_case()
    expected, cosines = slow_ranks(queries, documents, gains)
    for queries_at_once in (1, 5, 1000):
        monkeypatch.setattr(search, "_DOCUMENTS", queries_at_once + 6)
        monkeypatch.setattr(search, "_BLOCK_QUERIES", queries_at_once)
        monkeypatch.setattr(search, "_BLOCK_ENTRIES", 1 if queries_at_once < 1000 else 2**20)
        found = find_neighbours(queries, documents, judge_by(gains), depth=20)
        assert found.documents_QK.shape == (37, 20)
        # Documents of equal cosine and gain may stand in any order: compare what a metric sees.
        for row in range(37):
            assert (
                gains[row][found.documents_QK[row]].tolist()
                == gains[row][expected[row, :20]].tolist()
            )
            assert found.cosines_QK[row] == pytest.approx(
                cosines[row][expected[row, :20]], abs=2e-5
            )


@pytest.mark.parametrize("queries_at_once", [3, 1000])
def test_the_right_document_and_its_rank_are_found_beyond_the_depth(queries_at_once, monkeypatch):
    monkeypatch.setattr(search, "_BLOCK_QUERIES", queries_at_once)
    monkeypatch.setattr(search, "_BLOCK_ENTRIES", 1)
    queries, documents, gains = random_case(seed=1)
    gains[3] = 0
    expected, _ = slow_ranks(queries, documents, gains)
    found = find_neighbours(queries, documents, judge_by(gains), depth=1)
    assert (found.right_document_Q[3], found.right_rank_Q[3]) == (-1, 0)
    for row in set(range(37)) - {3}:
        first = int((gains[row][expected[row]] > 0).argmax())
        assert found.right_rank_Q[row] == first + 1
        assert gains[row, found.right_document_Q[row]] == gains[row, expected[row, first]]


def test_a_relevant_document_stands_after_its_ties():
    documents = np.array([[1, 0]] * 5, dtype=np.float32)
    gains = np.array([[2.0, 0, 1, 0, 0]])
    found = find_neighbours(
        np.array([[1, 0]], dtype=np.float32), documents, judge_by(gains), depth=5
    )
    assert found.documents_QK[0, 3:].tolist() == [2, 0]
    assert (found.right_document_Q[0], found.right_rank_Q[0]) == (2, 4)
    assert found.cosines_QK[0] == pytest.approx(np.ones(5))


def test_equal_vectors_tie_although_a_matrix_product_rounds():
    """Scaled copies of a vector: ordered by rounding, the relevant one would get any rank."""
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(384).astype(np.float32)
    documents = np.stack([vector * scale for scale in rng.uniform(0.1, 10, size=301)]).astype(
        np.float32
    )
    gains = np.zeros((40, 301))
    gains[:, 7] = 1
    queries = rng.standard_normal((40, 384)).astype(np.float32)
    ranks = find_neighbours(queries, documents, judge_by(gains), depth=1).right_rank_Q
    assert ranks.tolist() == [301] * 40


def test_what_is_no_candidate_is_left_out_and_the_row_padded():
    gains = np.array([[-1.0, 0, 1]])
    found = find_neighbours(
        np.eye(3, dtype=np.float32)[:1], np.eye(3, dtype=np.float32), judge_by(gains), depth=9
    )
    assert found.documents_QK.tolist() == [[1, 2, -1]]
    assert found.cosines_QK == pytest.approx(np.zeros((1, 3)), abs=1e-6)
    assert found.right_rank_Q.tolist() == [2]


def test_a_difference_that_is_no_tie_decides():
    query, gains = np.array([[1, 0]], dtype=np.float32), np.array([[1.0, 0]])
    # The cosine of a small slope is 1 - slope^2 / 2: 1 - 2e-7 ties with 1, 1 - 4.5e-6 does not.
    for slope, rank in ((0.0006, 2), (0.003, 1)):
        documents = np.array([[1, 0], [1, slope]], dtype=np.float32)
        assert find_neighbours(query, documents, judge_by(gains), depth=1).right_rank_Q == [rank]


def test_paired_cosines():
    first = np.array([[3, 4], [1, 0], [0, 0]], dtype=np.float32)
    second = np.array([[4, 3], [-2, 0], [1, 1]], dtype=np.float32)
    # (12 + 12) / 25; opposite; a zero vector is near nothing
    assert paired_cosines(first, second) == pytest.approx([0.96, -1, 0], abs=1e-6)


# --- token vectors


def token_case(seed=0, queries=11, documents=17):
    rng = np.random.default_rng(seed)

    def items(count):
        return [rng.normal(size=(rng.integers(1, 6), 4)).astype(np.float32) for _ in range(count)]

    gains = rng.choice([0.0, 0, 0, 1, 2], size=(queries, documents))
    # The first documents are one and the same: they tie, for every query.
    texts = items(documents)
    return items(queries), [texts[0]] * 4 + texts[4:], gains


@pytest.mark.parametrize("queries_at_once", [1, 1000])
def test_tokens_are_ranked_by_max_sim(queries_at_once, monkeypatch):
    monkeypatch.setattr(search, "_BLOCK_QUERIES", queries_at_once)
    monkeypatch.setattr(search, "_BLOCK_ENTRIES", 1)
    queries, documents, gains = token_case()
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    scores = np.asarray(
        [[(unit(q) @ unit(d).T).max(1).mean() for d in documents] for q in queries], np.float64
    )
    found = find_neighbours(
        TokenVectors.from_arrays(queries),
        TokenVectors.from_arrays(documents),
        judge_by(gains),
        depth=5,
    )
    for row in range(len(queries)):
        expected = order_by_score(np.round(scores[row], 5), gains[row])[:5]
        assert gains[row][found.documents_QK[row]].tolist() == gains[row][expected].tolist()
        assert found.cosines_QK[row] == pytest.approx(scores[row][expected], abs=2e-5)
    pairs = paired_cosines(
        TokenVectors.from_arrays(queries), TokenVectors.from_arrays(documents[:11])
    )
    np.testing.assert_allclose(pairs, scores[:, :11].diagonal(), atol=1e-6)


def test_tokens_on_one_side_only_are_an_error():
    queries, documents, gains = token_case()
    tokens, vectors = TokenVectors.from_arrays(queries), np.ones((17, 4), np.float32)
    with pytest.raises(VembedError, match="one of each"):
        find_neighbours(tokens, vectors, judge_by(gains), depth=5)
    with pytest.raises(VembedError, match="one of each"):
        paired_cosines(vectors[:11], tokens)


@pytest.mark.parametrize("broken", [False, True])
def test_a_token_that_is_nan_is_an_error_that_names_the_item(broken):
    arrays = [np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)]
    arrays[1][3, 0] = np.nan if broken else 1
    items = [Item("first"), Item("second")]
    encode = lambda items, role: TokenVectors.from_arrays(arrays)  # noqa: E731
    if not broken:
        assert len(encode_checked(encode, items, "query")) == 2
        with pytest.raises(VembedError, match="one row per item"):
            encode_checked(encode, items[:1], "query")
        return
    with pytest.raises(VembedError, match="1 of 2 items, the first is 'second'"):
        encode_checked(encode, items, "query")
