"""CMYK images: by their own profile, or plainly, and a line that says which."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from defectfill_dataset import image_tensor, load_image
from defectfill_dataset.images import file_warnings, open_image


def cmyk_profile(full_cyan: int = 128) -> bytes:
    """An ICC profile of a press whose cyan is a grey of this lightness (0 to 255), and whose other inks are black."""

    def s15(x: float) -> bytes:
        return struct.pack(">i", round(x * 65536))

    ramp = bytes(range(256))
    corners = np.full((2, 2, 2, 2, 3), 128, np.uint8)  # C, M, Y, K -> L, a, b
    corners[..., 0] = 0
    corners[0, 0, 0, 0, 0], corners[1, 0, 0, 0, 0] = 255, full_cyan
    identity = b"".join(s15(x) for x in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + corners.tobytes() + ramp * 3
    white = s15(0.9642) + s15(1) + s15(0.8249)
    text = b"a press"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + b"\0" + bytes(78)
    tags = {
        b"desc": described,
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + white,
        b"A2B0": lut,
    }
    table, body, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    rest = struct.pack(">I", len(tags)) + table + body
    header = struct.pack(
        ">I4sI4s4s4s12s4s", 128 + len(rest), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ", b"", b"acsp"
    )
    header += bytes(28) + white + b"lcms"
    return header.ljust(128, b"\0") + rest


@pytest.fixture
def save(tmp_path):
    """Writes an image of full cyan and returns the file."""

    def save(suffix: str, **options):
        file = tmp_path / f"x{suffix}"
        Image.new("CMYK", (48, 48), (255, 0, 0, 0)).save(file, **options)
        return file

    return save


def colour(file) -> np.ndarray:
    return np.asarray(load_image(open_image(file)))[24, 24].astype(int)


@pytest.mark.parametrize("suffix, options", [(".jpg", {"quality": 100}), (".tif", {})])
def test_a_cmyk_image_is_converted_by_its_own_profile(save, suffix, options):
    ImageCms.ImageCmsProfile(io.BytesIO(cmyk_profile()))  # one that a library reads
    plain = save(suffix, **options)
    assert np.abs(colour(plain) - (0, 255, 255)).max() <= 4
    (told,) = file_warnings(open_image(plain), "x")
    assert str(told) == "DF125 x: is in CMYK, converted to RGB without a colour profile"
    for lightness, expected in ((128, 119), (200, 193)):  # two profiles in one process
        own = save(suffix, icc_profile=cmyk_profile(lightness), **options)
        assert np.abs(colour(own) - expected).max() <= 4
        (told,) = file_warnings(open_image(own), "x")
        assert str(told) == "DF125 x: is in CMYK, converted to RGB by its own colour profile"


def test_a_profile_that_cannot_be_used_is_as_none(save):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (b"no profile", cmyk_profile()[:300], srgb):
        file = save(".jpg", quality=100, icc_profile=profile)
        assert np.abs(colour(file) - (0, 255, 255)).max() <= 4
        assert "without a colour profile" in str(file_warnings(open_image(file), "x")[0])


def test_a_cmyk_image_turned_by_its_tag_is_converted_too(save):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = save(".jpg", quality=100, icc_profile=cmyk_profile(), exif=exif)
    assert np.abs(colour(file) - 119).max() <= 4
    assert image_tensor(load_image(open_image(file)), 8).abs().max() < 0.1
