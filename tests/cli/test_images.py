"""Rows with images at the command line: check, train, evaluate, encode."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.own_encoder import load_pictures_encoder
from tests.pictures import COLORS, flipped_png, mode_rows, write_pictures
from tests.tiny import write_rows
from vembed.cli import main
from vembed.inference import encode_items

NAMES = list(COLORS)
OWN = ("--encoder_mode", "tests.own_encoder:load_pictures_encoder")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures in a folder, which is where commands run; they load the test's own encoder."""
    monkeypatch.chdir(write_pictures(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        "vembed.inference.predictor.load_encoder", lambda path, **_: load_pictures_encoder(path)
    )
    return tmp_path / "data"


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return status, shown.out, shown.err


def test_check_shows_images_texts_and_what_is_left_out(folder, capsys):
    rows = mode_rows("t2i")
    rows[5]["positives"] = ["gone.png"]
    write_rows("rows.jsonl", rows)
    before = sorted(path.name for path in folder.iterdir())
    status, shown, err = run(
        capsys, "check", "--model_name", folder, *OWN, "--data_path", "rows.jsonl",
        "--retrieval_mode", "t2i", "--device", "cpu", "--batch_size", 4,
        "--on_bad_record", "quarantine", "--max_bad_records", "0.2",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "query: 7 texts; tokens: 50 % up to 6" in shown
    assert "positive: 8 images; 8 PNG" in shown
    assert "width: 50 % up to 24" in shown
    assert "all of them can be decoded" in shown
    assert "images with the bytes of another" in shown
    assert "rows that are left out: 1" in shown
    assert "rows.jsonl:6: positive[0]: there is no such image file" in shown
    assert re.search(r"positive +pixel_values 3 x 4 x 4 +'\w+\.png'", shown)
    assert re.search(r"query +6 tokens +\[CLS\] the \w+ one \[SEP\]", shown)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"positives": ["../../etc/passwd"]}, (), "rows.jsonl:2: positives[0]: an image path must"),
        ({"positives": ["http://169.254.169.254/"]}, (), "must be a file, not a URL"),
        ({"positives": ["red.png\0"]}, (), "must not contain NUL characters"),
        ({}, ("--max_image_pixels", 10), "must not have more than 10 pixels"),
        ({}, ("--image_root", "nowhere"), "image_root: there is no folder 'nowhere'"),
        ({}, ("--max_image_pixels", 10**12), "--max_image_pixels: must be at most 178956970"),
        ({}, ("--max_bad_records", 5), "has no use where a bad record ends the run"),
        ({}, ("--retrieval_mode", "t2t", "--image_check", "decode"), "has no image"),
    ],
)
def test_mistakes_end_with_status_2(folder, capsys, row, options, expected):
    rows = mode_rows("t2i")
    rows[1] |= row
    write_rows("rows.jsonl", rows)
    mode = () if "--retrieval_mode" in options else ("--retrieval_mode", "t2i")
    status, _, err = run(
        capsys, "check", "--model_name", folder, *OWN, "--data_path", "rows.jsonl", *mode,
        "--device", "cpu", *options,
    )  # fmt: skip
    assert status == 2
    assert expected in err


@pytest.mark.parametrize("mode", ["t2i", "m2i", "i2m"])
def test_evaluate(folder, capsys, mode):
    write_rows("rows.jsonl", mode_rows(mode))
    arguments = ("evaluate", "--model", folder, "--data", "rows.jsonl", "--json")
    status, shown, _ = run(capsys, *arguments, "--retrieval_mode", mode, "--device", "cpu")
    assert status == 0
    assert 0 < json.loads(shown)["ndcg@10"] <= 1
    status, _, err = run(capsys, *arguments, "--retrieval_mode", mode, "--image_root", "no")
    assert (status, "there is no folder 'no'" in err) == (2, True)


def test_evaluate_fetches_from_named_hosts_only(folder, capsys):
    write_rows("rows.jsonl", [{"query": "a", "positive": "http://b.org/a.png"}])
    arguments = ("evaluate", "--model", folder, "--data", "rows.jsonl", "--retrieval_mode", "t2i")
    status, _, err = run(capsys, *arguments, "--image_hosts", "a.org")
    assert (status, "a host in image_hosts (a.org)" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--max_image_pixels", 10), "must not have more than 10 pixels"),
        (("--max_image_pixels", 0), "--max_image_pixels: must be from 1 to"),
        (("--image_hosts", "http://a.org"), "--image_hosts: expected host or host:port"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "encode"])
def test_image_options_are_those_of_training(folder, capsys, command, options, expected):
    write_rows("rows.jsonl", [{"query": "a", "image": "red.png"}])
    of_command = {
        "evaluate": ("--retrieval_mode", "t2i"),
        "encode": ("--modality", "i", "--output", "out.npy"),
    }
    arguments = (command, "--model", folder, "--data", "rows.jsonl", *of_command[command])
    status, _, err = run(capsys, *arguments, *options)
    assert (status, expected in err) == (2, True), err


@pytest.mark.parametrize("modality", ["i", "m"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_encode(folder, capsys, modality, ending):
    names = NAMES[:3]
    rows = [{"id": n, "text": f"the {n} one", "image": f"{n}.png"} for n in names]
    if ending == "jsonl":
        write_rows("rows.jsonl", rows)
    elif ending == "csv":
        lines = ["id,text,image", *(",".join(row.values()) for row in rows)]
        (folder / "rows.csv").write_text("\n".join(lines))
    else:
        (folder / "rows.txt").write_text("\n".join(row["image"] for row in rows))
    arguments = ("--model", folder, "--data", f"rows.{ending}", "--output", "out.npy")
    status, _, err = run(capsys, "encode", *arguments, "--modality", modality, "--device", "cpu")
    if (modality, ending) == ("m", "txt"):
        assert status == 2
        assert "a line is a text or an image, not both" in err
        return
    assert status == 0
    ids = (folder / "out.ids.txt").read_text().split()
    assert ids == (["1", "2", "3"] if ending == "txt" else names)
    from vembed.images import ImageFolder
    from vembed.modes import Item

    images = [ImageFolder(str(folder)).find(f"{n}.png") for n in names]
    texts = [f"the {n} one" if modality == "m" else None for n in names]
    items = [Item(text, image) for text, image in zip(texts, images, strict=True)]
    expected = encode_items(load_pictures_encoder(""), items, role=None)
    np.testing.assert_allclose(np.load(folder / "out.npy"), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (
            {"image": "gone.png"},
            ("--modality", "i"),
            "rows.jsonl:2: image: there is no such image file",
        ),
        ({"image": "/etc/passwd"}, ("--modality", "i"), "rows.jsonl:2: image: an image must lie"),
        ({"image": "red.png"}, ("--modality", "m"), "rows.jsonl:2: no column 'text'"),
        ({"image": "red.png", "text": " "}, ("--modality", "m"), "rows.jsonl:2: text: must not be"),
        ({"photo": "red.png"}, ("--modality", "i"), "Name one with --image_column"),
        ({"image": "http://b.org/a"}, ("--modality", "i"), "must be a file, not a URL"),
        (
            {"image": "http://b.org/a"},
            ("--modality", "i", "--image_hosts", "a.org"),
            "rows.jsonl:2: image: an image URL must be of a host in image_hosts (a.org)",
        ),
    ],
)
def test_rows_that_cannot_be_encoded(folder, capsys, row, options, expected):
    write_rows("rows.jsonl", [{"image": "red.png", "text": "a"}, row])
    arguments = ("--model", folder, "--data", "rows.jsonl", "--output", "out.npy")
    status, _, err = run(capsys, "encode", *arguments, *options)
    assert status == 2
    assert expected in err
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".out", "out"))]


def test_a_picture_that_one_of_two_processes_cannot_read(vembed, tmp_path):
    folder = write_pictures(tmp_path / "data")
    rows = mode_rows("t2i", negatives=(0,) * 8)
    rows[4]["positives"] = ["flipped.png"]
    (folder / "flipped.png").write_bytes(flipped_png())
    write_rows(folder / "rows.jsonl", rows)
    done = vembed(
        "train", "--model_name", folder, *OWN, "--data_path", "data/rows.jsonl", "--device", "cpu",
        "--retrieval_mode", "t2i", "--num_processes", 2, "--batch_size", 2, "--max_steps", 2,
        "--holdout_ratio", 0, "--output_dir", "run", PYTHONPATH=str(Path(__file__).parents[2]),
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("rows.jsonl:5: positive[0]: an image must be whole") == 1


def test_encode_says_what_it_embedded(folder, capsys):
    write_rows("rows.jsonl", [{"text": f"a {n}", "image": f"{n}.png"} for n in NAMES[:3]])
    arguments = ("encode", "--model", folder, "--data", "rows.jsonl", "--output", "out.npy")
    for modality, said in (
        ("t", "3 texts, "),
        ("i", "3 images, "),
        ("m", "3 texts with their images, "),
    ):
        status, shown, _ = run(capsys, *arguments, "--modality", modality, "--device", "cpu")
        assert (status, f"out.npy: {said}3 x 8 float32" in shown) == (0, True), shown


@pytest.mark.parametrize("ending", ["csv", "txt"])
def test_encode_refuses_names_of_image_files_as_texts(folder, capsys, ending):
    """The paths, embedded as texts, would be vectors that look fine and find nothing."""
    (folder / "photos").mkdir()
    for name in NAMES[:3]:
        (folder / f"{name}.png").rename(folder / "photos" / f"{name}.png")
    lines = [f"photos/{name}.png" for name in NAMES[:3]]
    if ending == "csv":
        lines = ["caption,image", *(f"a picture,{line}" for line in lines)]
    (folder / f"rows.{ending}").write_text("\n".join(lines))
    arguments = ("--model", folder, "--data", f"rows.{ending}", "--output", "out.npy")
    column = ("--column", "image") if ending == "csv" else ()
    status, _, err = run(capsys, "encode", *arguments, *column, "--device", "cpu")
    assert status == 2
    assert f"rows.{ending}: most" in err
    assert "name image files, such as 'photos/red.png'" in err
    assert ("--modality i --image_column image" if ending == "csv" else "--modality i\n") in err
    assert not (folder / "out.npy").exists()
    # The captions beside them, and names of which most are no files, are texts.
    if ending == "csv":
        assert run(capsys, "encode", *arguments, "--column", "caption", "--device", "cpu")[0] == 0
    gone = [line for line in lines if "red" not in line]
    (folder / f"rows.{ending}").write_text("\n".join([*gone, *[lines[-1] + "x"] * 3]))
    assert run(capsys, "encode", *arguments, *column, "--device", "cpu")[0] == 0


# --- names of image files taken for texts, and what a model was trained for


def captions(names=NAMES, column="image"):
    lines = [f"caption,{column}", *(f"the {name} one,{name}.png" for name in names)]
    return "\n".join(lines) + "\n"


def test_check_names_the_mode_that_was_forgotten(folder, capsys):
    (folder / "captions.csv").write_text(captions())
    arguments = ("check", "--model_name", folder, *OWN, "--data_path", "captions.csv")
    status, _, err = run(capsys, *arguments, "--device", "cpu")
    assert status == 2
    assert "captions.csv:2: positive: no column for it, and none for label" in err
    assert "set retrieval_mode: t2i" in err
    assert "your_column" not in err


def test_check_warns_of_names_of_images_as_texts(folder, capsys):
    (folder / "captions.csv").write_text(captions())
    arguments = ("check", "--model_name", folder, *OWN, "--data_path", "captions.csv")
    mapped = ("--column_mapping", "{query: caption, positive: image}", "--device", "cpu",
              "--freeze", "backbone.pixels")  # fmt: skip
    status, shown, err = run(capsys, *arguments, *mapped)
    assert status == 0, err
    assert "data_path: most of the positives are names of image files" in shown
    assert "set retrieval_mode: t2i" in " ".join(shown.split())
    (folder / "captions.csv").write_text(captions().replace(".png", ".png is a picture"))
    assert "names of image files" not in run(capsys, *arguments, *mapped)[1]


def test_evaluate_warns_of_names_of_images_as_texts(folder, capsys):
    (folder / "captions.csv").write_text(captions())
    arguments = ("evaluate", "--model", folder, "--data", "captions.csv", "--device", "cpu")
    mapping = ("--column_mapping", "query=caption", "positive=image")
    status, _, err = run(capsys, *arguments, *mapping)
    assert status == 0
    assert "warning: captions.csv: most of the documents are names of image files" in err
    assert "set retrieval_mode: t2i" in err
    assert "warning" not in run(capsys, *arguments, "--retrieval_mode", "t2i")[2]


def test_evaluate_takes_the_mode_that_the_model_was_trained_in(folder, capsys):
    (folder / "captions.csv").write_text(captions())
    (folder / "vembed_config.json").write_text(json.dumps({"retrieval_mode": "t2i"}))
    arguments = ("evaluate", "--model", folder, "--data", "captions.csv", "--device", "cpu")
    status, shown, err = run(capsys, *arguments, "--json")
    assert (status, "warning" in err) == (0, False)
    given = run(capsys, *arguments, "--json", "--retrieval_mode", "T2I")[1]
    assert json.loads(shown) == json.loads(given)
    # The flag wins.
    status, _, err = run(capsys, *arguments, "--retrieval_mode", "t2t")
    assert (status, "positive: no column for it" in err) == (2, True)
    (folder / "vembed_config.json").write_text("{")
    status, _, err = run(capsys, *arguments)
    assert (status, "vembed_config.json: must be JSON" in err) == (2, True)


@pytest.mark.parametrize("command", ["check", "evaluate", "encode"])
def test_a_folder_of_images_says_what_to_do(folder, capsys, command):
    arguments = {
        "check": ("--model_name", folder, *OWN, "--data_path", folder, "--retrieval_mode", "t2i"),
        "evaluate": ("--model", folder, "--data", folder),
        "encode": ("--model", folder, "--data", folder, "--output", "o.npy", "--modality", "i"),
    }
    status, _, err = run(capsys, command, *arguments[command])
    assert (status, "first line is `caption,image`" in err) == (2, True), err


def test_check_tells_test_pictures_that_are_trained_on(folder, capsys):
    (folder / "train.csv").write_text(captions())
    tested = [*captions(NAMES[:2]).splitlines(), "another caption,blue.png"]
    (folder / "test.csv").write_text("\n".join(tested))
    status, shown, _ = run(
        capsys, "check", "--model_name", folder, *OWN, "--data_path", "train.csv",
        "--retrieval_mode", "t2i", "--device", "cpu", "--test_data_path", "test.csv",
    )  # fmt: skip
    assert status == 0
    told = "2 of 3 pairs, 2 of 3 queries, 3 of 3 documents"
    assert f"test_data_path: test.csv: rows of it are also trained on: {told}" in shown


@pytest.mark.parametrize(
    ("gone", "counted"), [(3, ""), (9, "and 1 more image"), (10, "and 2 more")]
)
def test_encode_names_the_images_that_are_not_there(folder, capsys, gone, counted):
    write_rows("rows.jsonl", [{"image": f"{i}.png"} for i in range(gone)])
    arguments = ("--data", "rows.jsonl", "--output", "o.npy", "--modality", "i")
    status, _, err = run(capsys, "encode", "--model", folder, *arguments)
    assert status == 2
    for number in range(min(gone, 8)):
        where = f"rows.jsonl:{number + 1}: image: there is no such image file."
        assert f"{where} Received: '{number}.png'" in err
    assert err.count("there is no such image file") == min(gone, 8)
    assert counted in err
