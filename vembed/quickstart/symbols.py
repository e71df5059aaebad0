"""*Symbol search*: find the picture of a symbol by its Unicode name, in a font never seen before.

Pictures are drawn on the spot. Names that some font draws alike, such as LATIN CAPITAL LETTER A and
GREEK CAPITAL LETTER ALPHA, are names of one symbol: neither is a wrong answer to the other.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from vembed.quickstart.glyphs import Font, draw

_STRETCHED = ((1.0, 1.0), (0.85, 1.0), (1.0, 0.85), (1.1, 0.9))


def _styles(family: str, *styles: str) -> list[Font]:
    """The fonts of a family, no two stretched alike: shapes are to be learned, not pixels."""
    name = family.replace(" ", "")
    return [
        Font(name + style, family, width, height)
        for style, (width, height) in zip(styles, _STRETCHED, strict=True)
    ]


TRAIN_FONTS = (
    *_styles("DejaVu Sans", "", "-Bold", "-Oblique", "-BoldOblique"),
    *_styles("DejaVu Sans Mono", "-Bold", "", "-BoldOblique", "-Oblique"),
    *_styles("DejaVu Serif", "-Italic", "-BoldItalic", "", "-Bold"),
)
DEV_FONT = Font("STIXGeneralBol", "STIX")
TEST_FONT = Font("STIXGeneral", "STIX")

Pictures = dict[str, dict[Font, Image.Image]]
"""Character to its pictures by font."""


@dataclass(frozen=True)
class Symbol:
    """Characters that cannot be told apart.

    Attributes:
        characters: By code point.
    """

    characters: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """What it can be asked for by, in lower case."""
        return [name_of(character) for character in self.characters]


@dataclass(frozen=True)
class TrainRow:
    """A line of `train.jsonl`.

    Attributes:
        query: A name.
        positive: All pictures of its symbol, as paths.
    """

    query: str
    positive: list[str]


@dataclass(frozen=True)
class SymbolSearch:
    """Where the task was written, and how large it is.

    Attributes:
        train: JSONL of a name and all pictures of its symbol.
        dev: Folder in BEIR layout, for choosing settings.
        test: The same form, of another font.
        images: The folder that paths are relative to.
        names: All names to train on, in their order.
        sizes: Names by the name of the split, and `pictures` to train on.
    """

    train: Path
    dev: Path
    test: Path
    images: Path
    names: Sequence[str]
    sizes: Mapping[str, int]


def build_symbol_search(
    folder: Path,
    *,
    train_fonts: Sequence[Font] = TRAIN_FONTS,
    dev_font: Font = DEV_FONT,
    test_font: Font = TEST_FONT,
    keep: Callable[[str], bool] = lambda character: True,
) -> SymbolSearch:
    """Write the task: the same rows wherever the same matplotlib and Pillow are installed.

    Args:
        folder: Is created; an earlier build in it is replaced.
        train_fonts: What pictures to train on are drawn with.
        dev_font: What the pictures of `dev` are drawn with.
        test_font: What those of `test` are drawn with.
        keep: Which characters to use at all.

    Raises:
        ConfigError: if matplotlib lacks a font.
    """
    images = folder / "images"
    shutil.rmtree(images, ignore_errors=True)
    pictures: Pictures = defaultdict(dict)
    for font in (*train_fonts, dev_font, test_font):
        for character in filter(keep, font.characters()):
            if (picture := draw(character, font)) is not None:
                pictures[character][font] = picture
    symbols = find_symbols({c: p for c, p in pictures.items() if _is_worth_learning(p, test_font)})
    rows = [row for symbol in symbols for row in _train_rows(symbol, pictures, train_fonts, images)]
    _write_jsonl(folder / "train.jsonl", (asdict(row) for row in rows))
    names = [row.query for row in rows]
    sizes = {
        "train": len(rows),
        "pictures": len({path for row in rows for path in row.positive}),
        **{
            split: _write_beir(
                folder / split, symbols, pictures, font=font, learned=set(names), images=images
            )
            for split, font in (("dev", dev_font), ("test", test_font))
        },
    }
    return SymbolSearch(
        train=folder / "train.jsonl",
        dev=folder / "dev",
        test=folder / "test",
        images=folder,
        names=names,
        sizes=sizes,
    )


def find_symbols(pictures: Pictures) -> list[Symbol]:
    """Characters that a font draws with the same pixels, together; all others alone."""
    root = {character: character for character in pictures}

    def find(character: str) -> str:
        while root[character] != character:
            character = root[character]
        return character

    first: dict[bytes, str] = {}
    for character in sorted(pictures):
        for picture in pictures[character].values():
            one, other = sorted(
                (find(first.setdefault(picture.tobytes(), character)), find(character))
            )
            root[other] = one
    groups: dict[str, list[str]] = defaultdict(list)
    for character in sorted(pictures):
        groups[find(character)].append(character)
    return [Symbol(tuple(characters)) for characters in groups.values()]


def name_of(character: str) -> str:
    """A character's Unicode name in lower case."""
    return unicodedata.name(character).lower()


def _is_worth_learning(pictures: Mapping[Font, Image.Image], test_font: Font) -> bool:
    """Whether it can be asked for in the end, and another family shows what it looks like."""
    return test_font in pictures and any(font.family != test_font.family for font in pictures)


def _train_rows(
    symbol: Symbol, pictures: Pictures, fonts: Iterable[Font], images: Path
) -> list[TrainRow]:
    """A row for each name, with every picture of the symbol that differs from the others."""
    drawn: dict[bytes, str] = {}
    for font in fonts:
        for character in symbol.characters:
            picture = pictures[character].get(font)
            if picture is not None and picture.tobytes() not in drawn:
                drawn[picture.tobytes()] = _save(picture, character, font, images)
    return [TrainRow(name, list(drawn.values())) for name in symbol.names if drawn]


def _write_beir(
    folder: Path,
    symbols: Iterable[Symbol],
    pictures: Pictures,
    *,
    font: Font,
    learned: set[str],
    images: Path,
) -> int:
    """One picture for each symbol that the font has; its names ask for it.

    Returns:
        The number of queries.
    """
    corpus, queries, judgements = [], [], ["query-id\tcorpus-id\tscore"]
    for symbol in symbols:
        own = next((c for c in symbol.characters if font in pictures[c]), None)
        asked = [c for c in symbol.characters if name_of(c) in learned]
        if own is None or not asked:
            continue
        path = _save(pictures[own][font], own, font, images)
        corpus.append({"_id": path, "title": "", "text": "", "image": path})
        for character in asked:
            queries.append({"_id": _code(character), "text": name_of(character)})
            judgements.append(f"{_code(character)}\t{path}\t1")
    _write_jsonl(folder / "corpus.jsonl", corpus)
    _write_jsonl(folder / "queries.jsonl", queries)
    _write_lines(folder / "qrels" / "test.tsv", judgements)
    return len(queries)


def _save(picture: Image.Image, character: str, font: Font, images: Path) -> str:
    """Write a picture; returns its path as rows have it."""
    file = images / font.name / f"{_code(character)}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)
    return file.relative_to(images.parent).as_posix()


def _code(character: str) -> str:
    return f"{ord(character):04x}"


def _write_jsonl(file: Path, rows: Iterable[Mapping[str, object]]) -> None:
    _write_lines(file, (json.dumps(row, ensure_ascii=False) for row in rows))


def _write_lines(file: Path, lines: Iterable[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
