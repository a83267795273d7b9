"""Measure on synthetic parts how the scheduler, the number of steps and partial guidance change a LoRA's images.

    python scripts/compare_samplers.py --base scripts/tiny_base --segmenter segmenter \\
        --lora ablation/runs/whole-images-nut-hole-0 ablation/runs/whole-images-cloth-stain-0 --output comparison.md

Each variant inpaints the same good parts with the same masks and noise, one candidate each. The metrics are those of
ablate.py, whose LoRAs it takes; the IoU difference to the first variant is paired, image by image.
"""

import argparse
from pathlib import Path

import defectfill.quiet  # noqa: F401

import numpy as np
import torch
from diffusers import UNet2DModel

from defectfill.drawn.comparison import add_comparison_flags, load_base, read_whole_image_lora
from defectfill.drawn.pairs import drawn_pairs, latent_masks
from defectfill.drawn.scores import defect_features, figures_of
from defectfill.markdown import markdown_table
from defectfill.runs.files import atomic_write
from defectfill.sampling import SCHEDULERS, inpaint
from defectfill_dataset import derive_seed
from defectfill_dataset.commands import Parser, say


# Scheduler, steps, whether guided, and where; the first is what the others are compared with.
VARIANTS = {
    "DDIM, 50 steps": ("ddim", 50, True, (0, 1)),
    "DDIM, 20": ("ddim", 20, True, (0, 1)),
    "DPM-Solver++, 20": ("dpmsolver++", 20, True, (0, 1)),
    "UniPC, 20": ("unipc", 20, True, (0, 1)),
    "UniPC, 10": ("unipc", 10, True, (0, 1)),
    "DDIM, 20, guided in the first half": ("ddim", 20, True, (0, 0.5)),
    "DDIM, 20, guided in the second half": ("ddim", 20, True, (0.5, 1)),
    "DDIM, 20, unguided": ("ddim", 20, False, (0, 1)),
}


def measure(args: argparse.Namespace, path: Path, seed: int) -> list[dict]:
    """Metrics of each image that each variant generates with the LoRA at `path`; `seed` sets parts, masks, noise."""
    lora = read_whole_image_lora(path)
    part, [(defect, prompt)] = lora.record["object"], lora.prompts().items()
    good, _ = drawn_pairs([(part, None)], args.images, args.resolution, derive_seed(seed, "good"))
    _, masks = drawn_pairs([(part, defect)], args.images, args.resolution, derive_seed(seed, "unseen"))
    segmenter = UNet2DModel.from_pretrained(args.segmenter)
    others = drawn_pairs([(part, defect)], 2 * args.images, args.resolution, derive_seed(seed, "real"))
    real = defect_features(segmenter, *others)
    pipe = load_base(args.base, lora)
    grids = latent_masks(masks, args.resolution // pipe.vae_scale_factor)
    seeds = [[derive_seed(seed, "noise", i)] for i in range(args.images)]
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    lines, first, given = [], None, pipe.scheduler
    for variant, (scheduler, steps, guided, interval) in VARIANTS.items():
        pipe.scheduler = SCHEDULERS[scheduler](given)
        rows.clear()
        scale = args.guidance_scale if guided else 1.0
        inpainted = inpaint(pipe, good, grids, prompt, seeds, steps, scale, guidance_interval=interval)[:, 0] * 2 - 1
        pictures = torch.where(masks > 0.5, inpainted, good)
        first = pictures if first is None else first
        for i in range(args.images):
            one = slice(i, i + 1)
            change = (pictures - first)[i][:, masks[i, 0] > 0.5].abs().mean().item() / 2
            figures = figures_of(segmenter, pictures[one], masks[one], real) | {"change": change}
            lines.append({"variant": variant, "part": part, "rows": sum(rows) / args.images} | figures)
    return lines


def table(lines: list[dict]) -> str:
    """Markdown: means over the images of each variant; the paired IoU difference with its standard error."""
    parts = list(dict.fromkeys(line["part"] for line in lines))
    ious = {
        variant: np.array([line["segmenter_iou"] for line in lines if line["variant"] == variant])
        for variant in VARIANTS
    }
    heads = [
        "",
        "UNet evaluations",
        "segmenter IoU",
        *parts,
        "IoU difference",
        "detection rate",
        "feature distance",
        "change",
    ]
    rows = [heads]
    for variant in VARIANTS:
        mine = [line for line in lines if line["variant"] == variant]
        mean = {k: np.mean([line[k] for line in mine]) for k in ("found", "distance", "change")}
        by_part = [np.mean([line["segmenter_iou"] for line in mine if line["part"] == part]) for part in parts]
        paired = ious[variant] - ious[next(iter(VARIANTS))]
        error = paired.std(ddof=1) / np.sqrt(len(paired))
        cells = [variant, f"{mine[0]['rows']:.0f}", f"{ious[variant].mean():.3f}", *(f"{x:.3f}" for x in by_part)]
        cells += [f"{paired.mean():+.3f} ± {error:.3f}" if paired.any() else ""]
        cells += [f"{mean['found']:.3f}", f"{mean['distance']:.3f}", f"{mean['change']:.3f}"]
        rows.append(cells)
    return markdown_table(rows) + f"\n{len(mine)} images per variant.\n"


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_comparison_flags(add, images=8)
    add("--output", type=Path, required=True, metavar="FILE.md")
    add("--guidance_scale", type=float, default=2.0, metavar="X", help="Default: %(default)s.")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    lines = [line for i, path in enumerate(args.lora) for line in measure(args, path, derive_seed(args.seed, i))]
    with atomic_write(args.output) as temporary:
        temporary.write_text(table(lines))
    say(*table(lines).splitlines())


def command() -> None:
    main(parse_args())


if __name__ == "__main__":
    command()
