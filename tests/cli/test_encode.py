"""`vembed encode`: row k of the array belongs to line k of the ids, whatever the file was."""

import json

import numpy as np
import pytest

from vembed.cli import main
from vembed.inference import Predictor
from vembed.models import load_encoder
from vembed.quantized_vectors import Ranges, quantize

TEXTS = ["red apple", "deep blue ocean", "red apple", "the old king"]


@pytest.fixture
def encode(tmp_path, tiny_st_path):
    """Runs the command on a file; gives the vectors and their ids."""

    def run(data, *options: str):
        output = tmp_path / "out.npy"
        arguments = ["--model", str(tiny_st_path), "--data", str(data), "--output", str(output)]
        assert main(["encode", *arguments, "--device", "cpu", *options]) == 0
        return np.load(output), (tmp_path / "out.ids.txt").read_text().splitlines()

    return run


@pytest.fixture(scope="module")
def expected(tiny_st_path):
    return Predictor(str(tiny_st_path), device="cpu")


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": [7, 8, 9, 10], "text": TEXTS}), path)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_every_kind_of_table(encode, expected, tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    rows = list(zip(range(7, 11), TEXTS, strict=True))
    if ending == "jsonl":
        write(path, "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in rows))
    elif ending == "parquet":
        parquet(path)
    else:
        separator = "," if ending == "csv" else "\t"
        lines = [["id", "text"], *([str(i), t] for i, t in rows)]
        write(path, "".join(separator.join(line) + "\n" for line in lines))
    vectors, ids = encode(path)
    assert ids == ["7", "8", "9", "10"]
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected.encode(TEXTS), atol=1e-6)
    np.testing.assert_array_equal(vectors[0], vectors[2])


def test_lines_of_text_are_named_by_their_number(encode, expected, tmp_path):
    path = write(tmp_path / "rows.txt", "\ufeff" + "red apple\n\n deep blue ocean\n")
    vectors, ids = encode(path)
    assert ids == ["1", "3"]
    np.testing.assert_allclose(vectors, expected.encode(TEXTS[:2]), atol=1e-6)


def test_columns_role_prompt_and_length(encode, expected, tmp_path):
    rows = [{"title": t, "key": f"k{i}", "id": "no"} for i, t in enumerate(TEXTS)]
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--column", "title", "--id_column", "key")
    vectors, ids = encode(path, *columns, "--role", "query")
    assert ids == ["k0", "k1", "k2", "k3"]
    np.testing.assert_allclose(vectors, expected.encode_query(TEXTS), atol=1e-6)
    assert not np.allclose(vectors, expected.encode(TEXTS), atol=1e-3)
    vectors, _ = encode(path, *columns, "--prompt", "old ", "--no-normalize", "--batch_size", "1")
    plain = expected.encode(TEXTS, prompt="old ", normalize=False)
    np.testing.assert_allclose(vectors, plain, atol=1e-6)
    assert not np.allclose(np.linalg.norm(vectors, axis=1), 1)


def test_more_rows_than_are_held_at_once(encode, expected, tmp_path, monkeypatch):
    from vembed.cli import encode as module

    monkeypatch.setattr(module, "_WINDOW_ROWS", 3)
    path = write(tmp_path / "rows.txt", "".join(f"{t}\n" for t in TEXTS))
    np.testing.assert_allclose(encode(path)[0], expected.encode(TEXTS), atol=1e-6)


def test_it_says_where_the_vectors_are(encode, tmp_path, capsys):
    encode(write(tmp_path / "rows.txt", "red\n"))
    assert f"{tmp_path / 'out.npy'}: 1 text, 1 x 32 float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row",
    [
        ("rows.txt", "", [], "rows.txt: no rows in it"),
        ("no.txt", None, [], "no.txt: cannot be read: No such file or directory"),
        ("rows.txt", b"a\n\xff\n", [], "rows.txt:2: line: must be UTF-8"),
        (
            "rows.jsonl",
            '{"text": "a"}\n{"text": 3}\n',
            [],
            "rows.jsonl:2: text: a text is expected. Rec",
        ),
        (
            "rows.jsonl",
            '{"text": "a"}\n{"text": " "}\n',
            [],
            "rows.jsonl:2: text: must not be empty. R",
        ),
        ("rows.jsonl", '{"text": "a"}\n{"tex\n', [], "rows.jsonl:2: line: must be one JSON object"),
        (
            "rows.jsonl",
            '{"txt": "a"}\n',
            [],
            "no column 'text' (did you mean 'txt'?). Columns: 'txt'. Name one with --column",
        ),
        ("rows.jsonl", '{"text": "a"}\n', ["--id_column", "k"], "Name one with --id_column"),
        ("rows.jsonl", '{"text": "a", "id": "x\\ny"}\n', [], "id: expected an id in one line"),
        ("rows.txt", "a\n", ["--output", "out.bin"], "--output: expected a name that ends in .npy"),
        ("rows.txt", "a\n", ["--output", "/no/where.npy"], "--output: there is no folder '/no'"),
        ("rows.txt", "a\n", ["--batch_size", "0"], "--batch_size: must be at least 1. Received: 0"),
        ("rows.txt", "a\n", ["--model", "/no/model"], "/no/model"),
    ],
)
def test_mistakes_leave_no_file(tmp_path, tiny_st_path, capsys, row):
    name, text, options, message = row
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    fixed = ["--model", str(tiny_st_path), "--data", str(path), "--output", str(tmp_path / "o.npy")]
    assert main(["encode", *fixed, *options]) == 2
    assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir() if file != path] == []


# --- a vector for each token


@pytest.fixture(scope="module")
def late_path(tiny_bert_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("late")
    encoder = load_encoder(str(tiny_bert_path), pooling_method="none", projection_dim=8)
    encoder.save_pretrained(folder)
    return folder


def test_token_vectors_and_where_each_item_begins(late_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vembed.cli.encode._WINDOW_ROWS", 3)
    data, output = write(tmp_path / "rows.txt", "\n".join(TEXTS) + "\n"), tmp_path / "out.npz"
    command = ["encode", "--model", str(late_path), "--data", str(data), "--output", str(output)]
    assert main([*command, "--device", "cpu"]) == 0
    expected = Predictor(late_path, device="cpu").encode(TEXTS)
    with np.load(output) as found:
        vectors, offsets = found["vectors"], found["offsets"]
    assert vectors.dtype == np.float32
    assert offsets.tolist() == [0, *np.cumsum([len(array) for array in expected])]
    for row, array in enumerate(expected):
        np.testing.assert_allclose(vectors[offsets[row] : offsets[row + 1]], array, atol=2e-6)
    assert f"4 texts, {len(vectors)} x 8 float32" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"rows.txt", "out.npz", "out.ids.txt"}


def test_the_file_fits_the_model(late_path, tiny_st_path, tmp_path, capsys):
    data = write(tmp_path / "rows.txt", "red\n")
    for path, ending, fits in [(late_path, ".npy", ".npz"), (tiny_st_path, ".npz", ".npy")]:
        output = tmp_path / f"out{ending}"
        command = ["encode", "--model", str(path), "--data", str(data), "--output", str(output)]
        assert main([*command, "--device", "cpu"]) == 2
        assert f"goes into a {fits} file" in capsys.readouterr().err
        assert not output.exists()


def test_fewer_numbers_in_fewer_bits(encode, expected, tmp_path):
    path = write(tmp_path / "rows.txt", "\n".join(TEXTS))
    whole = expected.encode(TEXTS)
    cut = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True)
    vectors, _ = encode(path, "--truncate_dim", "16")
    np.testing.assert_allclose(vectors, cut, atol=1e-6)
    for precision, kind in (("binary", np.int8), ("ubinary", np.uint8)):
        packed, _ = encode(path, "--truncate_dim", "16", "--precision", precision)
        assert (packed.dtype, packed.shape) == (kind, (4, 2))
        np.testing.assert_array_equal(packed, quantize(cut, precision))


def test_int8_by_the_ranges_of_the_first_rows_or_of_another_call(encode, expected, tmp_path):
    path = write(tmp_path / "rows.txt", "\n".join(TEXTS))
    whole = expected.encode(TEXTS)
    codes, _ = encode(path, "--precision", "int8")
    assert codes.dtype == np.int8
    ranges = Ranges.load(tmp_path / "out.ranges.npy")
    np.testing.assert_allclose(ranges.highest_D, whole.max(0), atol=1e-6)
    assert np.abs(ranges.decode(codes) - whole).max() <= ranges.step_D.max()
    (tmp_path / "out.ranges.npy").rename(tmp_path / "kept.npy")
    one = write(tmp_path / "one.txt", TEXTS[1])
    again, _ = encode(one, "--precision", "int8", "--ranges", str(tmp_path / "kept.npy"))
    assert np.abs(again[0].astype(int) - codes[1]).max() <= 1
    assert not (tmp_path / "out.ranges.npy").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--truncate_dim", "99"], "truncate_dim: expected from 1 to 32"),
        (["--ranges", "kept.npy"], "--ranges: has no use with --precision float32"),
        (["--precision", "int8", "--ranges", "nothing.npy"], "nothing.npy: ranges cannot be read"),
    ],
)
def test_smaller_vectors_that_cannot_be(capsys, tmp_path, tiny_st_path, options, message):
    path = write(tmp_path / "rows.txt", "\n".join(TEXTS))
    arguments = ["--model", str(tiny_st_path), "--data", str(path), "--device", "cpu"]
    assert main(["encode", *arguments, "--output", str(tmp_path / "out.npy"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.npy").exists()


def test_ranges_that_cannot_be_are_told_before_the_model_is_looked_for(capsys, tmp_path):
    path, output = write(tmp_path / "rows.txt", "red\n"), str(tmp_path / "out.npy")
    arguments = ["--model", "./nowhere", "--data", str(path), "--ranges", "kept.npy"]
    assert main(["encode", *arguments, "--output", output]) == 2
    assert "--ranges: has no use" in capsys.readouterr().err
