"""Split two public datasets by part, and make what their evaluation in docs/evaluation.md needs.

    python scripts/prepare_real_parts.py magnetic_tile --data_dir magnetic_tile --output_dir tile
    python scripts/prepare_real_parts.py deep_pcb --data_dir DeepPCB/PCBData --output_dir pcb

magnetic_tile holds the folders MT_Blowhole, MT_Crack and MT_Free as published. One tile was photographed under up to
six exposures whose names do not tell that they belong together; only their numbers lie close to each other. Images are
copied with their tile in the name, so that no tile is learnt and tested. DeepPCB is published as images, their
defect-free templates and a box for each defect; deep_pcb gets them with masks, as COCO: what differs from the template
in a box. The first five digits of a name are its board.

Both write split.json; good, the defect-free images of the training parts, for make_tiny_base.py; and paint, those that
defects are painted into. deep_pcb writes roi and cases.jsonl as well: where each type of defect can be on a board.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Container, Iterable
from pathlib import Path

import defectfill.quiet  # noqa: F401

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm.auto import tqdm

from defectfill.evaluation.views import Viewing, split_good
from defectfill.runs.files import refuse_foreign, write_json
from defectfill_dataset import InputError, Problem, load_defect_pairs, load_image, open_image
from defectfill_dataset.commands import Parser, exit_on_input_error, say
from defectfill_dataset.readers.marks import rle_of
from defectfill_dataset.splits import SplitFile
from defectfill_dataset.text import read_json


# ---------------------------------------------------------------------------------------------------------------------
# Magnetic tiles

APART = 500  # numbers of one tile's exposures lie nearer to each other
ONE_TILE = range(85602, 88202)  # some of these are the same image under another number
EXPOSURES = {"MT_Blowhole": 1, "MT_Crack": 2}  # of each tile that trains
TILES = {"MT_Blowhole": 7, "MT_Crack": 4}
KINDS = (*TILES, "MT_Free")


def prepare_tiles(data_dir: Path, out: Path) -> None:
    found = []
    for kind in KINDS:
        files = [*(data_dir / kind / "Imgs").glob("*_num_*.jpg")]
        of_kind = [(int(match[1]), kind, file) for file in files if (match := re.search(r"_num_(\d+)$", file.stem))]
        if not of_kind:
            what = f"has no images {kind}/Imgs/expN_num_M.jpg"
            raise InputError(Problem("DF161", f"--data_dir {data_dir}", what, "give the dataset as it was published"))
        found += of_kind
    tile, last = -1, -APART
    of_tile = {kind: dict[int, list[str]]() for kind in KINDS}
    copied = list[tuple[Path, Path]]()
    for number, kind, file in sorted(found):
        tile += number - last >= APART and not ONE_TILE.start < number < ONE_TILE.stop
        last, name = number, f"{kind}/Imgs/tile{tile:03d}_{file.name}"
        of_tile[kind].setdefault(tile, []).append(name)
        copy = out / "magnetic tile" / name
        copied += [(existing(file.with_suffix(end)), copy.with_suffix(end)) for end in (".jpg", ".png")]
    for kind in KINDS:
        (out / "magnetic tile" / kind / "Imgs").mkdir(parents=True)
    for file, copy in copied:
        shutil.copyfile(file, copy)
    rng, split = random.Random(0), {"train": [], "test": [], "skipped": []}
    both = of_tile["MT_Blowhole"].keys() & of_tile["MT_Crack"].keys()
    learnt = set[int]()
    for kind, number in TILES.items():
        alone = sorted(of_tile[kind].keys() - both)
        learnt |= {*rng.sample(alone, max(0, min(number, len(alone) - 1)))}
    for kind, number in EXPOSURES.items():
        for tile, names in sorted(of_tile[kind].items()):
            chosen = rng.sample(sorted(names), min(number, len(names))) if tile in learnt else []
            split["train"] += [name for name in sorted(names) if name in chosen]
            split["skipped" if tile in learnt else "test"] += [name for name in sorted(names) if name not in chosen]
    write_json(out / "split.json", split)
    data = load_defect_pairs(out / "magnetic tile", split=str(out / "split.json"))
    rows = split_good(data, Viewing(128, 128, re.compile(r"tile\d+"), ("blowhole", "crack")))[0]
    images = [(f"{i:03d}.png", load_image(data["good"][i]["image"])) for i in rows]
    save(out, "magnetic tile", images, [name for name, _ in images[::3]])


# ---------------------------------------------------------------------------------------------------------------------
# Circuit boards

LEARNT_BOARDS = {"20085", "12100", "77000", "44000", "90100"}
BOARD_DEFECTS = ("open", "short", "mousebite", "spur", "copper", "pin_hole")  # numbered from 1
REFERENCES, TESTED, PAINTED = 6, 50, 40
NARROW_TRACE, NARROW_GAP, BORDER = 9, 12, 8  # px: half a width, and a distance to an edge


def prepare_boards(published: Path, out: Path) -> None:
    write_boards(published, data_dir := out / "deep_pcb")
    data = load_defect_pairs(data_dir, split="all")
    names = sorted({*data["train"]["source_file"]})
    is_learnt = lambda name: Path(name).name[:5] in LEARNT_BOARDS
    learnt, others = [n for n in names if is_learnt(n)], [n for n in names if not is_learnt(n)]
    if not (learnt and others):
        raise InputError(Problem("DF161", f"--data_dir {data_dir}", "has no images of DeepPCB, named by their board"))
    rng = random.Random(0)
    train, test = (rng.sample(side, min(n, len(side))) for side, n in ((learnt, REFERENCES), (others, TESTED)))
    write_json(out / "split.json", {"train": train, "test": test, "skipped": sorted({*names} - {*train} - {*test})})
    painted = rng.sample(learnt, min(PAINTED, len(learnt)))
    template = lambda name: Path(name).stem + "_template.png"
    files = {template(name): data_dir / Path(name).parent / template(name) for name in learnt}
    images = {name: load_image(open_image(file)) for name, file in files.items()}
    regions = {name: defect_regions(np.asarray(images[name].convert("L")) < 128) for name in map(template, painted)}
    regions = {name: found for name, found in regions.items() if min(r.mean() for r in found.values()) >= 0.01}
    save(out, "circuit board", images.items(), regions)
    for name, found in regions.items():
        for defect, region in found.items():
            (folder := out / "roi" / defect).mkdir(parents=True, exist_ok=True)
            Image.fromarray(region).save(folder / name)
    cases = [
        {"defect": defect, "roi": str(out / "roi" / defect), "coverage": coverage, "placement": "anywhere"}
        for defect, coverage in (("open", 0.75), ("short", 0.8), ("mousebite", 0.85), ("spur", 0.85))
    ]
    (out / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")


def write_boards(published: Path, folder: Path) -> None:
    """Images, templates and defects as groupN/N/NAME_test.jpg, NAME_temp.jpg and groupN/N_not/NAME.txt have them."""
    boards = []
    for test in sorted(published.glob("group*/*/*_test.jpg")):
        name = test.name.removesuffix("_test.jpg")
        template, boxes = test.with_name(f"{name}_temp.jpg"), test.parents[1] / f"{test.parent.name}_not/{name}.txt"
        boards.append((name, test, existing(template), read_boxes(existing(boxes))))
    if not boards:
        raise InputError(Problem("DF161", f"--data_dir {published}", "has no images group*/*/NAME_test.jpg"))
    (folder / "images").mkdir(parents=True)
    images, annotations = list[dict](), list[dict]()
    for name, *files, boxes in tqdm(boards, desc="Boards"):
        bright, defect_free = (np.asarray(open_image(file).convert("L")) > 127 for file in files)
        for pixels, suffix in ((defect_free, "_template"), (bright, "")):
            size = {"width": pixels.shape[1], "height": pixels.shape[0]}
            images.append({"id": len(images) + 1, "file_name": f"{name}{suffix}.png", **size})
            Image.fromarray(pixels).save(folder / "images" / images[-1]["file_name"])
        for (left, top, right, bottom), kind in boxes:
            mask = defect_mask(bright != defect_free, (slice(top, bottom), slice(left, right)))
            annotation = {"id": len(annotations) + 1, "image_id": len(images), "category_id": kind, "iscrowd": 0}
            shape = {"bbox": [left, top, right - left, bottom - top], "area": int(mask.sum())}
            segmentation = {"size": list(mask.shape), "counts": rle_of(mask)}
            annotations.append({**annotation, **shape, "segmentation": segmentation})
    categories = [{"id": number, "name": name} for number, name in enumerate(BOARD_DEFECTS, 1)]
    write_json(folder / "annotations.json", {"images": images, "annotations": annotations, "categories": categories})


def read_boxes(file: Path) -> list[tuple[tuple[int, int, int, int], int]]:
    """((left, top, right, bottom), number of the type) of each defect.

    Raises:
        InputError: a line that is not these five numbers (DF161).
    """
    boxes = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            *box, kind = (int(value) for value in line.replace(",", " ").split())
            left, top, right, bottom = box
            if not (0 <= left < right and 0 <= top < bottom and 1 <= kind <= len(BOARD_DEFECTS)):
                raise ValueError
        except ValueError:
            raise InputError(Problem("DF161", file, f"{line!r} is not a box and a type: x1 y1 x2 y2 1-6")) from None
        boxes.append(((left, top, right, bottom), kind))
    return boxes


def defect_mask(different: np.ndarray, box: tuple[slice, slice]) -> np.ndarray:
    """(H, W) bool: what differs from the template in a box, without single pixels, widened by one, holes filled."""
    mask = np.zeros_like(different)
    mask[box] = ndimage.binary_opening(different, np.ones((2, 2)))[box]
    return ndimage.binary_fill_holes(ndimage.binary_dilation(mask))


def defect_regions(copper: np.ndarray) -> dict[str, np.ndarray]:
    """Where each type of defect can be on a board, as (H, W) bool."""
    copper = ndimage.binary_opening(copper, np.ones((3, 3)))
    inside, outside = ndimage.distance_transform_edt(copper), ndimage.distance_transform_edt(~copper)
    return {
        "open": grown(copper & ~opened(inside, NARROW_TRACE), 3),
        "short": grown(~copper & ~opened(outside, NARROW_GAP), 3),
        "mousebite": copper & (inside <= BORDER),
        "spur": ~copper & (outside <= BORDER),
    }


def opened(depth: np.ndarray, radius: int) -> np.ndarray:
    """What is left of a region, given the depth in it, where a disk of this radius fits."""
    return grown(depth > radius, radius + 1)


def grown(region: np.ndarray, radius: int) -> np.ndarray:
    return ndimage.distance_transform_edt(~region) <= radius


# ---------------------------------------------------------------------------------------------------------------------
# The command


def existing(file: Path) -> Path:
    """Raises InputError (DF160) if the dataset lacks this file."""
    if not file.is_file():
        raise InputError(Problem("DF160", file, "does not exist", "give the dataset as it was published"))
    return file


def save(out: Path, what: str, images: Iterable[tuple[str, Image.Image]], painted: Container[str]) -> None:
    """Saves the good images in a folder with the name of what they show, and those to paint into once more."""
    for folder in (good := out / "good" / what, paint := out / "paint"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, image in images:
        for folder in (good, paint) if name in painted else (good,):
            image.save(folder / name)


DATASETS: dict[str, Callable[[Path, Path], None]] = {"magnetic_tile": prepare_tiles, "deep_pcb": prepare_boards}


def main(input_args: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("dataset", choices=[*DATASETS])
    parser.add_argument("--data_dir", type=Path, required=True, metavar="DIR", help="The dataset.")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="A new or empty folder.")
    args = parser.parse_args(input_args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    refuse_foreign(args.output_dir, sorted(os.listdir(args.output_dir)))
    DATASETS[args.dataset](args.data_dir, args.output_dir)
    split = read_json(args.output_dir / "split.json", SplitFile)
    say(f"{args.output_dir}: {len(split['train'])} reference images, {len(split['test'])} test images")


def command() -> None:
    exit_on_input_error(main)


if __name__ == "__main__":
    command()
