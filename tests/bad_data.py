"""Bad inputs, by their rows: pairs to be refused, pairs to be read all the same, folders and names to be refused."""

import dataclasses
import json
import os
import struct
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from folders import make_mvtec, make_seed_layout
from PIL import Image


SIZE = 48


@dataclasses.dataclass
class Pair:
    """An image and its mask in an object's folder; `pixels` and `area` are what should be read of them."""

    image: Path
    mask: Path
    pixels: np.ndarray
    area: np.ndarray

    def save(self, picture: Image.Image | np.ndarray, suffix: str = ".png", **options) -> Path:
        """Another image in place of the one that is there."""
        return self.write(b"", suffix, lambda file: as_image(picture).save(file, **options))

    def save_mask(self, picture: Image.Image | np.ndarray, suffix: str = ".png", **options) -> None:
        self.mask.unlink()
        self.mask = self.mask.with_suffix(suffix)
        as_image(picture).save(self.mask, **options)

    def write(self, content: bytes, suffix: str = ".png", save: Callable | None = None) -> Path:
        self.image.unlink()
        self.image = self.image.with_suffix(suffix)
        save(self.image) if save else self.image.write_bytes(content)
        return self.image

    def edit(self, change: Callable[[bytes], bytes], suffix: str = ".png", **options) -> None:
        """The image in the format of `suffix`, its bytes changed."""
        self.write(change(self.save(self.pixels, suffix, **options).read_bytes()), suffix)

    def rename(self, stem: str, mask_stem: str | None = None) -> None:
        self.image = self.image.rename(self.image.with_stem(stem))
        self.mask = self.mask.rename(self.mask.with_stem(f"{mask_stem or stem}_mask"))

    def beside(self, suffix: str) -> Path:
        return self.image.with_suffix(suffix)


def as_image(picture: Image.Image | np.ndarray) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def make_pair(root: Path, stem: str) -> Pair:
    """A good pair in MVTec AD's layout; its noise follows from its stem."""
    rng = np.random.default_rng([*stem.encode()])
    top, left = rng.integers(4, SIZE - 20, 2)
    area = np.zeros((SIZE, SIZE), dtype=bool)
    area[top : top + 14, left : left + 9] = True
    pair = Pair(
        root / f"test/hole/{stem}.png",
        root / f"ground_truth/hole/{stem}_mask.png",
        rng.integers(40, 200, (SIZE, SIZE, 3)).astype(np.uint8),
        area,
    )
    for file, picture in ((pair.image, pair.pixels), (pair.mask, area.astype(np.uint8) * 255)):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    return pair


def png(width: int, height: int, pixels: bytes = b"", bits: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG whose header says what it likes; `extra` is a zTXt chunk's text."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    if extra:
        parts.insert(1, (b"zTXt", b"Comment\0\0" + zlib.compress(extra)))
    chunks = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


def frames(pair: Pair) -> dict:
    return {"save_all": True, "append_images": [Image.new("RGB", (SIZE, SIZE), c) for c in ("red", "blue")]}


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def replaced_by(make: Callable[[Path], None]) -> Callable[[Pair], None]:
    def change(pair: Pair) -> None:
        pair.image.unlink()
        make(pair.image)

    return change


def with_alpha(pair: Pair, alpha: np.ndarray, mode: str = "RGBA") -> Image.Image:
    image = Image.fromarray(pair.pixels).convert(mode)
    image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return image


def classes(pair: Pair) -> np.ndarray:
    values = pair.area.astype(np.uint8)
    values[pair.area.nonzero()[0].max()] *= 3
    return values


def turned_without_its_mask(pair: Pair) -> None:
    pair.save(pair.pixels[:40], exif=turned(6))
    pair.save_mask(pair.area[:40])


def two_spellings(pair: Pair) -> None:
    name = f"{pair.image.stem} \u00e9"
    pair.rename(name)
    as_image(pair.pixels).save(pair.image.with_stem(unicodedata.normalize("NFD", name)))


# Row -> what makes it of a good pair, the code, words of the line that names its file

REFUSED: dict[str, tuple[Callable[[Pair], object], str, str]] = {
    "empty file": (lambda p: p.write(b""), "DF103", "it is empty"),
    "text": (lambda p: p.write(b"some text"), "DF103", "WEBP): it begins with b'some text'"),
    "PostScript": (
        lambda p: p.write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\n%%EOF\n"), "DF103",
        "not an image of a known format",
    ),
    "page of a failed download": (lambda p: p.write(b"<!DOCTYPE html><p>404", ".jpg"), "DF103", "DOCTYPE html"),
    "half a PNG": (lambda p: p.edit(lambda b: b[: len(b) // 2]), "DF103", "damaged"),
    "half a JPEG": (lambda p: p.edit(lambda b: b[: len(b) // 2], ".jpg"), "DF103", "damaged"),
    "flipped byte": (lambda p: p.edit(lambda b: flip(b, len(b) // 2)), "DF103", "damaged"),
    "animation": (lambda p: p.save(p.pixels, ".webp", **frames(p)), "DF103", "3 frames"),
    "pages": (lambda p: p.save(p.pixels, ".tif", **frames(p)), "DF103", "3 frames or pages"),
    "400 million pixels": (lambda p: p.write(png(20000, 20000)), "DF103", "too large"),
    "120 million pixels": (lambda p: p.write(png(12000, 10000)), "DF103", "too large"),
    "bomb of text": (lambda p: p.write(png(SIZE, SIZE, extra=bytes(2**21))), "DF103", "too large"),
    "pipe": (replaced_by(os.mkfifo), "DF103", "it is not a regular file"),
    "link to nothing": (replaced_by(lambda f: f.symlink_to("nowhere.png")), "DF103", "a broken link"),
    "link to itself": (replaced_by(lambda f: f.symlink_to(f)), "DF103", "a broken link"),
    "two spellings": (two_spellings, "DF144", "more than one image or mask"),
    "control characters": (
        lambda p: (p.rename("control characters\n\x1b[31m"), p.mask.unlink()), "DF142", "characters\\n\\x1b[31m"),
    "12 bits in 16": (lambda p: p.save(p.pixels[..., 0].astype(np.uint16) * 20), "DF103", "12 bits or fewer"),
    "float": (lambda p: p.save(p.pixels[..., 0] / np.float32(255), ".tif"), "DF103", "more than 16 bits"),
    "32 bits": (lambda p: p.save(p.pixels[..., 0].astype(np.int32), ".tif"), "DF103", "more than 16 bits"),
    "RGBA": (lambda p: p.save(with_alpha(p, ~p.area * 255)), "DF103", "transparent pixels; flatten it"),
    "LA": (lambda p: p.save(with_alpha(p, ~p.area * 255, "L")), "DF103", "transparent pixels; flatten it"),
    "all transparent": (lambda p: p.save(with_alpha(p, p.area * 0)), "DF103", "transparent pixels; flatten it"),
    "no numbers": (lambda p: p.save(np.full((SIZE, SIZE), np.nan, np.float32), ".tif"), "DF103", "more than 16"),
    "one pixel": (lambda p: p.save(p.pixels[:1, :1]), "DF130", "is 1x1; give an image of at least 32 pixels"),
    "3x2000": (lambda p: p.save(Image.new("RGB", (3, 2000))), "DF130", "is 3x2000"),
    "20000x8": (lambda p: p.save(Image.new("RGB", (20000, 8))), "DF130", "is 20000x8"),
    "mask of another size": (lambda p: p.save_mask(p.area[::2, ::2]), "DF140", "48x48, its mask 24x24"),
    "turned without its mask": (turned_without_its_mask, "DF140", "40x48, its mask 48x40: one is turned"),
    "no mask": (lambda p: p.mask.unlink(), "DF142", "its mask is missing"),
    "no image": (lambda p: p.image.unlink(), "DF143", "a mask without an image"),
    "two masks": (lambda p: p.mask.with_stem(p.image.stem).write_bytes(p.mask.read_bytes()), "DF144", "keep one"),
    "empty mask": (lambda p: p.save_mask(p.area & False), "DF145", "its mask is empty"),
    "full mask": (lambda p: p.save_mask(p.area | True), "DF146", "covers the whole image"),
    "classes": (lambda p: p.save_mask(classes(p)), "DF103", "_mask.png: its greatest value is 3; code it"),
    "mask in alpha": (
        lambda p: p.save_mask(with_alpha(p, p.area * 255)), "DF103", "_mask.png: it has transparent pixels"),
    "empty mask file": (lambda p: p.mask.write_bytes(b""), "DF103", "_mask.png: it is empty"),
}  # fmt: skip


def deep(pair: Pair) -> np.ndarray:
    """16-bit grey over the full range; `pixels` becomes what 8 bits keep of it."""
    grey = pair.pixels[..., 0].astype(np.uint16)
    pair.pixels = np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)
    return grey * 257


def deep_rgb(pair: Pair) -> None:
    lines = (pair.pixels.astype(">u2") * 257).astype(">u2")
    pair.write(png(SIZE, SIZE, b"".join(b"\0" + line.tobytes() for line in lines), bits=16))


def grey(pair: Pair, mode: str = "L") -> Image.Image:
    image = Image.fromarray(pair.pixels).convert(mode)
    pair.pixels = np.asarray(image.convert("RGB"))
    return image


def smooth(pair: Pair) -> np.ndarray:
    """Pixels that a lossy format or another space of colours hardly changes."""
    ramp = np.linspace(60, 180, SIZE)
    pair.pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 120.0), axis=-1).astype(np.uint8)
    return pair.pixels


def as_mode(pair: Pair, mode: str) -> Image.Image:
    return Image.fromarray(smooth(pair)).convert(mode)


def resized(pair: Pair, pixels: np.ndarray, area: np.ndarray) -> None:
    pair.pixels, pair.area = pixels, area
    pair.save(pixels), pair.save_mask(area)


def turn(pair: Pair) -> None:
    """Image and mask, each turned by a tag of its own."""
    pair.save(pair.pixels, exif=turned(6)), pair.save_mask(pair.area.astype(np.uint8) * 255, exif=turned(3))
    pair.pixels, pair.area = np.rot90(pair.pixels, -1), np.rot90(pair.area, 2)


def linked_elsewhere(pair: Pair) -> None:
    elsewhere = pair.image.parents[3] / "elsewhere.png"
    pair.image.rename(elsewhere)
    pair.image.symlink_to(elsewhere)


def palette_mask(pair: Pair) -> Image.Image:
    mask = Image.fromarray(pair.area.astype(np.uint8)).convert("P")
    mask.putpalette([0, 0, 0, 255, 0, 0])
    return mask


def smoothed_mask(pair: Pair) -> Image.Image:
    """Its border is half in, half out: resized twofold and back."""
    mask = Image.fromarray(pair.area).convert("L")
    return mask.resize((4 * SIZE, 4 * SIZE)).resize((SIZE, SIZE), Image.Resampling.BOX)


def colour_of(area: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (area[..., None] * np.array(colour)).astype(np.uint8)


def large_area(pair: Pair) -> None:
    pair.area = np.ones((SIZE, SIZE), dtype=bool)
    pair.area[0] = False
    pair.save_mask(pair.area)


def small_area(pair: Pair) -> None:
    pair.area = np.zeros((SIZE, SIZE), dtype=bool)
    pair.area[20, 20] = True
    pair.save_mask(pair.area)


# Row -> what makes it of a good pair and sets what should be read, and the code of what is told ("" for nothing)

ACCEPTED: dict[str, tuple[Callable[[Pair], object], str]] = {
    "trailing bytes": (lambda p: p.edit(lambda b: b + bytes(500)), "DF104"),
    "PNG called JPEG": (lambda p: p.rename("photo") or p.image.rename(p.beside(".jpg")), "DF105"),
    "JPEG called PNG": (lambda p: (p.save(smooth(p), format="JPEG", quality=98)), "DF105"),
    "GIF beside": (lambda p: as_image(p.pixels).save(p.beside(".gif")), "DF107"),
    "no images": (lambda p: [p.beside(s).write_bytes(b"x") for s in (".svg", ".npy", ".mp4", ".raw")], "DF107"),
    "files of the system": (
        lambda p: [p.image.with_name(n).write_bytes(b"x") for n in (".DS_Store", "Thumbs.db", "._000.png")], ""),
    "HEIC": (lambda p: p.beside(".heic").write_bytes(b"x"), "DF107"),
    "folder called x.png": (lambda p: p.image.with_stem("folder").mkdir(), "DF107"),
    "link out of the dataset": (linked_elsewhere, "DF114"),
    "quotes": (lambda p: p.rename("'\" quoted"), ""),
    "dash": (lambda p: p.rename("-rf"), ""),
    "signs": (lambda p: p.rename("100%s #1 [a] a::b {x}"), ""),
    "newline": (lambda p: p.rename("two\nlines"), ""),
    "emoji": (lambda p: p.rename("\U0001f529"), ""),
    "mask spelt in another way": (lambda p: p.rename("\u00e9", "e\u0301"), ""),
    "16 bits": (lambda p: p.save(deep(p)), "DF120"),
    "16 bits in TIFF": (lambda p: p.save(deep(p), ".tif"), "DF120"),
    "16 bits a colour": (deep_rgb, "DF120"),
    "grey": (lambda p: p.save(grey(p)), ""),
    "black and white": (lambda p: p.save(grey(p, "1")), "DF122"),
    "palette": (lambda p: p.save(grey(p, "P")), ""),
    "CMYK": (lambda p: p.save(as_mode(p, "CMYK"), ".jpg", quality=98), "DF125"),
    "LAB": (lambda p: p.save(as_mode(p, "LAB"), ".tif"), "DF125"),
    "YCbCr": (lambda p: p.save(as_mode(p, "YCbCr"), ".tif"), "DF125"),
    "broken profile": (lambda p: p.save(p.pixels, icc_profile=b"no profile"), ""),
    "turned": (turn, "DF127"),
    "turned by nothing": (lambda p: p.save(p.pixels, exif=turned(99)), "DF126"),
    "one colour": (lambda p: p.save(np.full_like(p.pixels, 90)) and p.pixels.fill(90), "DF124"),
    "long and thin": (
        lambda p: resized(p, np.tile(p.pixels, (1, 5, 1)), np.tile(p.area, (1, 5))), "DF131"),
    "smaller than the resolution": (lambda p: resized(p, p.pixels[:40, :40], p.area[:40, :40]), "DF132"),
    "nearly full mask": (large_area, "DF150"),
    "0 and 1": (lambda p: p.save_mask(p.area.astype(np.uint8)), ""),
    "palette mask": (lambda p: p.save_mask(palette_mask(p)), ""),
    "blue mask": (lambda p: p.save_mask(colour_of(p.area, (0, 0, 255))), ""),
    "16-bit mask": (lambda p: p.save_mask(p.area.astype(np.uint16) * 65535), ""),
    "JPEG mask": (lambda p: p.save_mask(Image.fromarray(p.area).convert("L"), ".jpg"), ""),
    "smoothed mask": (lambda p: p.save_mask(smoothed_mask(p)), ""),
    "one pixel": (small_area, "DF151"),
}  # fmt: skip

# Row -> what makes it in an empty folder and returns the folder to give, the code, words

FOLDERS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "no folder": (lambda d: d / "nowhere", "DF160", "no such folder"),
    "a file": (lambda d: Path(__file__), "DF160", "not a folder"),
    "nothing": (lambda d: d, "DF161", "Found: nothing. Expected test/<defect>/"),
    "a leaf": (lambda d: make_mvtec(d / "nut") / "test/hole", "DF161", "nut' looks right"),
    "a leaf of the other layout": (lambda d: make_seed_layout(d / "nut") / "train", "DF161", "nut' looks right"),
    "too deep": (lambda d: make_mvtec(d / "a/b/c/d/e/nut").parents[4], "DF161", "Found: b."),
    "only good": (lambda d: (make_mvtec(d / "nut", {"hole": 0}), (d / "nut/ground_truth").mkdir())[0], "DF163",
                      "no defect images"),
}  # fmt: skip

NAMES = """../../etc /abs a/b CON nul.txt .. a\nb <b>x</b> [x](http://y) a:b -rf""".split(" ") + ["x" * 300, " "]


def write_table(root: Path, name: str) -> Path:
    """A table that names the object of its one pair."""
    pair = make_pair(root, "000")
    (root / "ground_truth").rename(root / "masks")
    line = {"file_name": "test/hole/000.png", "mask_file_name": f"masks/hole/{pair.mask.name}", "object": name}
    (root / "metadata.jsonl").write_text(json.dumps(line | {"defect": "hole"}))
    return root
