"""Folder layouts: each reader is one function from an object's folder to the same table of `Row`s."""

import csv
import dataclasses
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .errors import InputError
from .images import UNREADABLE, open_image
from .masks import MaskFiles, MaskShapes


IMAGE_EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
ONE_TYPE = "defect"  # the defect type where the format names none
MASK_SUFFIX = re.compile(r"[_\-. ](mask|gt|label|seg)(?:[_\-. ]?(\d+))?$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Row:
    """One image of one object.

    Args:
        image: absolute path.
        mask: None for a good image.
        defect: the defect type's name, "good" for a good image.
        split: "train", "test" or "good" where the layout says so, None where a split rule decides.
        object: its name where a table holds several, None where the folder is the object.
    """

    image: Path
    mask: MaskFiles | MaskShapes | None
    defect: str
    split: str | None
    object: str | None = None


def image_files(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name; hidden ones and other formats are passed over."""
    if not folder.is_dir():
        return []
    files = (f for f in folder.iterdir() if f.suffix.lower() in IMAGE_EXTENSIONS and not f.name.startswith("."))
    return sorted(f for f in files if not f.is_dir())


def folders_in(folder: Path) -> list[Path]:
    """The folders directly in `folder`, sorted by name; hidden ones are passed over."""
    return sorted(f for f in folder.iterdir() if f.is_dir() and f.name[0] != ".") if folder.is_dir() else []


def _spelt(stem: str) -> str:
    return unicodedata.normalize("NFC", stem)


def pair_masks(images: list[Path], masks: list[Path], root: Path) -> tuple[dict[Path, tuple[Path, ...]], list[str]]:
    """Pairs 007.png with its masks, by stem and never by order, and lists what does not fit.

    Masks are 007.png, 007_mask.png (or gt, label, seg), several 007_mask_1.png ..., or a folder 007. However a name
    is spelt in Unicode (macOS takes accents apart), it is the same name.

    Returns:
        the masks of each image that has them, and the problems (DF142 mask missing, DF143 mask without an image,
        DF144 several masks or images of one stem).
    """
    whole: dict[str, list[Path]] = {}
    numbered: dict[str, list[Path]] = {}
    images_of: dict[str, list[Path]] = {}
    for image in images:
        images_of.setdefault(_spelt(image.stem), []).append(image)
    problems = []
    for mask in masks:
        stem = _spelt(mask.name if mask.is_dir() else mask.stem)
        suffix = None if stem in images_of else MASK_SUFFIX.search(stem)
        stem = stem[: suffix.start()] if suffix else stem
        (numbered if suffix and suffix[2] else whole).setdefault(stem, []).append(mask)
        if stem not in images_of:
            problems.append(f"DF143 {mask.relative_to(root)}: a mask without an image; remove it or add '{stem}'")
    pairs = {}
    for stem, files in images_of.items():
        found, parts = whole.get(stem, []), numbered.get(stem, [])
        if not found and not parts:
            problems += [
                f"DF142 {f.relative_to(root)}: its mask is missing; expected '{stem}_mask.png'" for f in files
            ]
        elif len(files) > 1 or len(found) > 1 or (found and parts):
            names = ", ".join(str(f.relative_to(root)) for f in [*files, *found, *parts])
            problems.append(f"DF144 {names}: more than one image or mask named '{stem}'; keep one of each")
        else:
            pairs[files[0]] = tuple(found or parts)
    return pairs, problems


def pair_by_name(images: list[Path], masks: list[Path], root: Path) -> tuple[dict[Path, Path], list[str]]:
    """`pair_masks` where each image must have a single mask; several are a problem (DF144) too."""
    pairs, problems = pair_masks(images, masks, root)
    for image, files in pairs.items():
        if len(files) > 1:
            names = ", ".join(str(f.relative_to(root)) for f in files)
            problems.append(f"DF144 {names}: more than one mask of {image.name}; keep one")
    return {image: files[0] for image, files in pairs.items() if len(files) == 1}, problems


def _masks_in(folder: Path) -> list[Path]:
    return [*image_files(folder), *folders_in(folder)]


def _pair_rows(
    images: list[Path], masks: list[Path], root: Path, defect: str, split: str | None = None, by_value: bool = False
) -> tuple[list[Row], list[str]]:
    """The rows of `pair_masks`, and its problems; `by_value` where any value above 0 is defect."""
    pairs, problems = pair_masks(images, masks, root)
    rows = []
    for image, found in pairs.items():
        files = tuple(f for mask in found for f in (image_files(mask) if mask.is_dir() else [mask]))
        if files:
            rows.append(Row(image, MaskFiles(files, by_value), defect, split))
        else:
            problems.append(f"DF142 {found[0].relative_to(root)}: holds no mask of {image.name}; add it")
    return rows, problems


class RowsError(InputError):
    """Problems of a layout, and the rows that could be read all the same."""

    def __init__(self, rows: list[Row], problems: list[str]):
        super().__init__(*problems)
        self.rows = rows


def rows_or_problems(rows: list[Row], problems: list[str]) -> list[Row]:
    """The rows, unless there are problems: raises RowsError with all of them."""
    if problems:
        raise RowsError(rows, problems)
    return rows


def file_inside(root: Path, folder: Path, name: str | None) -> Path | None:
    """The file that `name` means seen from `folder`; None if there is none, or not inside `root`."""
    file = Path(os.path.normpath(folder / (name or "").replace("\\", "/")))
    return file if name and file.is_relative_to(root) and file.is_file() else None


def read_csv(file: Path) -> list[dict[str, str]]:
    """The lines of a table by its header's names; raises InputError (DF166) if it cannot be read."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            return [{k: v or "" for k, v in line.items() if k} for line in csv.DictReader(stream)]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"DF166 {file}: cannot be read as a table: {error}") from error


def _read_types(
    root: Path,
    images: str,
    masks: str,
    split: str | None = None,
    by_value: bool = False,
    not_types: Iterable[str] = ("good",),
) -> tuple[list[Row], list[str]]:
    """Rows of every defect type `images`/<defect> with its masks in `masks`/<defect>, pairs by name, and problems."""
    rows, problems = [], []
    types = {f.name for part in (images, masks) for f in folders_in(root / part)}
    for defect in sorted(types - set(not_types)):
        more, wrong = _pair_rows(
            image_files(root / images / defect), _masks_in(root / masks / defect), root, defect, split, by_value
        )
        rows += more
        problems += wrong
    return rows, problems


def _read_good(root: Path, *folders: str) -> list[Row]:
    return [Row(image, None, "good", "good") for folder in folders for image in image_files(root / folder)]


def read_mvtec(root: Path) -> list[Row]:
    """MVTec AD: test/<defect>/007.png with ground_truth/<defect>/007_mask.png; good images in train/ and test/good.

    Source: Bergmann et al., CVPR 2019.
    """
    rows, problems = _read_types(root, "test", "ground_truth")
    return rows_or_problems(rows + _read_good(root, "train/good", "test/good"), problems)


def read_seed(root: Path) -> list[Row]:
    """The DefectFill tutorial's layout: train/defective/<defect> with train/defective_masks/<defect>, test/good."""
    rows, problems = _read_types(root, "train/defective", "train/defective_masks", "train")
    return rows_or_problems(rows + _read_good(root, "test/good"), problems)


def read_mvtec_ad2(root: Path) -> list[Row]:
    """MVTec AD 2: test_public/bad with ground_truth/bad, in test_public or beside it; the private tests have no masks.

    Source: Heckler-Kram et al., arXiv 2503.21622.
    """
    masks = "test_public/ground_truth" if (root / "test_public/ground_truth").is_dir() else "ground_truth"
    rows, problems = _read_types(root, "test_public", masks, not_types=("good", "ground_truth"))
    good = _read_good(root, "train/good", "validation/good", "test_public/good")
    return rows_or_problems(rows + good, problems)


def has_mask_folders(root: Path) -> bool:
    """Whether ground_truth/<defect> holds folders of masks."""
    types = folders_in(root / "ground_truth")
    return any(image_files(folder) for defect in types for folder in folders_in(defect))


def read_mvtec_loco(root: Path) -> list[Row]:
    """MVTec LOCO: the masks of test/<defect>/007.png are ground_truth/<defect>/007/*.png, any value a defect.

    Source: Bergmann et al., IJCV 2022.
    """
    rows, problems = _read_types(root, "test", "ground_truth", by_value=True)
    return rows_or_problems(rows + _read_good(root, "train/good", "validation/good", "test/good"), problems)


def read_btad(root: Path) -> list[Row]:
    """BTAD: test/ko with ground_truth/ko; good images in train/ok and test/ok.

    Source: Mishra et al., VT-ADL, ISIE 2021.
    """
    rows, problems = _read_types(root, "test", "ground_truth", not_types=("ok",))
    return rows_or_problems(rows + _read_good(root, "train/ok", "test/ok"), problems)


def read_visa(root: Path) -> list[Row]:
    """VisA: Data/Images/{Normal,Anomaly} with Data/Masks/Anomaly, any value a defect.

    Where ../split_csv/1cls.csv names the object's images, it says which they are and which mask each has.

    Source: Zou et al., ECCV 2022.
    """
    table = root.parent / "split_csv/1cls.csv"
    lines = [line for line in read_csv(table) if line.get("object") == root.name] if table.is_file() else []
    if not lines:
        images, masks = image_files(root / "Data/Images/Anomaly"), _masks_in(root / "Data/Masks/Anomaly")
        rows, problems = _pair_rows(images, masks, root, "anomaly", by_value=True)
        return rows_or_problems(rows + _read_good(root, "Data/Images/Normal"), problems)
    rows, problems = [], []
    for line in lines:
        image, mask = (file_inside(root, table.parents[1], line.get(key)) for key in ("image", "mask"))
        if image is None:
            problems.append(f"DF166 {table}: names the image '{line.get('image')}', which is not in {root}")
        elif line.get("label") == "normal":
            rows.append(Row(image, None, "good", "good"))
        elif mask is None:
            problems.append(f"DF142 {image.relative_to(root)}: its mask is missing; expected '{line.get('mask')}'")
        else:
            rows.append(Row(image, MaskFiles((mask,), nonzero=True), "anomaly", None))
    return rows_or_problems(rows, problems)


def read_ksdd2(root: Path) -> list[Row]:
    """KolektorSDD2: train/10000.png with train/10000_GT.png, the same in test/; an all-black mask means good.

    Source: Bozic et al., Computers in Industry 2021.
    """
    rows, problems = [], []
    for split in ("train", "test"):
        files = image_files(root / split)
        masks = [f for f in files if f.stem.upper().endswith("_GT")]
        pairs, wrong = pair_masks([f for f in files if f not in set(masks)], masks, root)
        problems += wrong
        for image, found in pairs.items():
            try:
                marked = any(np.asarray(open_image(mask)).any() for mask in found)
            except UNREADABLE as error:
                problems.append(f"DF103 {image.relative_to(root)}: its mask cannot be read: {error}")
                continue
            good = Row(image, None, "good", "good")
            rows.append(Row(image, MaskFiles(found), ONE_TYPE, split) if marked else good)
    return rows_or_problems(rows, problems)


def read_magnetic_tile(root: Path) -> list[Row]:
    """Magnetic tile: MT_<Defect>/Imgs/*.jpg with the mask *.png of the same stem; MT_Free is good.

    Source: Huang, Qiu and Yuan, The Visual Computer 2020.
    """
    rows, problems = [], []
    for folder in (f for f in folders_in(root) if f.name.startswith("MT_")):
        files = image_files(folder / "Imgs")
        masks = [f for f in files if f.suffix.lower() == ".png"]
        images = [f for f in files if f not in set(masks)]
        if folder.name == "MT_Free":
            rows += [Row(image, None, "good", "good") for image in images]
            continue
        more, wrong = _pair_rows(images, masks, root, folder.name.removeprefix("MT_").lower())
        rows += more
        problems += wrong
    return rows_or_problems(rows, problems)


def read_folder(root: Path) -> list[Row]:
    """A folder of one's own: images/ with masks/, in sub-folders by defect type or without, and good/."""
    types = [f.name for f in folders_in(root / "images") if f.name != "good"]
    loose = [mask for mask in _masks_in(root / "masks") if mask.name not in types]
    rows, problems = _pair_rows(image_files(root / "images"), loose, root, ONE_TYPE)
    for defect in types:
        more, wrong = _pair_rows(
            image_files(root / "images" / defect), _masks_in(root / "masks" / defect), root, defect
        )
        rows += more
        problems += wrong
    return rows_or_problems(rows + _read_good(root, "good", "images/good"), problems)
