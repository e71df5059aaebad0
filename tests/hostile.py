"""Rows, settings and images that nobody should have to trust, made from a seed.

Every mutation breaks a rule: what would leave a row, a file of settings or an image in order is not
among them, so that a test may ask that each one is refused.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.pictures import encode, flipped_png, huge_png, noise, picture, plain
from tests.tiny import PAIRS, WORDS

MODES = ("t2t", "t2i")


@dataclass(frozen=True)
class BadLine:
    """A line of a JSON Lines file.

    Attributes:
        kind: The mutation that made it.
        raw: The bytes, without the line break.
        mode: The retrieval mode it is bad in.
    """

    kind: str
    raw: bytes
    mode: str = "t2t"


def good_row(draw: random.Random) -> dict[str, Any]:
    """A row of any of the layouts that are understood, which can be used."""
    pair = dict(draw.choice(PAIRS))
    match draw.randrange(5):
        case 0:
            return pair
        case 1:
            return {**pair, "negatives": [" ".join(draw.sample(WORDS, 3)) for _ in range(2)]}
        case 2:
            return {**pair, "score": round(draw.uniform(-5, 5), 3)}
        case 3:
            return {**pair, "label": draw.choice(["a", 3])}
        case _:
            return {**pair, "negative": "no", "teacher_scores": [draw.random(), draw.random()]}


def bad_lines(count: int, seed: int) -> Iterator[BadLine]:
    """That many lines, all kinds in turns, none of which can be used."""
    draw = random.Random(seed)
    kinds = [*_BROKEN_ROWS.items(), *_BROKEN_BYTES.items()]
    for number in range(count):
        kind, make = kinds[number % len(kinds)]
        made = make(draw, good_row(draw))
        raw = made if isinstance(made, bytes) else json.dumps(made).encode()
        yield BadLine(kind, raw)


def bad_image_lines(count: int, seed: int) -> Iterator[BadLine]:
    """Rows of a caption and an image whose place cannot be meant, whatever is on the disk."""
    draw = random.Random(seed)
    for number in range(count):
        place = _PLACES[number % len(_PLACES)]
        value = place(draw) if callable(place) else place
        row = {"query": draw.choice(WORDS), "positive": value}
        yield BadLine(f"place {number % len(_PLACES)}", json.dumps(row).encode(), "t2i")


def _field(draw: random.Random) -> str:
    return draw.choice(["query", "positive"])


def _value(*values: Any) -> Callable[[random.Random, dict[str, Any]], dict[str, Any]]:
    """Query or positive with one of these values; no label, which would do without a positive."""

    def make(draw: random.Random, row: dict[str, Any]) -> dict[str, Any]:
        row.pop("label", None)
        return {**row, _field(draw): draw.choice(values)}

    return make


def _score(*values: Any) -> Callable[[random.Random, dict[str, Any]], dict[str, Any]]:
    return lambda draw, row: {**row, "score": draw.choice(values)}


def _label(*values: Any) -> Callable[[random.Random, dict[str, Any]], dict[str, Any]]:
    return lambda draw, row: {**row, "label": draw.choice(values)}


def _scores(*values: Any) -> Callable[[random.Random, dict[str, Any]], dict[str, Any]]:
    def make(draw: random.Random, row: dict[str, Any]) -> dict[str, Any]:
        return {**dict(draw.choice(PAIRS)), "teacher_scores": draw.choice(values)}

    return make


def nested(depth: int, kind: str = "[") -> str:
    """JSON of brackets in brackets."""
    return "[" * depth + "]" * depth if kind == "[" else '{"a":' * depth + "1" + "}" * depth


def _nested(draw: random.Random, row: dict[str, Any]) -> bytes:
    """From what Python still reads to what no parser does."""
    depth = draw.choice([50, 500, *range(900, 1000), 2000, 100_000])
    deep = nested(depth, draw.choice("[{"))
    return json.dumps(row | {_field(draw): "?"}).replace('"?"', deep).encode()


def _without(draw: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    lost = _field(draw)
    return {k: v for k, v in row.items() if k not in (lost, "label")}


def _twice(draw: random.Random, row: dict[str, Any]) -> bytes:
    """A key that is written twice, with another value."""
    key = _field(draw)
    return json.dumps(row)[:-1].encode() + f', "{key}": "{draw.choice(WORDS)} again"}}'.encode()


def _huge_number(draw: random.Random, row: dict[str, Any]) -> bytes:
    key, digits = draw.choice(["score", "label"]), draw.choice([5_000, 50_000])
    if key == "score":
        digits = draw.choice([400, digits])
    return json.dumps({**row, key: "?"}).replace('"?"', "9" * digits).encode()


def _bad_byte(draw: random.Random, row: dict[str, Any]) -> bytes:
    raw, bad = json.dumps(row).encode(), draw.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80"])
    place = raw.index(b'": "') + 4
    return raw[:place] + bad + raw[place:]


def _cut(draw: random.Random, row: dict[str, Any]) -> bytes:
    raw = json.dumps(row).encode()
    return raw[: draw.randrange(1, len(raw))]


def _inserted(draw: random.Random, row: dict[str, Any]) -> bytes:
    """Something that JSON has not, before, behind or between the parts of an object."""
    raw = json.dumps(row)
    junk = draw.choice(["\0", "// x", "}", ",", "\x01", "{}", "'", "\\", "\x1b[2J"])
    place = draw.choice([0, len(raw), 1])
    return (raw[:place] + junk + raw[place:]).encode()


_BROKEN_ROWS: dict[str, Callable[[random.Random, dict[str, Any]], Any]] = {
    "a value that is no text": _value(
        7, 1e400, -0.5, True, False, {}, {"text": "a"}, [["a"]], [{}], [None], 10**40
    ),
    "nothing in it": _value("", "   ", "\n\t", None, "\u2003"),
    "NUL": _value("a\0b", "\0"),
    "half of a surrogate pair": _value("\ud800", "a\udfff b"),
    "no such field": _without,
    "no number": _score(
        float("nan"), float("inf"), float("-inf"), "0.5", True, [1], {"a": 1}, "nan", 10**400
    ),
    "no label": _label(1.5, True, "", [1], {"a": 1}, "\0", "\ud800", float("nan")),
    "scores that do not fit": _scores(
        [], [1, 2], [float("nan")], ["1"], [True], [[1]], "x", {"a": 1}, [None], [10**400]
    ),
}

_BROKEN_BYTES: dict[str, Callable[[random.Random, dict[str, Any]], bytes]] = {
    "nested": _nested,
    "a key twice": _twice,
    "a huge number": _huge_number,
    "not UTF-8": _bad_byte,
    "cut off": _cut,
    "something inserted": _inserted,
    "not an object": lambda draw, row: draw.choice(
        [b"[]", b"7", b'"text"', b"null", b"true", b"NaN", b"[{}]", json.dumps([row]).encode()]
    ),
    "two objects": lambda draw, row: json.dumps(row).encode() * 2,
    "another encoding": lambda draw, row: (
        json.dumps(row).encode(draw.choice(["utf-16", "utf-16-be", "utf-32"])).replace(b"\n", b"")
    ),
    "single quotes": lambda draw, row: repr(row).encode(),
}

_PLACES: tuple[Any, ...] = (
    "../outside.png", "a/../../outside.png", "/etc/passwd", "/outside.png", "..", ".", "/",
    "file:///etc/passwd", "FILE:///etc/passwd", "file:outside.png", "data:image/png;base64,AAAA",
    "http://169.254.169.254/latest/meta-data/", "https://[fd00:ec2::254]/x.png", "http://[::1",
    "http://127.0.0.1/x.png", "http://2130706433/x.png", "http://0x7f.1/x.png", "ftp://a/x.png",
    "gopher://127.0.0.1:6379/_x", "s3://bucket/x.png", "hf://datasets/x.png", "jar:file:///x!/y",
    "http://user:word@example.org/x.png", "https://example.org:99999/x.png", "//host/share/x.png",
    "\\\\host\\share\\x.png", "..\\outside.png", "C:\\x.png", "x.png\0.txt", "\0", "", "   ",
    "nothing.png", "\ud800.png", "a" * 300 + ".png", "a/" * 3000 + "x.png", "~/x.png", "~root/x",
    "$HOME/x.png", "-rf.png", "x.png\nnext.png", "\u202egnp.x", "link-out.png",
    "link-loop.png", "link-dangling.png", "folder", "folder/", "link-folder/outside.png", "pipe",
    "link-zero", "empty.png", 7, 1.5, True, {}, {"bytes": None}, {"path": 7}, {"bytes": 7},
    {"bytes": "AAAA"}, {"path": "../outside.png"}, {"path": {"path": "x"}}, {"path": ""}, [], [[]],
    [7], [None], {"text": "a", "image": "b"}, lambda draw: "../" * draw.randrange(1, 50) + "etc",
    lambda draw: f"http://169.254.{draw.randrange(256)}.{draw.randrange(256)}/x.png",
    lambda draw: f"http://10.{draw.randrange(256)}.0.1:{draw.randrange(1, 65536)}/x.png",
)  # fmt: skip


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Bytes that are cut off, flipped, taken out or put in; they may still be in order."""
    changed = bytearray(data)
    place = draw.randrange(len(data))
    match draw.randrange(4):
        case 0:
            del changed[place:]
        case 1:
            for _ in range(draw.choice([1, 3, 10])):
                changed[draw.randrange(len(data))] = draw.randrange(256)
        case 2:
            del changed[place : place + draw.randrange(1, 50)]
        case _:
            changed[place:place] = draw.randbytes(draw.randrange(1, 20))
    return bytes(changed)


@dataclass(frozen=True)
class BadSettings:
    """A file of settings.

    Attributes:
        kind: What is wrong with it.
        text: The file.
        line: Where.
    """

    kind: str
    text: bytes
    line: int


GOOD_SETTINGS = (
    "# a run", "model_name: owner/name", "data_path: rows.jsonl", "lr: 5e-5", "epochs: 2",
    "freeze: [a, 'b: c']", "loss_kwargs:\n  margin: 0.1", "output_dir: runs/a", "",
)  # fmt: skip

_BAD_FOR_EVERY_KEY = {
    "NUL": '"a\\0b"',
    "an escape": '["\\e[2J"]',
    "a tag": "!!python/object/apply:os.system [id]",
    "a tag of nobody": "!x 1",
    "bytes": "!!binary AAAA",
    "no such anchor": "*nowhere",
    "in itself": "&a [*a]",
    "a key twice": "{a: 1, a: 2}",
    "no key": "{[a]: 1}",
    "levels": "[" * 60 + "]" * 60,
    "more levels than Python has": "{a: " * 1000 + "}" * 1000,
    "not closed": "[a, b",
    "not opened": "]",
    "two values": "'a' 'b'",
    "a number of everything": "99999999999999999999999999999999e999999999 : 1",
}
_BAD_NUMBERS = (
    "x", "''", "[1]", "{a: 1}", "true", ".nan", ".inf", "-.inf", "1e999", "9" * 5000, "-1e3",
    "0x1F", "1;2", "1 2", "1,5", "٣", "²", "one", "--1", "1e", "1.2.3", "2020-01-01", "12:30:45",
)  # fmt: skip
_BAD_SWITCHES = ("maybe", "2", "[true]", "{a: true}", "''", "null", "1.5", "truе")
_BROKEN_FILES: dict[str, Callable[[bytes], bytes]] = {
    "not UTF-8": lambda line: line + b" \xff",
    "another encoding": lambda line: line.decode().encode("utf-16"),
    "a tab": lambda line: b"\t" + line,
    "NUL": lambda line: line + b" \0",
    "an escape": lambda line: line + b" \x1b[2J",
    "indented": lambda line: b"lr: 1e-4\n    " + line + b"\n  - x: ",
    "no colon": lambda line: b"model: " + line + b"\nnothing",
}


def bad_settings(
    numbers: list[str], switches: list[str], keys: list[str], count: int, seed: int
) -> list[BadSettings]:
    """Files with one bad line at a random place, `count` of them, all kinds in turns.

    Args:
        numbers: Keys that take a number only.
        switches: Keys that are true or false.
        keys: All keys.
        count: How many.
        seed: Of the choice of keys and places.
    """
    draw = random.Random(seed)
    lines = [
        (f"{kind}, {key}", f"{key}: {value}".encode())
        for kind, value in _BAD_FOR_EVERY_KEY.items()
        for key in draw.choices(keys, k=25)
    ]
    lines += [("number", f"{draw.choice(numbers)}: {v}".encode()) for v in _BAD_NUMBERS * 8]
    lines += [("switch", f"{draw.choice(switches)}: {v}".encode()) for v in _BAD_SWITCHES * 6]
    lines += [("unknown", f"{_misspelt(draw.choice(keys), draw)}: 1".encode()) for _ in range(60)]
    lines += [(kind, broken(f"{draw.choice(numbers)}: 7".encode()))
              for kind, broken in _BROKEN_FILES.items() for _ in range(5)]  # fmt: skip
    draw.shuffle(lines)
    made = []
    for kind, line in lines[:count]:
        key = line.partition(b":")[0].decode("utf-8", "replace")
        before = [text for text in GOOD_SETTINGS if not text.startswith(key)]
        after = [before.pop() for _ in range(draw.randrange(len(before)))]
        start = "\n".join([*before, ""]).encode()
        text = b"\n".join([start + line, "\n".join(after).encode()])
        made.append(BadSettings(kind, text, start.count(b"\n") + 1))
    return made


def _misspelt(key: str, draw: random.Random) -> str:
    place = draw.randrange(len(key))
    return f"{key[:place]}{draw.choice('qxz')}{key[place:]}"


def bad_images(seed: int) -> dict[str, bytes]:
    """More than a hundred files by name, none of which is a picture that can be shown whole."""
    draw = random.Random(seed)
    found = {}
    for kind, files in {
        "cut": _cut_images(draw),
        "huge": _huge_images(),
        "flipped": [flipped_png(seed=n) for n in range(10)],
        "foreign": _foreign_files(draw),
        "hollow": _hollow_images(),
    }.items():
        found |= {f"{kind}-{number}.png": data for number, data in enumerate(files)}
    return found


def _cut_images(draw: random.Random) -> list[bytes]:
    whole = [encode(noise(), format) for format in ("JPEG", "PNG", "WEBP", "BMP", "GIF")]
    whole.append(encode(noise(), "JPEG", progressive=True))
    whole.append(encode(noise(), "WEBP", lossless=True))
    return [data[: int(len(data) * draw.uniform(0.02, 0.9))] for data in whole for _ in range(6)]


def _huge_images() -> list[bytes]:
    """Claims of more pixels than anybody may hold: with the pixels behind them, or without."""
    claims = [huge_png(*size) for size in [
        (10_000, 5_001), (100_000, 99_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (50_000_001, 1),
    ]]  # fmt: skip
    for format, place, size in (
        ("GIF", 6, b"\xff\xff\xff\xff"),
        ("BMP", 18, b"\xff\xff\x0f\0" * 2),
    ):
        data = picture(format=format)
        claims.append(data[:place] + size + data[place + len(size) :])
    jpeg = picture(format="JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    claims.append(jpeg[:frame] + b"\xff\xdc\xff\xdc" + jpeg[frame + 4 :])
    return [*claims, encode(plain(1, (8000, 6500), "1")), encode(plain(0, (7100, 7100), "L"))]


def _foreign_files(draw: random.Random) -> list[bytes]:
    starts = (
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF", "%PDF-1.7", "<svg/>", "<html>",
        "GIF", "PK\x03\x04", "\x7fELF", "{}", "", "\0" * 100, "cos\nsystem\n(S'id'\ntR.",
        "#!/bin/sh",
        "push graphic-context\nviewbox 0 0 9 9\nfill 'url(https://127.0.0.1/x\"|id\")'\n",
    )  # fmt: skip
    films = [b"\0\0\0\x20ftyp" + kind + bytes(99) for kind in (b"avif", b"heic", b"mp42")]
    others = [encode(plain(), kind) for kind in ("TIFF", "ICO", "PPM", "TGA", "PCX", "SGI", "PDF")]
    junk = [draw.randbytes(draw.randrange(1, 2000)) for _ in range(20)]
    return [*(start.encode("latin-1") for start in starts), *films, *others, *junk]


def _hollow_images() -> list[bytes]:
    """Files of a format that lack what an image has."""
    png, jpeg, gif, bmp, webp = (picture(format=f) for f in ("PNG", "JPEG", "GIF", "BMP", "WEBP"))
    pixels = png.index(b"IDAT") - 4
    tables = jpeg.index(b"\xff\xda")
    return [
        png[:8], png[:pixels], png[:pixels] + png[-12:], png[:16] + bytes(8) + png[24:],
        png[:8] + png[-12:], png[:-12] + b"\0" * 12, png[:37] + b"\xff\xff\xff\xff" + png[41:],
        jpeg[:2], jpeg[:3] + b"\xd9", jpeg[:tables], jpeg[:tables] + b"\xff\xd9",
        b"\xff\xd8" + b"\xff\xe0\xff\xff" * 100, b"\xff\xd8\xff\xd9", gif[:6], gif[:13],
        gif[:13] + b";", gif[:6] + bytes(4) + gif[10:13] + b";", bmp[:14], bmp[:30],
        bmp[:18] + bytes(8) + bmp[26:], bmp[:28] + b"\x07\0" + bmp[30:], webp[:12], webp[:20],
        webp[:12] + b"VP8X" + bytes(20), b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\xff" * 50,
        b"BM" + b"\xff" * 100, b"GIF89a" + b"\xff" * 100, b"\x89PNG\r\n\x1a\n" + b"\xff" * 100,
    ]  # fmt: skip
