"""Formats out: the examples of a dataset, one at a time, as files that others load.

An example is a row of `FEATURES` with its files' content: image {"bytes", "path"}, mask the same or None for a good
image, object, defect, source_file. A writer is one function from a folder, a split's name and its examples to files.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from ..builder import FEATURES
from ..images import ORIENTATION, load_image, open_image
from ..masks import Mask
from ..minimal import minimal
from ..readers import Row, relative


SHARD_BYTES, GROUP_BYTES = 500 << 20, 32 << 20  # of a Parquet file, and of what is held in memory
PNG_MODES = ("1", "L", "LA", "RGB", "RGBA", "I;16", "I;16B")


def image_bytes(file: Path) -> tuple[bytes, str]:
    """An image file's pixels, upright, in a file that holds nothing else, and what was done for that.

    Returns:
        its content, and "kept" byte for byte, "trimmed" with the pixels coded as they were, or "rewritten" as PNG.
    """
    with open_image(file) as image:
        content = file.read_bytes()
        if image.getexif().get(ORIENTATION, 1) == 1 and (bare := minimal(content)):
            return bare, "kept" if bare == content else "trimmed"
        pixels = ImageOps.exif_transpose(image) if image.mode in PNG_MODES else load_image(image)
    pixels.info.clear()
    return png_bytes(pixels), "rewritten"


def mask_bytes(mask: Mask) -> bytes:
    """A PNG: 255 inside the defect, 0 outside."""
    return png_bytes(Image.fromarray(mask.render()).convert("L"))


def png_bytes(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def read_examples(rows: Iterable[tuple[str, Path, Row]], treated: dict[tuple[str, str], str]) -> Iterator[dict]:
    """The example of each (object, its folder, row); `treated` gets what `image_bytes` did with each image."""
    for name, root, row in rows:
        source = relative(row.image, root)
        content, treated[name, source] = image_bytes(row.image)
        rewritten = treated[name, source] == "rewritten"
        path = row.image.with_suffix(".png").name if rewritten else row.image.name
        yield {
            "image": {"bytes": content, "path": path},
            "mask": {"bytes": mask_bytes(row.mask), "path": f"{row.image.stem}.png"} if row.mask else None,
            "object": name,
            "defect": row.defect,
            "source_file": source,
        }


def _groups(examples: Iterable[dict]) -> Iterator[list[dict]]:
    """The examples in groups whose images are `GROUP_BYTES` or little more."""
    group, size = [], 0
    for example in examples:
        group.append(example)
        size += len(example["image"]["bytes"])
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def write_parquet(folder: Path, split: str, examples: Iterable[dict]) -> None:
    """data/train-00000-of-00002.parquet and so on, with the images in them, each `SHARD_BYTES` or little more."""
    (folder / "data").mkdir(exist_ok=True)
    groups, shards = _groups(examples), list[Path]()
    for first in groups:
        shards.append(folder / f"data/{split}-{len(shards)}")
        with shards[-1].open("wb") as stream, pq.ParquetWriter(stream, FEATURES.arrow_schema) as writer:
            for group in itertools.chain([first], groups):
                writer.write_table(pa.Table.from_pylist(group, FEATURES.arrow_schema))
                if stream.tell() >= SHARD_BYTES:
                    break
    for number, shard in enumerate(shards):
        shard.rename(folder / f"data/{split}-{number:05d}-of-{len(shards):05d}.parquet")


def write_imagefolder(folder: Path, split: str, examples: Iterable[dict]) -> None:
    """train/images/00000.jpg, train/masks/00000.png and their table train/metadata.jsonl.

    An image with defects of several types is one file, with a line and a mask for each type.
    """
    (folder / split / "images").mkdir(parents=True)
    files: dict[tuple[str, str], str] = {}
    with (folder / split / "metadata.jsonl").open("w") as table:
        for number, example in enumerate(examples):
            source = (example["object"], example["source_file"])
            image = files.get(source)
            if image is None:
                image = files[source] = f"images/{number:05d}{Path(example['image']['path']).suffix.lower()}"
                (folder / split / image).write_bytes(example["image"]["bytes"])
            mask = f"masks/{number:05d}.png" if example["mask"] else None
            if mask:
                (folder / split / "masks").mkdir(exist_ok=True)
                (folder / split / mask).write_bytes(example["mask"]["bytes"])
            names = {key: example[key] for key in ("object", "defect", "source_file")}
            table.write(json.dumps({"file_name": image, "mask_file_name": mask, **names}) + "\n")


WRITERS: dict[str, Callable[[Path, str, Iterable[dict]], None]] = {
    "parquet": write_parquet,
    "imagefolder": write_imagefolder,
}
