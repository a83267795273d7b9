"""Explains why a folder matches no layout, as far as possible."""

from collections.abc import Iterator
from pathlib import Path

from ..text import holds_text
from .coco import is_coco
from .cvat import is_cvat
from .datumaro import is_datumaro
from .files import IMAGE_EXTENSIONS, PEEKED, Place
from .label_studio import is_label_studio
from .labelme import is_labelme
from .voc import is_voc
from .yolo import is_yolo


ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"}
NOT_READ = {
    ".mat", ".npy", ".npz", ".h5", ".hdf5", ".tfrecord", ".record", ".pkl", ".pt", ".lmdb", ".parquet", ".arrow",
    ".mp4", ".avi", ".mov", ".dcm", ".ndjson", ".xlsx", ".ipynb",
}  # fmt: skip
KINDS = (  # words that a JSON file of this program holds
    ("VIA", ('"shape_attributes"', '"region_attributes"')),
    ("Supervisely", ('"classTitle"',)),
    ("Labelbox", ('"data_row"',)),
    ("V7 Darwin", ('"bounding_box"', '"annotations"', '"item"')),
    ("CreateML", ('"coordinates"', '"annotations"', '"image"')),
    ("Scalabel", ('"box2d"',)),
    ("Label Studio without annotations", ('"data"', '"image"')),
)
PROGRAMS = {
    "COCO": is_coco, "CVAT": is_cvat, "Datumaro": is_datumaro, "Label Studio": is_label_studio, "LabelMe": is_labelme,
    "Pascal VOC": is_voc, "YOLO": is_yolo,
}  # fmt: skip
MASK_FOLDERS = {"mask", "masks", "ground_truth", "gt", "labels", "segmentation", "annotations"}


def explain(root: Path) -> str:
    """A sentence, and a space, for each kind of thing in the folder that may be meant as data."""
    place = Place(root, below=True)
    known = [name for name, fits in PROGRAMS.items() if fits(place)]
    return "".join(f"{told}. " for told in _told(place.files, root, known))


def _told(files: list[Path], root: Path, known: list[str]) -> Iterator[str]:
    def some(found: list[Path]) -> str:
        first = f"'{found[0].relative_to(root).as_posix()}'"
        return first if len(found) == 1 else f"{first} and {len(found) - 1} more"

    def ending(*suffixes: str) -> list[Path]:
        return [file for file in files if file.suffix.lower() in suffixes]

    if found := ending(*ARCHIVES):
        yield f"{some(found)} must be unpacked"
    if found := ending(*NOT_READ):
        yield f"{some(found)}: {', '.join(sorted({f.suffix.lower() for f in found}))} files are not read"
    images = ending(*IMAGE_EXTENSIONS)
    if known and not images:
        yield f"There are annotations of {' and '.join(known)}, but no images; put them into the same folder"
    if known:
        return
    kinds: dict[str, list[Path]] = {}
    for file in ending(".json")[:PEEKED]:
        kind = next((kind for kind, words in KINDS if holds_text(file, *words)), "")
        kinds.setdefault(kind, []).append(file)
    for kind, found in kinds.items():
        what = f"is from {kind}" if kind else "is from an unknown program"
        yield f"{some(found)} {what}; export the annotations as COCO"
    if found := ending(".xml"):
        yield f"{some(found)} is XML, but not from Pascal VOC, LabelMe or CVAT"
    if found := ending(".csv", ".jsonl"):
        yield f"{some(found)} has no column mask_file_name, or is not called metadata.csv or .jsonl"
    if found := ending(".txt", ".yaml", ".yml"):
        yield f"{some(found)} holds no lines of YOLO labels"
    masks = [file for file in images if file.parent.name.casefold() in MASK_FOLDERS]
    if masks and len(masks) == len(images):
        yield f"{some(masks)} may be masks, but there are no images beside that folder"
    elif images and not masks:
        yield f"{some(images)} are images, but there is neither a mask nor an annotation of them"
