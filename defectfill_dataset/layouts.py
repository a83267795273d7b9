"""Dataset layouts: each reader is one function from an object's folder to the same table of `Row`s."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from .errors import InputError


IMAGE_EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One image of one object.

    Args:
        image: absolute path.
        mask: absolute path, or None for a good image.
        defect: the defect type's folder name, "good" for a good image.
        split: "train", "test" or "good" where the layout says so, None where a split rule decides.
    """

    image: Path
    mask: Path | None
    defect: str
    split: str | None


def image_files(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name; hidden files and other formats are passed over."""
    if not folder.is_dir():
        return []
    files = (f for f in folder.iterdir() if f.suffix.lower() in IMAGE_EXTENSIONS and not f.name.startswith("."))
    return sorted(f for f in files if f.is_file())


def pair_by_name(images: list[Path], masks: list[Path], root: Path) -> tuple[dict[Path, Path], list[str]]:
    """Pairs 007.png with 007.png or 007_mask.png, by stem and never by order, and lists what does not fit.

    Returns:
        the mask of each image that has exactly one, and the problems (DF142 mask missing, DF143 mask without an
        image, DF144 several masks or images of one stem).
    """
    masks_of: dict[str, list[Path]] = {}
    images_of: dict[str, list[Path]] = {}
    for image in images:
        images_of.setdefault(image.stem, []).append(image)
    problems = []
    for mask in masks:
        stem = mask.stem.removesuffix("_mask") if mask.stem not in images_of else mask.stem
        masks_of.setdefault(stem, []).append(mask)
    for stem, files in masks_of.items():
        if stem not in images_of:
            problems += [
                f"DF143 {m.relative_to(root)}: a mask without an image; remove it or add '{stem}'" for m in files
            ]
    pairs = {}
    for stem, files in images_of.items():
        found = masks_of.get(stem, [])
        if not found:
            problems += [
                f"DF142 {f.relative_to(root)}: its mask is missing; expected '{stem}_mask.png'" for f in files
            ]
        elif len(found) > 1 or len(files) > 1:
            names = ", ".join(str(f.relative_to(root)) for f in [*files, *found])
            problems.append(f"DF144 {names}: more than one image or mask named '{stem}'; keep one of each")
        else:
            pairs[files[0]] = found[0]
    return pairs, problems


def _read_pairs(root: Path, images: str, masks: str, split: str | None) -> list[Row]:
    """Rows of every defect type `images`/<defect> with its masks in `masks`/<defect>, pairs proved by name."""
    rows, problems = [], []
    types = {
        f.name for part in (images, masks) if (root / part).is_dir() for f in (root / part).iterdir() if f.is_dir()
    }
    for defect in sorted(types - {"good"}):
        pairs, wrong = pair_by_name(image_files(root / images / defect), image_files(root / masks / defect), root)
        problems += wrong
        rows += [Row(image, mask, defect, split) for image, mask in pairs.items()]
    if problems:
        raise InputError(*problems)
    return rows


def _read_good(root: Path, *folders: str) -> list[Row]:
    return [Row(image, None, "good", "good") for folder in folders for image in image_files(root / folder)]


def read_mvtec(root: Path) -> list[Row]:
    """MVTec AD: test/<defect>/007.png with ground_truth/<defect>/007_mask.png; good images in train/ and test/good.

    Source: Bergmann et al., CVPR 2019.
    """
    return _read_pairs(root, "test", "ground_truth", None) + _read_good(root, "train/good", "test/good")


def read_seed(root: Path) -> list[Row]:
    """The DefectFill tutorial's layout: train/defective/<defect> with train/defective_masks/<defect>, test/good."""
    pairs = _read_pairs(root, "train/defective", "train/defective_masks", "train")
    return pairs + _read_good(root, "test/good")


LAYOUTS: dict[str, tuple[str, Callable[[Path], list[Row]]]] = {  # the folder that proves the layout, its reader
    "mvtec": ("ground_truth", read_mvtec),
    "seed": ("train/defective", read_seed),
}


def layout_of(folder: Path) -> str | None:
    """The layout's name, or None if `folder` is not one object of a known layout."""
    return next((name for name, (proof, _) in LAYOUTS.items() if (folder / proof).is_dir()), None)


def find_objects(root: str | Path) -> dict[str, Path]:
    """The objects at `root`, name to folder: `root` itself if it is one object, else its sub-folders that are.

    Raises:
        InputError: no such folder (DF160), or nothing in it has a known layout (DF161).
    """
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise InputError(
            f"DF160 {root}: {'not a folder' if root.exists() else 'no such folder'}; give the dataset's folder"
        )
    if layout_of(root):
        return {root.name: root}
    objects = {f.name: f for f in sorted(root.iterdir()) if f.is_dir() and layout_of(f)}
    if not objects:
        parent = next((p for p in root.parents if layout_of(p)), None)
        found = sorted(f.name for f in root.iterdir())[:8]
        raise InputError(
            f"DF161 {root}: no images of a known layout. Found: {', '.join(found) or 'nothing'}. "
            + (f"'{parent}' looks right: give that. " if parent else "")
            + "Expected test/<defect>/ with ground_truth/<defect>/ (MVTec AD), or train/defective/<defect>/ with "
            "train/defective_masks/<defect>/, in the folder or one level below it."
        )
    return objects
