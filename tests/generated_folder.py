"""What generate_defectfill.py leaves, without a model; its exports, and what the project reads from them."""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from defectfill_dataset import binarise, find_objects
from defectfill_dataset.readers import read_object
from defectfill_scripts import export_generated


SIZE = (64, 48)  # W, H


def drawn(kind: str) -> np.ndarray:
    """(H, W) bool masks that are hard to say with polygons."""
    canvas = Image.new("1", SIZE)
    draw = ImageDraw.Draw(canvas)
    if kind == "ring":
        draw.ellipse((10, 8, 40, 40), fill=1), draw.ellipse((18, 16, 30, 30), fill=0)
    elif kind == "two":
        draw.ellipse((4, 4, 20, 18), fill=1), draw.rectangle((40, 30, 63, 47), fill=1)  # up to the border
    elif kind == "crack":
        draw.line([(2, 40), (30, 10), (60, 12)], fill=1)
    else:
        draw.polygon([(8, 8), (50, 12), (30, 40)], fill=1)
    return np.asarray(canvas)


KINDS = ("ring", "two", "crack", "triangle")


def make_generated(root: Path, photographs: int = 6, defects=("hole", None), digest: bool = True) -> Path:
    """What generate_defectfill.py leaves: on each photograph one image of each defect, with masks of all `KINDS`."""
    lines, names = [], [(i, d) for i in range(photographs) for d in range(len(defects))]
    for number, (photograph, defect) in enumerate(names):
        name, mask = f"{photograph:03d}_{defect}", drawn(KINDS[number % len(KINDS)])
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"images/{name}.png")
        Image.fromarray(mask).convert("L").save(root / f"masks/{name}.png")
        line = {"name": name, "image": f"images/{name}.png", "mask": f"masks/{name}.png", "object": "metal nut"}
        line |= {"defect": defects[defect], "good_image": f"{photograph:03d}.png", "prompt": "A metal nut with sks"}
        if digest:
            content = (root.parent / f"photos/{photograph:03d}.png").read_bytes()
            line["good_image_sha256"] = hashlib.sha256(content).hexdigest()
        lines.append(line)
    (root / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def export(out: Path, file_format: str, *more) -> Path:
    argv = ["--output_dir", out, "--format", file_format, *more]
    export_generated.main(export_generated.parse_args([str(a) for a in argv]))
    return out


def marks(generated: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Image name -> defect type and mask, as generated."""
    lines = [json.loads(line) for line in (generated / "manifest.jsonl").read_text().splitlines()]
    return {
        line["name"]: (line["defect"] or "defect", binarise(Image.open(generated / line["mask"]))) for line in lines
    }


def read_back(root: Path) -> tuple[dict[str, tuple[str, np.ndarray]], dict[str, str | None]]:
    """Image name -> defect type and mask; image name -> split, of all with a mask, as the project's readers see it."""
    rows = [row for name, folder in find_objects(root).items() for row in read_object(folder, name).rows if row.mask]
    return {r.image.stem: (r.defect, r.mask.render()) for r in rows}, {r.image.stem: r.split for r in rows}
