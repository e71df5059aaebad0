"""Rows from a stranger: each bad one is refused in one message with its line, and nothing else."""

import gzip
import json
import os
import random
import subprocess
import sys
import tarfile
from io import BytesIO

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.hostile import BadLine, bad_image_lines, bad_lines, good_row, mutated, nested
from tests.pictures import picture
from tests.tiny import PAIRS, write_beir
from vembed.data import Quarantine, load_dataset_records
from vembed.data.problems import describe
from vembed.errors import DataError, exit_status

LINES = [*bad_lines(1000, seed=7), *bad_image_lines(200, seed=8)]
GOOD = {"t2t": json.dumps(PAIRS[0]), "t2i": json.dumps({"query": "red", "positive": "x.png"})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an image, and with everything beside it that is none."""
    folder = tmp_path_factory.mktemp("rows")
    (folder.parent / "outside.png").write_bytes(picture())
    (folder / "x.png").write_bytes(picture())
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    for name, target in {
        "link-out.png": "../outside.png",
        "link-loop.png": "link-loop.png",
        "link-dangling.png": "none",
        "link-folder": "..",
        "link-zero": "/dev/zero",
    }.items():
        (folder / name).symlink_to(target)
    return folder


def read(path, mode="t2t", **options) -> int:
    """What the programs do: all rows, or an error that ends them."""
    quarantine = Quarantine(10**6) if mode != "t2t" else None
    rows = load_dataset_records(str(path), retrieval_mode=mode, quarantine=quarantine, **options)
    list(rows)
    if quarantine is not None and quarantine.records:
        (record,) = quarantine.records
        raise DataError(f"{record.where}: {record.field}: {record.reason}")
    return 0


def refusals(line: BadLine, folder, capsys) -> list[str]:
    """What is wrong with how a file is refused whose second line is bad."""
    path = folder / "rows.jsonl"
    good = GOOD[line.mode].encode()
    path.write_bytes(b"\n".join([good, line.raw, good, b""]))
    try:
        status = exit_status(lambda: read(path, line.mode, streaming=True))
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        return [f"{line}: {error!r}"]
    said = capsys.readouterr().err
    wrong = []
    if status != 2:
        wrong.append(f"{line}: status {status}")
    if not said.startswith(f"vembed: {path}:2: ") or said.count(": ") < 3:
        wrong.append(f"{line}: does not say where: {said[:200]}")
    if len(said) > 2000:
        wrong.append(f"{line}: {len(said)} characters")
    return wrong


def test_a_thousand_bad_rows_are_refused_with_their_line(folder, capsys):
    assert len(LINES) == 1200
    wrong = [complaint for line in LINES for complaint in refusals(line, folder, capsys)]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(LINES)}", *wrong[:20]])


def test_good_rows_of_the_same_maker_are_taken(tmp_path):
    draw = random.Random(7)
    rows = [good_row(draw) for _ in range(200)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "\r\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert len(load_dataset_records(str(path))) == 200


def test_bad_rows_among_good_ones_are_all_found_and_only_they(tmp_path):
    """Those behind which a file can be read on, in one file, as it is stored."""
    bad = [line.raw for line in LINES if line.mode == "t2t" and b"\n" not in line.raw]
    good = json.dumps(PAIRS[0]).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(part for raw in bad for part in (raw, good)))
    quarantine = Quarantine(len(bad))
    rows = load_dataset_records(str(path), quarantine=quarantine)
    assert len(rows) == len(bad)
    places = [int(record.where.rpartition(":")[2]) for record in quarantine.records]
    assert places == list(range(1, 2 * len(bad), 2))


@pytest.mark.parametrize("kind", "[{")
def test_any_depth_is_refused(tmp_path, kind):
    """Python gives up at a depth that hangs on how deep the program itself is: try them all."""
    path = tmp_path / "rows.jsonl"
    for depth in range(800, 1010):
        path.write_text(json.dumps(PAIRS[0] | {"query": "?"}).replace('"?"', nested(depth, kind)))
        with pytest.raises(DataError, match=r"rows.jsonl:1: (query|line): "):
            read(path, streaming=True)


def test_any_depth_can_be_told():
    deep_list, deep_object = [], {}
    for _ in range(100_000):
        deep_list, deep_object = [deep_list], {"a": deep_object}
    assert describe(deep_list).endswith("(a list of 1)")
    assert describe({"k" * 10**6: deep_object, "b": "x" * 10**6}).startswith("{'kkk")
    assert len(describe([list(range(10**6))])) < 120


def _write(table, path):
    pyarrow.parquet.write_table(table, path)
    return path


NOT_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(),
    2,
    [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xffa")],
)
FAR_AWAY = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))
WORDS = pyarrow.array(["a", "b"])


@pytest.mark.parametrize(
    ("columns", "where"),
    [
        ({"query": WORDS, "positive": NOT_UTF8}, "{}:1: positive: "),
        ({"query": FAR_AWAY, "positive": WORDS}, "{}:1: query: "),
        ({"query": WORDS, "positive": WORDS, "score": FAR_AWAY}, "{}:1: score: "),
        ({"query": WORDS, "positive": pyarrow.array([b"\xff", b"a"])}, "{}:1: positive: "),
        ({"query": WORDS, "positive": WORDS, "score": pyarrow.array([float("nan"), 1])}, "{}:1: "),
    ],
)
@pytest.mark.parametrize("ending", [".parquet", ""])
def test_cells_of_arrow_that_python_has_no_form_for(tmp_path, columns, where, ending):
    path = tmp_path / f"rows{ending}"
    if ending:
        _write(pyarrow.table(columns), path)
    else:
        datasets.Dataset(pyarrow.table(columns)).save_to_disk(str(path))
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(where.format(path))


def test_an_unreadable_cell_that_nobody_needs_is_no_matter(tmp_path):
    table = pyarrow.table({"query": WORDS, "positive": WORDS, "made": FAR_AWAY})
    assert read(_write(table, tmp_path / "rows.parquet")) == 0


def test_two_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([WORDS] * 3, names=["query", "positive", "positive"])
    with pytest.raises(DataError, match=r"rows.parquet: columns: column names must differ"):
        read(_write(table, tmp_path / "rows.parquet"))


def _files():
    """The same rows in every format."""
    lines = "".join(f"{json.dumps(pair)}\n" for pair in PAIRS).encode()
    rows = [f'{pair["query"]},"{pair["positive"]}"' for pair in PAIRS]
    cells = "\n".join(["query,positive", *rows]).encode()
    parquet, shard = BytesIO(), BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), parquet)
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for number, pair in enumerate(PAIRS[:6]):
            for name, text in (("query.txt", pair["query"]), ("json", json.dumps(pair))):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(text)
                tar.addfile(member, BytesIO(text.encode()))
    return {
        "jsonl": lines, "jsonl.gz": gzip.compress(lines), "csv": cells,
        "tsv": cells.replace(b",", b"\t"), "parquet": parquet.getvalue(), "tar": shard.getvalue(),
    }  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet", "tar"])
def test_damaged_files_are_read_or_refused(tmp_path, ending):
    """Of a flipped byte nobody can say that it must show; that nothing else happens, one can."""
    whole, draw, path = _files()[ending], random.Random(ending), tmp_path / f"rows.{ending}"
    said = []
    for _ in range(100):
        path.write_bytes(mutated(whole, draw))
        try:
            read(path, streaming=True)
        except DataError as error:
            said.append(str(error))
    assert len(said) > 30
    assert all(message.startswith(str(path)) for message in said)


@pytest.mark.parametrize("kind", ["arrow", "beir"])
def test_damaged_folders_are_read_or_refused(tmp_path, kind):
    draw, said = random.Random(kind), []
    for number in range(30):
        folder = tmp_path / str(number)
        if kind == "beir":
            write_beir(folder)
        else:
            datasets.Dataset.from_list(PAIRS).save_to_disk(str(folder))
        file = draw.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
        file.write_bytes(mutated(file.read_bytes(), draw))
        try:
            read(folder, streaming=True, **({"split": "test"} if kind == "beir" else {}))
        except DataError as error:
            said.append(str(error))
    assert len(said) > 15
    assert all(message.startswith(str(tmp_path)) for message in said)


_READ_IN_LITTLE_MEMORY = """
import resource, sys
from vembed.data.reading import read_csv, read_jsonl
from vembed.data.problems import RowProblem
path = sys.argv[1]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = read_csv(path, ",") if path.endswith(".csv") else read_jsonl(path)
last = list(rows)[-1]
assert isinstance(last.values, RowProblem), last
print(last.line, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    ("name", "line"), [("long.jsonl", 2), ("bomb.jsonl.gz", 2), ("long.csv", 2), ("open.csv", 2)]
)
def test_a_line_of_hundreds_of_megabytes_takes_little_memory(tmp_path, name, line):
    """A long line; a gzip file of 300 kB that holds one; a cell whose quote is never closed."""
    path, first = tmp_path / name, b"query,positive\n" if name.endswith("csv") else b"\n"
    block = (b"a" * 1023 + b"\n") * 2**10 if name == "open.csv" else b"a" * 2**20
    with gzip.open(path, "wb", 1) if name.endswith("gz") else path.open("wb") as file:
        file.write(first + b'"')
        for _ in range(300):
            file.write(block)
    command = [sys.executable, "-c", _READ_IN_LITTLE_MEMORY, str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert not found.stderr
    at, kilobytes = map(int, found.stdout.split())
    assert at == line
    assert kilobytes < 256 * 1024, f"{kilobytes / 1024:.0f} MB"
