"""Train a small segmenter on drawn defects: an independent eye for what a LoRA paints on drawn parts.

    python scripts/train_segmenter.py --output_dir segmenter

It sees pairs that make_demo_data.py never writes, of every part and defect type, and good parts. Saved as a diffusers
UNet2DModel; its timestep is always 0. A killed run goes on where it was.

Shapes: B images, R side. Images are in [-1, 1], masks 1 inside the defect.
"""

import json
from pathlib import Path

import defectfill.quiet  # noqa: F401

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from defectfill.drawn.fitting import fit
from defectfill.drawn.pairs import KINDS, drawn_pairs
from defectfill.drawn.parts import PARTS
from defectfill.drawn.scores import iou, segment
from defectfill.runs.files import exclusive_lock, write_json
from defectfill_dataset import derive_seed
from defectfill_dataset.commands import Parser


def build_segmenter(resolution: int) -> UNet2DModel:
    """(B, 3, R, R) -> (B, 1, R, R) logits."""
    return UNet2DModel(
        sample_size=resolution,
        in_channels=3,
        out_channels=1,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        norm_num_groups=8,
    )


class Segmentation(torch.nn.Module):
    """Loss of a segmenter: cross-entropy and Dice."""

    def __init__(self, unet: UNet2DModel):
        super().__init__()
        self.unet = unet

    def forward(self, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        logits = self.unet(images, 0).sample
        p = logits.sigmoid()
        dice = 1 - (2 * (p * masks).sum() + 1) / (p.sum() + masks.sum() + 1)
        return F.binary_cross_entropy_with_logits(logits, masks) + dice


def main(input_args: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--resolution", type=int, default=128, metavar="PX", help="Default: %(default)s.")
    parser.add_argument("--pairs", type=int, default=80, metavar="N", help="Pairs of each type. Default: %(default)s.")
    parser.add_argument("--steps", type=int, default=800, metavar="N", help="Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Default: %(default)s.")
    args = parser.parse_args(input_args)
    with exclusive_lock(args.output_dir / "work"):
        torch.manual_seed(args.seed)
        unet = build_segmenter(args.resolution)
        good = [(part, None) for part in PARTS]
        images, masks = drawn_pairs([*KINDS, *good], args.pairs, args.resolution, derive_seed(args.seed, "train"))

        def batch_of() -> tuple:
            rows = torch.randint(len(images), (8,))
            flips = [axis for axis in (-1, -2) if torch.rand(()) < 0.5]
            return images[rows].flip(flips), masks[rows].flip(flips)

        fit("segmenter", Segmentation(unet), batch_of, args.steps, 2e-3, args.output_dir / "work", args.seed)
        unet.eval().save_pretrained(args.output_dir)
        figures = {}
        for kind in [*KINDS, *good]:
            images, masks = drawn_pairs(
                [kind], max(4, args.pairs // 4), args.resolution, derive_seed(args.seed, "test")
            )
            figures[" ".join(filter(None, kind))] = round(iou(segment(unet, images), masks).mean().item(), 3)
        write_json(args.output_dir / "figures.json", {"iou": figures})
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
