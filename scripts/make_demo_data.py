"""Render a small inspection dataset in MVTec AD's layout: four kinds of part, good and defective, with exact masks.

    python scripts/make_demo_data.py --output_dir demo/data

Every image is a lit height field: a part has a height and a colour at each pixel, a defect changes both inside its
mask, and one light shades the result. Nothing is downloaded or copied; the images are free of any licence.

    plate  brushed metal      scratch, dent, stain
    nut    on a dark ground   hole, crack
    cloth  woven              tear, stain
    board  printed circuit    open, short, mouse_bite, spur, pin_hole

Shapes: H x W pixels at twice the size asked for, halved at the end. Heights are in pixels, colours in [0, 1].
"""

import argparse
import os
from pathlib import Path

from defectfill.drawn.parts import PARTS, write_parts


DEFECTS = sorted({defect for _, defects in PARTS.values() for defect in defects})


def main(input_args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", type=int, default=256, metavar="PX", help="Side of an image. Default: %(default)s.")
    parser.add_argument(
        "--defects", type=int, default=12, metavar="N", help="Pairs of each type. Default: %(default)s."
    )
    parser.add_argument(
        "--good", type=int, default=24, metavar="N", help="Good images of each part. Default: %(default)s."
    )
    types_help = "Types of defect to draw. Default: all of each part."
    parser.add_argument("--types", nargs="+", choices=DEFECTS, default=[], metavar="TYPE", help=types_help)
    masks_help = "Types for which each good image gets a mask, where such a defect could be: good_masks/TYPE."
    parser.add_argument("--good_masks", nargs="+", choices=DEFECTS, default=[], metavar="TYPE", help=masks_help)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="Default: all.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Default: %(default)s.")
    args = parser.parse_args(input_args)
    offered = {defect for part in args.parts for defect in PARTS[part][1]}
    for flag, types in (("--types", args.types), ("--good_masks", args.good_masks)):
        for defect in sorted({*types} - offered):
            having = " or ".join(part for part, (_, defects) in PARTS.items() if defect in defects)
            parser.error(f"{flag} {defect}: no type of {', '.join(args.parts)}; add {having} to --parts")
    sizes = {"size": args.size, "defects": args.defects, "good": args.good, "seed": args.seed}
    kinds = {"types": args.types, "good_masks": args.good_masks}
    write_parts(args.output_dir, args.parts, **sizes, processes=os.cpu_count() or 1, **kinds)


if __name__ == "__main__":
    main()
