"""What photographs tell besides their pixels stays out of everything that is written, unless asked for."""

import base64
import io
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from drawn import write_image, write_mask
from generated_folder import export, make_generated
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from runs import generate

from defectfill_dataset import images
from defectfill_dataset.minimal import minimal
from defectfill_dataset.writers import datasets as writers
from defectfill_dataset.writers.exports import EXPORTERS
from defectfill_scripts import prepare_data


GPS, CAMERA, ORIENTATION = 0x8825, 0x0110, 0x0112  # EXIF tags
XMP = b"<x:xmpmeta><tiff:Orientation>6</tiff:Orientation>secret</x:xmpmeta>"
CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"iCCP"}
FAST = ["--num_inference_steps", 1, "--num_candidates", 2, "--selection", "rmse"]


def write_telling(folder: Path, size: tuple[int, int] = (48, 48)) -> None:
    """A JPEG, a PNG, a TIFF and a WebP, turned by their EXIF tag, that tell a place, a camera and more."""
    exif, text = Image.Exif(), PngInfo()
    exif[ORIENTATION], exif[CAMERA] = 6, "secret"
    exif.get_ifd(GPS).update(place := {1: "N", 2: (48.0, 8.0, 0.0)})
    text.add_text("Author", "secret"), text.add_text("Comment", "secret", zip=True), text.add(b"caBX", b"secret")
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / "a.jpg", exif=exif, xmp=XMP, comment=b"secret")
    picture.save(folder / "b.png", exif=exif, pnginfo=text)
    picture.save(folder / "d.webp", exif=exif, xmp=XMP, lossless=True)
    exif[GPS] = place  # as a TIFF file wants it
    picture.save(folder / "c.tif", exif=exif)


def pictures(file: Path) -> list[bytes]:
    """The contents of all pictures in a file."""
    if file.suffix == ".parquet" and "image" in (table := pq.read_table(file)).column_names:
        cells = [cell for name in ("image", "mask") for cell in table[name].to_pylist()]
        return [cell["bytes"] for cell in cells if isinstance(cell, dict)]
    if file.suffix == ".html":
        return [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", file.read_text())]
    return [file.read_bytes()] if file.suffix in (".png", ".jpg", ".tif", ".webp") else []


def chunks(png: bytes) -> Iterator[bytes]:
    """The names of its chunks."""
    place = 8
    while place < len(png):
        yield png[place + 4 : place + 8]
        place += 12 + int.from_bytes(png[place : place + 4])


def assert_bare(folder: Path) -> None:
    """Nothing below `folder` tells anything but pixels."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    found = [(file.name, content) for file in files for content in pictures(file)]
    assert found and not [f for f in files if b"secret" in f.read_bytes()]
    for name, content in found:
        image = Image.open(io.BytesIO(content))
        image.load()
        assert b"secret" not in content and not image.getexif(), name
        assert not image.info.keys() & {"exif", "xmp", "comment"}, name
        if image.format == "PNG":
            assert set(chunks(content)) <= CHUNKS, name


@pytest.mark.slow
def test_generated_files_tell_nothing_of_the_photographs(trained, tmp_path):
    write_telling(tmp_path / "good")
    argv = ["--lora", trained, "--image", tmp_path / "good", "--mask_source", "random", *FAST]
    generate(*argv, "--output_dir", tmp_path / "bare")
    assert len(list((tmp_path / "bare/images").iterdir())) == 4
    assert_bare(tmp_path / "bare")
    generate(*argv, "--keep_metadata", "--output_dir", tmp_path / "kept")
    for name in "abcd":
        bare, kept = (Image.open(tmp_path / out / f"images/{name}.png") for out in ("bare", "kept"))
        exif = kept.getexif()
        assert exif.keys() == {GPS, CAMERA, ORIENTATION}
        assert exif[ORIENTATION] == 1 and exif[CAMERA] == "secret" and exif.get_ifd(GPS)[1] == "N"
        assert np.array_equal(bare, kept) and not kept.text
    for kind in ("masks", "contact"):
        assert_bare(tmp_path / "kept" / kind)


@pytest.mark.parametrize("file_format", EXPORTERS)
def test_exports_tell_nothing_of_the_photographs(tmp_path, file_format):
    for number in range(6):
        write_image(tmp_path / f"photos/{number:03d}.png")
    root = make_generated(tmp_path / "generated")
    write_telling(tmp_path / "photos"), write_telling(tmp_path / "told", (48, 64))
    for file in (root / "images").iterdir():  # as with --keep_metadata
        file.write_bytes((tmp_path / "told/b.png").read_bytes())
    out = export(tmp_path / "out", file_format, root, "--good", tmp_path / "photos")
    assert_bare(out)


@pytest.mark.parametrize("file_format", writers.WRITERS)
def test_prepared_data_tells_nothing_of_the_photographs(tmp_path, capsys, file_format):
    root = tmp_path / "nut"
    write_telling(root / "images/hole"), write_telling(root / "good")
    for name in "abcd":
        write_mask(root / f"masks/hole/{name}.png")
    argv = [root, "--output_dir", tmp_path / "out", "--format", file_format, "--split", "all"]
    prepare_data.main(prepare_data.parse_args([str(a) for a in argv]))
    told = capsys.readouterr().out
    assert "Of 8 images, 8 written anew as upright PNG of the same pixels\n" in told
    assert told.splitlines()[0] in (tmp_path / "out/README.md").read_text()
    assert_bare(tmp_path / "out")


def with_text(**how) -> PngInfo:
    text = PngInfo()
    key = how.pop("key", "Comment")
    text.add_itxt("XML:com.adobe.xmp", XMP.decode()) if how.get("xmp") else text.add_text(key, "secret", **how)
    return text


@pytest.mark.parametrize(
    "name, saving, segment",
    [
        ("xmp.jpg", {"xmp": XMP}, b""), ("xmp.webp", {"xmp": XMP}, b""), ("xmp.tif", {"tiffinfo": {700: XMP}}, b""),
        ("xmp.png", {"pnginfo": with_text(xmp=True)}, b""), ("text.png", {"pnginfo": with_text()}, b""),
        ("lower.png", {"pnginfo": with_text(key="comment")}, b""),
        ("zipped.png", {"pnginfo": with_text(zip=True)}, b""), ("comment.jpg", {"comment": b"secret"}, b""),
        ("iptc.jpg", {}, b"\xff\xed\x00\x08secret"), ("behind.jpg", {}, b""), ("behind.png", {}, b""),
    ],
)  # fmt: skip
def test_each_kind_of_metadata_alone_is_left_out(tmp_path, name, saving, segment):
    file = tmp_path / name
    Image.new("RGB", (8, 8), (9, 90, 200)).save(file, **saving)
    content = file.read_bytes()
    file.write_bytes(content[:2] + segment + content[2:] + b"secret" * name.startswith("behind"))
    bare, how = writers.image_bytes(file)
    image = Image.open(io.BytesIO(bare))
    assert how != "kept" and b"secret" not in bare and minimal(bare) == bare
    assert image.size == (8, 8) and not image.getexif()


def test_a_malformed_tag_costs_the_exif_data_and_nothing_else(tmp_path):
    tag = struct.pack("<HHII", 0x0100, 12, 1, 26)  # a width as a double
    content = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + tag + struct.pack("<Id", 0, 8.5)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=content)
    assert images.upright_exif(tmp_path / "x.jpg") == b""
