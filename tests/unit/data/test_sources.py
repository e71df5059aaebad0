import datasets
import pytest

from tests.tiny import write_beir, write_pairs, write_rows
from vembed.data import sources
from vembed.data.sources import find_source
from vembed.errors import ConfigError, DataError


def find(path, split="train", own_split=False, streaming=False):
    return find_source(str(path), split=split, own_split=own_split, streaming=streaming)


@pytest.mark.parametrize("name", ["f.jsonl", "F.JSONL"])
def test_file_is_known_by_its_ending(tmp_path, name):
    path = write_pairs(tmp_path / name, 2)
    source = find(path)
    assert not source.text_cells
    assert not source.has_header
    assert len(list(source.read())) == 2


def test_stamp_changes_when_a_file_is_replaced_by_one_of_the_same_size_and_time(tmp_path):
    import os

    path = write_rows(tmp_path / "f.jsonl", [{"query": "a", "positive": "b"}])
    before = path.stat()
    first = find(path).stamp
    assert find(path).stamp == first
    write_rows(path, [{"query": "c", "positive": "d"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert find(path).stamp != first


def test_arrow_folders(tmp_path):
    rows = datasets.Dataset.from_list([{"query": "q", "positive": "p"}] * 3)
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": rows, "dev": rows.select([0])}).save_to_disk(tmp_path / "dict")
    assert len(list(find(tmp_path / "plain").read())) == 3
    assert len(list(find(tmp_path / "dict", split="dev").read())) == 1
    with pytest.raises(DataError, match="no split 'test'. Splits: 'train', 'dev'"):
        list(find(tmp_path / "dict", split="test").read())
    next((tmp_path / "plain").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="must be a whole folder of datasets.save_to_disk"):
        list(find(tmp_path / "plain").read())


def test_beir_folder(tmp_path):
    source = find(write_beir(tmp_path), split="test")
    assert source.path.endswith("queries.jsonl")
    assert next(source.read()).values["query_text"] == "red apple"


def test_folder_that_is_none_of_these_names_its_files(tmp_path):
    write_pairs(tmp_path / "train.jsonl", 1)
    with pytest.raises(DataError, match=r"Name one of its files: 'train\.jsonl'"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("f.txt", r"ending must be one of \.jsonl, .*Received: '\.txt'"),
        ("f.json", "a .json file is one value: write one object per line"),
        ("f", "ending must be one of"),
    ],
)
def test_unknown_file_types(tmp_path, name, expected):
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=expected):
        find(tmp_path / name)


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: must have rows. Received: an empty file"):
        find(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"no such file or folder. Did you mean .*empty\.jsonl'"):
        find(tmp_path / "emty.jsonl")
    with pytest.raises(DataError, match="nor its folder"):
        find(tmp_path / "nowhere" / "f.jsonl")
    with pytest.raises(DataError, match="it is neither"):
        find("/dev/null")


def test_a_file_has_no_splits(tmp_path):
    path = write_pairs(tmp_path / "f.jsonl", 1)
    with pytest.raises(ConfigError, match="a single file has no splits. Received: 'dev'"):
        find(path, split="dev", own_split=True)


def test_hub_id_that_cannot_be_reached_says_both_readings():
    with pytest.raises(DataError, match=r"no such file.*split 'train' of this data set of the hub"):
        find("nobody/nothing")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_id_goes_through_load_dataset(monkeypatch, streaming):
    rows = [{"query": f"q{i}", "positive": ["p"]} for i in range(250)]
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split))
        dataset = datasets.Dataset.from_list(rows)
        return dataset.to_iterable_dataset(num_shards=3) if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = find("owner/name:pair", split="dev", streaming=streaming)
    assert [(row.line, row.values) for row in source.read()] == list(enumerate(rows, 1))
    assert set(asked) == {("owner/name", "pair", "dev")}
    assert source.path == "owner/name:pair"


@pytest.mark.parametrize("path", ["./owner/name", "/owner/name", "a/b/c", "owner/name.jsonl", "x"])
def test_what_is_no_hub_id_never_asks_the_hub(monkeypatch, path):
    monkeypatch.setattr(sources, "_load_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file"):
        find(path)
