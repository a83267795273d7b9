"""What is published holds the pixels and nothing else, as it was coded where that can be proved."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from defectfill_dataset.minimal import minimal
from defectfill_dataset.writers import datasets as writers


SECRET = b"secret 48.1N 8.2E"
NOISE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(kind: str, pixels: np.ndarray = NOISE, **how) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **how)
    return stream.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(before: bytes = b"", behind: bytes = b"", hidden: bytes = b"", loose: bytes = b"", **how) -> bytes:
    """A PNG with chunks before its pixels and after them, and more data in or after its compressed stream."""
    content = saved("PNG", **how)
    header, end = content[:33], content[-12:]
    data = b"".join(content[i + 8 : i + 8 + n] for i, n in idats(content))
    data = zlib.compress(zlib.decompress(data) + hidden) + loose if hidden or loose else data
    return header + before + chunk(b"IDAT", data) + behind + end


def idats(content: bytes) -> list[tuple[int, int]]:
    found, place = [], 8
    while place < len(content):
        size = int.from_bytes(content[place : place + 4])
        found += [(place, size)] * (content[place + 4 : place + 8] == b"IDAT")
        place += 12 + size
    return found


def jpeg(segments: bytes = b"", pixels: np.ndarray = NOISE, **how) -> bytes:
    content = saved("JPEG", pixels, **how)
    return content[:20] + segments + content[20:]


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 255, marker, len(data) + 2) + data


def shorter(content: bytes, rows: int) -> bytes:
    """The JPEG whose header says fewer rows than it holds."""
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">H", rows) + content[place + 2 :]


def hidden_table(content: bytes) -> bytes:
    """A JPEG with a table for no component that spells the secret."""
    return content[:20] + segment(0xDB, b"\3" + SECRET.ljust(64)) + content[20:]


# What makes a file say more, by what can be done about it: left out, so that the pixels stay coded as they are ...
LEFT_OUT = {
    "png behind.png": png() + SECRET,
    "png text.png": png(chunk(b"tEXt", b"Comment\0" + SECRET)),
    "png behind the pixels.png": png(behind=chunk(b"tEXt", b"Comment\0" + SECRET)),
    "png time.png": png(chunk(b"tIME", SECRET[:7])),
    "png palette of no use.png": png(chunk(b"PLTE", SECRET[:15]) + chunk(b"sPLT", b"x\0\x08" + SECRET.ljust(18))),
    "png profile.png": saved("PNG", icc_profile=PROFILE + SECRET),
    "png unknown.png": png(chunk(b"prVt", SECRET)),
    "png licence and place.png": png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<cc:license/><q:GPS q:p='secret'/>")),
    "png next image.png": png() + png(),
    "jpeg behind.jpg": jpeg() + SECRET,
    "jpeg next image.jpg": jpeg() + jpeg(),
    "jpeg comment.jpg": jpeg(segment(0xFE, SECRET)),
    "jpeg jfif thumbnail.jpg": jpeg(segment(0xE0, b"JFXX\0\x10" + SECRET)),
    "jpeg jfif text.jpg": jpeg(segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0" + SECRET)),
    "jpeg profile.jpg": jpeg(icc_profile=PROFILE + SECRET),
    "jpeg adobe text.jpg": jpeg(segment(0xEE, b"Adobe\0\x64\0\0\0\0\1" + SECRET)),
    "jpeg xmp.jpg": jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<cc:license/><q:GPS>secret</q:GPS>")),
    "jpeg density.jpg": jpeg(dpi=(72, 73)),
}  # fmt: skip
# ... or written anew, as PNG.
WRITTEN_ANEW = {
    "png hidden rows.png": png(hidden=SECRET * 20),
    "png loose data.png": png(loose=SECRET),
    "png palette.png": None,
    "png interlaced.png": None,
    "jpeg hidden rows.jpg": shorter(jpeg(), 48),
    "jpeg hidden part of a block.jpg": shorter(jpeg(), 60),
    "jpeg progressive.jpg": jpeg(progressive=True),
    "jpeg progressive with a profile.jpg": jpeg(progressive=True, icc_profile=PROFILE + SECRET),
    "webp with a profile.webp": saved("WEBP", lossless=True, icc_profile=PROFILE + SECRET),
    "jpeg restarts.jpg": jpeg(restart_marker_blocks=2),
    "jpeg hidden table.jpg": hidden_table(jpeg()),
    "jpeg unusual segment.jpg": jpeg(segment(0xDC, SECRET)),
    "jpeg cmyk.jpg": None,
    "jpeg of rgb.jpg": jpeg(keep_rgb=True),
    "bmp.bmp": saved("BMP") + SECRET,
    "webp.webp": saved("WEBP", lossless=True) + SECRET,
    "tiff.tif": saved("TIFF") + SECRET,
    "mpo turned.jpg": None,
}


def special(name: str) -> bytes:
    stream = io.BytesIO()
    if "palette" in name:
        Image.fromarray(NOISE).quantize(16).save(stream, "PNG")
        return stream.getvalue()
    if name.startswith("png"):  # interlaced: Pillow reads it, and writes none
        palette = Image.fromarray(NOISE)
        palette.save(stream, "PNG")
        return interlaced(stream.getvalue())
    if name.startswith("jpeg"):
        Image.fromarray(NOISE).convert("CMYK").save(stream, "JPEG")
        return stream.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE).save(stream, "MPO", save_all=True, append_images=[Image.fromarray(NOISE[::-1])], exif=exif)
    return stream.getvalue()


def interlaced(content: bytes) -> bytes:
    """The PNG in Adam7's seven passes."""
    starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [b"\0" + line.tobytes() for y, x, dy, dx in starts for line in NOISE[y::dy, x::dx]]
    header = content[16:28] + b"\1"
    return content[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + content[-12:]


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_nobody_sees_is_left_out_and_the_pixels_stay_coded_as_they_are(tmp_path, name):
    content = LEFT_OUT[name]
    (tmp_path / name).write_bytes(content)
    new, how = writers.image_bytes(tmp_path / name)
    assert how == "trimmed" and SECRET[:6] not in new and len(new) < len(content) + 1
    assert np.array_equal(decoded(new), decoded(content)) and minimal(new) == new
    assert max(b"IDAT" in new, b"\xff\xda" in new) and content[-200:-150] in content
    assert Image.open(io.BytesIO(new)).format == ("PNG" if name.startswith("png") else "JPEG")


@pytest.mark.parametrize("name", WRITTEN_ANEW)
def test_what_may_hide_more_is_written_anew(tmp_path, name):
    content = WRITTEN_ANEW[name] or special(name)
    (tmp_path / name).write_bytes(content)
    new, how = writers.image_bytes(tmp_path / name)
    assert how == "rewritten" and minimal(new) == new and SECRET[:6] not in new
    shown = decoded(content)
    assert np.array_equal(decoded(new), np.rot90(shown, -1) if "turned" in name else shown)


@pytest.mark.parametrize(
    "kind, pixels",
    [
        ("PNG", NOISE), ("PNG", NOISE[..., 0]), ("PNG", NOISE[..., 0] > 127), ("PNG", NOISE[..., :2]),
        ("PNG", NOISE[:5, :7]), ("PNG", NOISE[..., 0].astype(np.uint16) * 257), ("JPEG", NOISE),
        ("JPEG", NOISE[..., 0]), ("JPEG", NOISE[:8, :8, 0]), ("JPEG", np.zeros((64, 64, 3), np.uint8)),
        ("JPEG", np.full((512, 512, 3), 255, np.uint8)), ("JPEG", np.full((64, 64), 128, np.uint8)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("quality", [50, 75, 95])
def test_a_minimal_file_stays_as_it_is(tmp_path, kind, pixels, quality):
    content = saved(kind, pixels, **({"quality": quality} if kind == "JPEG" else {}))
    assert minimal(content) == content
    (tmp_path / "x").write_bytes(content)
    assert writers.image_bytes(tmp_path / "x") == (content, "kept")


def test_any_damage_is_no_proof_and_no_traceback():
    rng = np.random.default_rng(0)
    for content in (png(), jpeg(), jpeg(quality=30, subsampling=0)):
        for _ in range(150):
            damaged = bytearray(content)
            for place in rng.integers(2, min(len(content), 700), 3):
                damaged[place] = rng.integers(256)
            new = minimal(bytes(damaged[: rng.integers(2, len(content) + 1)]))
            assert new is None or minimal(new) == new
    text = PngInfo()
    text.add_text("x", "y")
    assert minimal(saved("PNG", pnginfo=text)) == saved("PNG")
