"""The flags of generation and training, parsed and checked: the only module here with argparse."""

import argparse
import dataclasses
import math
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate.tracking import get_available_trackers
from diffusers.optimization import SchedulerType
from diffusers.utils import is_bitsandbytes_available, is_xformers_available
from pydantic import ConfigDict

from defectfill_dataset import InputError, Problem
from defectfill_dataset.commands import Parser, add_reading_flags, seed
from defectfill_dataset.synthesis.shapes import SHAPES
from defectfill_dataset.text import Schema, numbered_lines, parse_json, read_text

from ..base_model import SD2_MIRROR
from ..lora import LORA_TARGETS
from ..noise_levels import NoiseOptions
from ..sampling import COMPILED, SCHEDULERS
from ..seam import COMPOSITES
from ..selection import LPIPS_FILES, SELECTIONS
from .disks import default_fallback
from .plan import MOST_IMAGES
from .requests import GenerationCommand, GenerationRequest


MOST_SAMPLING_STEPS = 1000  # the training steps of Stable Diffusion 1 and 2: samplers take no more


def add_base_flags(
    parser: argparse.ArgumentParser, model_help: str, revision_help: str, default: str | None
) -> Callable:
    """The flags of the base model; returns the function that adds more to their group."""
    add = parser.add_argument_group("base model").add_argument
    add("--pretrained_model_name_or_path", default=default, metavar="PATH|ID", help=model_help)
    add("--revision", help=revision_help)
    add("--variant", help="Variant of the model's weight files, such as fp16.")
    add("--cache_dir", metavar="DIR", help="Folder of downloaded models and datasets.")
    return add


def add_hub_flags(add: Callable, pushed: str, id_flag: str) -> None:
    """The flags of a push to the Hub; `pushed` names what is pushed, `id_flag` takes its repository."""
    add(
        "--push_to_hub",
        action="store_true",
        help=f"Push {pushed} to the Hub, with the token in HF_TOKEN or from a login.",
    )
    add(id_flag, metavar="ID", help="Repository on the Hub. Default: the output folder's name.")
    add("--hub_public", action="store_true", help="Make a new repository public; without it, it is private.")
    add(
        "--push_timeout",
        type=float,
        default=600,
        metavar="SECONDS",
        help="Seconds after which a push is aborted, and the check of the Hub at the start too (after 60 at most).",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def parse_generation_args(description: str, input_args: list[str] | None = None) -> GenerationCommand:
    """The command of `generate_defectfill.py`, with one request of its own or one for each line of `--cases`.

    Raises:
        InputError: a `--cases` file that cannot be used (DF160, DF416).
    """
    usage = "%(prog)s --lora LORA --image IMAGES (--reference_data DIR | --mask MASKS) --output_dir DIR [flags]"
    parser = Parser(usage=usage, description=description)
    add_request_flags(parser)
    add_command_flags(parser)
    args = parser.parse_args(input_args)
    if args.cases:
        requests = read_requests(args.cases, args)
    else:
        check_request(parser, args)
        requests = [typed(GenerationRequest, args)]
    return typed(GenerationCommand, args, requests=requests)


def typed(kind: type, args: argparse.Namespace, **others):
    """The dataclass `kind` with `others`, and the flag of its name in every other field."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in others]
    return kind(**{name: getattr(args, name) for name in names}, **others)


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a `GenerationRequest`: those that a line of `--cases` may hold."""
    add = parser.add_argument_group("model").add_argument
    add("--lora", nargs="+", metavar="PATH|ID", help="LoRA folders, files or Hub ids; each makes its own images.")
    add("--lora_alpha", type=float, metavar="X",
        help="Alpha of LoRA files that do not tell their own, as it was in their training. Files of "
        "train_defectfill.py and of kohya's scripts do.")  # fmt: skip
    add(
        "--generation_prompt",
        choices=["defect", "object"],
        help="Prompt to generate with, of the two that the LoRA was trained with: defect names only the defect "
        "('A photo of sks'), object the part too ('A nut with sks'). Default: defect; object for LoRAs of older "
        "versions that have no other.",
    )
    add("--prompt", help="Prompt to generate with, in place of the LoRA's own.")
    add(
        "--prompt_noise",
        type=float,
        default=0.0,
        metavar="SIGMA",
        help="Variety: add Gaussian noise to the text embedding of each candidate, with SIGMA times the embedding's "
        "standard deviation. Default: 0, off.",
    )
    add(
        "--lora_scale",
        nargs="+",
        type=float,
        metavar="X",
        help="Strength of the LoRA: one factor, or MIN MAX for a random one in each image, for variety; images of "
        "different strengths are not batched together. Default: 1.",
    )
    add = parser.add_argument_group("sampling").add_argument
    number_help = "Images per defect type, cycling through the good images. Default: one for each good image."
    add("--num_images", type=int, metavar="N", help=number_help)
    add("--num_inference_steps", type=int, default=50, metavar="N", help="Number of sampling steps.")
    add("--guidance_scale", type=float, default=7.5, metavar="X", help="Classifier-free guidance; 1 is none.")
    add(
        "--guidance_interval",
        nargs=2,
        type=float,
        default=[0.0, 1.0],
        metavar=("START", "END"),
        help="Guided steps, in fractions of all steps; the other steps cost half. Default: 0 1, all steps.",
    )
    add(
        "--composite",
        choices=COMPOSITES,
        default="feather",
        help="How a candidate is pasted. feather: blended in, from the mask's outline inwards. exact: the whole mask, "
        "with a hard edge. grid: all that the model repaints, which is up to a latent cell more than the mask; the "
        "written masks hold all of it.",
    )
    add = parser.add_argument_group("zoom").add_argument
    add(
        "--zoom",
        choices=["auto", "on", "off"],
        default="auto",
        help="Inpaint square crops around the mask, so that small and thin defects get enough pixels. auto: as the "
        "LoRA was trained.",
    )
    add(
        "--zoom_context",
        type=float,
        metavar="X",
        help="Side of a crop, as a multiple of its defect's. Default: as trained.",
    )
    min_area_help = "A mask that covers a smaller share of its crop is tiled along its length. Default: as trained."
    add("--zoom_min_area", type=float, metavar="X", help=min_area_help)
    add_input_flags(parser)


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """The other flags of a `GenerationCommand`: those that hold for all of its requests."""
    cases_help = "One JSON object per line; it overrides the flags of model, sampling, images and masks."
    parser.add_argument("--cases", type=Path, metavar="FILE", help=cases_help)
    model_help = "Base inpainting model. Default: the LoRA's own base."
    revision_help = "Revision of the base on the Hub. Default: the one the LoRA was trained on."
    add = add_base_flags(parser, model_help, revision_help, default=None)
    precision_help = "Precision of the whole model. Default: fp16 on a GPU, no on a CPU."
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help=precision_help)
    add("--resolution", type=int, metavar="PX", help="Side of the model's square. Default: the LoRA's own.")
    scheduler_help = "Sampler. The paper uses ddim; the others need about 20 steps."
    add("--scheduler", choices=list(SCHEDULERS), default="ddim", help=scheduler_help)
    add = parser.add_argument_group("speed (each changes pixels by rounding)").add_argument
    fuse_help = "Fuse the LoRA into the weights, so that its layers cost nothing while sampling."
    add("--fuse_lora", action="store_true", help=fuse_help)
    add("--channels_last", action="store_true", help="Keep UNet and VAE in the channels-last memory layout.")
    add(
        "--torch_compile",
        nargs="?",
        const="blocks",
        choices=COMPILED,
        help="Compile the UNet's transformer blocks (blocks, also without a value), or all of it (unet). Compiling "
        "takes from half a minute (blocks) to several minutes (unet) before the first image, so it pays off only in "
        "long runs. Best with --fuse_lora: without it each LoRA is compiled anew.",
    )
    add = parser.add_argument_group("candidates and selection").add_argument
    add("--num_candidates", type=int, default=8, metavar="N", help="Number of candidates per crop.")
    batch_help = "Maximum candidates per UNet call; may span several images. Default: all candidates of one image."
    add("--batch_size", type=int, metavar="N", help=batch_help)
    add(
        "--selection",
        choices=SELECTIONS,
        default="lpips",
        help="Which candidate is kept. lpips, ssim, rmse: the one most distant from the good image inside the mask. "
        "likeness: the one nearest to the training defects of --reference_data, by its features, of those that change "
        "at least half as much as the median candidate. With + before likeness: the nearest of the more distant half. "
        "none: the first. The paper uses lpips.",
    )
    add("--lpips_net", choices=list(LPIPS_FILES), default="alex", help="Backbone of LPIPS.")
    add(
        "--likeness_net",
        type=Path,
        metavar="FILE",
        help="Network of likeness: SqueezeNet 1.0 in a safetensors file with torchvision's names. Default: the base's "
        "VAE encoder.",
    )
    add(
        "--min_change",
        type=float,
        default=0.0,
        metavar="X",
        help="Reject candidates that show no defect: RMS change inside the mask below X times the VAE's own "
        "reconstruction error. Default: 0, no filter.",
    )
    add(
        "--max_deviation",
        type=float,
        metavar="X",
        help="Reject artefacts: candidates whose colours are more than X times as far (Mahalanobis distance) from the "
        "training defects as the most unusual training defect is. Default: no filter.",
    )
    attempts_help = "Attempts at a crop, each with new seeds, if all candidates are rejected."
    add("--max_attempts", type=int, default=3, metavar="N", help=attempts_help)
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, type=Path, metavar="DIR", help="Folder of images, masks and manifest.")
    add("--keep_metadata", action="store_true", help="Copy the good image's EXIF data, such as place and camera.")
    verify_help = "On a restart, read all finished files, not only those that changed, to find damaged ones."
    add("--verify", action="store_true", help=verify_help)


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
    add(
        "--reference_data",
        metavar="DIR",
        help="Dataset whose masks are used: the one the LoRA was trained on. With --mask_source procedural, only "
        "their places.",
    )
    add("--object", metavar="NAME", help="Object in --reference_data, if it holds several.")
    add(
        "--split",
        default="auto",
        metavar="RULE|FILE",
        help="Which defects of --reference_data are references: auto, first_third, all, or a split.json.",
    )
    add_reading_flags(add, "--reference_data")
    add(
        "--like",
        type=Path,
        metavar="FILE",
        help="Make more of what a detector missed: a misses-*.jsonl that evaluate_defectfill.py wrote. Each reference "
        "mask gets the size and elongation of one of these defects, in turn, on the good images nearest to that "
        "defect's image in --reference_data, by the features of the base's VAE encoder. Do not test on those images "
        "afterwards.",
    )
    rotation_help = "Reference masks are rotated by up to this angle, to either side."
    add("--max_rotation", type=float, default=180.0, metavar="DEG", help=rotation_help)
    shapes_help = "Shapes that procedural masks are drawn from. Default: all."
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help=shapes_help)
    add("--seed", type=seed, default=0, metavar="N", help="Random seed of masks and candidates. Default: 0.")
    add = parser.add_argument_group("placement of reference and procedural masks").add_argument
    add(
        "--placement",
        choices=["auto", "anywhere", "like_references", "like_surroundings"],
        default="auto",
        help="Where masks go. like_references: where the masks in --reference_data are, by distance and direction to "
        "the object's border and position on the object. like_surroundings: where the image looks most as the "
        "reference does around its defect, so that a broken track is put across a track; masks are turned by quarters "
        "only. auto: like_references if there are at least four and their places or directions are clearly not random "
        "(p < 0.01), else anywhere. Default: auto.",
    )
    add(
        "--foreground",
        default="auto",
        metavar="auto|none|PATH",
        help="Where the object is. auto segments it from a plain background; a texture that fills the frame is all "
        "object. none places defects anywhere. PATH is a mask, or a folder of masks named like the images.",
    )
    add("--roi", type=Path, metavar="PATH", help="Mask of the region where defects may go, or a folder of them.")
    add("--zone", dest="roi", type=Path, help=argparse.SUPPRESS)  # its old name
    coverage_help = "Smallest share of a defect's pixels that must lie on the object and in the region."
    add("--coverage", type=float, default=0.99, metavar="X", help=coverage_help)
    add("--masks_per_image", type=int, default=1, metavar="N", help="Number of defects in an image.")


def check_input_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a message where flags of images and masks contradict each other."""
    likeness = "likeness" in getattr(args, "selection", "")
    if args.image is None:
        parser.error("give --image: a good image, or a folder of them")
    if args.mask_source is None:
        if likeness and args.mask is not None and args.reference_data is not None:
            pass  # the masks are given, the data is for the selection
        elif (args.mask is None) == (args.reference_data is None):
            parser.error("choose the masks: --mask, --reference_data, or --mask_source procedural or random")
        args.mask_source = "given" if args.mask is not None else "references"
    source = args.mask_source
    if (source == "given") != (args.mask is not None):
        parser.error("give --mask, or another --mask_source without it")
    has_data = args.reference_data is not None
    if likeness and not has_data:
        parser.error(f"--selection {args.selection}: give --reference_data, the dataset the LoRA was trained on")
    if source in ("references", "held_out") and not has_data:
        parser.error(f"give --reference_data with --mask_source {source}")
    places = source == "procedural" and args.placement != "anywhere"
    if has_data and not (source in ("references", "held_out") or places or likeness):
        parser.error("--reference_data: only with --mask_source references or held_out, for the places of procedural "
                     "masks, or with --selection likeness")  # fmt: skip
    if args.placement.startswith("like_") and not has_data:
        parser.error(f"give --reference_data with --placement {args.placement}")
    if args.placement == "like_surroundings" and (source == "procedural" or getattr(args, "like", None)):
        other = "--like" if source == "references" else "--mask_source procedural"
        parser.error(f"--placement like_surroundings takes the references' own masks: leave out {other}")
    users = {"like": ["references"], "max_rotation": ["references"], "shapes": ["procedural"]}
    of_data = ("object", "split", "layout", "mask_classes", "skip_problems")
    users |= {} if likeness else dict.fromkeys(of_data, ["references", "held_out", *(["procedural"] * has_data)])
    placing = ("placement", "foreground", "roi", "coverage", "masks_per_image")
    users |= dict.fromkeys(placing, ["references", "procedural"])
    for flag, sources in users.items():
        if source not in sources and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag}: only with --mask_source {' or '.join(sources)}")
    if not 0 < args.coverage <= 1:
        parser.error(f"--coverage {args.coverage}: must be above 0 and at most 1")
    if not 0 <= args.max_rotation <= 180:
        parser.error(f"--max_rotation {args.max_rotation}: must be from 0 to 180")
    if not 1 <= args.masks_per_image <= 1000:
        parser.error(f"--masks_per_image {args.masks_per_image}: must be at least 1 and at most 1,000")


# The most of each that is planned, far above what any run can need.
MOST = {
    "num_images": MOST_IMAGES, "num_candidates": 1000, "num_inference_steps": MOST_SAMPLING_STEPS,
    "batch_size": 10_000, "max_attempts": 1000,
}  # fmt: skip


def check_request(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Calls the parser's `error` where a flag of a request cannot work."""
    check_input_flags(parser, args)
    if not args.lora:
        parser.error("give --lora: what train_defectfill.py made")
    for flag, most in MOST.items():
        if getattr(args, flag) is not None and not 1 <= getattr(args, flag) <= most:
            parser.error(f"--{flag} {getattr(args, flag)}: must be at least 1 and at most {most:,}")
    if args.lora_alpha is not None and not 0 < args.lora_alpha < math.inf:
        parser.error(f"--lora_alpha {args.lora_alpha}: must be a finite number above 0")
    if not 0 <= args.prompt_noise < math.inf:
        parser.error(f"--prompt_noise {args.prompt_noise}: must be a finite number of at least 0")
    if args.likeness_net is not None and "likeness" not in args.selection:
        parser.error("--likeness_net: only with --selection likeness")
    if args.lora_scale is not None:
        check_lora_scale(parser, args.lora_scale, bool(args.fuse_lora or args.torch_compile))
    if args.zoom_context is not None and not 1 <= args.zoom_context < math.inf:
        parser.error(f"--zoom_context {args.zoom_context}: must be a finite number of at least 1")
    if args.zoom_min_area is not None and not 0 <= args.zoom_min_area < 1:
        parser.error(f"--zoom_min_area {args.zoom_min_area}: must be at least 0 and below 1")
    if not 0 <= args.min_change < math.inf:
        parser.error(f"--min_change {args.min_change}: must be a finite number of at least 0")
    if args.max_deviation is not None and not 0 < args.max_deviation < math.inf:
        parser.error(f"--max_deviation {args.max_deviation}: must be a finite number above 0")
    if not math.isfinite(args.guidance_scale):
        parser.error(f"--guidance_scale {args.guidance_scale}: must be a finite number")
    start, end = args.guidance_interval
    if not 0 <= start < end <= 1:
        parser.error(f"--guidance_interval {start} {end}: must be 0 <= START < END <= 1")
    steps = args.num_inference_steps
    if args.guidance_scale > 1 and not any(start <= i / steps < end for i in range(steps)):
        parser.error(f"--guidance_interval {start} {end}: contains none of the {steps} steps; widen it")


def check_lora_scale(parser: argparse.ArgumentParser, scale: list[float], must_be_one: bool) -> None:
    """Calls the parser's `error` unless `--lora_scale` is one strength, or a range of them where that works."""
    shown = " ".join(map(str, scale))
    low, high = scale[0], scale[-1]
    if len(scale) > 2 or not 0 <= low <= high < math.inf:
        parser.error(f"--lora_scale {shown}: give one finite number of at least 0, or two, the smaller one first")
    if low < high and must_be_one:
        parser.error(f"--lora_scale {shown}: a range needs a new strength for each image; leave out --fuse_lora and "
                     "--torch_compile, or give one number")  # fmt: skip


class CaseLine(Schema):
    """A line of `--cases`: flags with their values, which argparse reads."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, bool | int | float | str | list[int | float | str] | None]


class LineParser(argparse.ArgumentParser):
    """Raises ValueError where its parent would end the program."""

    def error(self, message: str):
        raise ValueError(message)


def read_requests(file: Path, args: argparse.Namespace) -> list[GenerationRequest]:
    """A request for each line of `--cases`: the flags of the command, overridden by those of the line.

    Raises:
        InputError: no file (DF160), or a line that is not a JSON object or whose flags cannot work (DF416).
    """
    if not file.is_file():
        raise InputError(Problem("DF160", f"--cases {file}", "no such file"))
    parser = LineParser(add_help=False, allow_abbrev=False)
    add_request_flags(parser)
    requests, problems = [], []
    for number, text in numbered_lines(read_text(file, "DF416")):
        try:
            requests.append(read_request(parser, parse_json(text, CaseLine), args))
        except ValueError as error:
            problems.append(Problem("DF416", f"{file}, line {number}", str(error)))
    if not requests and not problems:
        problems.append(Problem("DF416", file, "is empty", "give one JSON object per line"))
    if (number := sum(request.num_images or 1 for request in requests)) > MOST_IMAGES:
        what = f"asks for {number:,} images; one run makes at most {MOST_IMAGES:,}"
        problems.append(Problem("DF416", file, what, "make several files of it"))
    if problems:
        raise InputError(*problems)
    return requests


def read_request(parser: LineParser, line: dict, args: argparse.Namespace) -> GenerationRequest:
    """The request of one line; `null` resets a flag to its default.

    Raises:
        ValueError: a flag is unknown, or cannot work.
    """
    flags, words = dict(vars(args)), []
    known = {field.name for field in dataclasses.fields(GenerationRequest)}
    for flag, value in line.items():
        flag = "roi" if flag == "zone" else flag
        if flag not in known:
            raise ValueError(f"no flag of a line: --{flag}")
        if value is None:
            flags[flag] = parser.get_default(flag)
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words.append(f"--{flag}={value}")
    of_line = parser.parse_args(words, argparse.Namespace(**flags))
    check_request(parser, of_line)
    return typed(GenerationRequest, of_line)


# ---------------------------------------------------------------------------------------------------------------------
# Training

# piecewise_constant needs rules that no flag gives.
LR_SCHEDULERS = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]


def refuse_flags(name: str, given: str, ours: Iterable[object]) -> list[Problem]:
    """A problem (DF188) for each flag in the quoted text of the flag `name` that is among our own arguments."""
    own = {str(word).partition("=")[0] for word in ours if str(word).startswith("--")} | {"--push_to_hub"}
    problems = []
    for flag in sorted(own & {word.partition("=")[0] for word in shlex.split(given)}):
        what = f"holds {flag}, which is set here"
        if flag == "--push_to_hub":
            what = f"holds {flag}, and all LoRAs would have one name there"
        problems.append(Problem("DF188", name, what, "leave it out"))
    return problems


# fmt: off
def parse_training_args(description: str, input_args: list[str] | None = None) -> argparse.Namespace:
    """The flags of `train_defectfill.py`."""
    usage = "%(prog)s --train_data_dir DIR --output_dir DIR [flags]"
    parser = Parser(usage=usage, description=description)

    def group(title: str) -> Callable:
        return parser.add_argument_group(title).add_argument

    add_base_flags(
        parser, "Folder or Hub id of the inpainting model to fine-tune.", "Revision of the model on the Hub.",
        default=SD2_MIRROR,
    )

    add = group("data")
    add("--train_data_dir", metavar="DIR", help="Folder of one object, or a folder above several.")
    add_reading_flags(add, "--train_data_dir")
    add("--dataset_name", metavar="PATH|ID", help="Prepared dataset, instead of --train_data_dir.")
    add("--dataset_config_name", metavar="NAME", help="Configuration of the prepared dataset.")
    add("--object", metavar="NAME", help="Object to train on, if the data holds several.")
    add("--defect", nargs="+", metavar="NAME", help="Defect types to learn. Default: all types of the object but "
        "'combined'.")
    add("--split", default="auto", metavar="RULE|FILE",
        help="Defects to train on: auto (the dataset's own split, else first_third), first_third (of each type), all, "
             "or a split.json.")
    add("--validation_defects", type=int, default=0, metavar="N",
        help="Hold the last N reference images of each defect type out of training, and measure losses and the error "
             "of x_0 on them at every checkpoint; run_record.json names the best step. Each type keeps at least one "
             "image to train on. Default: 0, none.")
    add("--resolution", type=int, default=512, metavar="PX", help="Side of the square that the model sees.")
    add("--max_resize_scale", type=float, default=1.125, metavar="X",
        help="Augmentation: each image is enlarged by a random factor from 1 to X, then cropped back.")
    add("--center_crop", action="store_true", help="Crop the centre of enlarged images, not a random part.")
    add("--cache_latents", type=int, default=0, metavar="K",
        help="Encode K augmented variants of each crop once, each with 4 sets of random boxes, and train on these; 0 "
             "augments and encodes at every step, as in the paper. Once they are cached a step skips "
             "the VAE, half of its work; they take 0.3 MiB each at 512 px in half precision. Default: 0.")
    add("--zoom", choices=["auto", "on", "off"], default="auto",
        help="Train on square crops around the defects instead of whole images. auto does so if the median mask "
             "covers less than --zoom_min_area.")
    add("--zoom_context", type=float, default=3.0, metavar="X", help="Side of a crop, as a multiple of its defect's.")
    add("--zoom_min_area", type=float, default=0.01, metavar="X",
        help="Share of the image below which a defect counts as small (--zoom auto), and share of its crop below "
             "which a long defect is tiled.")
    add("--dataloader_num_workers", type=int, default=0, metavar="N",
        help="Processes that load images. Default: 0, a thread of the main process loads them.")

    add = group("prompts")
    add("--phrase", help="Words that name the defect, [V*]. Default: sks for one type, {defect} for several.")
    add("--object_words", metavar="WORDS", help="Words that name the object. Default: its folder's name.")
    add("--defect_prompt", default="A photo of {phrase}", metavar="TEXT", help="Prompt of the defect pass.")
    add("--object_prompt", default="A {object} with {phrase}", metavar="TEXT", help="Prompt of the object pass.")
    add("--prompt_noise", type=float, default=0.0, metavar="SIGMA",
        help="Add Gaussian noise to the text embedding in each sample, with SIGMA times the embedding's standard "
             "deviation. Default: 0, off.")

    add = group("method")
    add("--lambda_def", type=float, default=0.5, metavar="X", help="Weight of the defect loss.")
    add("--lambda_obj", type=float, default=0.2, metavar="X", help="Weight of the object loss.")
    add("--lambda_attn", type=float, default=0.05, metavar="X", help="Weight of the attention loss.")
    add("--background_alpha", type=float, default=0.3, metavar="X",
        help="Weight alpha of the background in the object loss, M' = M + alpha (1 - M).")
    add("--num_random_boxes", type=int, default=30, metavar="N", help="Number of boxes in the object pass's mask.")
    add("--loss_reduction", choices=["mean", "mask"], default="mean",
        help="Average the losses over all elements, or over each mask, so that small and large defects count alike.")
    add("--attention_pass", choices=["object", "defect"], default="object",
        help="Pass whose attention map feeds the attention loss.")
    add("--attention_map_scale", choices=["raw", "minmax"], default="raw",
        help="Use the attention map's probabilities, or stretch each map to [0, 1].")

    add = group("noise levels")
    add("--snr_gamma", type=float, metavar="X",
        help="Min-SNR weighting of the defect and object losses: errors at low noise count less. The usual value "
             "is 5. Default: off.")
    add("--high_noise_power", type=float, default=0.0, metavar="P",
        help="Weigh the squared errors of these losses by (1 / alpha_bar)^P, with mean weight 1: errors at high "
             "noise, where it is decided whether a defect appears, count more. Default: 0, off.")
    add("--noise_offset", type=float, default=0.0, metavar="X",
        help="Shift the noise of each channel by a random value of this scale. The usual value is 0.1. "
             "Default: 0, off.")
    add("--timestep_bias_strategy", choices=["none", "earlier", "later", "range"], default="none",
        help="Timesteps to sample more often: the lowest (low noise), the highest (high noise), or a range.")
    add("--timestep_bias_multiplier", type=float, default=1.0, metavar="X",
        help="How much more often these timesteps are sampled; below 1, less often.")
    add("--timestep_bias_begin", type=int, default=0, metavar="N", help="First timestep of the range. Default: 0.")
    add("--timestep_bias_end", type=int, default=1000, metavar="N", help="End of the range, exclusive.")
    add("--timestep_bias_portion", type=float, default=0.25, metavar="X",
        help="Share of all timesteps that earlier and later favour.")

    add = group("LoRA")
    add("--rank", type=int, default=8, metavar="N", help="Rank of every LoRA layer.")
    add("--lora_alpha", type=float, default=16, metavar="X", help="LoRA layers are scaled by alpha / rank.")
    add("--lora_targets", choices=list(LORA_TARGETS), default="attention",
        help="Layers that get LoRA. attention is the paper's. attention+ff adds the feed-forward layers. all adds, in "
             "the UNet, the projections and the convolutions of its resnets, downsamplers and upsamplers.")
    add("--conv_rank", type=int, metavar="N",
        help="Rank of convolutions, with --lora_targets all; they are scaled by alpha / rank too. Default: --rank.")
    add("--lora_dropout", type=float, default=0.1, metavar="P", help="Dropout before LoRA layers, in training only.")

    add = group("optimisation")
    add("--seed", type=int, default=0, metavar="N", help="Random seed. Default: 0.")
    add("--max_train_steps", type=int, default=2000, metavar="N", help="Number of optimizer steps.")
    add("--train_batch_size", type=int, default=4, metavar="N", help="Images per process and micro-batch.")
    add("--auto_find_batch_size", action="store_true",
        help="If --train_batch_size does not fit in memory, halve it until it does, and accumulate so many more "
             "micro-batches that an optimizer step has as many images. Tried once, before the first step.")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="N", help="Micro-batches per optimizer step.")
    add("--learning_rate", type=float, default=2e-4, metavar="X", help="Learning rate of the UNet's LoRA.")
    add("--text_encoder_lr", type=float, default=4e-5, metavar="X", help="Learning rate of the text encoder's LoRA.")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant_with_warmup",
        help="How the learning rates change over the steps.")
    add("--lr_warmup_steps", type=int, default=100, metavar="N",
        help="Steps in which the learning rates rise from 0 to their full value.")
    add("--use_8bit_adam", action="store_true", help="Use the 8-bit AdamW of bitsandbytes.")
    add("--adam_beta1", type=float, default=0.9, metavar="X", help="Decay rate of AdamW's first moment.")
    add("--adam_beta2", type=float, default=0.999, metavar="X", help="Decay rate of AdamW's second moment.")
    add("--adam_weight_decay", type=float, default=1e-2, metavar="X", help="Weight decay of AdamW.")
    add("--adam_epsilon", type=float, default=1e-8, metavar="X", help="Epsilon of AdamW.")
    add("--max_grad_norm", type=float, default=1.0, metavar="X", help="Gradients are clipped to this norm.")

    add = group("precision and memory")
    add("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="Precision of the frozen weights and of the computation; LoRA weights stay in fp32. Default: that of "
             "accelerate's configuration, else no.")
    add("--gradient_checkpointing", action="store_true", help="Save memory at the cost of speed; same result.")
    add("--enable_xformers_memory_efficient_attention", action="store_true",
        help="Use the attention of xformers, which needs CUDA. PyTorch's own is the default.")
    add("--channels_last", action="store_true",
        help="Keep UNet and VAE in the channels-last memory layout, which can be faster on a GPU.")
    add("--torch_compile", action="store_true",
        help="Compile the UNet's transformer blocks, which can be faster on a GPU. The first step then takes minutes, "
             "so it pays in long runs only. Needs a C++ compiler. Changes losses by rounding.")
    add("--allow_tf32", action="store_true", help="Allow TF32 matrix products, on Ampere GPUs and later.")

    add = group("output and checkpoints")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="Folder of the LoRA, checkpoints and records.")
    add("--fallback_dir", type=Path, default=default_fallback(), metavar="DIR",
        help="Folder, best on another disk, for results that cannot be written to --output_dir. Default: "
             "defectfill/results in the user's cache folder.")
    add("--checkpointing_steps", type=int, default=500, metavar="N", help="Save a checkpoint every N steps.")
    add("--checkpoints_total_limit", type=int, metavar="N",
        help="Keep only the newest N checkpoints, and the best by --validation_defects. Default: all.")
    add("--resume_from_checkpoint", metavar="latest|PATH",
        help="Checkpoint to resume, or latest; with latest and no checkpoint, training starts from scratch.")

    add = group("validation and logging")
    add("--validation_steps", type=int, default=500, metavar="N",
        help="Save validation images every N steps, or never (0).")
    add("--num_validation_images", type=int, default=4, metavar="N", help="Number of good images per validation.")
    add("--validation_inference_steps", type=int, default=50, metavar="N", help="DDIM steps of a validation image.")
    add("--report_to", default="tensorboard", metavar="NAME", help="Tracker that accelerate logs to, all or none.")
    add("--logging_dir", default="logs", metavar="DIR", help="Folder of the tracker, inside the output folder.")

    add = group("Hugging Face Hub")
    add_hub_flags(add, "LoRA and model card", "--hub_model_id")
    return parser.parse_args(input_args)
# fmt: on


def noise_level_problems(args: argparse.Namespace) -> list[Problem]:
    """What cannot work among the flags of noise levels."""
    problems = []
    for name in ("snr_gamma", "timestep_bias_multiplier"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            problems.append(Problem("DF187", f"--{name} {getattr(args, name)}", "must be a finite number above 0"))
    if not 0 < args.timestep_bias_portion <= 1:
        what = "must be above 0 and at most 1"
        problems.append(Problem("DF187", f"--timestep_bias_portion {args.timestep_bias_portion}", what))
    begin, end = args.timestep_bias_begin, args.timestep_bias_end
    if not begin < end <= 1000:
        what = f"must be above --timestep_bias_begin {begin}, at most 1000"
        problems.append(Problem("DF187", f"--timestep_bias_end {end}", what))
    if args.snr_gamma is not None and args.high_noise_power:
        what = "give only one of them; they counteract each other"
        problems.append(Problem("DF188", "--snr_gamma, --high_noise_power", what))
    strategy = args.timestep_bias_strategy
    if (strategy == "none") != (args.timestep_bias_multiplier == 1):
        what = "give --timestep_bias_strategy and --timestep_bias_multiplier together, or neither"
        problems.append(Problem("DF188", "", what))
    users = {"begin": ["range"], "end": ["range"], "portion": ["earlier", "later"]}
    for name, strategies in users.items():
        flag = f"timestep_bias_{name}"
        if strategy not in strategies and getattr(args, flag) != NoiseOptions._field_defaults[flag]:
            what = f"only with --timestep_bias_strategy {' or '.join(strategies)}"
            problems.append(Problem("DF188", f"--{flag}", what))
    return problems


# The most of each that a training plans, far above what any can need; and what is planned before it starts.
MOST_OF_TRAINING = {
    "max_train_steps": 10_000_000, "train_batch_size": 10_000, "gradient_accumulation_steps": 10_000,
    "resolution": 8192, "rank": 8192, "conv_rank": 8192, "num_random_boxes": 10_000, "num_validation_images": 10_000,
    "validation_inference_steps": MOST_SAMPLING_STEPS, "cache_latents": 10_000, "dataloader_num_workers": 1000,
    "validation_defects": 10_000,
}  # fmt: skip
MOST_SAMPLES = 100_000_000


def check_training_args(args: argparse.Namespace) -> None:
    """Raises InputError (DF187-DF189) for values and combinations that cannot work."""
    at_least = {
        1: """resolution max_resize_scale zoom_context num_random_boxes rank conv_rank max_train_steps train_batch_size
            checkpointing_steps gradient_accumulation_steps num_validation_images validation_inference_steps
            checkpoints_total_limit""",
        0: """seed lambda_def lambda_obj lambda_attn background_alpha lora_dropout learning_rate text_encoder_lr
            lr_warmup_steps adam_beta1 adam_beta2 adam_epsilon adam_weight_decay dataloader_num_workers
            validation_steps push_timeout zoom_min_area high_noise_power noise_offset timestep_bias_begin
            cache_latents prompt_noise validation_defects""",
    }
    problems = [
        Problem("DF187", f"--{name} {getattr(args, name)}", f"must be a finite number of at least {bound}")
        for bound, names in at_least.items()
        for name in names.split()
        if getattr(args, name) is not None and not bound <= getattr(args, name) < math.inf
    ]
    problems += [
        Problem("DF187", f"--{name} {getattr(args, name)}", f"must be at most {most:,}")
        for name, most in MOST_OF_TRAINING.items()
        if getattr(args, name) is not None and getattr(args, name) > most
    ]
    samples = args.max_train_steps * args.gradient_accumulation_steps * args.train_batch_size
    if not problems and samples > MOST_SAMPLES:
        what = f"{samples:,} samples in a process; at most {MOST_SAMPLES:,} are planned"
        problems.append(Problem("DF187", f"--max_train_steps {args.max_train_steps}", what))
    below = {"zoom_min_area": 1, "lora_dropout": 1, "adam_beta1": 1, "adam_beta2": 1, "seed": 2**32}
    problems += [
        Problem("DF187", f"--{name} {getattr(args, name)}", f"must be below {bound}")
        for name, bound in below.items()
        if getattr(args, name) >= bound
    ]
    for name in ("lora_alpha", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            what = "must be above 0, or nothing is learnt"
            problems.append(Problem("DF187", f"--{name} {getattr(args, name)}", what))
    if args.phrase is not None and not args.phrase.strip():
        problems.append(Problem("DF187", "--phrase ''", "is empty", "leave it out for the default"))
    if args.dataset_name and args.split != "auto":
        what = "a prepared dataset has its own split"
        problems.append(Problem("DF188", "--split", what, "leave it out with --dataset_name"))
    of_folder = {
        "layout": args.layout != "auto",
        "mask_classes": args.mask_classes,
        "skip_problems": args.skip_problems,
    }
    for name in (name for name, given in of_folder.items() if given and args.dataset_name):
        fix = "leave it out with --dataset_name"
        problems.append(Problem("DF188", f"--{name}", "belongs to --train_data_dir", fix))
    if (args.train_data_dir is None) == (args.dataset_name is None):
        problems.append(Problem("DF188", "", "give either --train_data_dir or --dataset_name"))
    if args.conv_rank is not None and args.lora_targets != "all":
        what = "only --lora_targets all trains convolutions"
        problems.append(Problem("DF188", "--conv_rank", what, "add it, or leave this out"))
    problems += noise_level_problems(args)
    if args.use_8bit_adam and not is_bitsandbytes_available():
        fix = "run 'pip install bitsandbytes'"
        problems.append(Problem("DF189", "--use_8bit_adam", "bitsandbytes is not installed", fix))
    if args.enable_xformers_memory_efficient_attention:
        flag = "--enable_xformers_memory_efficient_attention"
        if not torch.cuda.is_available():
            problems.append(Problem("DF189", flag, "needs a CUDA device, and there is none here", "leave it out"))
        elif not is_xformers_available():
            problems.append(Problem("DF189", flag, "xformers is not installed", "see requirements-xformers.txt"))
    known = ["all", "none", *(str(tracker) for tracker in get_available_trackers())]
    if args.report_to not in known:
        fix = f"there are: {', '.join(known)}"
        problems.append(Problem("DF189", f"--report_to {args.report_to}", "not installed or unknown", fix))
    if problems:
        raise InputError(*problems)
