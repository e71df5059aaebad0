"""Images from a stranger: each is refused at the row that names it, in little memory."""

import json
import os
import struct
import subprocess
import sys
import zlib

import pytest

from tests.hostile import bad_images
from tests.pictures import picture
from vembed.data import ImageRules, Quarantine, load_dataset_records
from vembed.errors import exit_status

IMAGES = bad_images(seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with all of them, and one that is in order."""
    folder = tmp_path_factory.mktemp("images")
    for name, data in {**IMAGES, "good.png": picture()}.items():
        (folder / name).write_bytes(data)
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(20 * 2**30)
    return folder


def rows_of(folder, name: str):
    path = folder / "rows.jsonl"
    images = ["good.png", name, "good.png"]
    path.write_text("".join(f'{{"query": "a", "positive": "{image}"}}\n' for image in images))
    return path


def read(path, **options) -> int:
    rules = ImageRules(check="decode")
    list(load_dataset_records(str(path), retrieval_mode="t2i", images=rules, **options))
    return 0


@pytest.mark.filterwarnings("error")  # that of Pillow about bombs comes only when it is too late
def test_a_hundred_bad_images_are_refused_with_their_line(folder, capsys):
    assert len(IMAGES) > 120
    wrong = []
    for name in [*IMAGES, "sparse.png"]:
        path = rows_of(folder, name)
        try:
            status = exit_status(lambda path=path: read(path, streaming=True))
        except BaseException as error:  # noqa: BLE001 - that is what is looked for
            wrong.append(f"{name}: {error!r}")
            continue
        said = capsys.readouterr().err
        if status != 2 or not said.startswith(f"vembed: {path}:2: positive") or len(said) > 1000:
            wrong.append(f"{name}: {status}: {said[:300]}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(IMAGES)}", *wrong[:20]])


def test_all_of_them_in_one_quarantine(folder, tmp_path):
    """As rows are stored, with images looked at in threads."""
    path = tmp_path / "rows.jsonl"
    names = [*IMAGES, "good.png"]
    path.write_text("".join(json.dumps({"query": "a", "positive": n}) + "\n" for n in names))
    quarantine = Quarantine(len(names))
    rules = ImageRules(root=str(folder), check="decode")
    rows = load_dataset_records(
        str(path), retrieval_mode="t2i", images=rules, quarantine=quarantine
    )
    assert [record.where for record in rows] == [f"{path}:{len(names)}"]
    assert len(quarantine.records) == len(IMAGES)
    assert all(record.field == "positive[0]" for record in quarantine.records)


_LOOK = """
import resource, sys
from vembed.images import ImageError, ImageFolder, load_image, probe_image
folder = ImageFolder(sys.argv[1])
load_image(folder.find("good.png"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[2:]:
    for call in (probe_image, load_image):
        try:
            call(folder.find(name))
        except ImageError:
            pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def megabytes(folder, names) -> float:
    """What looking at images takes, in a process without torch."""
    command = [sys.executable, "-W", "error", "-c", _LOOK, str(folder), *names]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert not found.stderr
    return int(found.stdout) / 1024


def _with_chunk(kind: bytes, body: bytes, *, times: int = 1) -> bytes:
    """A PNG with chunks of any kind before its pixels."""
    png = picture()
    chunk = struct.pack(">I", len(body)) + kind + body
    chunk += struct.pack(">I", zlib.crc32(kind + body))
    return png[:33] + times * chunk + png[33:]


def test_bombs_take_little_memory(folder):
    """Pixels, texts and colour profiles that would be gigabytes; a file of 20 GB."""
    packed = zlib.compress(bytes(300 * 2**20), 9)
    for name, data in {
        "text.png": _with_chunk(b"zTXt", b"a\0\0" + packed),
        "international.png": _with_chunk(b"iTXt", b"a\0\1\0\0\0" + packed),
        "profile.png": _with_chunk(b"iCCP", b"a\0\0" + packed),
        "texts.png": _with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20)), times=90),
    }.items():
        (folder / name).write_bytes(data)
    bombs = ["text.png", "international.png", "profile.png", "texts.png", "sparse.png"]
    assert megabytes(folder, [*IMAGES, *bombs]) < 100


@pytest.mark.parametrize("name", ["huge-0.png", "cut-0.png", "foreign-2.png", "hollow-1.png"])
def test_the_real_command(folder, name):
    path = rows_of(folder, name)
    vembed = os.path.join(os.path.dirname(sys.executable), "vembed")
    model = ["--model", str(folder), "--output", str(folder / "out.npy"), "--modality", "i"]
    found = subprocess.run(
        [vembed, "encode", "--data", str(path), *model, "--image_column", "positive"],
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.startswith(f"vembed: {path}:2: positive: an image ")
    assert "Traceback" not in found.stderr
