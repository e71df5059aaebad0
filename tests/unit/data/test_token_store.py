"""Stored tokens: the same batches as from rows, made once, whatever happens to the files."""

import pickle
import threading

import datasets
import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tests.tiny import byte_level_tokenizer, wordpiece_tokenizer, write_rows
from vembed.data import Collator, TokenCollator, build_dataloader, load_dataset_records, token_store
from vembed.data import open_token_store as open_store
from vembed.errors import DataError
from vembed.models.processor import TextProcessor
from vembed.modes import Item

TYPES = ("input_ids", "attention_mask", "token_type_ids")
ROWS = [
    {"query": "red apple", "positive": ["the apple is red", "sweet fruit"], "negative": ["blue"]},
    {"query": "cold", "positive": ["ice and snow in winter"]},
    {"query": "red apple", "positive": ["sweet fruit"], "negative": ["a", "the big old house"]},
    {"query": "sweet fruit", "positive": ["red apple"]},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "vembed_tokens"


@pytest.fixture
def rows(tmp_path):
    return load_dataset_records(write_rows(tmp_path / "rows.jsonl", ROWS))


def processor(**options):
    options = {"max_seq_length": 7, "input_names": TYPES, **options}
    return TextProcessor(wordpiece_tokenizer(), **options)


def typed_processor():
    """A tokenizer whose token types are not zero."""
    made = processor()
    tokenizer = made.tokenizer
    names = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:2 $A:1 [SEP]:1", special_tokens=names
    )
    tokenizer._pad_token_type_id = 3
    return made


def left_padded():
    tokenizer = byte_level_tokenizer()
    tokenizer.padding_side = "left"
    return TextProcessor(tokenizer, max_seq_length=9, query_prompt="ask ", document_prompt="it: ")


PROCESSORS = {
    "types": processor,
    "real types": typed_processor,
    "left": left_padded,
    "fixed": lambda: processor(fixed_length=True, input_names=TYPES[:2]),
}


def assert_equal_batches(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[key].dtype, key
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def both(dataset, made, numbers):
    """The batch of some rows, from their records and from stored tokens."""
    store = open_store(dataset, made)
    stored = TokenCollator(store, made.padding, dataset)(numbers)
    return Collator(made)(dataset.__getitems__(numbers)), stored


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [2, 0], [1], [3, 1, 3]])
def test_batches_are_those_of_rows_bit_by_bit(rows, name, numbers):
    assert_equal_batches(*both(rows, PROCESSORS[name](), numbers))


def test_prompts_of_sets_and_a_choice_of_rows(tmp_path):
    one, two = (write_rows(tmp_path / f"{i}.jsonl", ROWS) for i in range(2))
    specs = [{"path": str(one)}, {"path": str(two), "query_prompt": "q ", "document_prompt": ""}]
    dataset = load_dataset_records(specs).select([6, 1, 0, 4])
    rows, stored = both(dataset, left_padded(), [0, 1, 2, 3])
    assert_equal_batches(rows, stored)
    # The third row's query and the first's are the same text under two prompts.
    assert stored["keys_query"] == [0, 1, 2, 0]


def test_labels_and_scores_are_there_where_all_rows_of_a_batch_have_them(tmp_path):
    facts = [
        {"label": "b", "score": 0.25, "teacher_scores": [1.0, 2.0, 3.0]},
        {"label": "a", "teacher_scores": [0.5]},
        {"score": 1.0, "teacher_scores": [1.0, 2.0, 3.0]},
        {"label": "b", "score": 0.5},
    ]
    path = write_rows(tmp_path / "f.jsonl", [a | b for a, b in zip(ROWS, facts, strict=True)])
    dataset = load_dataset_records(path)
    seen = set()
    for numbers in ([0, 1], [0, 2], [2, 3], [0, 3], [0, 1, 2]):
        rows, stored = both(dataset, processor(), numbers)
        assert_equal_batches(rows, stored)
        seen |= stored.keys()
    assert {"labels", "scores", "teacher_scores"} <= seen


def test_labelled_rows_without_positives(tmp_path):
    rows = [{"query": text, "label": label} for text, label in (("red", "x"), ("blue", "y"))]
    dataset = load_dataset_records(write_rows(tmp_path / "f.jsonl", rows))
    pair = both(dataset, processor(), [1, 0])
    assert_equal_batches(*pair)
    assert "positive_input_ids" not in pair[1]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 3])
def test_loaders_give_the_same_batches(rows, num_workers, processes):
    made = processor()
    tokens = TokenCollator(open_store(rows, made), made.padding, rows)
    for process in range(processes):
        shares = {"batch_size": 1, "process_index": process, "process_count": processes}
        expected = list(build_dataloader(rows, Collator(made), seed=1, **shares))
        stored = list(
            build_dataloader(
                rows, Collator(made), seed=1, tokens=tokens, num_workers=num_workers, **shares
            )
        )
        for one, other in zip(expected, stored, strict=True):
            assert_equal_batches(one, other)
    assert processes == 1 or "borrowed" in stored[-1]


class Counting(TextProcessor):
    """Counts the texts that it tokenises."""

    count = 0

    def tokenize(self, items, **kwargs):
        self.count += len(items)
        return super().tokenize(items, **kwargs)


def counting(**options):
    return Counting(wordpiece_tokenizer(), max_seq_length=7, **options)


def test_every_text_is_tokenised_once_and_found_again(rows, monkeypatch):
    monkeypatch.setattr(token_store, "_WINDOW_ROWS", 2)
    made = counting()
    open_store(rows, made)
    # Three queries and seven documents; "red apple" and "sweet fruit" are both.
    assert made.count == 3 + 7
    again = counting()
    assert_equal_batches(*both(rows, again, [3, 2, 0, 1]))
    assert again.count == sum(1 + len(r["positive"]) + len(r.get("negative", [])) for r in ROWS)


def test_what_decides_the_tokens_decides_the_folder(rows, cache):
    def folders():
        return {path.name for path in cache.iterdir() if path.is_dir()}

    open_store(rows, counting())
    for other in (
        {"max_seq_length": 6},
        {"query_prompt": "ask "},
        {"input_names": TYPES},
    ):
        before = folders()
        open_store(rows, TextProcessor(wordpiece_tokenizer(), **{"max_seq_length": 7, **other}))
        assert len(folders() - before) == 1, other
    before = folders()
    open_store(rows.select([0, 1]), counting())
    lower = counting()
    lower.tokenizer.backend_tokenizer.normalizer = None
    open_store(rows, lower)
    assert len(folders() - before) == 2
    # A call leaves padding and truncation in the tokenizer, which are no part of it.
    used = counting()
    used([Item("red")], role=None)
    open_store(rows, used)
    assert len(folders() - before) == 2


@pytest.mark.parametrize("file", ["ids.int32", "items.npy"])
def test_a_damaged_store_is_made_again(rows, cache, caplog, file):
    open_store(rows, counting())
    (path,) = cache.glob(f"*/{file}")
    path.write_bytes(path.read_bytes()[:-4])
    made = counting()
    pair = both(rows, made, [0, 1, 2, 3])
    assert "is damaged, and made again" in caplog.text
    assert_equal_batches(*pair)


def test_a_process_that_dies_leaves_nothing_to_find(rows, cache, monkeypatch):
    def die(folder, *args):
        (folder / "ids.int32").write_bytes(b"1234")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_store, "_write", die)
        with pytest.raises(KeyboardInterrupt):
            open_store(rows, counting())
    assert_equal_batches(*both(rows, processor(), [0, 1, 2, 3]))
    assert [path.name for path in cache.iterdir() if path.is_dir() and path.suffix != ".part"]


def test_of_two_at_once_one_waits_for_the_other(rows):
    made = [counting(), counting()]
    start = threading.Barrier(2)

    def run(own):
        start.wait()
        open_store(rows, own)

    threads = [threading.Thread(target=run, args=(own,)) for own in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(own.count for own in made) == [0, 10]


def test_a_cache_without_room_is_an_error_that_says_what_to_do(rows, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_store, "_write", fail)
    with pytest.raises(DataError, match=r"No space left .* HF_DATASETS_CACHE .* token_cache"):
        open_store(rows, counting())


def test_a_worker_maps_the_files_by_itself(rows):
    store = open_store(rows, processor())
    again = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 500
    numbers = np.arange(5)
    assert np.array_equal(again.tokens(numbers).ids, store.tokens(numbers).ids)
