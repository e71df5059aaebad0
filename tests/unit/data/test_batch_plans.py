"""Global batches: what each plan promises, and that nothing but rows, seed and epoch decides."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import write_rows
from vembed.data import (
    BATCH_SAMPLERS,
    StatelessBatchSampler,
    build_batch_plan,
    build_dataloader,
    load_dataset_records,
)
from vembed.data.batch_plans import _Deck, random_order
from vembed.data.dataset import RowContents
from vembed.errors import ConfigError


@dataclass
class Rows:
    """As much of a data set as plans look at: label, source and contents of each row."""

    of_rows: list[tuple[int, int, tuple[int, ...]]]
    fields: frozenset[str] = field(default=frozenset({"query", "label"}))

    def __len__(self):
        return len(self.of_rows)

    @property
    def labels(self):
        return np.array([label for label, _, _ in self.of_rows])

    @property
    def source_numbers(self):
        return np.array([source for _, source, _ in self.of_rows])

    @property
    def contents(self):
        ids = [ids for _, _, ids in self.of_rows]
        return RowContents(np.concatenate(ids), np.cumsum([len(of_row) for of_row in ids]))


row = st.tuples(
    st.integers(0, 4), st.integers(0, 2), st.lists(st.integers(0, 40), min_size=1, max_size=3)
)
any_rows = st.lists(row, min_size=8, max_size=80).map(
    # Two rows of one label, so that every plan can be built.
    lambda rows: Rows([*rows, (9, 0, [98]), (9, 1, [99])])
)
any_plan = st.sampled_from(sorted(BATCH_SAMPLERS))
numbers = {"size": st.integers(2, 24), "seed": st.integers(0, 9), "epoch": st.integers(0, 3)}


def batches_of(name, rows, size, seed=0, epoch=0, **kwargs):
    plan = build_batch_plan(name, rows, size, seed=seed, **kwargs)
    batches = list(plan.batches(epoch))
    assert len(batches) == len(plan)
    return batches


@settings(max_examples=150, deadline=None)
@given(name=any_plan, rows=any_rows, drop_last=st.booleans(), **numbers)
def test_any_plan(name, rows, drop_last, size, **when):
    batches = batches_of(name, rows, size, drop_last=drop_last, **when)
    assert batches == batches_of(name, rows, size, drop_last=drop_last, **when)
    when["epoch"] += 1
    # As many in every epoch, none empty, none too large, and no row twice in one.
    assert len(batches) == len(batches_of(name, rows, size, drop_last=drop_last, **when))
    assert all(0 < len(batch) <= size for batch in batches)
    assert all(len(set(batch)) == len(batch) for batch in batches)
    if name != "class_balanced":
        assert max(Counter(number for batch in batches for number in batch).values(), default=1) < 2


@settings(max_examples=60, deadline=None)
@given(name=any_plan, rows=any_rows, processes=st.integers(1, 4), start=st.integers(0, 3))
def test_processes_share_out_the_same_batches_from_any_start(name, rows, processes, start):
    plan = build_batch_plan(name, rows, 4 * processes, seed=3)
    shares = []
    for process in range(processes):
        sampler = StatelessBatchSampler(
            len(rows), 4, seed=3, process_index=process, process_count=processes, plan=plan
        )
        sampler.set_epoch(1, start_batch=start)
        shares.append(list(sampler))
    together = [sum(parts, []) for parts in zip(*shares, strict=True)]
    assert together == batches_of(name, rows, 4 * processes, seed=3, epoch=1)[start:]


@pytest.mark.parametrize("name", BATCH_SAMPLERS)
def test_seed_and_epoch_change_the_batches(name):
    rows = Rows([(n % 5, n % 2, (n,)) for n in range(40)])
    seen = {repr(batches_of(name, rows, 8, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(seen) == 9


@settings(max_examples=150, deadline=None)
@given(rows=any_rows, **numbers)
def test_no_content_is_in_two_rows_of_a_batch(rows, size, seed, epoch):
    for batch in batches_of("no_duplicates", rows, size, seed, epoch):
        contents = [content for number in batch for content in set(rows.of_rows[number][2])]
        assert len(set(contents)) == len(contents)


def test_rows_without_a_common_content_are_all_used_and_batches_full():
    rows = Rows([(0, 0, (n,)) for n in range(21)])
    assert sorted(map(len, batches_of("no_duplicates", rows, 4))) == [1, 4, 4, 4, 4, 4]


def test_what_fits_nowhere_is_left_out_and_said(caplog):
    rows = Rows([(0, 0, (7,))] * 9)
    assert list(map(len, batches_of("no_duplicates", rows, 3))) == [1, 1, 1]
    assert "leaves 6 of 9 rows out" in caplog.text


def test_few_duplicates_leave_no_row_out():
    rows = Rows([(0, 0, (n // 2,)) for n in range(400)])
    used = [number for batch in batches_of("no_duplicates", rows, 10) for number in batch]
    assert len(used) >= 396


@settings(max_examples=100, deadline=None)
@given(rows=any_rows, **numbers)
def test_a_batch_is_of_one_data_set(rows, size, seed, epoch):
    batches = batches_of("homogeneous", rows, size, seed, epoch)
    assert all(len({rows.of_rows[number][1] for number in batch}) == 1 for batch in batches)
    assert sorted(number for batch in batches for number in batch) == list(range(len(rows)))


def test_data_sets_come_in_turns():
    rows = Rows([(0, int(n >= 40), (n,)) for n in range(80)])
    sources = [rows.of_rows[batch[0]][1] for batch in batches_of("homogeneous", rows, 4)]
    assert sources != sorted(sources)


@settings(max_examples=100, deadline=None)
@given(rows=any_rows, samples=st.integers(2, 5), **numbers)
def test_a_class_has_some_samples_in_a_batch_or_none(rows, samples, size, seed, epoch):
    sizes = Counter(label for label, _, _ in rows.of_rows)
    usable = {label for label, count in sizes.items() if count > 1}
    batches = batches_of("class_balanced", rows, size, seed, epoch, samples_per_class=samples)
    for batch in batches:
        counts = Counter(rows.of_rows[number][0] for number in batch)
        assert set(counts) <= usable
        if sum(min(samples, sizes[label]) for label in usable) >= size:
            # Enough for one round: no label more often than wanted, or one more at the end.
            assert sum(count > samples for count in counts.values()) <= 1
            assert max(counts.values()) <= samples + 1


def test_balanced_classes_are_seen_equally_often():
    """Ninety rows of one label and ten of nine others: as often each, and rare rows repeat."""
    rows = Rows([(0, 0, (n,)) for n in range(90)] + [(1 + n % 5, 0, (n,)) for n in range(10)])
    batches = batches_of("class_balanced", rows, 12, samples_per_class=2)
    assert all(set(Counter(rows.of_rows[n][0] for n in b).values()) == {2} for b in batches)
    plain = batches_of("random", rows, 12)
    assert any(1 in Counter(rows.of_rows[n][0] for n in b).values() for b in plain)


def test_no_label_of_a_batch_stands_alone():
    rows = Rows([(n % 10, 0, (n,)) for n in range(100)])
    for batch in batches_of("class_balanced", rows, 9, samples_per_class=4):
        assert min(Counter(rows.of_rows[number][0] for number in batch).values()) > 1


def test_a_small_batch_has_two_labels():
    rows = Rows([(n % 10, 0, (n,)) for n in range(100)])
    for batch in batches_of("class_balanced", rows, 4, samples_per_class=4):
        assert list(Counter(rows.of_rows[number][0] for number in batch).values()) == [2, 2]


def test_rows_alone_with_their_label_are_left_out_and_said(caplog):
    rows = Rows([(0, 0, (1,)), (0, 0, (2,)), (1, 0, (3,))])
    assert sorted(batches_of("class_balanced", rows, 2)[0]) == [0, 1]
    assert "1 rows are alone" in caplog.text


@pytest.mark.parametrize(
    ("name", "rows", "kwargs", "message"),
    [
        ("balanced", [(0, 0, (1,))], {}, "batch_sampler: unknown name 'balanced'"),
        ("class_balanced", [(0, 0, (1,)), (1, 0, (2,))], {}, "two rows of some label"),
        ("class_balanced", [(0, 0, (1,))] * 2, {"samples_per_class": 1}, "at least 2"),
        ("class_balanced", [(0, 0, (1,))] * 2, {"samples": 1}, "it accepts.*samples_per_class"),
        ("homogeneous", [(0, 0, (1,))], {"samples_per_class": 4}, "homogeneous.*it accepts"),
    ],
)
def test_what_does_not_fit_is_refused(name, rows, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        build_batch_plan(name, Rows(rows), 2, seed=0, **kwargs)


# --- on real rows


def load(folder, *sets, **kwargs):
    paths = []
    for number, rows in enumerate(sets):
        paths.append(str(folder / f"{number}.jsonl"))
        write_rows(folder / f"{number}.jsonl", rows)
    return load_dataset_records(paths, **kwargs)


def rows_of(records):
    return {"query_rows": records}


def test_plans_know_what_a_data_set_holds(tmp_path):
    first = [{"query": f"q{n}", "positive": f"p{n % 3}", "label": f"l{n % 2}"} for n in range(6)]
    second = [{"query": "q0", "positive": ["a", "b"], "negatives": ["c"], "label": "l9"}]
    dataset = load(tmp_path, first, second).select([6, 0, 3, 4])
    assert dataset.source_numbers.tolist() == [1, 0, 0, 0]
    assert [dataset.label_names[number] for number in dataset.labels] == ["l9", "l0", "l1", "l0"]
    assert dataset.labels.tolist() == [record.label for record in dataset]
    contents = np.split(dataset.contents.ids, dataset.contents.ends[:-1])
    for record, ids in zip(dataset, contents, strict=True):
        items = (record.query, *record.positives, *record.negatives)
        assert ids.tolist() == [item.content_id for item in items]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_makes_the_batches_of_its_plan(tmp_path, workers):
    rows = [{"query": f"q{n}", "positive": f"p{n % 4}"} for n in range(24)]
    dataset = load(tmp_path, rows)
    arguments = {"batch_size": 2, "seed": 5, "batch_sampler": "no_duplicates"}
    shares = [
        [
            batch["query_rows"]
            for batch in build_dataloader(
                dataset, rows_of, process_index=p, process_count=2, num_workers=workers, **arguments
            )
        ]
        for p in range(2)
    ]
    together = [sum(parts, []) for parts in zip(*shares, strict=True)]
    numbers = [[record.row_index for record in batch] for batch in together]
    assert numbers == batches_of("no_duplicates", dataset, 4, seed=5)
    assert all(len({r.positives for r in batch}) == len(batch) for batch in together)


def test_a_deck_gives_everything_once_before_anything_again():
    deck, drawn = _Deck(range(5), (1, 2)), []
    for _ in range(3):
        drawn.append([deck.draw(()) for _ in range(5)])
    assert drawn == [random_order(5, 1, 2, shuffle).tolist() for shuffle in range(3)]
    first, second = random_order(5, 1, 2, 3).tolist()[:2]
    assert deck.draw({first}) == second
    assert deck.draw(()) == first


def test_a_deck_of_many_is_drawn_in_linear_time():
    deck, started = _Deck(range(300_000), (1,)), time.process_time()
    for _ in range(deck.size):
        deck.draw(())
    assert time.process_time() - started < 5


def test_a_stream_cannot_be_planned(tmp_path):
    dataset = load(tmp_path, [{"query": "q", "positive": "p"}], streaming=True)
    with pytest.raises(ConfigError, match="class_balanced must know all rows"):
        build_dataloader(dataset, rows_of, batch_size=1, seed=0, batch_sampler="class_balanced")


def test_labels_of_another_data_set(tmp_path):
    train = load(tmp_path, [{"text": "a", "label": name} for name in ("x", "y", "z")])
    (tmp_path / "other").mkdir()
    rows = [{"text": "b", "label": "z"}, {"text": "c", "label": "x"}]
    validation = load(tmp_path / "other", rows)
    assert [record.label for record in validation] == [1, 0]
    assert [record.label for record in validation.with_labels_of(train)] == [2, 0]
    with pytest.raises(ValueError, match="'y' is not among the labels of the training rows"):
        train.with_labels_of(validation)
