"""Generated images out: what generate_defectfill.py leaves, in the formats that people train on.

An exporter is one function from a folder, the examples of each split (those of `writers`, with the `name` of their
files) and the defect types to files; it returns the name of the file that makes the folder whole.
"""

import csv
import dataclasses
import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import yaml

from ..builder import file_digest
from ..errors import InputError, Problem
from ..images import load_image, open_image
from ..mask_values import binarise
from ..masks import MaskFiles, components
from ..readers import ONE_TYPE, Row, can_name, file_inside, image_files
from ..readers.marks import MALFORMED, placed_rle, said
from ..seeds import derive_seed
from ..text import MOST_RUN_BYTES, Schema, numbered_lines, parse_json, read_text
from .datasets import WRITERS, png_bytes, read_examples
from .polygons import exact_polygon, joined_polygon


class ExportLine(Schema):
    """What an export uses of a line of the manifest."""

    image: str
    mask: str
    object: str | None
    defect: str | None = None
    good_image: str | None = None
    good_image_sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class ExportImage:
    """One image to export.

    Args:
        name: of its files, without suffix.
        root: the folder that its problems and `source_file` are relative to.
        source: what identifies the good image that it was made from, or that it is.
    """

    name: str
    root: Path
    row: Row
    source: str


# In


def read_generated(folder: Path, several: bool) -> tuple[list[ExportImage], list[Problem]]:
    """The images that a generated folder's manifest lists, and what is wrong with it (DF196, DF197, DF330).

    Args:
        several: it is one of several folders, whose name goes before those of its images.
    """
    folder = folder.expanduser().resolve()
    manifest = folder / "manifest.jsonl"
    if not manifest.is_file():
        fix = "give a folder that generate_defectfill.py wrote"
        return [], [Problem("DF196", folder, "holds no manifest.jsonl", fix)]
    items, problems = list[ExportImage](), list[Problem]()
    try:
        lines = [*numbered_lines(read_text(manifest, "DF196", "generate it again", MOST_RUN_BYTES))]
    except InputError as error:
        return [], [*error.problems]
    for number, text in lines:
        place = f"{manifest}, line {number}"
        try:
            line = parse_json(text, ExportLine)
            image, mask = (file_inside(folder, folder, line[key]) for key in ("image", "mask"))
            missing = [line[key] for key, file in (("image", image), ("mask", mask)) if file is None]
            names = {"object": str(line["object"] or ""), "defect": str(line.get("defect") or ONE_TYPE)}
            source = str(line.get("good_image_sha256") or line["good_image"])
            damaged = [
                line[key] for key, file in (("image", image), ("mask", mask)) if file and _damaged(line, key, file)
            ]
        except MALFORMED as error:
            problems.append(
                Problem("DF196", place, f"is not of a generated image: {said(error)}", "generate it again")
            )
            continue
        problems += [
            Problem("DF197", place, f"names '{name}', which is not there", "generate it again") for name in missing
        ]
        fix = "run the same generation again with --verify"
        problems += [Problem("DF330", place, f"'{name}' is not what was generated", fix) for name in damaged]
        problems += [
            Problem("DF196", place, f"the {kind} '{name}' cannot name a folder of defects", "rename it there")
            for kind, name in names.items()
            if name == "good" or not can_name(name)
        ]
        if image and mask:
            stem = f"{folder.name}_{image.stem}" if several else image.stem
            row = Row(image, MaskFiles((mask,)), names["defect"], None, names["object"])
            items.append(ExportImage(stem, folder.parent, row, source))
    if not items and not problems:
        problems.append(Problem("DF196", manifest, "lists no image", "generate some"))
    return items, problems


def _damaged(line: dict, key: str, file: Path) -> bool:
    """Whether the file of a manifest's line is another than its digest says; an earlier version wrote none."""
    kind = {"image": "images", "mask": "masks"}[key]
    return "files" in line and line["files"][kind]["sha256"] != file_digest(file)


def read_good_images(folder: Path, name: str, inpainted: set[str]) -> list[ExportImage]:
    """The good images in a folder, of the object of this name; those in `inpainted` are known as they are there."""
    folder = folder.expanduser().resolve()
    items = []
    for file in image_files(folder):
        source = file.name if file.name in inpainted else file_digest(file)
        items.append(ExportImage(f"good_{file.stem}", folder.parent, Row(file, None, "good", None, name), source))
    return items


def split_items(items: Iterable[ExportImage], share: float, normal_only: bool) -> dict[str, list[ExportImage]]:
    """The items of the splits train and test, by name; all images made from one good image are in one of them.

    Args:
        share: of the good images that are `test`, by a hash of each; one at least, unless it is 0.
        normal_only: training sees no defect, so all good images that defects were generated on are `test`.
    """
    items = sorted(items, key=lambda item: item.name)
    number = {item.source: derive_seed(item.source) / 2**63 for item in items}
    inpainted = {item.source for item in items if item.row.mask}
    test = {source for source in number if number[source] < share} | (inpainted if normal_only else set())
    wanted = {item.source for item in items if normal_only == (item.row.mask is None)}
    if share and wanted and not wanted & test:
        test.add(min(wanted, key=number.__getitem__))
    return {
        "train": [item for item in items if item.source not in test],
        "test": [item for item in items if item.source in test],
    }


def read_items(items: list[ExportImage], treated: dict[tuple[str, str], str]) -> Iterator[dict]:
    """The example of each item; `treated` gets what `image_bytes` did with each image."""
    rows = ((item.row.object or "", item.root, item.row) for item in items)
    for item, example in zip(items, read_examples(rows, treated)):
        yield {**example, "name": item.name}


# Out


def _put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _picture(example: dict, always_png: bool = False) -> tuple[str, bytes]:
    """The suffix and content of an example's image, a PNG if so wanted."""
    content, suffix = example["image"]["bytes"], Path(example["image"]["path"]).suffix.lower()
    with open_image(io.BytesIO(content)) as image:
        if image.format == "PNG" or not always_png:
            return suffix, content
        return ".png", png_bytes(load_image(image))


def _inside(example: dict) -> np.ndarray:
    return binarise(open_image(io.BytesIO(example["mask"]["bytes"])))


def write_mvtec(folder: Path, splits: dict[str, Iterable[dict]], defects: list[str]) -> str:
    """MVTec AD: nut/test/hole/007.png with nut/ground_truth/hole/007_mask.png; nut/train/good and nut/test/good."""
    for split, examples in splits.items():
        for example in examples:
            root, defect, name = folder / example["object"], example["defect"], example["name"]
            place = root / "test" / defect if example["mask"] else root / split / "good"
            _put(place / f"{name}.png", _picture(example, always_png=True)[1])
            if example["mask"]:
                _put(root / "ground_truth" / defect / f"{name}_mask.png", example["mask"]["bytes"])
    return ""


def write_anomalib(folder: Path, splits: dict[str, Iterable[dict]], defects: list[str]) -> str:
    """Anomalib's Folder (normal/, normal_test/, abnormal/, masks/) and, for its Tabular, samples.csv of the same.

    Source: anomalib.readthedocs.io, anomalib.data.Folder and Tabular.
    """
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(["image_path", "label_index", "mask_path", "split", "defect"])
    for split, examples in splits.items():
        for example in examples:
            place = "abnormal" if example["mask"] else {"train": "normal", "test": "normal_test"}[split]
            suffix, content = _picture(example)
            image, mask = f"{place}/{example['name']}{suffix}", ""
            _put(folder / image, content)
            if example["mask"]:
                mask = f"masks/{example['name']}.png"
                _put(folder / mask, example["mask"]["bytes"])
            lines.writerow([image, int(bool(mask)), mask, split, example["defect"]])
    (folder / "samples.csv").write_text(table.getvalue(), encoding="utf-8")
    return "samples.csv"


def write_coco(folder: Path, splits: dict[str, Iterable[dict]], defects: list[str]) -> str:
    """COCO: images/ and annotations_train.json and so on, or annotations.json if there is one split.

    An annotation is a connected component of a mask: its polygon where that is exact, else RLE.

    Source: Lin et al., ECCV 2014; cocodataset.org/#format-data.
    """
    file = ""
    for split, examples in splits.items():
        images, annotations = list[dict](), list[dict]()
        for example in examples:
            suffix, content = _picture(example)
            name = f"{example['name']}{suffix}"
            _put(folder / "images" / name, content)
            width, height = open_image(io.BytesIO(content)).size
            images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height})
            if example["mask"]:
                kind = {"image_id": len(images), "category_id": defects.index(example["defect"]) + 1, "iscrowd": 0}
                annotations += [{**kind, **shape} for shape in _coco_shapes(_inside(example))]
        table = {
            "images": images,
            "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)],
            "categories": [{"id": number, "name": defect} for number, defect in enumerate(defects, 1)],
        }
        file = f"annotations_{split}.json" if len(splits) > 1 else "annotations.json"
        (folder / file).write_text(json.dumps(table))
    return file


def _coco_shapes(mask: np.ndarray) -> Iterator[dict]:
    """The segmentation, area and box of each connected component of an (H, W) mask."""
    for left, top, component in components(mask):
        height, width = component.shape
        polygon = exact_polygon(component)
        segmentation: list | dict = [] if polygon is None else [(polygon + [left, top]).ravel().tolist()]
        if not segmentation:
            counts = placed_rle(component, left, top, (mask.shape[1], mask.shape[0]))
            segmentation = {"size": list(mask.shape), "counts": counts}
        yield {"segmentation": segmentation, "area": int(component.sum()), "bbox": [left, top, width, height]}


def _box(component: np.ndarray) -> np.ndarray:
    """The centre of an (h, w) component and its size, (2, 2) as (x, y)."""
    size = np.array(component.shape[::-1])
    return np.stack([size / 2, size])


def write_yolo(folder: Path, splits: dict[str, Iterable[dict]], defects: list[str], boxes: bool = False) -> str:
    """YOLO: images/ and labels/ with train/ and val/, a line a connected component, data.yaml; no labels: good.

    A polygon runs along the borders of the pixels, and into holes and out again along one path.

    Source: docs.ultralytics.com/datasets/segment and /detect.
    """
    for split, examples in splits.items():
        side = {"train": "train", "test": "val"}[split]
        for example in examples:
            suffix, content = _picture(example)
            _put(folder / "images" / side / f"{example['name']}{suffix}", content)
            if not example["mask"]:
                continue
            mask, lines = _inside(example), ""
            for left, top, component in components(mask):
                points = _box(component) + [[left, top], [0, 0]] if boxes else joined_polygon(component) + [left, top]
                values = " ".join(f"{value:.6f}" for value in (points / mask.shape[::-1]).ravel())
                lines += f"{defects.index(example['defect'])} {values}\n"
            _put(folder / "labels" / side / f"{example['name']}.txt", lines.encode())
    config = {"train": "images/train", "val": "images/val", "names": dict(enumerate(defects))}
    (folder / "data.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return "data.yaml"


def _write_rows(write: Callable, folder: Path, splits: dict[str, Iterable[dict]], defects: list[str]) -> str:
    for split, examples in splits.items():
        write(folder, split, examples)
    return "README.md"


EXPORTERS: dict[str, Callable[[Path, dict[str, Iterable[dict]], list[str]], str]] = {
    "mvtec": write_mvtec,
    "anomalib": write_anomalib,
    "coco": write_coco,
    "yolo": write_yolo,
    "yolo-detect": functools.partial(write_yolo, boxes=True),
    **{name: functools.partial(_write_rows, write) for name, write in WRITERS.items()},
}
NORMAL_ONLY = ("mvtec", "anomalib")  # formats whose training images are all good
