"""Look a dataset over before training: every problem at once, figures, and a picture with the masks outlined.

    python scripts/check_data.py mvtec/hazelnut
    python scripts/check_data.py mvtec --output_dir report

Prints, for every object, its problems and what is suspicious, then a table of its defect types. The exit status is 0
if everything can be used, 2 if not. In the output folder: report.json and a contact sheet of each object.
"""

import argparse
import concurrent.futures
import functools
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from tqdm.auto import tqdm

from defectfill.files import write_json
from defectfill_dataset import LAYOUTS, InputError, exit_on_input_error, load_image
from defectfill_dataset.checks import Look, look, passed_over, suspicions
from defectfill_dataset.discovery import find_objects, read_object
from defectfill_dataset.errors import did_you_mean, one_line
from defectfill_dataset.layouts import Row, RowsError
from defectfill_dataset.splits import split_rows


CELL, COLUMNS, MOST = 192, 8, 48  # of a contact sheet: pixels a picture, pictures a row, pictures


def check_object(root: Path, name: str, args: argparse.Namespace) -> tuple[dict, list[Row], dict[str, Look]]:
    """The report of one object, its rows, and what each image is like by its name."""
    try:
        rows, problems = read_object(root, name, args.layout), []
    except RowsError as error:
        rows, problems = error.rows, list(error.problems)
    grid = args.resolution // args.vae_scale_factor
    one = functools.partial(look, root=root, resolution=args.resolution, grid=grid, with_zoom=True)
    reuse = Image.core.set_blocks_max  # of Pillow's memory, which to get anew for each image costs a sixth of the time
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), initializer=reuse, initargs=(16,)) as pool:
        looks = list(tqdm(pool.map(one, rows, chunksize=8), desc=name, total=len(rows)))
    problems += [problem for x in looks for problem in x.problems]
    if not any(row.mask for row in rows):
        problems.append(f"DF163 {root}: no defect images; add at least one with its mask")
    splits = split_rows(rows, root, args.split)
    references = {row.image.relative_to(root).as_posix() for row in splits["train"]}
    report = {
        "object": name,
        "problems": [one_line(problem) for problem in problems],
        "suspicious": suspicions(looks, references, args.resolution) + passed_over(rows, root),
        "references": len(references),
        "held_out": len(splits["test"]),
        "defects": {defect: figures([x for x in looks if x.defect == defect]) for defect in
                    sorted({row.defect for row in rows})},
    }  # fmt: skip
    return report, rows, {x.name: x for x in looks}


def figures(looks: list[Look]) -> dict:
    """Number, and least, median and greatest of their sizes, their masks' share of the image and its latent cells."""

    def spread(values: list, digits: int | None = None) -> list:
        return [round(float(q), digits) for q in np.quantile(values, (0, 0.5, 1))]

    opened, marked = [x for x in looks if x.size[0]], [x for x in looks if x.area]
    found: dict = {"images": len(looks)}
    if opened:
        found |= {name: spread([x.size[i] for x in opened]) for i, name in enumerate(("width", "height"))}
    if marked:
        found["area_percent"] = spread([100 * x.area for x in marked], 3)
        found["latent_cells"] = spread([x.cells for x in marked])
        found["latent_cells_with_zoom"] = spread([x.zoomed for x in marked])
        found["lost_by_nearest"] = sum(x.nearest == 0 for x in marked)
    return found


def shortened(lines: list[str], most: int = 20) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more like these"]


def contact_sheet(rows: list[Row], looks: dict[str, Look], root: Path) -> Image.Image:
    """Up to `MOST` defective pictures with the outline of their masks, spread over the dataset."""
    usable = [r for r in rows if r.mask and not looks[r.image.relative_to(root).as_posix()].problems]
    chosen = [usable[i] for i in np.linspace(0, len(usable) - 1, min(MOST, len(usable))).astype(int)]
    lines = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (CELL + 4) + 4, max(1, lines) * (CELL + 20) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(chosen):
        left, top = 4 + i % COLUMNS * (CELL + 4), 4 + i // COLUMNS * (CELL + 20)
        sheet.paste(outlined(load_image(Image.open(row.image)), row.mask.render()), (left, top))
        area = looks[row.image.relative_to(root).as_posix()].area
        draw.text((left, top + CELL + 3), f"{row.defect} {row.image.stem}  {100 * area:.2f} %"[:32], fill="black",
                  font=ImageFont.load_default(11))  # fmt: skip
    return sheet


def outlined(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture, `CELL` pixels a side, with a red line around the (H, W) mask."""
    small = np.array(image.resize((CELL, CELL), Image.Resampling.BOX))
    cells = Image.fromarray(mask).convert("L").resize((CELL, CELL), Image.Resampling.BOX)
    inside = np.asarray(cells) > 0
    small[ndimage.binary_dilation(inside, iterations=2) & ~inside] = (255, 0, 0)
    return Image.fromarray(small)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data_dir", metavar="DIR", help="An object's folder, or one above several.")
    add("--layout", choices=["auto", *LAYOUTS], default="auto", help="Default: %(default)s.")
    add("--object", metavar="NAME", help="Only this object.")
    add("--split", default="auto", metavar="RULE|FILE", help="As in training. Default: %(default)s.")
    add("--resolution", type=int, default=512, metavar="PX", help="Of the training to come. Default: %(default)s.")
    add("--vae_scale_factor", type=int, default=8, metavar="N", help="Pixels a latent cell. Default: %(default)s.")
    add("--output_dir", type=Path, metavar="DIR", help="Where report.json and the contact sheets go.")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    objects = find_objects(args.data_dir, args.layout)
    if args.object and args.object not in objects:
        raise InputError(f"DF162 --object {args.object}: not in {args.data_dir}.{did_you_mean(args.object, objects)}")
    reports = []
    for name, root in objects.items():
        if args.object not in (None, name):
            continue
        report, rows, looks = check_object(root, name, args)
        reports.append(report)
        if args.output_dir:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            contact_sheet(rows, looks, root).save(args.output_dir / f"{name}.png")
        print(f"\n{name}: {report['references']} references, {report['held_out']} held out")
        print("\n".join([*report["problems"], *shortened(report["suspicious"])]) or "nothing wrong found")
        for defect, found in report["defects"].items():
            print(f"  {defect}: " + ", ".join(f"{k} {v}" for k, v in found.items()))
    if args.output_dir:
        write_json(args.output_dir / "report.json", {"resolution": args.resolution, "objects": reports})
    if any(report["problems"] for report in reports):
        sys.exit(2)


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
