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
    add("--defect", nargs="+", metavar="NAME", help="Defect types to generate, if a LoRA knows several. Default: all.")
    add(
        "--mask_source",
        choices=["given", "random", "references", "procedural", "held_out"],
        help="Where masks come from. given: --mask. references: masks of the training defects in --reference_data, "
        "transformed and placed on the object. procedural: drawn shapes, placed on the object. random: a blob "
        "anywhere. held_out: the held-out masks of --reference_data as they are, which leaks them (the paper's "
        "protocol). Default: given with --mask, references with --reference_data.",
    )
    add("--mask", type=Path, metavar="PATH", help="Mask, white where the defect goes, or a folder of masks.")
    add("--reference_data", metavar="DIR", help="Dataset whose masks are used: the one the LoRA was trained on.")
    add("--object", metavar="NAME", help="Object in --reference_data, if it holds several.")
    add("--split", default="auto", metavar="RULE|FILE", help="Split of --reference_data, as in training.")
    add_reading_flags(add, "--reference_data")
    rotation_help = "Reference masks are rotated by up to this angle, to either side."
    add("--max_rotation", type=float, default=180.0, metavar="DEG", help=rotation_help)
    shapes_help = "Shapes that procedural masks are drawn from. Default: all."
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help=shapes_help)
    add("--seed", type=int, default=0, metavar="N", help="Random seed of masks and candidates.")
    add = parser.add_argument_group("placement of reference and procedural masks").add_argument
    add(
        "--foreground",
        default="auto",
        metavar="auto|none|PATH",
        help="Where the object is. auto segments it from a plain background; a texture that fills the frame is all "
        "object. none places defects anywhere. PATH is a mask, or a folder of masks named like the images.",
    )
    add("--zone", type=Path, metavar="PATH", help="Mask of the region where defects may go, or a folder of them.")
    coverage_help = "Smallest share of a defect's pixels that must lie on the object and in the region."
    add("--coverage", type=float, default=0.99, metavar="X", help=coverage_help)
    add("--masks_per_image", type=int, default=1, metavar="N", help="Number of defects in an image.")


def add_reading_flags(add: Callable, data: str) -> None:
    """The flags that decide how a dataset's folder, given by the flag `data`, is read."""
    layouts = f"Folder layout of {data}, if it cannot be detected: {', '.join(LAYOUTS)}."
    add("--layout", choices=["auto", *LAYOUTS, *OLD_NAMES], default="auto", metavar="NAME", help=layouts)
    add(
        "--mask_classes",
        nargs="+",
        default=[],
        metavar="VALUE=NAME",
        help="What the values or colours of masks mean, if they hold several: a defect type's name, or ignore "
        "(85=scratch 255=ignore, 250,50,83=hole, #fa3253=hole).",
    )
    add("--skip_problems", action="store_true", help="Leave out images that cannot be used, and name each.")


def check_input_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a message where flags of images and masks contradict each other."""
    if args.image is None:
        parser.error("give --image: a good image, or a folder of them")
    if args.mask_source is None:
        if (args.mask is None) == (args.reference_data is None):
            parser.error("say which masks: --mask, or --reference_data, or --mask_source procedural or random")
        args.mask_source = "given" if args.mask is not None else "references"
    source = args.mask_source
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
