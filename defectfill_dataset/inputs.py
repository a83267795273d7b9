"""The flags of good images and masks, and what they name."""

import argparse
from collections.abc import Callable
from pathlib import Path

from .cases import Case, check_cases, find_cases
from .foreground import find_foreground
from .placement import (
    MaskSource,
    PlacedShapes,
    held_out_source,
    load_masks,
    masks_digest,
    procedural_shapes,
    random_source,
    reference_shapes,
)
from .readers import LAYOUTS
from .readers.discovery import OLD_NAMES
from .shapes import SHAPES


# What decides a mask source.
MASK_FLAGS = (
    "mask_source", "reference_data", "object", "split", "layout", "mask_classes", "skip_problems", "max_rotation",
    "shapes", "foreground", "zone", "coverage", "masks_per_image",
)  # fmt: skip


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that decide which images are taken and which masks they get."""
    add = parser.add_argument_group("images and masks").add_argument
    add("--image", type=Path, metavar="PATH", help="Good image, or a folder of them.")
    add("--defect", nargs="+", metavar="NAME", help="Defect types to paint, where a LoRA knows several.")
    add(
        "--mask_source",
        choices=["given", "random", "references", "procedural", "held_out"],
        default="given",
        help="given: --mask. random: a seeded irregular blob for each image. references: masks of the dataset's "
        "reference images, transformed and placed on the part. procedural: drawn shapes placed on the part. held_out: "
        "the dataset's held-out masks as they are (the paper's protocol, which leaks them). Default: %(default)s.",
    )
    add("--mask", type=Path, metavar="PATH", help="Mask of given, white inside, or a folder of the same names.")
    add("--reference_data", metavar="DIR", help="Dataset folder of references and held_out.")
    add("--object", help="Object in it, where there are several.")
    add("--split", default="auto", metavar="RULE|FILE", help="As in training. Default: %(default)s.")
    add_reading_flags(add, "--reference_data")
    rotation_help = "Of references, to either side. Default: %(default)s."
    add("--max_rotation", type=float, default=180.0, metavar="DEG", help=rotation_help)
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="Of procedural. Default: all.")
    add("--seed", type=int, default=0, help="Of masks and candidates. Default: %(default)s.")
    add = parser.add_argument_group("places, of references and procedural").add_argument
    add(
        "--foreground",
        default="auto",
        metavar="auto|none|PATH",
        help="Where the part is. auto: what stands out from the rim's colour; a surface that fills the picture is all "
        "part. none: everywhere. PATH: a mask, or a folder of masks of the images' names. Default: %(default)s.",
    )
    add("--zone", type=Path, metavar="PATH", help="Mask of where defects may go, or a folder of them.")
    coverage_help = "Least share of a defect's pixels on the part and in the zone. Default: %(default)s."
    add("--coverage", type=float, default=0.99, metavar="X", help=coverage_help)
    add("--masks_per_image", type=int, default=1, metavar="N", help="Defects in an image. Default: %(default)s.")


def add_reading_flags(add: Callable, data: str) -> None:
    """The flags that decide how a dataset's folder, given by the flag `data`, is read."""
    add(
        "--layout",
        choices=["auto", *LAYOUTS, *OLD_NAMES],
        default="auto",
        help=f"Folder layout of {data}. Detected by default.",
    )
    add(
        "--mask_classes",
        nargs="+",
        default=[],
        metavar="VALUE=NAME",
        help="What each value or colour of class-coded masks means: a defect type's name, or ignore "
        "(85=scratch 255=ignore, 250,50,83=hole, #fa3253=hole).",
    )
    add("--skip_problems", action="store_true", help="Leave out images that cannot be used, and name each.")


def check_input_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a message where flags of images and masks contradict each other."""
    source = args.mask_source
    if args.image is None:
        parser.error("give --image: a good image, or a folder of them")
    if (source == "given") != (args.mask is not None):
        parser.error("give --mask, or another --mask_source without it")
    if (source in ("references", "held_out")) != (args.reference_data is not None):
        parser.error("give --reference_data with --mask_source references or held_out, and only there")
    users = {"max_rotation": ["references"], "shapes": ["procedural"]}
    of_data = ("object", "split", "layout", "mask_classes", "skip_problems")
    users |= dict.fromkeys(of_data, ["references", "held_out"])
    users |= dict.fromkeys(("foreground", "zone", "coverage", "masks_per_image"), ["references", "procedural"])
    for flag, sources in users.items():
        if source not in sources and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag}: only with --mask_source {' or '.join(sources)}")
    if not 0 < args.coverage <= 1:
        parser.error(f"--coverage {args.coverage}: must be above 0 and at most 1")
    if not 0 <= args.max_rotation <= 180:
        parser.error(f"--max_rotation {args.max_rotation}: must be from 0 to 180")
    if args.masks_per_image < 1:
        parser.error(f"--masks_per_image {args.masks_per_image}: must be at least 1")


def read_cases(args: argparse.Namespace) -> list[Case]:
    """The cases of the flags, every file opened and checked."""
    foreground = Path(args.foreground) if args.foreground not in ("auto", "none") else None
    cases = find_cases(args.image, args.mask, foreground, args.zone)
    check_cases(cases)
    return cases


def read_source(
    args: argparse.Namespace, defect: str | None, cache_dir: str | None = None
) -> tuple[MaskSource | None, dict]:
    """The mask source of the flags, None for given masks, and the settings that decide its masks."""
    if args.mask_source in ("given", "random"):
        return (random_source if args.mask_source == "random" else None), {}
    if args.mask_source == "procedural":
        shapes, settings = procedural_shapes(args.shapes), {"shapes": args.shapes}
    else:
        held_out = args.mask_source == "held_out"
        masks = load_masks(
            args.reference_data, args.object, args.split, defect, held_out, cache_dir, args.layout, args.mask_classes,
            args.skip_problems,
        )  # fmt: skip
        settings = {"reference_masks_sha256": masks_digest(masks)}
        if held_out:
            return held_out_source(masks), settings
        shapes, settings["max_rotation"] = reference_shapes(masks, args.max_rotation), args.max_rotation
    foreground = args.foreground if args.foreground in ("auto", "none") else "given"
    settings |= {
        "foreground": foreground,
        "zone": args.zone is not None,
        "coverage": args.coverage,
        "masks_per_image": args.masks_per_image,
    }
    finder = find_foreground if foreground == "auto" else None
    return PlacedShapes(shapes, finder, args.coverage, args.masks_per_image), settings
