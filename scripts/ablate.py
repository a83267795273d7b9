"""Measure on synthetic parts what each loss term and each ambiguous detail of DefectFill does.

    python scripts/ablate.py --base scripts/tiny_base --segmenter segmenter --output_dir ablation

For every variant, seed and defect type: a LoRA on a third of twelve pairs; defects inpainted into good parts with
masks that no LoRA saw, one candidate each, with the defect prompt, feathered; and these metrics: the attention map's
IoU with the mask and the error of x_0 inside it at timestep 800, as a share of the variance of x_0, on the training
images; the IoU of the segmenter's prediction with the target mask, for some variants also with the object prompt; its
detection rate (share of images with an IoU above 0.3); and the feature distance of the generated defects to real ones,
in the segmenter's features. Each result is a line of results.jsonl and is not computed again. table.md and samples.png
are made from them.

Shapes: R is --resolution. Parts are drawn 2 R pixels a side, and halved for the segmenter.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import defectfill.quiet  # noqa: F401

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image

import train_defectfill
from defectfill.drawn.comparison import load_base
from defectfill.drawn.pairs import KINDS, drawn_pairs
from defectfill.drawn.parts import render, write_parts
from defectfill.drawn.scores import defect_features, figures_of, iou, segment
from defectfill.lora import LoraFile, read_lora
from defectfill.markdown import markdown_table
from defectfill.runs.checkpoint import as_json, keep_options
from defectfill.runs.files import exclusive_lock
from defectfill.runs.manifest import read_lines, write_lines
from defectfill.runs.signals import handlers_restored
from defectfill.sampling import composite, inpaint
from defectfill.seam import feather_alpha
from defectfill_dataset import derive_seed, image_tensor, pool_mask
from defectfill_dataset.commands import Parser, exit_on_input_error, say
from defectfill_dataset.crops import CropRule, crop_boxes, crop_mask
from defectfill_dataset.text import Schema, read_json


MAY_CHANGE = ("output_dir", "variants", "seeds", "cases")  # when an ablation goes on
# Of scripts/demo.sh, which also draws high timesteps more often.
RANK = "--zoom on --cache_latents 8 --rank 32 --lora_alpha 32 --lora_dropout 0".split()
RECIPE = [*RANK, "--lora_targets", "all"]
VARIANTS = {
    "recipe": RECIPE,
    "whole images": [*RECIPE, "--zoom", "off"],
    "the paper's LoRA": RANK[:4],  # rank 8 on attention
    "rank 32 on attention": RANK,
    "rank 32, feed-forward too": [*RANK, "--lora_targets", "attention+ff"],
    "rank 32, on convolutions 8": [*RECIPE, "--conv_rank", "8"],
    "no L_def": [*RECIPE, "--lambda_def", "0"],
    "no L_obj": [*RECIPE, "--lambda_obj", "0"],
    "no L_attn": [*RECIPE, "--lambda_attn", "0"],
    "attention of the defect pass": [*RECIPE, "--attention_pass", "defect"],
    "min-max maps": [*RECIPE, "--attention_map_scale", "minmax"],
    "reduction over the mask": [*RECIPE, "--loss_reduction", "mask"],
    "alpha 0": [*RECIPE, "--background_alpha", "0"],
    "alpha 1": [*RECIPE, "--background_alpha", "1"],
    "high-noise power 0.5": [*RECIPE, "--high_noise_power", "0.5"],
    "high timesteps 3 times as often": RECIPE + "--timestep_bias_strategy later --timestep_bias_multiplier 3".split(),
    "min-SNR 5": [*RECIPE, "--snr_gamma", "5"],
    "offset noise 0.1": [*RECIPE, "--noise_offset", "0.1"],
}
OBJECT_PROMPT_TOO = ("recipe", "whole images", "the paper's LoRA", "no L_def")
CASES = ["nut:hole", "plate:scratch", "cloth:stain"]
NO_LORA = "base without LoRA"
REAL = "real defects"
FIGURES = {
    "attention IoU": "attention_iou", "error of x_0": "x0_error", "segmenter IoU": "segmenter_iou",
    "object prompt": "object_prompt_iou", "detection rate": "found",
    "feature distance": "distance",
}  # fmt: skip
SHOWN = 6  # images of each run that are kept

Pictures = Sequence[Image.Image]


# ---------------------------------------------------------------------------------------------------------------------
# One run


def run_folder(args: argparse.Namespace, line: dict) -> Path:
    words = (str(line[k]) for k in ("variant", "part", "defect", "seed"))
    return args.output_dir / "runs" / "-".join(words).replace(" ", "-")


def train(args: argparse.Namespace, part: str, defect: str, options: list[str], seed: int, folder: Path) -> dict:
    """Trains a LoRA into `folder`; returns its measures on the references."""
    record = folder / "run_record.json"
    if not record.exists() or "after" not in read_json(record):
        words = f"""--defect {defect} --resolution {args.resolution} --max_train_steps {args.steps}
            --validation_steps 0 --train_batch_size {args.train_batch_size} --learning_rate {args.learning_rate}
            --text_encoder_lr {args.learning_rate} --lr_scheduler cosine --lr_warmup_steps {args.steps // 10}
            --seed {seed} --checkpointing_steps 1000000 --checkpoints_total_limit 1
            --resume_from_checkpoint latest --report_to none""".split()
        words += ["--pretrained_model_name_or_path", args.base, "--output_dir", str(folder)]
        words += ["--train_data_dir", str(args.output_dir / "data" / part)]
        with handlers_restored():
            train_defectfill.main(train_defectfill.parse_args([*words, *options]))
    after = read_json(record)["after"]
    x0_error = after["x0_error"]
    return {"attention_iou": after["attention_iou"], "x0_error": x0_error["defect"]["800"] / x0_error["variance"]}


def inpaint_parts(
    args: argparse.Namespace, lora: LoraFile | None, prompt: str, good: Pictures, masks: Pictures, seed: int
) -> list[Image.Image]:
    """The good parts with a defect inpainted inside each mask, one candidate for each crop; without LoRA on crops."""
    pipe = load_base(args.base, lora)
    zoom = CropRule() if lora is None else lora.record["zoom"] and CropRule(**lora.record["zoom"])
    found = []
    for i, (image, mask) in enumerate(zip(good, masks)):
        image, left = image.copy(), np.asarray(mask) > 0
        alpha = feather_alpha(left)
        for j, box in enumerate(crop_boxes(left, args.resolution, zoom)):
            inside = crop_mask(left, box)
            grid = pool_mask(inside, args.resolution // pipe.vae_scale_factor)
            before, seeds = image.crop(box), [[derive_seed(seed, "ablation", i, j)]]
            source = image_tensor(before, args.resolution)
            steps, guidance = args.num_inference_steps, args.guidance_scale
            candidate = inpaint(pipe, source[None], grid[None], prompt, seeds, steps, guidance)[0, 0]
            image.paste(composite(before, candidate, crop_mask(alpha, box) * inside), box[:2])
            inside[:] = False
        found.append(image)
    return found


def halved(pictures: Pictures, masks: Pictures, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the segmenter sees: (B, 3, size, size) in [-1, 1], (B, 1, size, size) masks."""
    small = [np.asarray(mask.resize((size, size), Image.Resampling.BOX)) >= 128 for mask in masks]
    images = torch.stack([image_tensor(picture, size) for picture in pictures])
    return images, torch.from_numpy(np.stack(small))[:, None].float()


class ResultLine(Schema):
    """What tells a result from the others."""

    variant: str
    seed: int
    part: str
    defect: str


def read_results(file: Path) -> list[dict]:
    """The whole lines of results.jsonl; raises InputError (DF310) for one that is something else."""
    return read_lines(file, ResultLine)


def run_all(args: argparse.Namespace, results_file: Path) -> None:
    """Runs what is not yet in the results, a seed after the other, so that a stop leaves whole rounds."""
    segmenter = UNet2DModel.from_pretrained(args.segmenter)
    lines = read_results(results_file)
    write_lines(results_file, lines)  # without half a line that a kill left
    done = {tuple(line[k] for k in ("variant", "seed", "part", "defect")) for line in lines}
    for seed in range(args.seeds):
        for part, defect in (case.split(":") for case in args.cases):
            todo = [v for v in (REAL, NO_LORA, *args.variants) if (v, seed, part, defect) not in done]
            if not todo:
                continue
            size, number = 2 * args.resolution, range(args.images)
            pairs = [render(part, defect, size, (derive_seed(seed, "unseen"), i)) for i in number]
            good = [render(part, None, size, (derive_seed(seed, "good"), i))[0] for i in number]
            unseen, masks = zip(*pairs)
            others = drawn_pairs([(part, defect)], 2 * args.images, args.resolution, derive_seed(seed, "real"))
            real = defect_features(segmenter, *others)
            for variant in todo:
                line: dict = {"variant": variant, "seed": seed, "part": part, "defect": defect}
                folder = run_folder(args, line)
                if variant == REAL:
                    pictures = unseen
                elif variant == NO_LORA:
                    pictures = inpaint_parts(args, None, f"A {part} with {defect}", good, masks, seed)
                else:
                    line |= train(args, part, defect, VARIANTS[variant], seed, folder)
                    lora = read_lora(folder)
                    pictures = inpaint_parts(args, lora, lora.record["defect_prompts"][defect], good, masks, seed)
                    if variant in OBJECT_PROMPT_TOO:
                        of_object = inpaint_parts(args, lora, lora.record["prompts"][defect], good, masks, seed)
                        images, targets = halved(of_object, masks, args.resolution)
                        line["object_prompt_iou"] = iou(segment(segmenter, images), targets).mean().item()
                line |= figures_of(segmenter, *halved(pictures, masks, args.resolution), real)
                folder.mkdir(parents=True, exist_ok=True)
                row = np.concatenate([np.asarray(picture) for picture in pictures[:SHOWN]], axis=1)
                Image.fromarray(row).save(folder / "pictures.png")
                with results_file.open("a") as results:
                    results.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def over_seeds(lines: list[dict], figure: str) -> str:
    """The mean over cases and seeds, and the standard deviation over seeds of the mean over cases."""
    seeds = sorted({line["seed"] for line in lines if figure in line})
    means = [np.mean([line[figure] for line in lines if line["seed"] == seed]) for seed in seeds]
    return f"{np.mean(means):.3f} ± {np.std(means):.3f}" if seeds else ""


def table(results: list[dict]) -> str:
    """Markdown: each variant's figures, and the segmenter's IoU for each case."""
    variants = list(dict.fromkeys(line["variant"] for line in results))
    cases = list(dict.fromkeys((line["part"], line["defect"]) for line in results))
    rows = [["", "seeds", *FIGURES]]
    by_case = [["segmenter IoU", *(" ".join(case) for case in cases)]]
    for variant in variants:
        mine = [line for line in results if line["variant"] == variant]
        cells = [over_seeds(mine, figure) for figure in FIGURES.values()]
        rows.append([variant, f"{len({line['seed'] for line in mine})}", *cells])
        cells = [over_seeds([r for r in mine if (r["part"], r["defect"]) == case], "segmenter_iou") for case in cases]
        by_case.append([variant, *cells])
    return f"{markdown_table(rows)}\n{markdown_table(by_case)}"


def samples(args: argparse.Namespace, results: list[dict]) -> Image.Image:
    """Images of the first seed: a row for each variant and case."""
    files = [run_folder(args, line) / "pictures.png" for line in results if line["seed"] == 0]
    return Image.fromarray(np.concatenate([np.asarray(Image.open(file, formats=("PNG",))) for file in files]))


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--base", required=True, metavar="DIR", help="Base made by make_tiny_base.py.")
    add("--segmenter", required=True, metavar="DIR", help="Segmenter made by train_segmenter.py.")
    add("--output_dir", type=Path, required=True, metavar="DIR")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="Default: all.")
    kinds = [":".join(kind) for kind in KINDS]
    cases_help = "Of make_demo_data.py. Default: %(default)s."
    add("--cases", nargs="+", choices=kinds, default=CASES, metavar="PART:DEFECT", help=cases_help)
    add("--seeds", type=int, default=3, metavar="N", help="Default: %(default)s.")
    add("--images", type=int, default=16, metavar="N", help="Good parts inpainted by each LoRA. Default: %(default)s.")
    add("--resolution", type=int, default=128, metavar="PX", help="Default: %(default)s.")
    add("--steps", type=int, default=150, metavar="N", help="Training steps of each LoRA. Default: %(default)s.")
    add("--train_batch_size", type=int, default=4, metavar="N", help="Default: %(default)s.")
    add(
        "--learning_rate",
        type=float,
        default=2e-3,
        metavar="X",
        help="Highest learning rate of UNet and text encoder. Default: %(default)s.",
    )
    add("--num_inference_steps", type=int, default=20, metavar="N", help="DDIM steps. Default: %(default)s.")
    add("--guidance_scale", type=float, default=4.0, metavar="X", help="Default: %(default)s.")
    args = parser.parse_args(input_args)
    for name in ("seeds", "images", "steps", "train_batch_size", "num_inference_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    return args


def main(args: argparse.Namespace) -> None:
    with exclusive_lock(args.output_dir):
        keep_options(args.output_dir / "options.json", as_json(vars(args)), MAY_CHANGE)
        data = args.output_dir / "data"
        for part in {case.partition(":")[0] for case in args.cases}:
            if not (data / part).exists():  # written whole, or not at all
                with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
                    write_parts(Path(folder), [part], size=2 * args.resolution, defects=12, good=4, seed=0)
                    data.mkdir(exist_ok=True)
                    os.replace(Path(folder) / part, data / part)
        results_file = args.output_dir / "results.jsonl"
        run_all(args, results_file)
        results = read_results(results_file)
        (args.output_dir / "table.md").write_text(table(results))
        samples(args, results).save(args.output_dir / "samples.png")
        say(*table(results).splitlines())


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
