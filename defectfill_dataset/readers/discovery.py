"""Which layout a folder has, the objects at or below it, and what one holds."""

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import InputError, Problem
from ..mask_values import NO_CLASSES, MaskClasses
from . import coco, cvat, datumaro, folders, label_studio, labelme, published, real_iad, tables, visa, voc, yolo
from .classes import split_classes
from .explain import explain
from .files import IMAGE_EXTENSIONS, Place, child, entries, folders_in, may_read
from .rows import Reading, unite


def _holds(*names: str) -> Callable[[Place], bool]:
    """A test of whether a place has all of these folders, in any capitals."""
    return lambda place: all(child(place.folder, name).is_dir() for name in names)


Fits = Callable[[Place], bool]
Reader = Callable[[Path], Reading]
Layouts = dict[str, tuple[Fits, Reader]]  # what proves it, its reader

FOLDERS: Layouts = {  # the first that fits counts
    "defectfill": (_holds("train/defective/"), folders.read_defectfill),
    "mvtec_ad2": (_holds("test_public/"), folders.read_mvtec_ad2),
    "mvtec_3d": (published.is_mvtec_3d, published.read_mvtec_3d),
    "anomalib": (published.is_anomalib, published.read_anomalib),
    "btad": (_holds("ground_truth/", "test/ko/"), folders.read_btad),
    "mvtec_loco": (folders.has_mask_folders, folders.read_mvtec_loco),
    "mvtec": (_holds("ground_truth/"), folders.read_mvtec),
    "visa": (_holds("Data/Images/"), visa.read_visa),
    "ksdd2": (folders.is_ksdd2, folders.read_ksdd2),
    "magnetic_tile": (folders.is_magnetic_tile, folders.read_magnetic_tile),
    "ksdd": (published.is_ksdd, published.read_ksdd),
    "dagm": (published.is_dagm, published.read_dagm),
    "real_iad": (real_iad.is_real_iad, real_iad.read_real_iad),
    "folder": (_holds("images/", "masks/"), folders.read_folder),
    "anomalydiffusion": (published.is_anomalydiffusion, published.read_anomalydiffusion),
}
ANNOTATIONS: Layouts = {
    "metadata": (tables.is_metadata, tables.read_metadata),
    "coco": (coco.is_coco, coco.read_coco),
    "yolo": (yolo.is_yolo, yolo.read_yolo),
    "labelme": (labelme.is_labelme, labelme.read_labelme),
    "voc": (voc.is_voc, voc.read_voc),
    "cvat": (cvat.is_cvat, cvat.read_cvat),
    "datumaro": (datumaro.is_datumaro, datumaro.read_datumaro),
    "label_studio": (label_studio.is_label_studio, label_studio.read_label_studio),
}
LAYOUTS = FOLDERS | ANNOTATIONS
OLD_NAMES = {"seed": "defectfill"}
DEPTH = 3  # folders between the given one and its objects, as unpacking archives leaves them

NAME = re.compile(r"\w[\w \-.+,()&]{0,99}")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows
MOST_BYTES = 200  # of a name, as UTF-8: file systems take 255, with what comes before and behind it


def layout_of(folder: Path, layout: str = "auto", below: bool = False) -> str | None:
    """The layout's name, or None if `folder` is not one object of a known layout, or not of the wanted one.

    Args:
        below: annotation files may lie in folders of any name, not only where they usually do.

    Raises:
        InputError: several fit (DF161).
    """
    layout = OLD_NAMES.get(layout, layout)
    place = Place(folder, below)
    if layout != "auto":
        return layout if LAYOUTS[layout][0](place) else None
    fitting = list(itertools.islice((name for name, (fits, _) in FOLDERS.items() if fits(place)), 1))
    if place.of_kind(*IMAGE_EXTENSIONS):
        fitting += [name for name, (fits, _) in ANNOTATIONS.items() if fits(place)]
    if fitting == ["folder", "metadata"]:  # the table says which masks the images have
        fitting.remove("folder")
    if len(fitting) > 1:
        raise InputError(Problem("DF161", folder, f"may be {' or '.join(fitting)}", "choose one with --layout"))
    return fitting[0] if fitting else None


def find_objects(root: str | Path, layout: str = "auto") -> dict[str, Path]:
    """The objects at `root`, name to folder: `root` itself if it is one object, else the folders below it that are.

    A table of several objects gives each the same folder.

    Raises:
        InputError: no such folder (DF160), or nothing in it has a known layout, or the wanted one, or it may have
            several (DF161), or an object is in two folders or has a name that `check_names` refuses (DF162).
    """
    root = Path(root).expanduser().resolve()
    if layout not in ("auto", *LAYOUTS, *OLD_NAMES):
        fix = f"there are: auto, {', '.join(LAYOUTS)}"
        raise InputError(Problem("DF161", f"--layout {layout}", "no such layout", fix))
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        raise InputError(Problem("DF160", root, what, "give the dataset's folder"))
    places = [(name, folder) for folder in _object_folders(root, layout) for name in _names(folder, layout)]
    objects = dict(places)
    folders_of = {name: [str(folder) for n, folder in places if n == name] for name in objects}
    twice = [
        Problem("DF162", name, f"is an object of {' and of '.join(found)}", "rename one")
        for name, found in folders_of.items()
        if len(found) > 1
    ]
    if twice:
        raise InputError(*twice)
    check_names(objects, root)
    if not objects:
        raise InputError(_nothing_known(root, layout))
    return dict(sorted(objects.items()))


def _object_folders(folder: Path, layout: str, depth: int = DEPTH) -> list[Path]:
    """The folder if it is an object, else the objects below it, else the folder with annotations anywhere below."""
    if layout_of(folder, layout):
        return [folder]
    inner = [f for f in folders_in(folder) if may_read(f)] if depth else []
    below = [found for f in inner for found in _object_folders(f, layout, depth - 1)]
    return below or ([folder] if layout_of(folder, layout, below=True) else [])


def _nothing_known(root: Path, layout: str) -> Problem:
    parent = next((p for p in root.parents if may_read(p) and _is_of_folders(Place(p))), None)
    found = [entry.name for entry in entries(root)]
    wanted = "a known layout" if layout == "auto" else f"the layout {layout}"
    return Problem(
        "DF161", root,
        f"no images of {wanted}. Found: {', '.join(found[:8]) or 'nothing'}{' ...' if len(found) > 8 else ''}. "
        + (f"'{parent}' looks right: give that. " if parent else "") + explain(root)
        + "Expected test/<defect>/ with ground_truth/<defect>/ (MVTec AD), images/ with masks/, annotation files "
        "(COCO, YOLO, LabelMe, Pascal VOC, CVAT, Datumaro, Label Studio, metadata.csv), or another layout of "
        "docs/data.md, in the folder or below it",
    )  # fmt: skip


def _is_of_folders(place: Place) -> bool:
    try:
        return any(fits(place) for fits, _ in FOLDERS.values())
    except InputError:  # something in it may not be read, which nobody asked for
        return False


def can_name(name: str) -> bool:
    """Whether a name can be that of a folder and a file everywhere."""
    return bool(NAME.fullmatch(name)) and not RESERVED.fullmatch(name) and len(name.encode()) <= MOST_BYTES


def check_names(names: Iterable[str], source: str | Path) -> None:
    """Raises InputError (DF162) if an object's name is not what `can_name` takes."""
    wrong = [name for name in names if not can_name(name)]
    if wrong:
        told = "may hold letters, digits, spaces and _-.+,()&, a letter or digit first, 100 at most (200 bytes of "
        told += "UTF-8), and be no CON"
        reasons = (f"an object cannot be called '{name}': it {told}" for name in wrong)
        raise InputError(*(Problem("DF162", source, reason, "rename it") for reason in reasons))


def _names(folder: Path, layout: str) -> list[str]:
    """The names of the objects of which `folder` holds the images: its own, or those of its table."""
    found = layout_of(folder, layout, below=True)
    rows = tables.read_metadata(folder).rows if found == "metadata" else []
    return sorted({row.object for row in rows if row.object}) or [folder.name]


def read_object(root: str | Path, name: str, layout: str = "auto", mask_classes: MaskClasses = NO_CLASSES) -> Reading:
    """All rows of the object of this name at `root`, by the reader of its layout, and what is wrong with them.

    Raises:
        InputError: no known layout or several (DF161).
    """
    root = Path(root)
    found = layout_of(root, layout) or layout_of(root, layout, below=True)
    if found is None:
        raise InputError(Problem("DF161", root, "no known layout"))
    try:
        reading = LAYOUTS[found][1](root)
    except InputError as error:  # a file that the whole layout stands on
        return Reading(problems=list(error.problems))
    reading.rows = [row for row in reading.rows if row.object in (None, name)]
    return unite(split_classes(reading, mask_classes, root) if mask_classes else reading, root)
