"""Published datasets and other programs' folders: one function each, from an object's folder to its rows."""

import re
from collections.abc import Iterator
from pathlib import Path

from ..masks import MaskFiles
from ..text import read_text, unreadable
from .files import (
    MASK_SUFFIX,
    Place,
    all_images,
    child,
    folders_in,
    image_files,
    may_read,
    pair_masks,
    pair_rows,
    spelt,
)
from .folders import black_is_good, with_good
from .rows import GOOD, ONE_TYPE, Reading, Row, split_of


MASK_FOLDERS = ("mask", "masks", "ground_truth")
GOOD_FOLDER = re.compile(r"(good|normal|ok)([_\-]?(train|test))?", re.IGNORECASE)
DEFECTIVE = {"abnormal", "anomaly", "anomalous", "defect", "defective", "bad", "ng"}  # folders, maybe of types
KOS = re.compile(r"kos\d+", re.IGNORECASE)


def is_anomalib(place: Place) -> bool:
    """Whether masks lie in folders named as folders of images beside theirs, or such a folder is called defective.

    Names of splits are no types: train/ with masks/train/ is something else.
    """
    masks = next((place.folders[name] for name in MASK_FOLDERS if name in place.folders), None)
    if masks is None or {"test", "images"} & place.folders.keys():
        return False
    types = {spelt(f.name).casefold() for f in folders_in(masks)} - set(MASK_FOLDERS)
    types = {name for name in types if not split_of(name) and not GOOD_FOLDER.fullmatch(name)}
    beside = [folder for name, folder in place.folders.items() if name in types | DEFECTIVE]
    beside += [inside for f in beside if f.name.casefold() in DEFECTIVE for inside in folders_in(f)]
    return any(image_files(folder) for folder in beside)


def read_anomalib(root: Path) -> Reading:
    """anomalib's folders: good/ (or normal/) and <type>/ with masks of the same names in mask/<type>/.

    The types may lie in abnormal/ (ng/, bad/ and so on) instead, or that folder be a type itself, its masks in mask/.

    Source: hazelnut_toy and the `Folder` data module, github.com/open-edge-platform/anomalib.
    """
    reading = Reading()
    masks = next(found for name in MASK_FOLDERS if (found := child(root, name)).is_dir())
    types = list(_anomalib_types(root, masks))
    for defect, of_images, of_masks, ignored_folders in types:
        reading += pair_rows(of_images, of_masks, root, defect, ignored_folders=ignored_folders)
    known = {place for _, _, of_masks, _ in types for place in (of_masks, of_masks.parent)} - {masks}
    for folder in folders_in(masks):
        if folder not in known and not GOOD_FOLDER.fullmatch(folder.name):
            reading += pair_rows(root / folder.name, folder, root, folder.name)
    if not any(of_masks == masks for _, _, of_masks, _ in types):
        reading.problems += pair_masks([], image_files(masks), root)[1]
    return with_good(reading, root, *(f.name for f in folders_in(root) if GOOD_FOLDER.fullmatch(f.name)))


def _anomalib_types(root: Path, masks: Path) -> Iterator[tuple[str, Path, Path, frozenset[str]]]:
    """Each type with the folders of its images and masks, and the folders in these that are other types."""
    for folder in folders_in(root):
        own = child(masks, folder.name)
        if folder == masks or GOOD_FOLDER.fullmatch(folder.name):
            continue
        if folder.name.casefold() not in DEFECTIVE:
            yield folder.name, folder, own, frozenset()
            continue
        place = own if own.is_dir() else masks
        inside = {f.name for part in (folder, own) for f in folders_in(part)}
        for defect in sorted(inside):
            yield defect, child(folder, defect), child(place, defect), frozenset()
        if image_files(folder):
            yield folder.name, folder, place, frozenset(inside | {f.name for f in folders_in(place)})


def is_ksdd(place: Place) -> bool:
    parts = (folder for name, folder in place.folders.items() if KOS.fullmatch(name))
    return any(file.stem.lower().endswith("_label") for part in parts for file in image_files(part))


def read_ksdd(root: Path) -> Reading:
    """KolektorSDD: kos01/Part0.jpg with kos01/Part0_label.bmp, any value a defect; an all-black mask means good.

    Source: Tabernik et al., Journal of Intelligent Manufacturing 2020.
    """
    reading = Reading()
    for part in folders_in(root):
        if KOS.fullmatch(part.name):
            files = image_files(part)
            masks = [file for file in files if file.stem.lower().endswith("_label")]
            reading += black_is_good(files, masks, root, nonzero=True)
    return reading


def _masks_3d(test: Path) -> Path | None:
    """The folder of masks of one type's images of MVTec 3D-AD; None if it holds no rgb/."""
    found = (child(test, name) for name in ("gt", "ground_truth")) if child(test, "rgb").is_dir() else ()
    return next((folder for folder in found if folder.is_dir()), None)


def is_mvtec_3d(place: Place) -> bool:
    return "test" in place.folders and any(_masks_3d(folder) for folder in folders_in(place.folders["test"]))


def read_mvtec_3d(root: Path) -> Reading:
    """MVTec 3D-AD's colour images: test/<defect>/rgb/000.png with test/<defect>/gt/000.png, any value a defect.

    The values of its masks are numbers of types, which `combined` has several of; xyz/ (depth) is not read.

    Source: Bergmann et al., VISAPP 2022.
    """
    reading = Reading()
    for folder in folders_in(child(root, "test")):
        if folder.name.casefold() != GOOD:
            masks = _masks_3d(folder) or folder / "gt"
            reading += pair_rows(child(folder, "rgb"), masks, root, folder.name, nonzero=True)
    return with_good(reading, root, "train/good/rgb", "validation/good/rgb", "test/good/rgb")


def _has_labels(split: Path) -> bool:
    return any(file.stem.lower().endswith("_label") for file in image_files(child(split, "Label")))


def is_dagm(place: Place) -> bool:
    return any(_has_labels(place.folders[split]) for split in ("train", "test") if split in place.folders)


def read_dagm(root: Path) -> Reading:
    """DAGM 2007: Train/0576.PNG with Train/Label/0576_label.PNG, the same in Test; images without a mask are good.

    Where Label/Labels.txt is there, it must say the same.

    Source: Wieler and Hahn, DAGM symposium 2007, zenodo.org/records/12750201.
    """
    reading = Reading()
    for split in ("train", "test"):
        folder = child(root, split)
        label = child(folder, "Label")
        images, masks, table = image_files(folder), image_files(label), child(label, "Labels.txt")
        defective = _defective(table) if table.is_file() else {}
        masked = {MASK_SUFFIX.sub("", spelt(mask.stem)) for mask in masks}
        marked = [f for f in images if spelt(f.stem) in masked or defective.get(spelt(f.stem))]
        pairs, problems = pair_masks(marked, masks, root)
        reading += Reading([Row(f, MaskFiles(found), ONE_TYPE, split) for f, found in pairs.items()], problems)
        for image in pairs:
            if not defective.get(spelt(image.stem), True):
                reading.blame("DF167", image, root, "a good image by Labels.txt, with a mask", "mend one of them")
        for stem in sorted(defective.keys() - {spelt(f.stem) for f in images}):
            reading.missing(table, f"names the image '{stem}', which is not in {folder}")
        reading.add_good(image for image in images if image not in set(marked))
    return reading


def _defective(table: Path) -> dict[str, bool]:
    """Image stem -> whether it is defective, by the lines "576 1 0576.PNG 0 0576_label.PNG" of a Labels.txt."""
    defective = {}
    for number, line in enumerate(read_text(table).splitlines(), 1):
        words = line.split()
        if len(words) < 2:  # the first line is a number
            continue
        if len(words) < 3 or words[1] not in ("0", "1"):
            raise unreadable(table, f"line {number} is not 'number 0-or-1 image 0 mask': '{line.strip()}'")
        defective[spelt(Path(words[2]).stem)] = words[1] == "1"
    return defective


def is_anomalydiffusion(place: Place) -> bool:
    """Whether a folder, which is no split, holds image/ and mask/."""
    types = (folder for name, folder in place.folders.items() if not split_of(name) and may_read(folder))
    return any(child(f, "image").is_dir() and child(f, "mask").is_dir() for f in types)


def read_anomalydiffusion(root: Path) -> Reading:
    """Generated pairs <type>/image/0.jpg with <type>/mask/0.jpg, and good images in good/ if there are any.

    What else AnomalyDiffusion writes beside them (ori/, recon/, image-mask/) are its steps, and not read.

    Source: Hu et al., AAAI 2024, generate_with_mask.py of github.com/sjtuplayer/anomalydiffusion.
    """
    reading = Reading()
    for folder in folders_in(root):
        images, masks = child(folder, "image"), child(folder, "mask")
        if GOOD_FOLDER.fullmatch(folder.name):
            reading.add_good(all_images(images if images.is_dir() else folder))
        elif images.is_dir() or masks.is_dir():
            reading += pair_rows(images, masks, root, folder.name)
    return reading
