"""What to generate on: good images, and the files given for each."""

import dataclasses
import functools
import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image

from defectfill_dataset.builder import file_digest
from defectfill_dataset.checks import ImageReport, area_problems, image_warnings, inspect_image
from defectfill_dataset.errors import InputError, Problem
from defectfill_dataset.images import UNREADABLE, load_image, open_image
from defectfill_dataset.mask_values import binarise
from defectfill_dataset.readers import image_files, is_unicode, pair_by_name
from defectfill_dataset.seeds import derive_seed
from defectfill_dataset.synthesis.placement import MaskSource, PlacedMask


logger = logging.getLogger(__name__)


def repeat_seed(seed: int, repeat: int) -> int:
    """The seed of the `repeat`-th image generated from one source image; the first has the run's own."""
    return derive_seed(seed, "repeat", repeat) if repeat else seed


@dataclasses.dataclass(frozen=True)
class SourceImage:
    """One good image and the files given for it: its mask (None: from a source), its foreground, its ROI.

    Everything random is drawn from the image's name and content, so that no two images share a number, in one run or
    in several; images of several defect types made from one source image do.
    """

    file: Path
    mask: Path | None = None
    foreground: Path | None = None
    roi: Path | None = None

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def areas(self) -> dict[str, Path]:
        """What is given beside the image, by its flag."""
        files = {"mask": self.mask, "foreground": self.foreground, "roi": self.roi}
        return {flag: file for flag, file in files.items() if file}

    @functools.cached_property
    def digests(self) -> dict[str, str | None]:
        """sha256 of its files: what a finished image was made from."""
        files = {"good_image": self.file, "given_mask": None}
        files |= {"given_zone" if flag == "roi" else f"given_{flag}": file for flag, file in self.areas.items()}
        return {f"{k}_sha256": file_digest(f) if f else None for k, f in files.items()}

    def derive_seed(self, seed: int, *parts: int | str) -> int:
        return derive_seed(seed, self.name, self.digests["good_image_sha256"] or "", *parts)

    def load(self) -> tuple[Image.Image, dict[str, np.ndarray]]:
        """The image as RGB and its (H, W) bool areas, by their flags."""
        image = load_image(open_image(self.file))
        return image, {flag: binarise(open_image(file)) for flag, file in self.areas.items()}

    def load_with_mask(self, seed: int, source: MaskSource | None) -> tuple[Image.Image, PlacedMask | None]:
        """The image and its mask, given or from `source`; None where that finds no place."""
        image, areas = self.load()
        if source is None:
            return image, PlacedMask(areas["mask"], [])
        return image, source(image, self.derive_seed(seed, "mask"), areas.get("foreground"), areas.get("roi"))


def find_source_images(
    image: Path, mask: Path | None = None, foreground: Path | None = None, roi: Path | None = None
) -> list[SourceImage]:
    """One source image or a folder of them, with their masks and areas: a file each, or folders paired by name.

    One foreground or ROI file may also serve a folder of images.

    Raises:
        InputError: nothing there (DF160, DF161), or files that do not pair (DF142-DF144).
    """
    given = {"mask": mask, "foreground": foreground, "roi": roi}
    for flag, path in {"image": image, **given}.items():
        if path is not None and not path.exists():
            raise InputError(Problem("DF160", f"--{flag} {path}", "no such file or folder"))
    if mask is not None and image.is_dir() != mask.is_dir():
        raise InputError(Problem("DF161", f"--image {image}, --mask {mask}", "give two files or two folders"))
    if mask is not None and image.samefile(mask):
        fix = "give masks of their own"
        raise InputError(Problem("DF161", f"--image {image}, --mask {mask}", "are the same", fix))
    images = image_files(image) if image.is_dir() else [image]
    if not images:
        raise InputError(Problem("DF161", f"--image {image}", "no images in it"))
    stems: dict[str, list[str]] = {}
    for file in images:
        stems.setdefault(file.stem, []).append(file.name)
    if twice := [", ".join(names) for names in stems.values() if len(names) > 1]:
        raise InputError(*(Problem("DF144", names, "one name twice", "rename one") for names in twice))
    files = {flag: pair_files(images, flag, path) for flag, path in given.items() if path}
    return [SourceImage(file, **{flag: pairs[file] for flag, pairs in files.items()}) for file in images]


def pair_files(images: list[Path], flag: str, path: Path) -> dict[Path, Path]:
    """For each image the file at `path`, or the one of its name in that folder; only masks must all have an image."""
    if path.is_file():
        return dict.fromkeys(images, path)
    root = Path(os.path.commonpath([images[0].absolute(), path.absolute()]))
    pairs, problems = pair_by_name([f.absolute() for f in images], [f.absolute() for f in image_files(path)], root)
    problems = [problem for problem in problems if flag == "mask" or problem.code != "DF143"]
    if problems:
        raise InputError(*(dataclasses.replace(p, fix=f"{p.fix} (--{flag} {path})") for p in problems))
    return {file: pairs[file.absolute()] for file in images}


def check_source_images(source_images: list[SourceImage]) -> None:
    """Opens every file and logs warnings; raises InputError with all problems: DF120, and those of training."""
    image_reports: list[ImageReport] = []
    problems: list[Problem] = []
    for source_image in source_images:
        name = str(source_image.file)
        seen = inspect_image(name, "good", source_image.file)
        image_reports.append(seen)
        problems += seen.problems
        if not is_unicode(name):
            problems.append(Problem("DF115", name, "the file's name is not UTF-8", "rename it"))
        if any(odd.code == "DF120" for odd in seen.warnings):
            what = "has 16 bits per channel, and the result would have 8 everywhere, not only inside the mask"
            problems.append(Problem("DF120", name, what, "convert it to 8 bits"))
        for flag, file in source_image.areas.items():
            try:
                problems += area_problems(name, seen.size, binarise(open_image(file)), flag) if seen.pixels else []
            except UNREADABLE as error:
                problems.append(Problem("DF103", name, f"its {flag} cannot be read: {file}: {error}"))
    if problems:
        raise InputError(*problems)
    for note in image_warnings(image_reports):
        logger.warning("%s", note)
