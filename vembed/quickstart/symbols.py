"""*Symbol search*: find the picture of a symbol by its Unicode name, in a font never seen before.

Pictures are drawn on the spot. Names that some font draws alike, such as VERTICAL LINE and DIVIDES,
or that differ in words for style only, such as CIRCLED DIGIT NINE and DINGBAT CIRCLED SANS-SERIF
DIGIT NINE, are names of one symbol: neither is a wrong answer to the other.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
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

_WRONG_GLYPHS = {"STIXGeneral": frozenset("\u22d2\u22d3")}
"""By font name, characters that are left out, because the font shows something else.

STIXGeneral has DOUBLE INTERSECTION and DOUBLE UNION exchanged. Of the characters that are clearly
nearer to the DejaVu glyph of another name (the 70 with the largest margin were looked at), they are
the only ones that differ in more than style.
"""

_ALIKE = 64
"""Pictures of one font are alike if no pixel differs by more, of 255.

Edges that are rounded differently stay below it (arc and half circle: 50); a mark of its own, such
as the arrow of a contour integral or the dot of a die, is far above.
"""

_BLOCK = 4  # pixels
_STYLES_IN_NAMES = ("dingbat ", "sans-serif ")

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
            if character in _WRONG_GLYPHS.get(font.name, ()):
                continue
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
    """Characters that count as one symbol, together; all others alone.

    Two do if any picture of theirs has the same pixels, or nearly so in one font, or their names
    differ in words for style only.
    """
    root = {character: character for character in pictures}

    def find(character: str) -> str:
        while root[character] != character:
            character = root[character]
        return character

    first: dict[bytes | str, str] = {}
    pairs = _drawn_alike(pictures)
    for character in sorted(pictures):
        keys: list[bytes | str] = [p.tobytes() for p in pictures[character].values()]
        keys.append(_name_without_style(character))
        pairs += [(first.setdefault(key, character), character) for key in keys]
    for pair in pairs:
        one, other = sorted(map(find, pair))
        root[other] = one
    groups: dict[str, list[str]] = defaultdict(list)
    for character in sorted(pictures):
        groups[find(character)].append(character)
    return [Symbol(tuple(characters)) for characters in groups.values()]


def _drawn_alike(pictures: Pictures) -> list[tuple[str, str]]:
    """Pairs of characters whose pictures in one font are nearly equal."""
    pairs = []
    for font in {font for by_font in pictures.values() for font in by_font}:
        drawn = [character for character in sorted(pictures) if font in pictures[character]]
        pixels = np.stack([np.asarray(pictures[c][font], dtype=np.int16) for c in drawn])
        means = _block_means(pixels)
        for number, character in enumerate(drawn):
            # Means of blocks never differ by more than pixels do, and are few.
            near = np.abs(means[number + 1 :] - means[number]).max(axis=1, initial=0) <= _ALIKE
            for other in np.flatnonzero(near) + number + 1:
                if np.abs(pixels[other] - pixels[number]).max() <= _ALIKE:
                    pairs.append((character, drawn[other]))
    return pairs


def _block_means(pixels: NDArray[np.int16]) -> NDArray[np.float32]:
    """`[n, H, W]` to the means of small squares, `[n, blocks]`."""
    count, height, width = pixels.shape
    step = min(_BLOCK, height, width)
    shape = (count, height // step, step, width // step, step)
    means: NDArray[np.float32] = pixels.reshape(shape).mean(axis=(2, 4), dtype=np.float32)
    return means.reshape(count, -1)


def _name_without_style(character: str) -> str:
    name = name_of(character)
    for style in _STYLES_IN_NAMES:
        name = name.replace(style, "")
    return name


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
