"""Merge a LoRA into its base: a whole inpainting pipeline for programs that load no LoRA.

    python scripts/merge_lora.py lora-nut --output_dir merged --single_file merged.safetensors

An image inpainted with the merged pipeline is compared with one that base and LoRA inpaint, and what was written is
read again and compared, before the command ends. The exit status is 2 if the LoRA or its base cannot be used.
"""

import argparse
import math
import tempfile
from pathlib import Path

import defectfill.quiet  # noqa: F401

import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline

from defectfill.base_model import check_resolution, read_base
from defectfill.lora import LoraFile, check_content, check_fits, fuse_lora, load_lora, read_lora
from defectfill.runs.disks import NOTHING_WRITTEN, told_if_unwritable
from defectfill.runs.files import TEMPORARY, atomic_write, usual_mode, visible_files
from defectfill.runs.flags import MOST_OF_TRAINING, add_base_flags
from defectfill.sampling import inpaint, load_pipeline
from defectfill.single_file import save_single_file
from defectfill_dataset import InputError, Problem
from defectfill_dataset.commands import Parser, exit_on_input_error, say


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LARGEST = MOST_OF_TRAINING["resolution"]
TOLERANCE = 0.01  # of pixels in [0, 1]: a merged weight rounds differently


def inpaint_noise(pipe: StableDiffusionInpaintPipeline, lora: LoraFile, resolution: int) -> torch.Tensor:
    """(3, S, S) in [0, 1]: an image of noise with its upper half inpainted, the same at every call."""
    image = torch.rand(1, 3, resolution, resolution, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cells = resolution // pipe.vae_scale_factor
    mask = torch.zeros(1, 1, cells, cells)
    mask[..., : cells // 2, :] = 1
    prompt = next(iter(lora.prompts().values()), "A photo")
    return inpaint(pipe, image, mask, prompt, [[0]], num_inference_steps=4)[0, 0]


def compare_weights(written: StableDiffusionInpaintPipeline, pipe: StableDiffusionInpaintPipeline, path: Path) -> None:
    """Raises RuntimeError unless both pipelines hold the same weights."""
    for part in ("unet", "vae", "text_encoder"):
        theirs, ours = getattr(written, part).state_dict(), getattr(pipe, part).state_dict()
        if theirs.keys() != ours.keys() or not all(torch.equal(theirs[name], ours[name]) for name in ours):
            raise RuntimeError(f"{path}: the {part} was not read as it was written")


def check_outputs(output_dir: Path, single_file: Path | None) -> None:
    """Raises InputError (DF192) if an output exists, or (DF188) if the single file has another extension."""
    for flag, path in {"--output_dir": output_dir, "--single_file": single_file}.items():
        if path and path.exists():
            raise InputError(Problem("DF192", f"{flag} {path}", "exists", "choose another"))
    if single_file and single_file.suffix != ".safetensors":
        raise InputError(Problem("DF188", f"--single_file {single_file}", "must end in .safetensors"))


def merged_pipeline(args: argparse.Namespace, lora: LoraFile) -> tuple[StableDiffusionInpaintPipeline, float]:
    """(the base with the LoRA merged, the largest difference of a pixel in [0, 1] from base and LoRA), in fp32.

    Raises:
        InputError: there is no base (DF412), or it cannot be used or does not fit.
        RuntimeError: the pipelines do not inpaint the same image.
    """
    record = lora.record
    name = args.pretrained_model_name_or_path or record.get("base")
    resolution = args.resolution or record.get("resolution")
    if not name or not resolution:
        fix = "give --pretrained_model_name_or_path and --resolution"
        raise InputError(Problem("DF412", lora.path, "has no record of its base", fix))
    revision = args.revision or (record.get("revision") if name == record.get("base") else None)
    base = read_base(name, revision, args.cache_dir, args.variant)
    check_resolution(base, resolution)
    check_fits(lora, base)
    check_content(lora, base, args.pretrained_model_name_or_path is not None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(base, args.cache_dir, "no", device)
    load_lora(pipe, lora)
    expected = inpaint_noise(pipe, lora, resolution)
    fuse_lora(pipe)
    difference = (inpaint_noise(pipe, lora, resolution) - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"The merged pipeline inpaints another image: pixels differ by up to {difference:.3f}")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe, difference


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("lora", metavar="LORA", help="LoRA folder, file or Hub id.")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="New folder for the pipeline.")
    add("--single_file", type=Path, metavar="FILE", help="Also write one .safetensors file that holds all weights.")
    add("--dtype", choices=list(DTYPES), default="fp16", help="Precision of the weights written.")
    add("--lora_alpha", type=float, metavar="X", help="Alpha of a LoRA file that does not tell its own.")
    add("--resolution", type=int, metavar="PX", help="Side of the image compared. Default: the LoRA's.")
    base_help = "Base inpainting model. Default: the LoRA's own base."
    add_base_flags(parser, base_help, "Revision of the base on the Hub. Default: the LoRA's.", default=None)
    args = parser.parse_args(input_args)
    if args.lora_alpha is not None and not 0 < args.lora_alpha < math.inf:
        parser.error(f"--lora_alpha {args.lora_alpha}: must be a finite number above 0")
    if args.resolution is not None and not 1 <= args.resolution <= LARGEST:
        parser.error(f"--resolution {args.resolution}: must be at least 1 and at most {LARGEST}")
    return args


def main(args: argparse.Namespace) -> None:
    check_outputs(args.output_dir, args.single_file)
    with told_if_unwritable(args.output_dir.parent, NOTHING_WRITTEN):
        args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    if args.single_file:
        with told_if_unwritable(args.single_file.parent, NOTHING_WRITTEN):
            args.single_file.parent.mkdir(parents=True, exist_ok=True)
    lora, dtype = read_lora(args.lora, args.lora_alpha), DTYPES[args.dtype]
    pipe, difference = merged_pipeline(args, lora)
    pipe.to("cpu", dtype)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=args.output_dir.parent) as folder:
        pipe.save_pretrained(Path(folder) / "pipeline")
        written = StableDiffusionInpaintPipeline.from_pretrained(Path(folder) / "pipeline", dtype=dtype)
        compare_weights(written, pipe, args.output_dir)
        for file in visible_files(Path(folder)).values():
            usual_mode(file)
        (Path(folder) / "pipeline").rename(args.output_dir)
    say(f"{args.output_dir}: base and LoRA merged; in fp32, pixels in [0, 1] differ by at most {difference:.0e}")
    if args.single_file:
        with atomic_write(args.single_file) as temporary:
            save_single_file(pipe, temporary, open_clip=pipe.text_encoder.config.hidden_size == 1024)
            written = StableDiffusionInpaintPipeline.from_single_file(
                str(temporary), config=str(args.output_dir), local_files_only=True, dtype=dtype
            )
            compare_weights(written, pipe, args.single_file)
        say(f"{args.single_file}: the same weights in one file")
    for defect, prompt in lora.prompts().items():
        say(f"Prompt for {defect}: {prompt}")


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
