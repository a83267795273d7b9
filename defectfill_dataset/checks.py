"""Checks of the pixels of image and mask pairs, all problems at once, before any model is loaded."""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np
import xxhash
from datasets import Dataset
from PIL import Image

from .crops import CropRule, crop_boxes, crop_mask
from .errors import InputError, Problem
from .images import ORIENTATION, UNREADABLE, file_warnings, load_image, open_image
from .mask_values import binarise
from .masks import Mask, MaskFiles, MaskUnion, pool_mask
from .readers import IMAGE_EXTENSIONS, Reading, Row, is_outside, relative
from .readers.files import is_hidden


LEAST_SIDE = 32  # of an image, in pixels: four cells of the latent grid
MOST_ASPECT = 4
LEAST_CELLS = 4  # of the latent grid
STRIP = 64  # rows
BESIDE_IMAGES = {".txt", ".json", ".jsonl", ".csv", ".xml", ".yaml", ".yml", ".md", ".db", ".ini"}


@dataclasses.dataclass(frozen=True)
class ImageReport:
    """What is known of one image of a dataset after inspection.

    Args:
        name: relative to the object's folder.
        problems: why it cannot be used.
        pixels: digest of the image's pixels.
        size: (W, H).
        area: share of the image that the mask marks; 0 for a good image, or where there are problems.
        cells: cells of the latent grid that it marks, pooled as training does.
        zoomed: cells that it marks in the smallest of its crops.
        crowded: crops that also show defects of other types; `crops` counts all of them.
        nearest: cells that nearest-neighbour sampling would leave.
        mask: digest of the mask's pixels.
        warnings: what is unusual about it.
    """

    name: str
    defect: str
    problems: tuple[Problem, ...]
    pixels: str = ""
    size: tuple[int, int] = (0, 0)
    area: float = 0.0
    cells: int = 0
    zoomed: int = 0
    crops: int = 0
    crowded: int = 0
    nearest: int = 0
    mask: str = ""
    warnings: tuple[Problem, ...] = ()


def inspect_row(
    row: Row,
    root: str | Path,
    resolution: int = 512,
    grid: int = 64,
    with_zoom: bool = False,
    others: Mask | None = None,
) -> ImageReport:
    """`inspect_image` for one row of a dataset's folder; `others` marks the image's defects of other types."""
    name = relative(row.image, root)
    render, render_others = (mask.render if mask else None for mask in (row.mask, others))
    seen = inspect_image(name, row.defect, row.image, render, resolution, grid, with_zoom, render_others)
    if not is_outside(row.image, root):
        return seen
    link = Problem("DF114", name, "is a link to a file outside the dataset")
    return dataclasses.replace(seen, warnings=(*seen.warnings, link))


def outside_links(rows: Iterable[Row], root: str | Path) -> list[Problem]:
    """A problem (DF200) for each image and mask that lies elsewhere, for what is published from the folder `root`."""
    root = Path(root).expanduser().resolve()
    files = dict.fromkeys(file for row in rows for file in (row.image, *(row.mask.paths if row.mask else ())))
    fix = "put the file there, or publish it with --follow_links"
    return [
        Problem("DF200", relative(file, root), f"is a link to a file outside {root}", fix)
        for file in files
        if is_outside(file, root)
    ]


def other_types(rows: Sequence[Row]) -> list[Mask | None]:
    """For each row the mask of all other defect types of its image, if it has some."""
    masks: dict[Path, dict[str, Mask]] = {}
    for row in rows:
        if row.mask:
            masks.setdefault(row.image, {})[row.defect] = row.mask
    found = [[m for defect, m in masks.get(row.image, {}).items() if defect != row.defect] for row in rows]
    return [MaskUnion.of(of_others) if of_others else None for of_others in found]


def inspect_image(
    name: str,
    defect: str,
    file: Path | io.BytesIO,
    render: Callable[[], np.ndarray] | None = None,
    resolution: int = 512,
    grid: int = 64,
    with_zoom: bool = False,
    others: Callable[[], np.ndarray] | None = None,
) -> ImageReport:
    """Opens one image and its mask, which `render` gives.

    Its problems: DF103 unreadable, DF130 too small, DF140 sizes differ, DF142 no mask, DF145 an empty and DF146 a full
    mask.

    Args:
        resolution: to train at; `grid` is the side of its latent grid.
        with_zoom: measure crops too.
    """

    def one_problem(code: str, what: str, fix: str = "") -> tuple[Problem, ...]:
        return (Problem(code, name, what, fix, name),)

    try:
        opened = open_image(file)
        warnings, image = file_warnings(opened, name), load_image(opened)
    except UNREADABLE as error:
        return ImageReport(name, defect, one_problem("DF103", f"the image cannot be read: {error}"))
    if image.getcolors(1):
        warnings += (Problem("DF124", name, "has a single colour"),)
    orientation = opened.getexif().get(ORIENTATION, 1)
    if orientation not in range(9):
        warnings += (Problem("DF126", name, "has an invalid EXIF orientation", "it is not rotated"),)
    elif render and (orientation in (2, 3, 4) or (orientation > 4 and image.width == image.height)):
        fix = "check that the outline fits"
        warnings += (Problem("DF127", name, "is rotated by its EXIF tag, so its mask must be rotated too", fix),)
    seen = ImageReport(name, defect, (), digest(image), image.size, warnings=warnings)
    if min(image.size) < LEAST_SIDE:
        fix = f"give an image of at least {LEAST_SIDE} pixels a side"
        return dataclasses.replace(seen, problems=one_problem("DF130", f"is {image.width}x{image.height}", fix))
    if render is None:
        missing = () if defect == "good" else one_problem("DF142", "its mask is missing", "add it")
        return dataclasses.replace(seen, problems=missing)
    try:
        inside = render()
    except UNREADABLE as error:
        return dataclasses.replace(seen, problems=one_problem("DF103", f"its mask cannot be read: {error}"))
    if problems := area_problems(name, image.size, inside):
        return dataclasses.replace(seen, problems=tuple(problems))
    rows, columns = ((np.arange(grid) * side) // grid for side in inside.shape)
    apart = others() if others and with_zoom else None
    boxes = crop_boxes(inside, resolution, CropRule(), apart) if with_zoom else []
    return dataclasses.replace(
        seen,
        area=np.count_nonzero(inside) / inside.size,
        cells=int(pool_mask(inside, grid).sum()),
        zoomed=min((int(pool_mask(crop_mask(inside, box), grid).sum()) for box in boxes), default=0),
        crops=len(boxes),
        crowded=0 if apart is None else sum(bool(crop_mask(apart, box).any()) for box in boxes),
        nearest=int(inside[np.ix_(rows, columns)].sum()),
        mask=xxhash.xxh128(np.packbits(inside).data).hexdigest(),
    )


def digest(image: Image.Image) -> str:
    """Of the pixels, read a strip at a time: copies of whole images cost more than the digest."""
    found = xxhash.xxh128()
    for top in range(0, image.height, STRIP):
        found.update(image.crop((0, top, image.width, min(top + STRIP, image.height))).tobytes())
    return found.hexdigest()


def area_problems(name: str, size: tuple[int, int], inside: np.ndarray, what: str = "mask") -> list[Problem]:
    """What is wrong with an (H, W) mask, or another area, of an image of this (W, H); only a mask must not be full."""
    height, width = inside.shape
    if size != (width, height):
        turned = size == (height, width)
        told = f"the image is {size[0]}x{size[1]}, its {what} {width}x{height}" + (": one is turned" if turned else "")
        fix = "give both one EXIF orientation" if turned else "they must match"
        return [Problem("DF140", name, told, fix, name)]
    if not inside.any():
        return [Problem("DF145", name, f"its {what} is empty", "mark the area, or remove the pair", name)]
    if inside.all() and what == "mask":
        return [Problem("DF146", name, "its mask covers the whole image", "mark the defect only", name)]
    return []


def refusal(problems: Sequence[Problem]) -> InputError:
    """The error for a dataset's folder; it says whether `--skip_problems` would help."""
    images = {problem.image for problem in problems if problem.image}
    if not images or not all(map(skippable, problems)):
        return InputError(*problems)
    what = f"leaves out {'this image' if len(images) == 1 else f'these {len(images)} images'} and uses the others"
    return InputError(*problems, Problem("DF109", "--skip_problems", what))


def check_pairs(
    references: Dataset, *more: Dataset, resolution: int = 512, grid: int = 64, of_folder: bool = False
) -> list[Problem]:
    """Proves that every image of a defect split, and of more splits, can be trained on; returns warnings.

    Args:
        resolution: to train at; `grid` is the side of its latent grid.
        of_folder: the images are a folder's, for which there is `--skip_problems`.

    Raises:
        InputError: no images at all (DF163), or all problems that `inspect_image` finds.
    """
    if not len(references):
        raise InputError(Problem("DF163", "", "no defect images to train on", "check --defect and --split"))
    image_reports = [
        _inspect_example(row, resolution, grid) for split in (references, *more) for row in _encoded(split)
    ]
    if problems := [problem for seen in image_reports for problem in seen.problems]:
        raise refusal(problems) if of_folder else InputError(*problems)
    return dataset_warnings(image_reports, set(references["source_file"]), resolution)


def find_problems(rows: Iterable[Row], root: str | Path, good: bool = False) -> list[Problem]:
    """All problems of the pixels of the defect images among `rows`, and with `good` of the good ones too."""
    image_reports = [inspect_row(row, root) for row in rows if row.mask or good]
    return [problem for seen in image_reports for problem in seen.problems]


def skippable(problem: Problem) -> bool:
    """Whether the dataset can be used without the one image that the problem is of, or without a mask of no image."""
    return problem.image is not None or problem.code == "DF143"


def without(reading: Reading, images: Collection[str], root: str | Path) -> Reading:
    """The reading without these images; problems that go with them, and masks without an image, are gone too."""
    if not images:
        return reading
    rows = [row for row in reading.rows if relative(row.image, root) not in images]
    return Reading(rows, [p for p in reading.problems if not skippable(p)], reading.notes)


def _encoded(split: Dataset) -> Dataset:
    lazy = datasets.Image(decode=False)
    return split.cast_column("image", lazy).cast_column("mask", lazy)


def _inspect_example(row: dict, resolution: int, grid: int) -> ImageReport:
    name, image, mask = row["source_file"], row["image"], row["mask"]
    if image is None:
        return ImageReport(name, row["defect"], (Problem("DF103", name, "its row holds no image", image=name),))
    render = (lambda: _read_mask(mask)) if mask else None
    return inspect_image(name, row["defect"], _file(image), render, resolution, grid)


def _file(encoded: dict) -> Path | io.BytesIO:
    return Path(encoded["path"]) if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])


def data_digest(dataset: Dataset) -> str:
    """sha256 over the names and the encoded bytes of a split's images and masks: says which data a run saw."""
    digest = hashlib.sha256()
    for row in _encoded(dataset):
        digest.update(f"{row['object']}/{row['defect']}/{row['source_file']}\n".encode())
        for file in (row["image"], row["mask"]):
            digest.update(hashlib.sha256(file["bytes"] or Path(file["path"]).read_bytes()).digest() if file else b"-")
    return digest.hexdigest()


def _read_mask(encoded: dict) -> np.ndarray:
    file = _file(encoded)
    return MaskFiles((file,)).render() if isinstance(file, Path) else binarise(open_image(file))


def dataset_warnings(image_reports: Sequence[ImageReport], references: set[str], resolution: int) -> list[Problem]:
    """Warnings about a dataset; none of them stops a training.

    What `file_warnings` finds, DF114 a link, DF124 one colour, DF131 long and thin, DF132 enlarged, DF150 inverted
    masks, DF151 a defect of fewer than four latent cells, DF153 one image twice, DF154 an image both among the
    references and held out, or both defective and good, DF155 one mask for all, DF157 crops with defects of other
    types.

    Args:
        references: names of the images that train.
        resolution: to train at.
    """
    notes = image_warnings(image_reports)
    opened = list({x.name: x for x in image_reports if x.size[0]}.values())
    marked = [x for x in image_reports if x.area]
    long = [x.name for x in opened if max(x.size) > MOST_ASPECT * min(x.size)]
    if long:
        what = f"over {MOST_ASPECT} times as long as wide, squeezed to a square"
        notes.append(Problem("DF131", _some(long), what, "use --zoom on"))
    small = {x.name: resolution / min(x.size) for x in opened if min(x.size) < resolution}
    if small:
        times = f"{max(small.values()):.1f} times"
        what = f"enlarged up to {times} to {resolution} pixels, which adds no detail"
        notes.append(Problem("DF132", _some(small), what, "a lower --resolution trains faster"))
    if marked and all(x.area > 0.5 for x in marked):
        notes.append(Problem("DF150", "", f"all {len(marked)} masks are more than half white", "are they inverted?"))
    elif full := [x.name for x in marked if x.area > 0.9]:
        what = "the mask covers more than 90 % of the image"
        notes.append(Problem("DF150", _some(full), what, "is it inverted?"))
    if len(marked) > 1 and len({x.mask for x in marked}) == 1:
        notes.append(Problem("DF155", "", f"all {len(marked)} masks are the same", "does each belong to its image?"))
    tiny = [x for x in marked if x.cells < LEAST_CELLS]
    if tiny:
        what = f"{len(tiny)} of {len(marked)} defects cover fewer than {LEAST_CELLS} cells of the latent grid"
        fix = "use --zoom on, or a higher --resolution"
        notes.append(Problem("DF151", _some(x.name for x in tiny), what, fix))
    crowded = [x for x in marked if x.crowded]
    if crowded:
        number, crops = sum(x.crowded for x in crowded), sum(x.crops for x in marked)
        what = f"{number} of {crops} crops also show defects of other types, which lie too close"
        fix = "leave these images out if the types get mixed"
        notes.append(Problem("DF157", _some(x.name for x in crowded), what, fix))
    same: dict[str, list[ImageReport]] = {}
    for x in opened:
        same.setdefault(x.pixels, []).append(x)
    for group in (group for group in same.values() if len(group) > 1):
        names = _some(x.name for x in group)
        kinds = {"good" if x.defect == "good" else "reference" if x.name in references else "held out" for x in group}
        if len(kinds) > 1:
            notes.append(Problem("DF154", names, f"the same image, {' and '.join(sorted(kinds))}", "keep one"))
        else:
            notes.append(Problem("DF153", names, "the same image", "keep one"))
    return notes


def image_warnings(image_reports: Iterable[ImageReport]) -> list[Problem]:
    """One warning for each kind, with the names of the images."""
    names: dict[Problem, list[str]] = {}
    for x in image_reports:
        for note in x.warnings:
            names.setdefault(dataclasses.replace(note, where=""), []).append(str(note.where))
    return [dataclasses.replace(note, where=_some(n)) for note, n in names.items()]


def ignored_files(rows: Iterable[Row], root: Path) -> list[Problem]:
    """A warning (DF107) that names the files beside the images that are not read, if any."""
    files = sorted(
        f for folder in {row.image.parent for row in rows} for f in folder.iterdir() if not is_hidden(f.name)
    )
    known = IMAGE_EXTENSIONS | BESIDE_IMAGES | {""}
    strange = [
        f for f in files if (f.suffix.lower() in IMAGE_EXTENSIONS if f.is_dir() else f.suffix.lower() not in known)
    ]
    names = [relative(f, root) for f in strange]
    read = ", ".join(sorted(IMAGE_EXTENSIONS))
    return [Problem("DF107", _some(names), "not read", f"convert to one of {read}")] if names else []


def _some(names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
