"""Characters drawn with the fonts that come with matplotlib."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vembed.errors import ConfigError

IMAGE_SIZE = 32
"""Width and height of a picture, in pixels."""

_CAPITALS = 18  # height of a capital H, in pixels
_SCALES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_MARGIN = 1
_SYMBOLS = frozenset("NPS")  # numbers, punctuation and signs; not letters, marks or controls


@dataclass(frozen=True)
class Font:
    """A font file that matplotlib carries.

    Attributes:
        name: The file's name without its ending; also names its folder of pictures.
        family: Fonts of one family share shapes; a symbol is worth learning if two families have
            it.
        width: What its pictures are stretched to, as a share of their own width.
        height: The same of their height.
    """

    name: str
    family: str
    width: float = 1.0
    height: float = 1.0

    @property
    def path(self) -> Path:
        """Where the file is.

        Raises:
            ConfigError: if matplotlib does not bring it.
        """
        import matplotlib as mpl

        path = Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{self.name}.ttf"
        if not path.is_file():
            raise ConfigError(
                f"quickstart: draws its data with the fonts of matplotlib {mpl.__version__}, which "
                f"has no {path.name}. Install the tested versions: pip install -c constraints.txt "
                "'vembed[quickstart]'"
            )
        return path

    def characters(self) -> list[str]:
        """What the font says it can draw: named characters that are symbols, by code point.

        Without those that Unicode has for a letter in another style, such as MATHEMATICAL BOLD
        CAPITAL A: style is what fonts differ in.
        """
        from matplotlib.ft2font import FT2Font

        # Glyph 0 stands for everything that a font lacks.
        glyphs = FT2Font(str(self.path)).get_charmap().items()
        known = [chr(code) for code, glyph in sorted(glyphs) if glyph > 0]
        return [character for character in known if _is_symbol(character)]


def draw(character: str, font: Font) -> Image.Image | None:
    """The character in black on white, in the middle, as large as capitals of one height have it.

    Larger ones are drawn smaller until they fit.

    Returns:
        A grey image, or None if there is no ink, or it would not fit at a size to be read.
    """
    for scale in _SCALES:
        face = _face(font, scale)
        left, top, right, bottom = (round(edge) for edge in face.getbbox(character))
        size = (round((right - left) * font.width), round((bottom - top) * font.height))
        if max(size) <= IMAGE_SIZE - 2 * _MARGIN:
            break
    else:
        return None
    if min(size) < 1:
        return None
    ink = Image.new("L", (right - left, bottom - top), "white")
    ImageDraw.Draw(ink).text((-left, -top), character, font=face, fill="black")
    image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), "white")
    place = ((IMAGE_SIZE - size[0]) // 2, (IMAGE_SIZE - size[1]) // 2)
    image.paste(ink.resize(size, Image.Resampling.BOX), place)
    darkest, _ = image.getextrema()
    return None if darkest == 255 else image


def _is_symbol(character: str) -> bool:
    return (
        unicodedata.category(character)[0] in _SYMBOLS
        and unicodedata.name(character, "") != ""
        and not unicodedata.decomposition(character).startswith("<font>")
    )


@lru_cache
def _face(font: Font, scale: float) -> ImageFont.FreeTypeFont:
    # Basic layout: the same pictures whether or not Pillow finds libraqm.
    basic = ImageFont.Layout.BASIC
    _, top, _, bottom = ImageFont.truetype(font.path, 100, layout_engine=basic).getbbox("H")
    size = scale * _CAPITALS * 100 / (bottom - top)
    return ImageFont.truetype(font.path, size, layout_engine=basic)
