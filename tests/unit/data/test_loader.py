import pickle
import subprocess
import sys

import psutil
import pytest
import torch

from tests.tiny import write_rows
from vembed.data import build_dataloader, load_dataset_records
from vembed.errors import ConfigError, DataError


def rows_of(records):
    return {"row_index": [record.row_index for record in records], "seed": torch.initial_seed()}


def refuse_row_nine(records):
    if any(record.row_index == 9 for record in records):
        raise DataError(f"{records[0].where}: a text gives no token")
    return rows_of(records)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(23)]
    return write_rows(tmp_path_factory.mktemp("rows") / "f.jsonl", rows)


def batches(path, *, streaming=False, epoch=0, start_batch=0, batch_size=4, **kwargs):
    dataset = load_dataset_records(path, streaming=streaming)
    loader = build_dataloader(dataset, rows_of, batch_size=batch_size, seed=1, **kwargs)
    loader.set_epoch(epoch, start_batch=start_batch)
    return [batch["row_index"] for batch in loader]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_do_not_depend_on_workers(path, streaming, shuffle):
    kwargs = {"streaming": streaming, "shuffle": shuffle, "shuffle_buffer_size": 9}
    expected = batches(path, **kwargs)
    assert sorted(sum(expected, [])) == list(range(23))
    assert [len(batch) for batch in expected] == [4, 4, 4, 4, 4, 3]
    assert batches(path, num_workers=2, **kwargs) == expected
    assert batches(path, epoch=1, **kwargs) == expected if not shuffle else True
    if shuffle:
        assert batches(path, epoch=1, **kwargs) != expected
        assert batches(path, epoch=1, num_workers=2, **kwargs) == batches(path, epoch=1, **kwargs)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_two_processes_see_what_one_with_twice_the_batch_sees(path, streaming, drop_last):
    kwargs = {"streaming": streaming, "drop_last": drop_last, "epoch": 2}
    one = batches(path, batch_size=8, **kwargs)
    first, second = (
        batches(path, batch_size=4, process_index=p, process_count=2, **kwargs) for p in range(2)
    )
    assert [a + b for a, b in zip(first, second, strict=True)] == one
    assert len(one) == (2 if drop_last else 3)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_process_without_rows_borrows_one(path, streaming, num_workers):
    dataset = load_dataset_records(path, streaming=streaming)
    last = []
    for process in range(3):
        loader = build_dataloader(
            dataset, rows_of, batch_size=7, seed=1, process_index=process, process_count=3,
            num_workers=num_workers, shuffle=False,
        )  # fmt: skip
        first, second = loader  # 21 rows, and 2 for three processes
        assert "borrowed" not in first
        last.append((second["row_index"], second.get("borrowed", False)))
    lent = 21 if streaming else 0  # a stream has the rows of the batch only
    assert last == [([21], False), ([22], False), ([lent], True)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_beginning_in_the_middle(path, streaming, num_workers):
    whole = batches(path, streaming=streaming, epoch=3)
    kwargs = {"streaming": streaming, "num_workers": num_workers, "epoch": 3}
    assert batches(path, start_batch=3, **kwargs) == whole[3:]


@pytest.mark.parametrize("streaming", [False, True])
def test_epochs_follow_each_other_with_workers_that_stay(path, streaming):
    dataset = load_dataset_records(path, streaming=streaming)
    loader = build_dataloader(dataset, rows_of, batch_size=4, seed=1, num_workers=1)
    seen = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        seen.append([batch["row_index"] for batch in loader])
    assert seen == [batches(path, streaming=streaming, epoch=epoch) for epoch in range(2)]


@pytest.mark.skipif(sys.platform != "linux", reason="who sent a signal is known on Linux only")
def test_workers_go_on_after_a_signal_to_the_whole_job(path):
    """The training process finishes its step, for which it needs rows; it alone ends them."""
    dataset = load_dataset_records(path)
    loader = build_dataloader(dataset, rows_of, batch_size=2, seed=1, num_workers=1)
    it = iter(loader)
    next(it)
    (worker,) = psutil.Process().children()
    for name in ("INT", "TERM", "USR1"):
        # Sent by another process, as a terminal or a cluster does.
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len([*it]) == 11
    assert worker.is_running()
    worker.terminate()
    assert worker.wait(20) == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_worker_is_the_same_error(tmp_path, path, num_workers):
    with pytest.raises(DataError) as caught:
        list(
            build_dataloader(
                load_dataset_records(path), refuse_row_nine, batch_size=4, seed=1,
                num_workers=num_workers, shuffle=False,
            )
        )  # fmt: skip
    assert str(caught.value) == f"{path}:9: a text gives no token"
    broken = tmp_path / "g.jsonl"
    broken.write_text('{"query": "q", "positive": "p"}\n' * 7 + '{"query": "", "positive": "p"}\n')
    loader = build_dataloader(
        load_dataset_records(broken, streaming=True), rows_of, batch_size=2, seed=1,
        num_workers=num_workers, shuffle=False,
    )  # fmt: skip
    seen = []
    with pytest.raises(DataError) as caught:
        seen.extend(batch["row_index"] for batch in loader)
    assert str(caught.value).startswith(f"{broken}:8: query: must not be empty. Received: ''")
    assert "Traceback" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_global_random_state_is_left_alone(path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(path, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_length_is_known_unless_streaming(path):
    arguments = {"batch_size": 4, "seed": 1, "process_count": 2}
    loader = build_dataloader(load_dataset_records(path), rows_of, **arguments)
    assert len(loader) == 3
    assert loader.process_count == loader.batch_sampler.process_count == 2
    stream = load_dataset_records(path, streaming=True)
    loader = build_dataloader(stream, rows_of, **arguments)
    assert loader.process_count == 2
    with pytest.raises(TypeError):
        len(loader)


@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_that_make_no_batch(path, streaming):
    dataset = load_dataset_records(path, streaming=streaming)
    with pytest.raises(ConfigError, match="batch_size"):
        build_dataloader(dataset, rows_of, batch_size=0, seed=1)
