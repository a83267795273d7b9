"""Text in images: whole, wrapped, and in letters that the machine has a font for."""

import re
import unicodedata
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from .errors import one_line


Colour = tuple[int, int, int]

SIZE = 13  # pixels
FONTS = (  # for what Pillow's own, which is ASCII, lacks: files that Linux, macOS and Windows keep among their fonts
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-zenhei.ttc", "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf", "Hiragino Sans GB.ttc", "PingFang.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf",
    "msyh.ttc", "simsun.ttc", "YuGothM.ttc", "msgothic.ttc", "malgun.ttf", "segoeui.ttf",
)  # fmt: skip


class Letters:
    """Writes with the first font that has all characters of some texts, or else most; what it lacks is spelt out."""

    def __init__(self, texts: Iterable[str]):
        wanted, most = {c for text in texts for c in composed(text)}, -1
        for font in fonts():
            known = {c for c in wanted if c == " " or has(font, c)}
            if len(known) > most:
                self.font, self.known, most = font, known, len(known)
            if most == len(wanted):
                break

    def shown(self, text: str) -> str:
        """The text on one line, of characters that the font has, others as their code points."""
        return "".join(c if c in self.known else c.encode("unicode_escape").decode() for c in composed(text))

    def block(self, text: str, width: int, size: int = SIZE) -> Image.Image:
        """The lines of a text, wrapped to a width in pixels and never cut, black on white."""
        font = self.font.font_variant(size=size)
        lines = [part for line in text.split("\n") for part in wrapped(self.shown(line), width, font)]
        step = sum(font.getmetrics()) + 2
        image = Image.new("RGB", (width, step * len(lines)), "white")
        draw = ImageDraw.Draw(image)
        for i, line in enumerate(lines):
            draw.text((0, i * step), line, "black", font)
        return image

    def badge(self, text: str, fill: Colour, letters: Colour) -> Image.Image:
        """A framed word."""
        image = Image.new("RGB", (int(self.font.getlength(text)) + 13, sum(self.font.getmetrics()) + 4), "white")
        draw = ImageDraw.Draw(image)
        draw.rounded_rectangle((0, 0, image.width - 1, image.height - 1), 4, fill, "black")
        draw.text((6, 2), text, letters, self.font)
        return image


def composed(text: str) -> str:
    """The text on one line, accents and syllables in one character each where there is one."""
    return one_line(unicodedata.normalize("NFC", text))


def fonts() -> Iterable[ImageFont.FreeTypeFont]:
    """Pillow's own, then those of `FONTS` that there are."""
    own = ImageFont.load_default(SIZE)
    assert isinstance(own, ImageFont.FreeTypeFont)  # the other kind is of a Pillow that was built without FreeType
    yield own
    for name in FONTS:
        try:
            yield ImageFont.truetype(name, SIZE)
        except OSError:
            continue


def has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether a font draws the character otherwise than one that no font has."""
    drawn, none = font.getmask(character), font.getmask("\uffff")
    return drawn.size != none.size or bytes(drawn) != bytes(none)


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The text in lines of at most this width in pixels: parted after spaces, / _ and -, or anywhere if need be."""
    lines, line = list[str](), ""
    for word in re.findall(r"[^\s/_-]*[\s/_-]*", text):
        if font.getlength(line + word.rstrip()) > width:
            lines, line = [*lines, line], ""
        for c in word:
            if font.getlength(line + c.strip()) > width:
                lines, line = [*lines, line], ""
            line += c
    return [line for line in [*lines, line] if line.strip()]
