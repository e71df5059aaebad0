"""The whole road in every mode: rows, training steps and evaluation, with a user's own encoder."""

import json

import pytest

from tests.pictures import COLORS, flipped_png, mode_rows, picture, write_pictures
from tests.tiny import write_rows
from vembed.config import TrainConfig
from vembed.errors import ConfigError, DataError
from vembed.modes import all_modes
from vembed.training.check import check_run
from vembed.training.run import run_training

MODES = [str(mode) for mode in all_modes()]
NAMES = list(COLORS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_pictures(tmp_path_factory.mktemp("modes"))
    for mode in MODES:
        write_rows(folder / f"{mode}.jsonl", mode_rows(mode))
    return folder


def settings(folder, mode, output_dir, **others):
    path = str(folder / f"{mode}.jsonl")
    return {
        "model_name": str(folder),
        "encoder_mode": "tests.own_encoder:load_pictures_encoder",
        "retrieval_mode": mode,
        "data_path": path,
        "holdout_ratio": 0,
        "max_steps": 12,
        "batch_size": 4,
        "lr": 0.1,
        "logging_steps": 1,
        "warmup_ratio": 0,
        "device": "cpu",
        "output_dir": str(output_dir),
        "progress": False,
        "ddp_find_unused_parameters": True,  # t2t trains no pixels
        **others,
    }


def metrics_of(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", MODES)
def test_from_rows_to_metrics(folder, tmp_path, mode):
    path = str(folder / f"{mode}.jsonl")
    run = settings(
        folder, mode, tmp_path, val_data_path=path, eval_steps=20, use_gradient_cache=True,
        max_steps=40, lr=0.03,
    )  # fmt: skip
    run_training(run | {"gradient_cache_chunk_size": 3})
    lines = metrics_of(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 40
    assert losses[-1] < losses[0] / 2
    measured = [line["val_ndcg@10"] for line in lines if "val_ndcg@10" in line]
    assert measured[-1] > 0.9
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_pairs_are_judged_by_labelled_rows(folder, tmp_path, caplog):
    """The loss of pairs has nothing to say about these, the metrics do."""
    images = [row["query"] for row in mode_rows("i2i")]
    rows = [{"image": image, "label": number % 2} for number, image in enumerate(images)]
    path = write_rows(folder / "labelled.jsonl", rows)
    run = settings(folder, "i2i", tmp_path, val_data_path=str(path), eval_steps=6)
    with caplog.at_level("WARNING", logger="vembed"):
        run_training(run)
    assert "its rows have no positive, which loss_type infonce needs" in caplog.text
    validated = [line for line in metrics_of(tmp_path) if "val_knn@1" in line]
    assert [line["step"] for line in validated] == [0, 6, 12]
    assert all("val_loss" not in line for line in validated)


def test_bad_rows_are_left_out_of_a_run(folder, tmp_path, caplog):
    rows = mode_rows("t2i")
    rows[1]["positives"] = ["gone.png"]
    path = write_rows(folder / "bad.jsonl", rows)
    run = settings(folder, "t2i", tmp_path / "run", data_path=str(path))
    with pytest.raises(DataError, match=r"bad\.jsonl:2: positive\[0\]: there is no such image"):
        run_training(run)
    with caplog.at_level("WARNING", logger="vembed"):
        run_training(run | {"on_bad_record": "quarantine", "max_bad_records": 1})
    (line,) = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == f"{path}:2"
    assert "1 rows cannot be used and are left out" in caplog.text
    # Another run in the same place leaves nothing of it behind.
    run_training(run | {"data_path": str(folder / "t2i.jsonl"), "overwrite_output_dir": True})
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()


def test_bad_rows_of_a_stream_are_written_while_it_is_read(folder, tmp_path):
    rows = mode_rows("t2i")
    rows[1]["positives"] = ["gone.png"]
    path = write_rows(folder / "bad-stream.jsonl", rows)
    for num_workers in (0, 1):
        run = settings(
            folder, "t2i", tmp_path / str(num_workers), data_path=str(path), streaming=True,
            on_bad_record="quarantine", max_bad_records=0.2, num_workers=num_workers, max_steps=4,
        )  # fmt: skip
        run_training(run)
        (line,) = (tmp_path / str(num_workers) / "quarantine.jsonl").read_text().splitlines()
        assert json.loads(line)["where"] == f"{path}:2"


def check(run):
    return check_run(TrainConfig.coerce(run), lambda stage, share: None)


@pytest.mark.parametrize("mode", ["t2i", "m2i", "i2t"])
def test_a_check_looks_at_every_image(folder, tmp_path, mode):
    result = check(settings(folder, mode, tmp_path / "out"))
    inspection = result.inspection
    query, document = mode.split("2")
    assert set(inspection.lengths) == {
        role for role, m in (("query", query), ("positive", document), ("negative", document))
        if m != "i"
    }  # fmt: skip
    assert inspection.images["positive" if document != "t" else "query"].widths[50] == 24
    first, second, *_ = result.sample
    assert (first.role, second.role) == ("query", "positive")
    for item, modality in ((first, query), (second, document)):
        assert ("one" in item.text) == (modality != "i")
        assert (item.shapes == {"pixel_values": (3, 4, 4)}) == (modality != "t")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_check_finds_what_the_header_does_not_show(folder, tmp_path, streaming):
    (folder / "flipped.png").write_bytes(flipped_png())
    rows = mode_rows("i2i")
    rows[3]["query"] = rows[5]["query"] = "flipped.png"
    path = write_rows(folder / "flipped.jsonl", rows)
    stream = {"streaming": True, "shuffle_buffer_size": 1} if streaming else {}
    # The step that a check takes does not reach row 4.
    run = settings(folder, "i2i", tmp_path, data_path=str(path), batch_size=2, **stream)
    with pytest.raises(DataError, match=r"flipped\.jsonl:4: query: an image must be whole"):
        check(run)
    tolerant = run | {"on_bad_record": "quarantine", "max_bad_records": 2}
    with pytest.raises(DataError, match="To leave such rows out: .*image_check: decode"):
        check(tolerant)
    result = check(tolerant | {"image_check": "decode"})
    assert [record.where for record in result.bad_records] == [f"{path}:4", f"{path}:6"]


def test_a_check_lists_what_it_needs_to_show_texts(folder, tmp_path):
    run = settings(folder, "t2t", tmp_path, encoder_mode="tests.numerics.two_towers:load")
    with pytest.raises(ConfigError, match="needs tokenizer, prompt_for, which WordHashes has not"):
        check(run)


@pytest.mark.parametrize("key", ["val_data_path", "test_data_path"])
def test_a_check_decodes_what_is_measured_on_too(folder, tmp_path, key):
    (folder / "flipped.png").write_bytes(flipped_png())
    rows = mode_rows("t2i")
    run = settings(folder, "t2i", tmp_path)
    check(run | {key: str(write_rows(folder / "whole.jsonl", rows))})
    rows[3]["positives"] = ["flipped.png"]
    path = write_rows(folder / "damaged.jsonl", rows)
    with pytest.raises(DataError, match=r"damaged\.jsonl:4: positive.*: an image must be whole"):
        check(run | {key: str(path)})


def test_pictures_with_the_same_bytes_are_told(folder, tmp_path):
    (folder / "copy.png").write_bytes(picture("red"))
    rows = mode_rows("i2i", negatives=(0,) * 8)
    rows[6]["query"] = "copy.png"
    path = write_rows(folder / "copies.jsonl", rows)
    inspection = check(settings(folder, "i2i", tmp_path, data_path=str(path))).inspection
    assert inspection.copied_images.count == 1
    assert inspection.copied_images.first == f"{path}:7: query"
    assert inspection.images["query"].formats == {"PNG": 8}


def test_a_folder_of_images_that_is_not_there(folder, tmp_path):
    with pytest.raises(ConfigError, match="image_root: there is no folder 'nowhere'"):
        run_training(settings(folder, "t2i", tmp_path, image_root="nowhere"))
