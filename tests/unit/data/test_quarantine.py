"""Bad rows are left out before batches are made: the same everywhere, up to a cap."""

import json

import pytest

from tests.own_encoder import PictureProcessor
from tests.pictures import COLORS, flipped_png, mode_rows, picture, write_pictures
from tests.tiny import write_rows
from vembed.data import Collator, ImageRules, Quarantine, build_dataloader, load_dataset_records
from vembed.errors import ConfigError, DataError

NAMES = list(COLORS)


def load(path, quarantine, mode="t2i", **kwargs):
    return load_dataset_records(path, retrieval_mode=mode, quarantine=quarantine, **kwargs)


@pytest.fixture
def path(tmp_path):
    """Rows 1 to 8 with uneven negatives; the images of rows 3 and 6 are missing and cut."""
    write_pictures(tmp_path)
    rows = mode_rows("t2i", negatives=(0,) * 8)
    rows[2]["positives"] = ["gone.png"]
    (tmp_path / "cut.png").write_bytes(picture()[:-15])
    rows[5]["negatives"] = ["red.png", "cut.png"]
    return write_rows(tmp_path / "rows.jsonl", rows)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_left_out_and_written_down(path, tmp_path, streaming):
    quarantine = Quarantine(3)
    dataset = load(path, quarantine, streaming=streaming)
    quarantine.write(tmp_path / "quarantine.jsonl")
    for _ in range(2):  # a second pass over a stream writes nothing twice
        lines = [int(record.where.rpartition(":")[2]) for record in dataset]
        assert lines == [1, 2, 4, 5, 7, 8]
        assert [record.row_index for record in dataset] == list(range(6))
    first, second = lines_of(tmp_path / "quarantine.jsonl")
    assert first == {
        "where": f"{path}:3",
        "field": "positive[0]",
        "reason": f"there is no such image file. Received: 'gone.png', looked for in '{tmp_path}'.",
    }
    assert (second["where"], second["field"]) == (f"{path}:6", "negative[1]")
    assert "breaks off" in second["reason"]
    assert [vars(record) for record in quarantine.records] == [first, second]
    assert dataset.fields >= {"query", "positive"}
    if not streaming:
        assert len(dataset) == 6
        assert dataset[-1].where == f"{path}:8"
        assert [r.where for r in dataset.select([5, 2])] == [f"{path}:8", f"{path}:4"]


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_are_full_and_the_same_for_all_processes_and_workers(path, streaming):
    def batches(process, processes, workers):
        loader = build_dataloader(
            load(path, Quarantine(3), streaming=streaming), Collator(PictureProcessor()),
            batch_size=4 // processes, seed=1, process_index=process, process_count=processes,
            num_workers=workers,
        )  # fmt: skip
        return [batch["row_index"] for batch in loader]

    one = batches(0, 1, 0)
    assert [len(rows) for rows in one] == [4, 2]
    assert batches(0, 1, 2) == one
    pairs = zip(batches(0, 2, 0), batches(1, 2, 2), strict=True)
    assert [first + second for first, second in pairs] == one


def test_the_first_worker_writes_for_all(path, tmp_path):
    quarantine = Quarantine(3)
    dataset = load(path, quarantine, streaming=True)
    quarantine.write(tmp_path / "quarantine.jsonl")
    loader = build_dataloader(
        dataset, Collator(PictureProcessor()), batch_size=2, seed=1, num_workers=2
    )
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert len(list(loader)) == 3
        assert len(lines_of(tmp_path / "quarantine.jsonl")) == 2


def test_other_rows_go_there_too(tmp_path):
    path = tmp_path / "f.jsonl"
    good = '{"query": "q", "positive": "p", "score": 1}'
    path.write_text("\n".join([good, '{"query": ""}', "{broken", good.replace("1", '"x"'), good]))
    quarantine = Quarantine(0.7)
    dataset = load(path, quarantine, "t2t")
    assert [record.where for record in dataset] == [f"{path}:1", f"{path}:5"]
    assert [record.field for record in quarantine.records] == ["query", "line", "score"]
    # The fields and labels are those of the rows that are left.
    assert dataset.fields == {"query", "positive", "score"}


def test_rows_of_a_stream_that_lack_a_field(tmp_path):
    rows = [{"query": "q", "positive": "p", "score": 1}, {"query": "q", "positive": "p"}]
    quarantine = Quarantine(1)
    stream = load(write_rows(tmp_path / "f.jsonl", rows), quarantine, "t2t", streaming=True)
    assert len(list(stream)) == 1
    assert "rows of a stream must have what its first" in quarantine.records[0].reason


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("cap", "bad", "allowed"), [(2, 2, True), (2, 3, False), (0.3, 3, True), (0.3, 4, False)]
)
def test_the_cap(tmp_path, streaming, cap, bad, allowed):
    rows = [{"query": "" if i < bad else "q", "positive": "p"} for i in range(10)]
    path = write_rows(tmp_path / "f.jsonl", rows)

    def read():
        return len(list(load(path, Quarantine(cap), "t2t", streaming=streaming)))

    if allowed:
        assert read() == 10 - bad
        return
    with pytest.raises(DataError) as caught:
        read()
    at_most = "2" if cap == 2 else "30.00% of the rows"
    message = str(caught.value)
    assert message.startswith(f"{path}: max_bad_records: at most {at_most} may be bad.")
    assert f"Received: {bad} of " in message
    assert f"{path}:1: query: must not be empty" in message
    assert f"{path}:{bad}: query: must not be empty" in message
    if not streaming:
        assert f"set max_bad_records: {bad}" in message


def test_a_share_of_a_small_set_says_which_number_would_do(tmp_path):
    """A hundredth of 40 rows is less than one row."""
    rows = [{"query": "" if i < 3 else f"q{i}", "positive": "p"} for i in range(40)]
    path = write_rows(tmp_path / "f.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load(path, Quarantine(), "t2t")
    assert "To leave these rows out, set max_bad_records: 3." in str(caught.value)
    assert len(load(path, Quarantine(3), "t2t")) == 37


def test_the_cap_of_a_stream_is_looked_at_on_the_way(tmp_path):
    rows = [{"query": "q" if i < 990 else "", "positive": "p"} for i in range(5000)]
    path = write_rows(tmp_path / "f.jsonl", rows)
    stream = load(path, Quarantine(0.02), "t2t", streaming=True)
    with pytest.raises(DataError, match=r"at most 2.00% of the rows may be bad.\n?.* of 1,0"):
        list(stream)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_bad_rows_only(tmp_path, streaming):
    path = write_rows(tmp_path / "f.jsonl", [{"query": ""}] * 3)
    with pytest.raises(DataError, match=r"f\.jsonl: no row of it can be used"):
        list(load(path, Quarantine(10), "t2t", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_read_past_ends_the_run(tmp_path, streaming):
    path = tmp_path / "f.csv"
    path.write_text('query,positive\na,b\n"c"x,d\ne,f\n')
    with pytest.raises(DataError, match=r"f\.csv:3: line: must be a row of cells"):
        list(load(path, Quarantine(10), "t2t", streaming=streaming))
    with pytest.raises(DataError, match="column_mapping: query is mapped to 'ask'"):
        list(load(path, Quarantine(10), "t2t", column_mapping={"query": "ask"}))


def test_damage_in_the_middle_needs_decoding(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "flipped.png").write_bytes(flipped_png())
    rows = mode_rows("i2i", negatives=(0,) * 8)
    rows[4]["query"] = "flipped.png"
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert len(load(path, Quarantine(1), "i2i")) == 8
    quarantine = Quarantine(1)
    assert len(load(path, quarantine, "i2i", images=ImageRules(check="decode"))) == 7
    assert quarantine.records[0].where == f"{path}:5"


def test_an_image_that_is_mended_comes_back(path, tmp_path):
    assert len(load(path, Quarantine(3))) == 6
    assert len(load(path, Quarantine(3))) == 6
    (tmp_path / "gone.png").write_bytes(picture())
    dataset = load(path, Quarantine(3))
    assert [int(record.where.rpartition(":")[2]) for record in dataset] == [1, 2, 3, 4, 5, 7, 8]
    (tmp_path / "cut.png").write_bytes(picture())
    assert len(load(path, Quarantine(3))) == 8


def test_caps_that_cannot_be_meant():
    for cap in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="max_bad_records: must be above 0"):
            Quarantine(cap)
