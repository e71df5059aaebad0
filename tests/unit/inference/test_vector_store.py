"""Parts on disk: whole or not there, found by key, read by several processes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from vembed.errors import ConfigError
from vembed.inference.vector_store import VectorStore, as_keys, name_of


def vectors(keys, size=3):
    return np.outer(keys, np.arange(1, size + 1)).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    store = VectorStore(tmp_path, 3)
    for keys in (as_keys([5, 1, 9]), as_keys([2, 7])):
        store.write(keys, vectors(keys))
    store.refresh()
    return store


def test_vectors_are_found_by_key_over_parts(store):
    keys = as_keys([7, 1, 5, 7])
    assert len(store) == 5
    assert store.has(as_keys([1, 3, 9])).tolist() == [True, False, True]
    assert np.array_equal(store.read(keys), vectors(keys))


def test_another_process_maps_the_files_by_itself(store):
    store.read(as_keys([1]))
    copy = pickle.loads(pickle.dumps(store))
    assert copy._open == {}
    assert np.array_equal(copy.read(as_keys([9])), vectors([9]))


def test_keys_that_were_written_twice_count_once(store):
    keys = as_keys([1, 2, 3])
    store.write(keys, vectors(keys))
    store.refresh()
    assert len(store) == 6
    assert np.array_equal(store.read(keys), vectors(keys))


def test_a_part_without_its_keys_is_not_there(store, tmp_path):
    """The keys are written last: whatever ended the process before, the part is missing."""
    (tmp_path / f"{name_of(as_keys([2, 7]))}.keys.npy").unlink()
    again = VectorStore(tmp_path, 3)
    assert again.has(as_keys([2, 5])).tolist() == [False, True]
    assert not again.has_part(as_keys([2, 7]))


@pytest.mark.parametrize("damage", ["cut", "gone", "other keys"])
def test_a_damaged_part_is_named(store, tmp_path, damage):
    name = name_of(as_keys([2, 7]))
    path = tmp_path / f"{name}.vectors.npy"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "gone":
        path.unlink()
    else:
        np.save(tmp_path / f"{name}.keys.npy", as_keys([2, 8]))
    with pytest.raises(ConfigError, match=rf"{name}.keys.npy is damaged.*Remove .*{name}\.\*"):
        VectorStore(tmp_path, 3)


def test_vectors_of_another_size_are_refused(store, tmp_path):
    with pytest.raises(ConfigError, match="shape"):
        VectorStore(tmp_path, 4)


def test_one_process_at_a_time_computes_a_part(store, tmp_path):
    keys = as_keys([3])
    with store.claim(keys, wait=False) as first, store.claim(keys, wait=False) as second:
        assert (first, second) == (True, False)
        with store.claim(as_keys([4]), wait=False) as other:
            assert other
    with store.claim(keys, wait=False) as again:
        assert again
    assert not list(tmp_path.glob("*.lock"))
