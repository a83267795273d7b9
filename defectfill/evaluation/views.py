"""What a detector sees: square views of real and generated images, split by part, and a check that no test data leaks.

Shapes: N views, R side of a view at the detector's size.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image

from defectfill_dataset import (
    Box,
    InputError,
    Problem,
    binarise,
    check_pairs,
    derive_seed,
    load_defect_pairs,
    load_image,
    open_image,
    pool_mask,
)
from defectfill_dataset.checks import find_problems
from defectfill_dataset.masks import components
from defectfill_dataset.writers.exports import read_generated


PLACES = 24  # of a window that are tried, to leave out other types of defect
PROBES = 4096  # pixels by which images are compared
SAME = 0.8  # of `sameness`, from which two images show the same photograph
LEAST_PROBES = 20  # that must show more than plain ground
LEAST_SHAPE = 30  # pixels of a mask from which an equal shape is no chance


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A square of an image, at the detector's size.

    Args:
        source: the image's name.
        group: the part or board it shows.
        box: the square in the image, in pixels.
        image: (R, R, 3) uint8.
        labels: (R, R) uint8, 0 where there is no defect, else 1 + the index of its type.
    """

    source: str
    group: str
    box: Box
    image: np.ndarray
    labels: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(R, R) bool."""
        return self.labels > 0


@dataclasses.dataclass(frozen=True)
class Viewing:
    """How images become views.

    Args:
        resolution: R.
        window: side of a view in pixels of the image; None for the whole image.
        group: regular expression whose first group, or whole match, in an image's name is its part; None: each image.
        defects: the types, in the order of the labels.
    """

    resolution: int
    window: int | None
    group: re.Pattern | None
    defects: tuple[str, ...]

    def group_of(self, name: str) -> str:
        """The part that an image shows.

        Raises:
            InputError: the expression is not found in the name (DF350).
        """
        if self.group is None:
            return name
        found = self.group.search(name)
        part = found and (found.group(1) if self.group.groups else found.group())
        if part is None:
            what = f"is not found in the image name '{name}'"
            raise InputError(Problem("DF350", f"--group {self.group.pattern}", what, "give one that every name has"))
        return part

    def view(self, name: str, image: Image.Image, labels: np.ndarray, box: Box) -> View:
        """The view in a box; a pixel of it is labelled if any pixel under it is."""
        left, top, right, bottom = box
        size = (self.resolution,) * 2
        small = np.zeros(size, np.uint8)
        for label in range(1, len(self.defects) + 1):
            part = labels[top:bottom, left:right] == label
            if part.any():
                small[pool_mask(part, self.resolution)[0].numpy() > 0] = label
        pixels = np.asarray(image.crop(box).resize(size, Image.Resampling.LANCZOS))
        return View(name, self.group_of(name), box, pixels, small)

    def side(self, size: tuple[int, int]) -> int:
        """Of a window in an image of this (W, H)."""
        return min(self.window or 0, *size)

    def defect_views(
        self, name: str, image: Image.Image, labels: np.ndarray, others: np.ndarray | None, seed: int
    ) -> Iterator[View]:
        """Views that hold each defect at least once, at a random place in them; none where another type is too near.

        Args:
            labels: (H, W), as in a view.
            others: (H, W) bool, where defects of types that are not looked for are.
        """
        if self.window is None:
            if others is None or not others.any():
                yield self.view(name, image, labels, (0, 0, *image.size))
            return
        side, rng = self.side(image.size), np.random.default_rng(seed)
        seen = np.zeros(labels.shape, bool)
        for left, top, part in sorted(components(labels > 0), key=lambda found: -int(found[2].sum())):
            bottom, right = top + part.shape[0], left + part.shape[1]
            if (seen[top:bottom, left:right] | ~part).all():
                continue
            for _ in range(PLACES):
                y = window_start(rng, top, bottom, side, labels.shape[0])
                x = window_start(rng, left, right, side, labels.shape[1])
                if others is None or not others[y : y + side, x : x + side].any():
                    seen[y : y + side, x : x + side] = True
                    yield self.view(name, image, labels, (x, y, x + side, y + side))
                    break

    def good_views(self, name: str, image: Image.Image, number: int, seed: int) -> Iterator[View]:
        """So many views of a good image at random places; one if it is seen whole."""
        nothing = np.zeros(image.size[::-1], np.uint8)
        if self.window is None:
            yield self.view(name, image, nothing, (0, 0, *image.size))
            return
        side, rng = self.side(image.size), np.random.default_rng(seed)
        for _ in range(number):
            left, top = (int(rng.integers(length - side + 1)) for length in image.size)
            yield self.view(name, image, nothing, (left, top, left + side, top + side))


def window_start(rng: np.random.Generator, start: int, stop: int, side: int, length: int) -> int:
    """Where a window of `side` begins that holds start to stop, or their middle if it is too short for them."""
    low, high = (stop - side, start) if stop - start <= side else ((start + stop - side) // 2,) * 2
    low, high = (int(np.clip(place, 0, length - side)) for place in (low, high))
    return int(rng.integers(low, high + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Real images


@dataclasses.dataclass
class RealViews:
    """Views of the real images; no part is on both sides."""

    train: list[View]
    test: list[View]
    train_good: list[View]
    test_good: list[View]
    good_rows: tuple[list[int], list[int]]  # the good images of the two sides
    left_out: int  # test images in no view, because other types lie too near

    @property
    def tested(self) -> list[View]:
        """Those that detectors are tested on."""
        return [*self.test, *self.test_good]


def check_groups(data: DatasetDict, viewing: Viewing) -> None:
    """Raises InputError (DF351) if defects of one part are on both sides of the split."""
    sides = [{viewing.group_of(name) for name in data[split]["source_file"]} for split in ("train", "test")]
    if both := sorted(sides[0] & sides[1]):
        what = f"{len(both)} parts are in both train and test, such as '{both[0]}'"
        raise InputError(Problem("DF351", "--group", what, "give --split a file that keeps each part on one side"))


def split_good(data: DatasetDict, viewing: Viewing, painted: Iterable[int] = ()) -> tuple[list[int], list[int]]:
    """The rows of good images that train and test: with their part's defects, others in turn.

    Args:
        painted: rows that images were generated into; they train, unless defects of their part test.
    """
    train, test = ({viewing.group_of(name) for name in data[split]["source_file"]} for split in ("train", "test"))
    names = data["good"]["source_file"] if "good" in data else []
    groups = [viewing.group_of(name) for name in names]
    train |= {groups[i] for i in painted} - test
    for place, group in enumerate(sorted(set(groups) - train - test), start=1 if painted else 0):
        (test if place % 2 else train).add(group)
    sides = [[i for i, group in enumerate(groups) if group in side] for side in (train, test)]
    for side, rows in zip(("training", "test"), sides):
        if not rows:
            what, fix = f"has no good images of {side} parts", "add some that no image was generated into"
            raise InputError(Problem("DF352", "--data_dir", what, fix))
    return sides[0], sides[1]


def real_views(
    data: DatasetDict, viewing: Viewing, per_good: int, seed: int, painted: Iterable[int] = ()
) -> RealViews:
    """The views of one object's images.

    Args:
        data: its splits with all types; those not in `viewing.defects` are left out of the views.
        per_good: views of each good image.
        painted: as in `split_good`.

    Raises:
        InputError: a part is on both sides (DF351), or one side has no defects or no good images (DF352).
    """
    if "test" not in data:
        what = "leaves no defect image to test on"
        raise InputError(Problem("DF352", "--split", what, "give a rule or a file that holds some out"))
    check_groups(data, viewing)
    views: dict[str, list[View]] = {}
    left_out = 0
    for split in ("train", "test"):
        views[split] = []
        for name, image, labels, others in labelled_images(data[split], viewing.defects):
            found = [*viewing.defect_views(name, image, labels, others, derive_seed(seed, "views", name))]
            views[split] += found
            left_out += not found and split == "test"
        if not views[split]:
            raise InputError(Problem("DF352", "--defect", f"no {split} image shows them alone", "give other types"))
    rows = split_good(data, viewing, painted)
    good = data["good"]
    train_good, test_good = (
        [
            view
            for i in side
            for view in viewing.good_views(
                good[i]["source_file"], load_image(good[i]["image"]), per_good, derive_seed(seed, "good", i)
            )
        ]
        for side in rows
    )
    return RealViews(views["train"], views["test"], train_good, test_good, rows, left_out)


def labelled_images(
    rows: Dataset, defects: Sequence[str]
) -> Iterator[tuple[str, Image.Image, np.ndarray, np.ndarray]]:
    """Name, image, (H, W) labels and (H, W) mask of other types, of each image with one of these defects."""
    by_name: dict[str, list[int]] = {}
    for i, name in enumerate(rows["source_file"]):
        by_name.setdefault(name, []).append(i)
    for name, places in by_name.items():
        found = [rows[i] for i in places]
        if not any(row["defect"] in defects for row in found):
            continue
        image = load_image(found[0]["image"])
        labels, others = np.zeros(image.size[::-1], np.uint8), np.zeros(image.size[::-1], bool)
        for row in found:
            mask = binarise(row["mask"])
            if row["defect"] in defects:
                labels[mask] = 1 + defects.index(row["defect"])
            else:
                others |= mask
        yield name, image, labels, others & (labels == 0)


# ---------------------------------------------------------------------------------------------------------------------
# Generated images


def check_bank(folder: Path) -> None:
    """Raises InputError with all that is wrong with the images and masks of `bank_images`."""
    if not (folder / "manifest.jsonl").exists():
        check_pairs(load_defect_pairs(folder, split="all")["train"])
        return
    items, problems = read_generated(folder, several=False)
    if problems := problems or find_problems([item.row for item in items], folder):
        raise InputError(*problems)


def bank_images(folder: Path, defects: Sequence[str]) -> Iterator[tuple[str, Image.Image, np.ndarray]]:
    """Name, image and (H, W) labels of generated images: a folder of generate_defectfill.py, or any dataset.

    Raises:
        InputError: what the folder's reader finds, or no images of these types (DF352).
    """
    if (folder / "manifest.jsonl").exists():
        items, problems = read_generated(folder, several=False)
        if problems:
            raise InputError(*problems)
        kept = [item.row for item in items if item.row.defect in defects]
        found = [(row.image.name, row.defect, row.image, row.mask) for row in kept]
    else:
        data = load_defect_pairs(folder, split="all")["train"]
        found = [
            (row["source_file"], row["defect"], row["image"], row["mask"]) for row in data if row["defect"] in defects
        ]
    if not found:
        raise InputError(Problem("DF352", f"--bank {folder}", f"has no image of {', '.join(defects)}"))
    for name, defect, image, mask in found:
        inside = binarise(mask) if isinstance(mask, Image.Image) else mask.render()
        pixels = load_image(open_image(image) if isinstance(image, Path) else image)
        yield name, pixels, inside.astype(np.uint8) * (1 + list(defects).index(defect))


def bank_views(folder: Path, viewing: Viewing, seed: int) -> list[View]:
    """The views of a folder of generated images; each image is its own part."""
    alone = dataclasses.replace(viewing, group=None)
    return [
        view
        for name, image, labels in bank_images(folder, viewing.defects)
        for view in alone.defect_views(name, image, labels, None, derive_seed(seed, "bank", name))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Leaks


class Leak(NamedTuple):
    """What of the test side was found where detectors or LoRAs learn."""

    what: str
    number: int
    example: str


class Sample(NamedTuple):
    """Some pixels of an image, by which it is known again.

    Args:
        size: (H, W) of the image.
        colours: (PROBES,) uint32.
        ground: the commonest colour.
    """

    size: tuple[int, ...]
    colours: np.ndarray
    ground: int


def sample(image: Image.Image) -> Sample:
    """Pixels at places that depend on the image's size alone."""
    pixels = np.asarray(image)
    places = np.random.default_rng(pixels.shape[:2]).integers(pixels.shape[0] * pixels.shape[1], size=PROBES)
    red, green, blue = pixels.reshape(-1, 3)[places].astype(np.uint32).T
    found, counts = np.unique(colours := (red << 16) + (green << 8) + blue, return_counts=True)
    return Sample(pixels.shape[:2], colours, int(found[counts.argmax()]))


Named = tuple[str, Sample]


def sameness(one: Sample, other: Sample) -> float:
    """The share of equal pixels, of those where not both show the other's ground.

    Plain ground is alike in all images, in binary ones to the bit; it says nothing.
    """
    if one.size != other.size:
        return 0.0
    telling = (one.colours != other.ground) | (other.colours != other.ground)
    return float((one.colours == other.colours)[telling].mean()) if telling.sum() >= LEAST_PROBES else 0.0


def same_images(learnt: Iterable[Named], tested: Sequence[Named]) -> list[tuple[str, str]]:
    """The names of pairs that show the same photograph, painted on or not, at the same size."""
    pairs = []
    for name, one in learnt:
        equal = [sameness(one, other) for _, other in tested]
        if max(equal) >= SAME:
            pairs.append((name, tested[int(np.argmax(equal))][0]))
    return pairs


def painted_rows(good: Dataset, folders: Iterable[Path], defects: Sequence[str]) -> set[int]:
    """The rows of good images that the images of these folders were generated into."""
    known = [(str(i), sample(load_image(image))) for i, image in enumerate(good["image"])]
    images = ((name, sample(image)) for folder in folders for name, image, _ in bank_images(folder, defects))
    return {int(row) for _, row in same_images(images, known)}


def shapes(labels: np.ndarray) -> set[bytes]:
    """The shapes of an (H, W) image's defects, wherever they lie; small ones are like others by chance."""
    return {
        np.array(part.shape).tobytes() + np.packbits(part).tobytes()
        for _, _, part in components(labels > 0)
        if part.sum() >= LEAST_SHAPE
    }


def find_leaks(data: DatasetDict, viewing: Viewing, test_good: Sequence[int], banks: Mapping[str, Path]) -> list[Leak]:
    """What training images and generated images share with the test side, by content and not by name.

    Images that were resized or compressed anew are not found.

    Args:
        test_good: rows of the good images that test.
    """

    def samples(rows: Dataset) -> Iterator[Named]:
        first = {name: i for i, name in reversed([*enumerate(rows["source_file"])])}  # an image may have several rows
        return ((name, sample(load_image(rows[i]["image"]))) for name, i in first.items())

    tested = [*samples(data["test"]), *samples(data["good"].select(test_good))]
    tested_shapes = set().union(
        *(shapes(labels) for _, _, labels, _ in labelled_images(data["test"], viewing.defects))
    )
    own = set().union(*(shapes(labels) for _, _, labels, _ in labelled_images(data["train"], viewing.defects)))
    rows = sorted(set(range(len(data["good"]))) - set(test_good))
    leaks = []

    def note(what: str, pairs: Sequence[tuple[str, str]]) -> None:
        if pairs:
            leaks.append(Leak(what, len(pairs), " = ".join(pairs[0])))

    learnt = [*samples(data["train"]), *samples(data["good"].select(rows))]
    note("training images are test images", same_images(learnt, tested))
    for name, folder in banks.items():
        found, copied = [], []
        for image_name, image, labels in bank_images(folder, viewing.defects):
            found.append((image_name, sample(image)))
            if shapes(labels) & (tested_shapes - own):
                copied.append((image_name, "a test mask's shape"))
        note(f"images of {name} were painted into test images", same_images(found, tested))
        note(f"masks of {name} are test masks", copied)
    return leaks
