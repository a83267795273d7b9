"""Measure on synthetic parts which candidate each `--selection` keeps, against labels given by eye.

    python scripts/compare_selection.py --base scripts/tiny_base --segmenter segmenter --output_dir selection \\
        --lora ablation/runs/whole-images-nut-hole-0 ablation/runs/whole-images-cloth-stain-0

The first run generates candidates with LoRAs of ablate.py and writes sheets of them in random order, without a word on
which candidates belong together. Write the label of each number into labels.txt, a line for each: 2 for a defect that
could be real, 1 for a flawed one, 0 for a smear or nothing. The next run makes table.md.
"""

import argparse
import random
from pathlib import Path

import defectfill.quiet  # noqa: F401

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from defectfill.drawn.comparison import add_comparison_flags, feather, load_base, read_whole_image_lora
from defectfill.drawn.pairs import drawn_pairs, latent_masks
from defectfill.drawn.scores import iou, segment
from defectfill.likeness import Likeness, read_squeezenet, squeezenet_features, vae_features
from defectfill.markdown import markdown_table
from defectfill.runs.files import atomic_write, write_json
from defectfill.sampling import inpaint, reconstruct
from defectfill.selection import choose_candidate, measure, ssim_score
from defectfill_dataset import derive_seed, load_defect_pairs, tensor_image
from defectfill_dataset.commands import Parser, say
from defectfill_dataset.samples import make_crops
from defectfill_dataset.text import read_json, read_text


CANDIDATES = 4  # of each image
CANDIDATES_FILE = "candidates.safetensors"  # written last
SHEET = (8, 5)  # columns and rows
CELL = 192  # px


# ---------------------------------------------------------------------------------------------------------------------
# Candidates


def generate(args: argparse.Namespace, path: Path, seed: int, squeezenet: torch.nn.Sequential | None) -> list[dict]:
    """`args.images` good parts, each with its candidates and their measures; `seed` sets parts, masks and noise."""
    lora = read_whole_image_lora(path)
    part, [(defect, prompt)] = lora.record["object"], lora.prompts().items()
    good, _ = drawn_pairs([(part, None)], args.images, args.resolution, derive_seed(seed, "good"))
    _, masks = drawn_pairs([(part, defect)], args.images, args.resolution, derive_seed(seed, "unseen"))
    pipe = load_base(args.base, lora)
    grids = latent_masks(masks, args.resolution // pipe.vae_scale_factor)
    references = load_defect_pairs(path.parents[1] / "data" / part)["train"].filter(
        lambda row: row["defect"] == defect
    )
    crops = make_crops(references, args.resolution, None)
    nets = {"VAE encoder": vae_features(pipe.vae)}
    if squeezenet:
        nets["SqueezeNet"] = squeezenet_features(squeezenet, pipe.device)
    likenesses = {name: Likeness(net, crops, args.resolution, pipe.device) for name, net in nets.items()}
    found = []
    for i, (image, mask) in enumerate(zip(good, masks)):
        seeds = [derive_seed(seed, "candidate", i, j) for j in range(CANDIDATES)]
        candidates = inpaint(pipe, image[None], grids[i][None], prompt, [seeds], args.num_inference_steps)[0]
        source, rebuilt = image / 2 + 0.5, reconstruct(pipe, image[None])[0]
        kept = {}
        for name, likeness in likenesses.items():
            measures = measure(candidates, source, rebuilt, mask, ssim_score, None, likeness)
            ways = {
                f"ssim+likeness, {name}": measures,
                "ssim": measures._replace(reference_distances=None),
                f"likeness, {name}": measures._replace(scored=False),
            }
            kept |= {way: choose_candidate(of_way, [None] * CANDIDATES) for way, of_way in ways.items()}
        found.append(
            {
                "line": {"part": part, "defect": defect, "image": i, "seeds": seeds, "kept": kept},
                "pictures": feather(source, candidates, mask) * 2 - 1,
                "mask": mask,
            }
        )
    return found


def generate_all(args: argparse.Namespace) -> None:
    """Writes candidates.safetensors, candidates.json and the sheets."""
    squeezenet = read_squeezenet(args.likeness_net) if args.likeness_net else None
    found = [
        image
        for i, path in enumerate(args.lora)
        for image in generate(args, path, derive_seed(args.seed, "selection", i), squeezenet)
    ]
    pictures = torch.stack([image["pictures"] for image in found])
    masks = torch.stack([image["mask"] for image in found])
    order = list(range(len(found) * CANDIDATES))  # the n-th cell of the sheets shows candidate order[n]
    random.Random(args.seed).shuffle(order)
    cells = [cell(pictures.flatten(0, 1)[place], masks[place // CANDIDATES]) for place in order]
    at_once = SHEET[0] * SHEET[1]
    for number, start in enumerate(range(0, len(cells), at_once)):
        sheet(cells[start : start + at_once], start).save(args.output_dir / f"sheet-{number}.png")
    write_json(args.output_dir / "candidates.json", {"images": [image["line"] for image in found], "order": order})
    with atomic_write(args.output_dir / CANDIDATES_FILE) as temporary:
        save_file({"pictures": pictures, "masks": masks}, temporary)


def cell(picture: torch.Tensor, mask: torch.Tensor) -> Image.Image:
    """A candidate, enlarged, with the corners of its mask's box."""
    image = tensor_image(picture).resize((CELL, CELL), Image.Resampling.LANCZOS)
    rows, columns = np.nonzero(np.asarray(Image.fromarray(mask[0].numpy() > 0.5).resize(image.size)))
    draw, arm, gap = ImageDraw.Draw(image), 7, 4
    for x, inwards in ((columns.min() - gap, 1), (columns.max() + gap, -1)):
        for y, down in ((rows.min() - gap, 1), (rows.max() + gap, -1)):
            draw.line([(x + arm * inwards, y), (x, y), (x, y + arm * down)], fill="red")
    return image


def sheet(cells: list[Image.Image], first: int) -> Image.Image:
    """The cells with their numbers, from `first` on."""
    columns, rows = SHEET
    canvas = Image.new("RGB", (columns * CELL, rows * (CELL + 14)), "white")
    for i, image in enumerate(cells):
        x, y = i % columns * CELL, i // columns * (CELL + 14)
        canvas.paste(image, (x, y))
        ImageDraw.Draw(canvas).text((x + 2, y + CELL + 1), str(first + i), fill="black")
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(images: list[dict], labels: torch.Tensor, ious: torch.Tensor) -> str:
    """Markdown: what each selection keeps.

    Precision is the share of what it keeps that could be real; recall the share of the images with such a candidate
    for which it keeps one.

    Args:
        labels: (P, N) of 0 (nothing), 1 (flawed), 2 (could be real).
        ious: (P, N), of the segmenter's prediction with the mask.
    """
    could = (labels == 2).any(dim=1).sum().item()
    rows = [["kept by", "could be real", "flawed", "nothing", "precision", "recall", "segmenter IoU"]]
    every = torch.arange(len(images))
    ways = {way: torch.tensor([line["kept"][way] for line in images]) for way in images[0]["kept"]}
    ways = {
        "the first candidate": torch.zeros(len(images), dtype=torch.long),
        **ways,
        "the best label": labels.argmax(1),
    }
    for way, kept in ways.items():
        found = labels[every, kept]
        counts = [(found == label).sum().item() for label in (2, 1, 0)]
        shares = (counts[0] / len(images), counts[0] / max(could, 1))
        cells = [*map(str, counts), *(f"{share:.2f}" for share in shares), f"{ious[every, kept].mean():.3f}"]
        rows.append([way, *cells])
    last = f"{len(images)} images with {labels.shape[1]} candidates each; {could} have one that could be real."
    return f"{markdown_table(rows)}\n{last}\n"


def read_labels(file: Path, order: list[int]) -> torch.Tensor:
    """(P, N) labels from a file with a line for each cell of the sheets."""
    words = read_text(file).split()
    if len(words) != len(order) or set(words) - {"0", "1", "2"}:
        raise SystemExit(f"{file}: write {len(order)} lines of 0, 1 or 2; found {len(words)} words")
    labels = torch.empty(len(order), dtype=torch.long)
    labels[torch.tensor(order)] = torch.tensor([int(word) for word in words])
    return labels.unflatten(0, (-1, CANDIDATES))


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_comparison_flags(add, images=13)
    add("--output_dir", type=Path, required=True, metavar="DIR")
    add("--likeness_net", type=Path, metavar="FILE", help="SqueezeNet 1.0 as safetensors, compared too.")
    add("--num_inference_steps", type=int, default=20, metavar="N", help="DDIM steps. Default: %(default)s.")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if not (args.output_dir / CANDIDATES_FILE).exists():
        generate_all(args)
    labels_file = args.output_dir / "labels.txt"
    if not labels_file.exists():
        say(f"Label the sheets of {args.output_dir} in {labels_file}, then run this again.")
        return
    tensors = load_file(args.output_dir / CANDIDATES_FILE)
    record = read_json(args.output_dir / "candidates.json")
    labels = read_labels(labels_file, record["order"])
    segmenter = UNet2DModel.from_pretrained(args.segmenter)
    masks = tensors["masks"].repeat_interleave(CANDIDATES, dim=0)
    ious = iou(segment(segmenter, tensors["pictures"].flatten(0, 1)), masks).unflatten(0, (-1, CANDIDATES))
    text = table(record["images"], labels, ious)
    (args.output_dir / "table.md").write_text(text)
    say(*text.splitlines())


def command() -> None:
    main(parse_args())


if __name__ == "__main__":
    command()
