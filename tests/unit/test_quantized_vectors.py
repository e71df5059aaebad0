"""Quantised vectors: sentence-transformers' codes, what they lose, and search by signs."""

from __future__ import annotations

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings

from vembed.errors import ConfigError, DataError
from vembed.quantized_vectors import (
    BinaryVectors,
    Ranges,
    pack_signs,
    paired_rescored,
    quantize,
    search_scores,
)


def draw(count, size=20, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


@pytest.mark.parametrize("precision", ["int8", "binary", "ubinary", "float32"])
@pytest.mark.parametrize("size", [24, 20])
def test_codes_are_those_of_sentence_transformers(precision, size):
    sample, vectors = draw(200, size), draw(50, size, seed=1)
    ranges = Ranges.of(sample)
    stacked = np.stack([ranges.lowest_D, ranges.highest_D])
    theirs = quantize_embeddings(vectors, precision, ranges=stacked)
    ours = quantize(vectors, precision, ranges)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def test_int8_is_half_a_step_off_at_most():
    vectors = draw(100)
    ranges = Ranges.of(vectors)
    decoded = ranges.decode(ranges.encode(vectors))
    assert (np.abs(decoded - vectors) <= ranges.step_D * 0.5001).all()
    assert np.abs(decoded - vectors).max() > 0


def test_beyond_the_range_is_its_end_and_a_constant_is_kept():
    sample = np.array([[0.0, 3.0], [1.0, 3.0]], dtype=np.float32)
    ranges = Ranges.of(sample)
    codes = ranges.encode(np.array([[-9.0, 3.0], [9.0, 3.0]], dtype=np.float32))
    assert codes[:, 0].tolist() == [-128, 127]
    np.testing.assert_array_equal(ranges.decode(codes)[:, 1], [3.0, 3.0])


def test_ranges_are_kept_in_a_file(tmp_path):
    ranges = Ranges.of(draw(10))
    ranges.save(tmp_path / "a.npy")
    read = Ranges.load(tmp_path / "a.npy")
    np.testing.assert_array_equal(read.lowest_D, ranges.lowest_D)
    np.testing.assert_array_equal(read.highest_D, ranges.highest_D)
    np.save(tmp_path / "b.npy", np.ones(3))
    (tmp_path / "c.npy").write_text("no")
    for name in ("b.npy", "c.npy", "nothing.npy"):
        with pytest.raises(DataError, match=name):
            Ranges.load(tmp_path / name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(draw(2), "int4"), "int4"),
        (lambda: Ranges.of(draw(0)), "none"),
        (lambda: quantize(draw(2, 8), "int8", Ranges.of(draw(2, 4))), "4 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_search_is_hamming_and_then_the_querys_own_numbers():
    queries, documents = draw(6), draw(300, seed=1)
    scores = search_scores(BinaryVectors(queries), BinaryVectors(documents), rescored=25)
    bits = [np.unpackbits(pack_signs(v), axis=1)[:, :20].astype(int) for v in (queries, documents)]
    for query, row, query_bits in zip(queries, scores, bits[0], strict=True):
        hamming = (query_bits != bits[1]).sum(1)
        first = np.argsort(-row)[:25]
        assert hamming[first].max() <= np.delete(hamming, first).min()
        signs = np.where(documents > 0, 1, -1)
        slow = [query @ signs[d] / np.linalg.norm(query) / np.sqrt(20) for d in first]
        assert (np.diff(slow) <= 1e-12).all()
        np.testing.assert_allclose(row[first] - 2, slow, atol=1e-6)
        rest = np.argsort(-row)[25:]
        assert (np.diff(hamming[rest]) >= 0).all()
    pairs = paired_rescored(BinaryVectors(queries), BinaryVectors(documents[:6]))
    all_of_them = search_scores(BinaryVectors(queries), BinaryVectors(documents), rescored=300)
    np.testing.assert_allclose(pairs, np.diag(all_of_them[:, :6]) - 2, atol=1e-12)
