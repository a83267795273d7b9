"""Folders and names as people's disks have them: hidden files, links, capitals, accents taken apart."""

import functools
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError, Problem
from ..masks import MaskFiles
from .rows import Reading, Row, relative


IMAGE_EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
SYSTEM_NAMES = {  # that systems and programs leave beside data; names that begin with a dot are passed over too
    "__macosx", "lost+found", "$recycle.bin", "system volume information", "@eadir", "#recycle", "thumbs.db",
    "desktop.ini", "ehthumbs.db", "icon\r",
}  # fmt: skip
PEEKED = 50  # annotation files that are opened to find a layout out
MASK_SUFFIX = re.compile(r"[_\-. ](mask|gt|label|seg)(?:[_\-. ]?(\d+))?$", re.IGNORECASE)


def spelt(name: str) -> str:
    """The name in the usual form of Unicode; macOS takes accents apart."""
    return unicodedata.normalize("NFC", name)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def entries(folder: Path) -> list[Path]:
    """What lies directly in a folder, sorted by name, but for hidden and system files; nothing if it is no folder.

    Raises:
        InputError: a folder that may not be read (DF108).
    """
    return [folder / name for name in _names(folder)]


def _names(folder: Path, only_folders: bool = False) -> list[str]:
    """The names of `entries`; to sort and compare text is many times as quick as paths."""
    if not os.path.isdir(folder):
        return []
    try:
        with os.scandir(folder) as found:
            return sorted(e.name for e in found if not is_hidden(e.name) and (not only_folders or _is_folder(e)))
    except PermissionError as error:
        raise InputError(
            Problem("DF108", folder, "this folder may not be read", "allow it, or move it away")
        ) from error


def _is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # a link may lead to itself


def may_read(folder: Path) -> bool:
    try:
        entries(folder)
    except InputError:
        return False
    return True


def image_files(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name."""
    return [f for f in entries(folder) if f.suffix.lower() in IMAGE_EXTENSIONS and not f.is_dir()]


def folders_in(folder: Path) -> list[Path]:
    """The folders directly in `folder`, sorted by name."""
    return [folder / name for name in _names(folder, only_folders=True)]


def is_outside(file: Path, root: str | Path) -> bool:
    """Whether a file, all links followed, lies outside a folder."""
    return not os.path.realpath(file).startswith(os.path.realpath(root) + os.sep)


def walk(folder: Path, names: re.Pattern | None = None) -> Iterator[Path]:
    """A folder and all folders below it (only those of these names), links to folders followed, each once."""
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        place = waiting.pop(0)
        real = os.path.realpath(place)
        if place.is_dir() and real not in seen:
            seen.add(real)
            yield place
            waiting += [f for f in folders_in(place) if names is None or names.fullmatch(f.name)]


def all_images(folder: Path) -> list[Path]:
    """The image files in `folder` and below it."""
    return [file for place in walk(folder) for file in image_files(place)]


def all_files(folder: Path, *suffixes: str) -> list[Path]:
    """The files in `folder` and below it whose names end so, in any case: `all_files(root, ".json")`."""
    return [f for place in walk(folder) for f in entries(place) if f.suffix.lower() in suffixes and f.is_file()]


STRUCTURE = re.compile(  # folders inside an object, by their names: what is in others may be objects of their own
    r"(images?|imgs?|jpegimages|pngimages|pictures?|photos?|labels?|annotations?|annos?|anns?|jsons?|xmls?|txts?"
    r"|masks?|good|normal|ok|data|obj_train_data|obj_valid_data|obj_test_data|imagesets|segmentation(class|object)"
    r"|(train|val|valid|validation|test)([_\- ]?\d{4})?|default)",
    re.IGNORECASE,
)


class Place:
    """A folder that may be an object, and the files that say so.

    Args:
        below: files in folders of any name count, not only those in `STRUCTURE`.
    """

    def __init__(self, folder: Path, below: bool = False):
        self.folder = folder
        self.below = below

    @functools.cached_property
    def files(self) -> list[Path]:
        """The files in the folder, then those below it."""
        inside = walk(self.folder) if self.below else walk(self.folder, STRUCTURE)
        return [file for place in inside for file in entries(place) if not file.is_dir()]

    @functools.cached_property
    def folders(self) -> dict[str, Path]:
        """The folders directly in it, by their names in small letters."""
        return {spelt(folder.name).casefold(): folder for folder in folders_in(self.folder)}

    def of_kind(self, *suffixes: str) -> list[Path]:
        return [file for file in self.files if file.suffix.lower() in suffixes]


def child(folder: Path, path: str) -> Path:
    """What `path` means below the folder; in other capitals where nothing is spelt exactly so."""
    for part in path.split("/"):
        exact, wanted = folder / part, spelt(part).casefold()
        if not os.path.exists(exact):
            alike = (folder / name for name in _names(folder) if spelt(name).casefold() == wanted)
            exact = next(alike, exact)
        folder = exact
    return folder


def file_inside(root: Path, folder: Path, name: str | None) -> Path | None:
    """The file that `name` means seen from `folder`, however it is spelt; None if none, or not inside `root`."""
    wanted = os.path.normpath(folder / (name or "").replace("\\", "/"))
    if not name or not Path(wanted).is_relative_to(root):
        return None
    file = Path(wanted)
    if not os.path.isfile(file):  # Path's own method raises for names that are too long
        file = child(root, Path(wanted).relative_to(root).as_posix())
    return file if os.path.isfile(file) else None


def pair_masks(
    images: list[Path], masks: list[Path], root: Path
) -> tuple[dict[Path, tuple[Path, ...]], list[Problem]]:
    """Pairs 007.png with its masks, by stem and never by order, and lists what does not fit.

    Masks are 007.png, 007_mask.png (or gt, label, seg), several 007_mask_1.png ..., or a folder 007.

    Returns:
        the masks of each image that has them, and the problems (DF142 mask missing, DF143 mask without an image,
        DF144 several masks or images of one stem).
    """
    whole: dict[str, list[Path]] = {}
    numbered: dict[str, list[Path]] = {}
    images_of: dict[str, list[Path]] = {}
    for image in images:
        images_of.setdefault(spelt(image.stem), []).append(image)
    problems = []
    for mask in masks:
        stem = spelt(mask.name if mask.is_dir() else mask.stem)
        suffix = None if stem in images_of else MASK_SUFFIX.search(stem)
        stem = stem[: suffix.start()] if suffix else stem
        (numbered if suffix and suffix[2] else whole).setdefault(stem, []).append(mask)
        if stem not in images_of:
            problems.append(
                Problem("DF143", relative(mask, root), "a mask without an image", f"remove it or add '{stem}'")
            )
    pairs = {}
    for stem, files in images_of.items():
        found, parts = whole.get(stem, []), numbered.get(stem, [])
        names = [relative(f, root) for f in files]
        if not found and not parts:
            problems += [
                Problem("DF142", name, "its mask is missing", f"expected '{stem}_mask.png'", name) for name in names
            ]
        elif len(files) > 1 or len(found) > 1 or (found and parts):
            listed = ", ".join([*names, *(relative(f, root) for f in [*found, *parts])])
            problems += [
                Problem("DF144", listed, f"more than one image or mask named '{stem}'", "keep one of each", name)
                for name in names
            ]
        else:
            pairs[files[0]] = tuple(found or parts)
    return pairs, problems


def pair_by_name(images: list[Path], masks: list[Path], root: Path) -> tuple[dict[Path, Path], list[Problem]]:
    """`pair_masks` where each image must have a single mask; several are a problem (DF144) too."""
    pairs, problems = pair_masks(images, masks, root)
    for image, files in pairs.items():
        if len(files) > 1:
            listed = ", ".join(relative(f, root) for f in files)
            name = relative(image, root)
            problems.append(Problem("DF144", listed, f"more than one mask of {image.name}", "keep one", name))
    return {image: files[0] for image, files in pairs.items() if len(files) == 1}, problems


def pair_rows(
    images: Path, masks: Path, root: Path, defect: str, split: str | None = None, nonzero: bool = False,
    ignored_folders: frozenset[str] = frozenset(),
) -> Reading:  # fmt: skip
    """The rows of one defect type, in `images` and in any folders below it, with masks in the same places of `masks`.

    Args:
        nonzero: any value above 0 is defect.
        passed_over: sub-folders (of the first level) that are no part of this type, in any capitals.
    """
    files = image_files(images)
    apart = {spelt(name).casefold() for name in ignored_folders}
    below = {f.name for place in (images, masks) for f in folders_in(place) if spelt(f.name).casefold() not in apart}
    nested = {name for name in below if all_images(images / name)}
    candidates = [*image_files(masks), *(f for f in folders_in(masks) if f.name in below - nested)]
    reading = Reading()
    pairs, reading.problems = pair_masks(files, candidates, root)
    for image, found in pairs.items():
        parts = tuple(f for mask in found for f in (image_files(mask) if mask.is_dir() else [mask]))
        if parts:
            reading.rows.append(Row(image, MaskFiles(parts, nonzero), defect, split))
        else:
            reading.blame("DF142", image, root, f"holds no mask of {image.name}", "add it", relative(found[0], root))
    for name in sorted(nested):
        reading += pair_rows(images / name, masks / name, root, defect, split, nonzero)
    return reading
