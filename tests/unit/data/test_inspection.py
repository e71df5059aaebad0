from tests.tiny import wordpiece_tokenizer, write_rows
from vembed.data import inspect_records, load_dataset_records, token_counter
from vembed.data.inspection import Finding

ROWS = [
    {"query": "red", "positive": "the apple is red", "negatives": ["cold ice"]},
    {"query": "blue sea", "positive": ["deep", "ocean"]},
    {"query": "red", "positive": "ocean"},
    {"query": "red", "positive": "the apple is red", "negatives": ["cold ice"]},
    {"query": "snow", "positive": ["snow", "ice"], "negatives": ["ice"]},
]


class Processor:
    tokenizer = wordpiece_tokenizer()

    def prompt_for(self, role):
        return {"query": "ask ", "document": ""}[role]


def inspect(path, **kwargs):
    dataset = load_dataset_records(path)
    counter = token_counter(Processor())
    return inspect_records(dataset, counter, max_seq_length=5, **kwargs)


def test_what_is_there_twice(tmp_path):
    path = write_rows(tmp_path / "f.jsonl", ROWS)
    found = inspect(path)
    assert found.rows == 5
    assert found.field_counts == {"query": 5, "positive": 5, "negative": 3}
    assert found.label_count == 0
    assert found.duplicate_rows == Finding(1, f"{path}:4")
    assert found.repeated_queries == Finding(2, f"{path}:3")
    assert found.repeated_positives == Finding(2, f"{path}:3")
    assert found.own_positive == Finding(1, f"{path}:5")
    assert found.positive_as_negative == Finding(1, f"{path}:5")


def test_clean_data_has_no_findings(tmp_path):
    found = inspect(write_rows(tmp_path / "f.jsonl", ROWS[:2]))
    findings = (
        found.duplicate_rows,
        found.repeated_queries,
        found.repeated_positives,
        found.own_positive,
        found.positive_as_negative,
    )
    assert findings == (Finding(),) * 5


def test_lengths_are_those_before_truncation_with_prompts(tmp_path):
    path = write_rows(tmp_path / "f.jsonl", ROWS)
    lengths = inspect(path).lengths
    query = lengths["query"]  # [CLS] ask ... [SEP]
    assert query.count == 5
    assert query.percentiles == {50: 4, 90: 5, 99: 5, 100: 5}
    assert query.truncated == 0
    assert lengths["positive"].count == 7
    assert lengths["positive"].percentiles[100] == 6
    assert lengths["positive"].truncated == 2
    assert lengths["negative"].count == 3


def test_prompts_of_the_data_set_win(tmp_path):
    path = str(write_rows(tmp_path / "f.jsonl", ROWS[:1]))
    spec = {"path": path, "query_prompt": "", "document_prompt": "answer with the text "}
    lengths = inspect(spec).lengths
    assert lengths["query"].percentiles[100] == 3
    assert lengths["positive"].percentiles[100] == 10


def test_histogram_counts_every_item_once(tmp_path):
    rows = [{"query": " ".join(["a"] * n), "positive": "b"} for n in (1, 5, 6, 13, 29)]
    query = inspect(write_rows(tmp_path / "f.jsonl", rows)).lengths["query"]
    # With [CLS], ask and [SEP]: 4, 8, 9, 16, 32 tokens.
    assert query.bin_edges == [0, 8, 16, 32, 64]
    assert query.bin_counts == [1, 2, 1, 1]


def test_labels_are_counted_and_progress_is_told(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 3} for i in range(600)]
    told = []
    found = inspect(write_rows(tmp_path / "f.jsonl", rows), on_progress=told.append)
    assert found.label_count == 3
    assert found.field_counts == {"query": 600, "label": 600}
    assert "positive" not in found.lengths
    assert told == [256 / 600, 512 / 600, 1.0]
