"""Which layout a folder has, the objects at or below it, and the rows of one."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from . import annotations, layouts
from .errors import InputError
from .layouts import Row, folders_in


def _holds(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: all(any(folder.glob(pattern)) for pattern in patterns)


Layouts = dict[str, tuple[Callable[[Path], bool], Callable[[Path], list[Row]]]]  # what proves it, its reader

FOLDERS: Layouts = {  # the first that fits counts
    "seed": (_holds("train/defective/"), layouts.read_seed),
    "mvtec_ad2": (_holds("test_public/"), layouts.read_mvtec_ad2),
    "btad": (_holds("ground_truth/", "test/ko/"), layouts.read_btad),
    "mvtec_loco": (layouts.has_mask_folders, layouts.read_mvtec_loco),
    "mvtec": (_holds("ground_truth/"), layouts.read_mvtec),
    "visa": (_holds("Data/Images/"), layouts.read_visa),
    "ksdd2": (_holds("train/*_[Gg][Tt].*"), layouts.read_ksdd2),
    "magnetic_tile": (_holds("MT_*/Imgs/"), layouts.read_magnetic_tile),
    "folder": (_holds("images/", "masks/"), layouts.read_folder),
}
ANNOTATIONS: Layouts = {
    "metadata": (lambda folder: bool(annotations.metadata_files(folder)), annotations.read_metadata),
    "coco": (lambda folder: annotations.has_json(folder, annotations.COCO_KEYS), annotations.read_coco),
    "yolo": (lambda folder: bool(annotations.label_folders(folder)), annotations.read_yolo),
    "labelme": (lambda folder: annotations.has_json(folder, annotations.LABELME_KEYS), annotations.read_labelme),
}
LAYOUTS = FOLDERS | ANNOTATIONS

NAME = re.compile(r"\w[\w \-.+,()&]{0,99}")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows


def layout_of(folder: Path, layout: str = "auto") -> str | None:
    """The layout's name, or None if `folder` is not one object of a known layout, or not of the wanted one.

    Raises:
        InputError: several fit (DF161).
    """
    if layout != "auto":
        return layout if LAYOUTS[layout][0](folder) else None
    fitting = [name for name, (fits, _) in FOLDERS.items() if fits(folder)][:1]
    fitting += [name for name, (fits, _) in ANNOTATIONS.items() if fits(folder)]
    if fitting == ["folder", "metadata"]:  # the table says which masks the images have
        fitting.remove("folder")
    if len(fitting) > 1:
        raise InputError(f"DF161 {folder}: may be {' or '.join(fitting)}; choose one with --layout")
    return fitting[0] if fitting else None


def find_objects(root: str | Path, layout: str = "auto") -> dict[str, Path]:
    """The objects at `root`, name to folder: `root` itself if it is one object, else its sub-folders that are.

    A table of several objects gives each the same folder.

    Raises:
        InputError: no such folder (DF160), or nothing in it has a known layout, or the wanted one, or it may have
            several (DF161), or an object is in two folders or has a name that `check_names` refuses (DF162).
    """
    root = Path(root).expanduser().resolve()
    if layout not in ("auto", *LAYOUTS):
        raise InputError(f"DF161 --layout {layout}: no such layout; there are: auto, {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise InputError(
            f"DF160 {root}: {'not a folder' if root.exists() else 'no such folder'}; give the dataset's folder"
        )
    places = [(name, root) for name in _names(root, layout)]
    if not places:
        places = [(name, folder) for folder in folders_in(root) for name in _names(folder, layout)]
    objects = dict(places)
    twice = [
        f"DF162 {name}: is an object of {' and of '.join(str(f) for n, f in places if n == name)}; rename one"
        for name in objects
        if [n for n, _ in places].count(name) > 1
    ]
    if twice:
        raise InputError(*twice)
    check_names(objects, root)
    if not objects:
        parent = next((p for p in root.parents if any(fits(p) for fits, _ in FOLDERS.values())), None)
        found = sorted(f.name for f in root.iterdir())[:8]
        raise InputError(
            f"DF161 {root}: no images of {'a known layout' if layout == 'auto' else f'the layout {layout}'}. "
            f"Found: {', '.join(found) or 'nothing'}. "
            + (f"'{parent}' looks right: give that. " if parent else "")
            + "Expected test/<defect>/ with ground_truth/<defect>/ (MVTec AD), images/ with masks/, an annotation "
            "file (COCO, YOLO, LabelMe, metadata.csv) or another layout of README.md, in the folder or one level "
            "below it."
        )
    return dict(sorted(objects.items()))


def check_names(names: Iterable[str], source: str | Path) -> None:
    """Raises InputError (DF162) if a name cannot be that of a folder, a file and a model card everywhere."""
    wrong = [name for name in names if not NAME.fullmatch(name) or RESERVED.fullmatch(name)]
    if wrong:
        told = "may hold letters, digits, spaces and _-.+,()&, a letter or digit first, 100 at most, and be no CON"
        raise InputError(
            *(f"DF162 {source}: an object cannot be called '{name}': it {told}; rename it" for name in wrong)
        )


def _names(folder: Path, layout: str) -> list[str]:
    """The names of the objects of which `folder` holds the images: its own, or those of its table."""
    found = layout_of(folder, layout)
    rows = annotations.read_metadata(folder) if found == "metadata" else []
    return sorted({row.object for row in rows if row.object}) or ([folder.name] if found else [])


def read_object(root: str | Path, name: str, layout: str = "auto") -> list[Row]:
    """All rows of the object of this name at `root`, by the reader of its layout.

    Raises:
        InputError: no known layout or several (DF161), or what the reader finds.
    """
    root = Path(root)
    found = layout_of(root, layout)
    if found is None:
        raise InputError(f"DF161 {root}: no known layout")
    return [row for row in LAYOUTS[found][1](root) if row.object in (None, name)]
