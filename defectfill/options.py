"""Options: values of the training script's that cannot work, and lines of a file as options."""

import argparse
import json
import math
from collections.abc import Callable

import torch
from accelerate.tracking import get_available_trackers
from diffusers.utils import is_bitsandbytes_available, is_xformers_available

from defectfill_dataset import InputError


def check_options(args: argparse.Namespace) -> None:
    """Raises InputError (DF187-DF189) for values and combinations that cannot work."""
    at_least = {
        1: """resolution max_resize_scale zoom_context num_random_boxes rank max_train_steps train_batch_size
            checkpointing_steps gradient_accumulation_steps num_validation_images validation_inference_steps
            checkpoints_total_limit""",
        0: """seed lambda_def lambda_obj lambda_attn background_alpha lora_dropout learning_rate text_encoder_lr
            lr_warmup_steps adam_beta1 adam_beta2 adam_epsilon adam_weight_decay dataloader_num_workers
            validation_steps push_timeout zoom_min_area""",
    }
    problems = [
        f"DF187 --{name} {getattr(args, name)}: must be a finite number of at least {bound}"
        for bound, names in at_least.items()
        for name in names.split()
        if getattr(args, name) is not None and not bound <= getattr(args, name) < math.inf
    ]
    below = {"zoom_min_area": 1, "lora_dropout": 1, "adam_beta1": 1, "adam_beta2": 1, "seed": 2**32}
    problems += [
        f"DF187 --{k} {getattr(args, k)}: must be below {v}" for k, v in below.items() if getattr(args, k) >= v
    ]
    for name in ("lora_alpha", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            problems.append(f"DF187 --{name} {getattr(args, name)}: must be above 0, or nothing is learnt")
    if args.phrase is not None and not args.phrase.strip():
        problems.append("DF187 --phrase '': is empty; leave it out for the default")
    if args.dataset_name and args.split != "auto":
        problems.append("DF188 --split: a prepared dataset has its own split; leave it out with --dataset_name")
    of_folder = {
        "layout": args.layout != "auto",
        "mask_classes": args.mask_classes,
        "skip_problems": args.skip_problems,
    }
    for name in (name for name, given in of_folder.items() if given and args.dataset_name):
        problems.append(f"DF188 --{name}: is of --train_data_dir; leave it out with --dataset_name")
    if (args.train_data_dir is None) == (args.dataset_name is None):
        problems.append("DF188 give either --train_data_dir or --dataset_name")
    if args.use_8bit_adam and not is_bitsandbytes_available():
        problems.append("DF189 --use_8bit_adam: bitsandbytes is not installed; run 'pip install bitsandbytes'")
    if args.enable_xformers_memory_efficient_attention:
        flag = "DF189 --enable_xformers_memory_efficient_attention"
        if not torch.cuda.is_available():
            problems.append(f"{flag}: needs a CUDA device, and there is none here; leave it out")
        elif not is_xformers_available():
            problems.append(f"{flag}: xformers is not installed; see requirements-xformers.txt")
    known = ["all", "none", *(str(tracker) for tracker in get_available_trackers())]
    if args.report_to not in known:
        problems.append(f"DF189 --report_to {args.report_to}: not installed or unknown; there are: {', '.join(known)}")
    if problems:
        raise InputError(*problems)


class LineParser(argparse.ArgumentParser):
    """Raises ValueError where its parent would end the program."""

    def error(self, message: str):
        raise ValueError(message)


def overlays(
    args: argparse.Namespace,
    add_flags: Callable[[argparse.ArgumentParser], None],
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None],
) -> list[argparse.Namespace]:
    """The flags of the command with those of each line of `--cases` over them.

    Args:
        add_flags: adds those that a line may hold.
        check: calls the parser's `error` where a value cannot work.

    Raises:
        InputError: no file (DF160), or a line that is no JSON object or whose flags cannot work (DF416).
    """
    if not args.cases.is_file():
        raise InputError(f"DF160 --cases {args.cases}: no such file")
    parser = LineParser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    found, problems = [], []
    for number, text in enumerate(args.cases.read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            over, words = dict(vars(args)), []
            for flag, value in json.loads(text).items():
                if value is None:  # as if the command had not said it
                    over[flag] = parser.get_default(flag)
                elif isinstance(value, list):
                    words += [f"--{flag}", *map(str, value)]
                else:
                    words.append(f"--{flag}={value}")
            found.append(parser.parse_args(words, argparse.Namespace(**over)))
            check(parser, found[-1])
        except (ValueError, AttributeError) as error:
            problems.append(f"DF416 {args.cases}, line {number}: {error}")
    if not found and not problems:
        problems.append(f"DF416 {args.cases}: is empty; give a JSON object a line")
    if problems:
        raise InputError(*problems)
    return found
