"""Layouts that say by folders and names which mask an image has: one function each, from a folder to its rows."""

import filecmp
from collections.abc import Collection
from pathlib import Path

import numpy as np

from ..errors import Problem
from ..images import UNREADABLE, open_image
from ..mask_values import binarise
from ..masks import MaskFiles
from ..text import read_csv
from .files import Place, all_images, child, file_inside, folders_in, image_files, pair_masks, pair_rows
from .rows import ONE_TYPE, Reading, Row, relative


def read_types(
    root: Path,
    images: str,
    masks: str,
    split: str | None = None,
    nonzero: bool = False,
    not_types: Collection[str] = ("good",),
) -> Reading:
    """Rows of every defect type `images`/<defect> with its masks in `masks`/<defect>, paired by name.

    Args:
        nonzero: any value above 0 is defect.
        not_types: folders that hold no defects, in any capitals.
    """
    reading = Reading()
    of_images, of_masks = child(root, images), child(root, masks)
    types = {f.name for f in folders_in(of_images)}
    types |= {f.name for f in folders_in(of_masks) if child(of_images, f.name).name not in types}
    for defect in sorted(types):
        if defect.casefold() not in not_types:
            reading += pair_rows(child(of_images, defect), child(of_masks, defect), root, defect, split, nonzero)
    return reading


def with_good(reading: Reading, root: Path, *folders: str) -> Reading:
    """The reading with all images in and below these folders as good ones."""
    for folder in folders:
        reading.add_good(all_images(child(root, folder)))
    return reading


def read_mvtec(root: Path) -> Reading:
    """MVTec AD: test/<defect>/007.png with ground_truth/<defect>/007_mask.png; good images in train/ and test/good.

    Source: Bergmann et al., CVPR 2019.
    """
    return with_good(read_types(root, "test", "ground_truth"), root, "train/good", "test/good")


def read_defectfill(root: Path) -> Reading:
    """The DefectFill tutorial's layout: train/defective/<defect> with train/defective_masks/<defect>, test/good."""
    return with_good(read_types(root, "train/defective", "train/defective_masks", "train"), root, "test/good")


def read_mvtec_ad2(root: Path) -> Reading:
    """MVTec AD 2: test_public/bad with ground_truth/bad, in test_public or beside it; the private tests have no masks.

    Source: Heckler-Kram et al., arXiv 2503.21622.
    """
    masks = "test_public/ground_truth" if child(root, "test_public/ground_truth").is_dir() else "ground_truth"
    reading = read_types(root, "test_public", masks, not_types=("good", "ground_truth"))
    return with_good(reading, root, "train/good", "validation/good", "test_public/good")


def has_mask_folders(place: Place) -> bool:
    """Whether ground_truth/<defect> holds folders of masks, one for each image."""
    root = place.folder
    for defect in folders_in(child(root, "ground_truth")):
        stems = {file.stem for file in image_files(child(root, f"test/{defect.name}"))}
        if any(image_files(folder) and folder.name in stems for folder in folders_in(defect)):
            return True
    return False


def read_mvtec_loco(root: Path) -> Reading:
    """MVTec LOCO: the masks of test/<defect>/007.png are ground_truth/<defect>/007/*.png, any value a defect.

    Source: Bergmann et al., IJCV 2022.
    """
    reading = read_types(root, "test", "ground_truth", nonzero=True)
    return with_good(reading, root, "train/good", "validation/good", "test/good")


def read_btad(root: Path) -> Reading:
    """BTAD: test/ko with ground_truth/ko; good images in train/ok and test/ok.

    Source: Mishra et al., VT-ADL, ISIE 2021.
    """
    reading = read_types(root, "test", "ground_truth", not_types=("ok", "good"))
    return with_good(reading, root, "train/ok", "test/ok")


def read_visa(root: Path) -> Reading:
    """VisA: Data/Images/{Normal,Anomaly} with Data/Masks/Anomaly, any value a defect.

    Where ../split_csv/1cls.csv names the object's images, it says which they are and which mask each has.

    Source: Zou et al., ECCV 2022.
    """
    table = root.parent / "split_csv/1cls.csv"
    lines = [line for line in read_csv(table) if line.get("object") == root.name] if table.is_file() else []
    if not lines:
        reading = pair_rows(
            child(root, "Data/Images/Anomaly"), child(root, "Data/Masks/Anomaly"), root, "anomaly", nonzero=True
        )
        return with_good(reading, root, "Data/Images/Normal")
    reading = Reading()
    for line in lines:
        image, mask = (file_inside(root, table.parents[1], line.get(key)) for key in ("image", "mask"))
        if image is None:
            reading.missing(table, f"names the image '{line.get('image')}', which is not in {root}")
        elif line.get("label") == "normal":
            reading.add_good([image])
        elif mask is None:
            reading.blame("DF142", image, root, "its mask is missing", f"expected '{line.get('mask')}'")
        else:
            reading.rows.append(Row(image, MaskFiles((mask,), nonzero=True), "anomaly", None))
    return reading


def is_ksdd2(place: Place) -> bool:
    return any(f.stem.upper().endswith("_GT") for f in image_files(child(place.folder, "train")))


def read_ksdd2(root: Path) -> Reading:
    """KolektorSDD2: train/10000.png with train/10000_GT.png, the same in test/; an all-black mask means good.

    The published archive holds `10301 (copy).png` and `10301_GT (copy).png` too: equal copies are left out.

    Source: Bozic et al., Computers in Industry 2021.
    """
    reading = Reading()
    for split in ("train", "test"):
        files = image_files(child(root, split))
        copies = [file for file in files if _is_copy(file)]
        for copy in copies:
            reading.notes.append(Problem("DF153", relative(copy, root), "a copy of another file", "it is left out"))
        files = [file for file in files if file not in copies]
        masks = [f for f in files if f.stem.upper().endswith("_GT")]
        reading += black_is_good(files, masks, root, split)
    return reading


def _is_copy(file: Path) -> bool:
    original = file.with_stem(file.stem.removesuffix(" (copy)"))
    return original != file and original.is_file() and filecmp.cmp(file, original, shallow=False)


def black_is_good(
    files: Collection[Path], masks: list[Path], root: Path, split: str | None = None, nonzero: bool = False
) -> Reading:
    """The rows of images (all files that are no masks), each with a mask of its name; an all-black mask means good."""
    reading = Reading()
    apart = set(masks)
    pairs, reading.problems = pair_masks([f for f in files if f not in apart], masks, root)
    for image, found in pairs.items():
        try:
            marked = any(marks_something(mask) for mask in found)
        except UNREADABLE as error:
            reading.blame("DF103", image, root, f"its mask cannot be read: {error}")
            continue
        if marked:
            reading.rows.append(Row(image, MaskFiles(found, nonzero), ONE_TYPE, split))
        else:
            reading.add_good([image])
    return reading


def marks_something(mask: Path) -> bool:
    """Whether a mask file marks a pixel; values that only `--mask_classes` could tell apart count as marks."""
    image = open_image(mask)
    if not np.asarray(image).any():
        return False
    try:
        return bool(binarise(image).any())
    except ValueError:
        return True  # reported when the mask is read


def is_magnetic_tile(place: Place) -> bool:
    return any(child(folder, "Imgs").is_dir() for folder in _tile_folders(place.folder))


def _tile_folders(root: Path) -> list[Path]:
    return [folder for folder in folders_in(root) if folder.name.upper().startswith("MT_")]


def read_magnetic_tile(root: Path) -> Reading:
    """Magnetic tile: MT_<Defect>/Imgs/*.jpg with the mask *.png of the same stem; MT_Free is good.

    Source: Huang, Qiu and Yuan, The Visual Computer 2020.
    """
    reading = Reading()
    for folder in _tile_folders(root):
        files = image_files(child(folder, "Imgs"))
        masks = [f for f in files if f.suffix.lower() == ".png"]
        images = [f for f in files if f not in set(masks)]
        if folder.name.casefold() == "mt_free":
            reading.add_good(images)
            continue
        pairs, problems = pair_masks(images, masks, root)
        defect = folder.name[len("MT_") :].lower()
        reading += Reading([Row(image, MaskFiles(found), defect, None) for image, found in pairs.items()], problems)
    return reading


def read_folder(root: Path) -> Reading:
    """A folder of one's own: images/ with masks/, in sub-folders by defect type or without, and good/."""
    images, masks = child(root, "images"), child(root, "masks")
    types = frozenset(f.name for f in folders_in(images) if f.name.casefold() != "good")
    reading = pair_rows(images, masks, root, ONE_TYPE, ignored_folders=types | {"good"})
    for defect in sorted(types):
        reading += pair_rows(images / defect, child(masks, defect), root, defect)
    return with_good(reading, root, "good", "images/good")
