"""A seeded fuzzer of all that reads text: whatever a file holds, reading it ends, in a value or an InputError.

python tests/faults/fuzz.py --trials 10000
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import faulthandler
import functools
import json
import logging
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace


sys.path.insert(0, str(Path(__file__).parents[1]))
from offline import HOME, ROOT  # noqa: E402

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from annotated import make_cvat, make_datumaro, make_label_studio, make_labelme_3, make_voc, make_voc_masks  # noqa: E402
from drawn import write_image  # noqa: E402
from folders import (  # noqa: E402
    make_coco,
    make_dagm,
    make_labelme,
    make_metadata,
    make_mvtec,
    make_real_iad,
    make_visa,
    make_yolo,
    write_json,
)
from generated_folder import make_generated  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from toy_model import toy_pipeline  # noqa: E402

from defectfill import base_files  # noqa: E402
from defectfill.base_model import BaseModel, check_prompt, check_resolution, load_tokenizer, read_base  # noqa: E402
from defectfill.evaluation import report as evaluation  # noqa: E402
from defectfill.lora import LORA_FILE, add_lora, check_content, read_lora, save_lora  # noqa: E402
from defectfill.runs import checkpoint as checkpoints  # noqa: E402
from defectfill.runs.cards import add_results  # noqa: E402
from defectfill.runs.flags import parse_generation_args  # noqa: E402
from defectfill.runs.manifest import KINDS, PlanLine, merge_parts, read_lines, write_table  # noqa: E402
from defectfill.runs.misses import read_misses  # noqa: E402
from defectfill.runs.plan import check_plan, choose_crops, choose_defects  # noqa: E402
from defectfill.runs.record import LossLog  # noqa: E402
from defectfill.runs.report import write_report  # noqa: E402
from defectfill.runs.speed import SpeedFile  # noqa: E402
from defectfill.runs.validation import best_step  # noqa: E402
from defectfill_dataset import InputError, load_defect_pairs, shapes_like  # noqa: E402
from defectfill_dataset.readers import read_object  # noqa: E402
from defectfill_dataset.splits import split_rows  # noqa: E402
from defectfill_dataset.synthesis.placement import NamedMask  # noqa: E402
from defectfill_dataset.text import Schema, read_json  # noqa: E402
from defectfill_dataset.writers.exports import read_generated  # noqa: E402
from defectfill_scripts import run_objects  # noqa: E402


LIMITS = {signal.ITIMER_PROF: 5.0, signal.ITIMER_REAL: 60.0}  # seconds of the CPU, and of the clock, for one file


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that is read.

    Args:
        make: writes what is right into a folder; returns the file to change.
        read: reads it from that folder; the functions that the commands call.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]


# ---------------------------------------------------------------------------------------------------------------------
# Targets


def in_folder(make: Callable[[Path], object], file: str) -> Callable[[Path], Path]:
    """A maker of `nut` in a folder, whose `file` is to be changed."""

    def run(folder: Path) -> Path:
        make(folder / "nut")
        return folder / file

    return run


def read_dataset(folder: Path, layout: str = "auto") -> None:
    """All rows of the object and their masks; a mask that cannot be drawn is a ValueError, which is told."""
    for row in read_object(folder / "nut", "nut", layout).rows:
        with contextlib.suppress(ValueError):
            if row.mask:
                row.mask.render()
    load_defect_pairs(str(folder / "nut"), "nut", "all", layout=layout)


LINE = {
    "name": "000", "good_image": "000.png", "given_mask": None, "good_image_sha256": "ab", "object": "nut",
    "defect": "hole", "prompt": "A nut with sks", "zoom": {"context": 3.0, "min_area": 0.01}, "seed": 0,
}  # fmt: skip
CROP = {
    "box": [0, 0, 9, 9], "candidate_seeds": [1, 2], "scores": [0.5, None], "changes": [2.0, 1.0],
    "deviations": [0.4, 0.8], "chosen": 0, "attempts": 1, "refused": {"broken": 0, "no defect": 1, "artefact": 0},
}  # fmt: skip
SETTINGS = {"base": "toy", "revision": None, "selection": "none", "resolution": 32}
SPEED_FILE = {"device": "cpu", "processes": 1, "images": 2, "seconds_per_image": 1.5, "peak_memory_bytes": None}


def make_run(changed: str) -> Callable[[Path], Path]:
    """The output folder of a generation run; `changed` names the file to change."""

    def make(folder: Path) -> Path:
        lines = [LINE | {"name": f"00{i}"} for i in range(2)]
        made = {"seam_step": 3.0, "good_seam_step": 1.0, "reference_seam_step": None, "windows": [CROP]}
        for kind in KINDS:
            for line in lines:
                write_image(folder / kind / f"{line['name']}.png", size=8)
        texts = {
            "plan.jsonl": lines,
            "manifest.jsonl": [line | made | {"image": f"images/{line['name']}.png"} for line in lines],
            "settings.json": [SETTINGS],
            "speed.json": [SPEED_FILE],
        }
        for name, content in texts.items():
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in content))
        return folder / changed

    return make


def read_run(folder: Path) -> None:
    checkpoints.check_identity(read_json(folder / "settings.json", Schema, "DF310"), SETTINGS)
    plan = read_lines(folder / "plan.jsonl", PlanLine)
    check_plan([LINE | {"name": f"00{i}"} for i in range(2)], plan)
    lines = merge_parts(folder)
    if lines:
        write_table(folder / "manifest.parquet", lines)
        speed = read_json(folder / "speed.json", SpeedFile, "DF310")
        write_report(folder / "summary.html", plan, lines, [], speed)


def make_losses(folder: Path) -> Path:
    lines = [{"step": n, "loss": 1.0 / n, "l_def": 0.5, "grad_norm": None, "lr": 1e-4} for n in range(1, 6)]
    (folder / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "losses.jsonl"


def read_losses(folder: Path) -> None:
    log = LossLog(folder / "losses.jsonl", 4)
    log.write({"step": 5, "loss": 0.5})
    log.summary()


IDENTITY = {"rank": 4, "base": "toy", "base_sha256": "ab", "resolution": 32, "prompts": {"hole": ["a", "b"]}}


def trainable() -> tuple[dict, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    parameters = {f"lora_unet_{n}.lora_down.weight": torch.nn.Parameter(torch.ones(2, 2)) for n in "ab"}
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters.values()], lr=1.0)
    return parameters, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def make_checkpoint(changed: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        parameters, optimizer, scheduler = trainable()
        sum(p.sum() for p in parameters.values()).backward()
        optimizer.step()
        weights = {name: p.detach() for name, p in parameters.items()}
        state = {"step": 2, "identity": IDENTITY, "before": None, "validation": {"2": {"mean_x0_error": 0.5}}}
        checkpoints.save_checkpoint(
            folder, state, lambda to: save_file(weights, to / LORA_FILE), parameters, optimizer, scheduler, None, None
        )
        return folder / "checkpoint-2" / changed

    return make


def read_checkpoint(folder: Path) -> None:
    checkpoints.find_checkpoint(folder, "latest")
    checkpoints.find_checkpoint(folder, "checkpoint-2")


def read_state(folder: Path) -> None:
    parameters, optimizer, scheduler = trainable()
    saved = checkpoints.load(folder / "checkpoint-2", load_file(folder / "checkpoint-2" / LORA_FILE))
    checkpoints.check_identity(saved.state["identity"], IDENTITY)
    best_step(checkpoints.restore(saved, parameters, optimizer, scheduler, None).get("validation", {}))


def make_base(changed: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        toy_pipeline().save_pretrained(folder)
        return folder / changed

    return make


def read_base_folder(folder: Path) -> None:
    check_resolution(read_base(str(folder)), 32)


def read_tokenizer(folder: Path) -> None:
    check_prompt("A nut with sks", load_tokenizer(dataclasses.replace(toy_base(), name=str(folder)), None))


def make_index(folder: Path) -> Path:
    write_json(folder / "unet/diffusion_pytorch_model.safetensors.index.json", {
        "metadata": {"total_size": 1}, "weight_map": {f"t{i}": f"part-0000{i}-of-2.safetensors" for i in range(2)}
    })  # fmt: skip
    return folder / "unet/diffusion_pytorch_model.safetensors.index.json"


def make_digest(folder: Path) -> Path:
    (folder / "weights").write_bytes(b"weights")
    base_files.cached_digest(folder / "weights")
    return max(base_files.cache_folder().iterdir(), key=lambda file: file.stat().st_mtime_ns)


RECORD = {
    "schema": 1, "base": "toy", "base_sha256": "ab", "revision": None, "variant": None, "object": "nut",
    "prompts": {"hole": "A nut with sks"}, "defect_prompts": {"hole": "A photo of sks"}, "resolution": 32,
    "zoom": {"context": 3.0, "min_area": 0.01},
    "appearance": {"hole": {"mean": [0, 0, 0], "covariance": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "strangest": 2.0}},
}  # fmt: skip
PEFT = {
    "unet.lora_alpha": 8, "unet.r": 4, "unet.target_modules": ["to_k", "to_q"], "unet.rank_pattern": {"conv1": 2},
    "unet.alpha_pattern": {"conv1": 4}, "text_encoder.lora_alpha": 8, "text_encoder.use_rslora": False,
}  # fmt: skip


def make_lora(name: str, content: dict) -> Callable[[Path], Path]:
    """A LoRA; the text in its header's entry `name`, which lies in a file of its own while it is changed."""

    def make(folder: Path) -> Path:
        pipe = toy_pipeline()
        add_lora(pipe.unet, pipe.text_encoder, 4, 8, 0.0)
        save_lora(folder / LORA_FILE, pipe.unet, pipe.text_encoder, RECORD)
        write_json(folder / name, content)
        return folder / name

    return make


def read_header(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        tensors = {k: v for k, v in load_file(folder / LORA_FILE).items() if not k.endswith("alpha")}
        text = (folder / name).read_bytes().decode(errors="replace")
        save_file(tensors, folder / "x.safetensors", metadata={"defectfill": json.dumps(RECORD), name: text})
        use_lora(folder / "x.safetensors", 8.0 if name == "defectfill" else None)

    return read


def read_adapter(folder: Path) -> None:
    tensors = {k: v for k, v in load_file(folder / LORA_FILE).items() if not k.endswith("alpha")}
    save_file(tensors, folder / "adapter_model.safetensors")
    read_lora(folder / "adapter_model.safetensors")


def use_lora(file: Path, alpha: float | None) -> None:
    lora = read_lora(file, alpha)
    request = parse_generation_args("", [
        "--lora", str(file), "--image", str(file), "--mask", str(file), "--output_dir", str(file.parent / "out")
    ]).requests[0]  # fmt: skip
    choose_defects(request, [lora])
    choose_crops(request, lora)
    check_content(lora, toy_base(), True)


@functools.cache
def toy_base() -> BaseModel:
    toy_pipeline().save_pretrained(Path(HOME, "base"))
    return read_base(str(Path(HOME, "base")))


def make_cases(folder: Path) -> Path:
    lines = [
        {"image": "photos", "mask_source": "random", "num_images": 3, "seed": 1, "guidance_interval": [0.1, 0.9]},
        {"image": "photos", "mask_source": "procedural", "shapes": ["blob"], "roi": None, "prompt": "A nut"},
    ]
    (folder / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "cases.jsonl"


def read_cases(folder: Path) -> None:
    argv = ["--lora", "lora", "--cases", str(folder / "cases.jsonl"), "--output_dir", str(folder / "out")]
    parse_generation_args("", argv)


def make_misses(folder: Path) -> Path:
    lines = [{"image": f"test/hole/00{i}.png", "box": [4, 5, 20, 9 + i], "area": 60, "missed_by": 0.8} for i in (0, 1)]
    (folder / "misses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "misses.jsonl"


def use_misses(folder: Path) -> None:
    masks = [NamedMask("000", np.pad(np.ones((4, 9), dtype=bool), 3))]
    for miss in read_misses(folder / "misses.jsonl")[:3]:
        shapes_like(masks, miss.size, miss.area, 180)(np.random.default_rng(0), (48, 48))


DETECTOR, TESTED = evaluation.Run("kall-nall", "ours", 0, 0), [SimpleNamespace(mask=np.zeros((4, 4), dtype=bool))] * 2


def make_detector(folder: Path) -> Path:
    """What an evaluation keeps of a detector, without the digests that tell every change."""
    (folder / DETECTOR.setting).mkdir()
    save_file({"maps": torch.zeros(2, 4, 4)}, folder / f"{DETECTOR.name}.safetensors")
    figures = {"pixel_ap": 0.5, "pro": 0.25, "image_auroc": 1.0, "threshold": 0.5, "missed": 0, "smallest_found": None}
    write_json(DETECTOR.file(folder), figures)
    return DETECTOR.file(folder)


def read_detector(folder: Path) -> None:
    figures = {DETECTOR: evaluation.read_run(DETECTOR, folder, TESTED)}
    evaluation.figure_table(evaluation.Results(TESTED, figures, lambda run: np.zeros((2, 4, 4))))


RECIPE = {"recipe": ["300", "8", "0.001"], "protocol": "clean", "data": {"kall-nall": "ab"}, "arms": {"ours": 1}}


def make_recipe(folder: Path) -> Path:
    write_json(folder / "options.json", RECIPE)
    return folder / "options.json"


def make_card(folder: Path) -> Path:
    (folder / "README.md").write_text("---\nlicense: other\ntags:\n- lora\n---\n# A LoRA\n")
    add_results(folder, "nut: hole", {"pixel_ap": ("pixel AP", 0.5)})
    return folder / "README.md"


JOB = run_objects.Job("nut", "hole", Path(), {}, "ab")


def make_job(folder: Path) -> Path:
    stage = {"command": ["--rank", "4"], "seconds": 3.5, "done": True}
    write_json(folder / run_objects.JOB, {"train": stage, "generate": None, "failed": False})
    return folder / run_objects.JOB


def read_job(folder: Path) -> None:
    job = JOB._replace(folder=folder)
    run_objects.summary_line(job)
    run_objects.read_job(job)


def make_split(folder: Path) -> Path:
    make_mvtec(folder / "nut", {"hole": 3})
    names = [f"test/hole/00{i}.png" for i in range(3)]
    write_json(folder / "split.json", {"train": names[:1], "test": names[1:2], "skipped": names[2:]})
    return folder / "split.json"


def read_split(folder: Path) -> None:
    split_rows(read_object(folder / "nut", "nut").rows, folder / "nut", str(folder / "split.json"))


def make_table(kind: str) -> Callable[[Path], Path]:
    return in_folder(lambda root: make_metadata(root, kind), f"nut/{kind}")


def make_visa_table(folder: Path) -> Path:
    root = make_visa(folder / "nut")
    lines = [f"nut/Data/Images/Anomaly/00{i}.JPG,bent,nut/Data/Masks/Anomaly/00{i}.png" for i in range(2)]
    (root / "image_anno.csv").write_text("\n".join(["image,label,mask", *lines, ""]))
    return root / "image_anno.csv"


def make_export(folder: Path) -> Path:
    for number in range(2):
        write_image(folder / f"photos/{number:03d}.png")
    return make_generated(folder / "generated", 2) / "manifest.jsonl"


TARGETS = {
    "plan": Target(make_run("plan.jsonl"), read_run),
    "settings": Target(make_run("settings.json"), read_run),
    "manifest": Target(make_run("manifest.jsonl"), read_run),
    "speed": Target(make_run("speed.json"), read_run),
    "losses": Target(make_losses, read_losses),
    "checkpoint": Target(make_checkpoint("manifest.json"), read_checkpoint),
    "state": Target(make_checkpoint("state.json"), read_state),
    "unet": Target(make_base("unet/config.json"), read_base_folder),
    "vae": Target(make_base("vae/config.json"), read_base_folder),
    "text_encoder": Target(make_base("text_encoder/config.json"), read_base_folder),
    "scheduler": Target(make_base("scheduler/scheduler_config.json"), read_base_folder),
    "tokenizer": Target(make_base("tokenizer/tokenizer_config.json"), read_tokenizer),
    "index": Target(make_index, lambda folder: base_files.weight_files(folder, "unet", None)),
    "digest": Target(make_digest, lambda folder: base_files.cached_digest(folder / "weights")),
    "cases": Target(make_cases, read_cases),
    "misses": Target(make_misses, use_misses),
    "detector": Target(make_detector, read_detector),
    "recipe": Target(
        make_recipe,
        lambda folder: checkpoints.check_identity(read_json(folder / "options.json", Schema, "DF310"), RECIPE),
    ),
    "card": Target(make_card, lambda folder: add_results(folder, "other", {"pixel_ap": ("pixel AP", 0.5)})),
    "job": Target(make_job, read_job),
    "split": Target(make_split, read_split),
    "record": Target(make_lora("defectfill", RECORD), read_header("defectfill")),
    "peft header": Target(make_lora("lora_adapter_metadata", PEFT), read_header("lora_adapter_metadata")),
    "adapter_config": Target(
        make_lora("adapter_config.json", {k.partition(".")[2]: v for k, v in PEFT.items()}), read_adapter
    ),
    "export": Target(make_export, lambda folder: read_generated(folder / "generated", False)),
    "coco": Target(in_folder(make_coco, "nut/annotations/instances.json"), read_dataset),
    "labelme": Target(in_folder(make_labelme, "nut/*.json"), read_dataset),
    "voc": Target(in_folder(make_voc, "nut/Annotations/two.xml"), read_dataset),
    "voc labelmap": Target(in_folder(make_voc_masks, "nut/labelmap.txt"), read_dataset),
    "labelme 3": Target(
        in_folder(make_labelme_3, "nut/**/outline.xml"), functools.partial(read_dataset, layout="voc")
    ),
    "cvat": Target(in_folder(make_cvat, "nut/*.xml"), read_dataset),
    "datumaro": Target(in_folder(make_datumaro, "nut/**/*.json"), read_dataset),
    "label studio": Target(in_folder(make_label_studio, "nut/*.json"), read_dataset),
    "yolo": Target(in_folder(make_yolo, "nut/labels/*.txt"), read_dataset),
    "yolo names": Target(in_folder(make_yolo, "nut/*.yaml"), read_dataset),
    "metadata.csv": Target(make_table("metadata.csv"), read_dataset),
    "metadata.jsonl": Target(make_table("metadata.jsonl"), read_dataset),
    "visa": Target(make_visa_table, read_dataset),
    "dagm": Target(in_folder(make_dagm, "nut/**/Labels.txt"), read_dataset),
    "real_iad": Target(in_folder(make_real_iad, "realiad_jsons/nut.json"), read_dataset),
}


# ---------------------------------------------------------------------------------------------------------------------
# Mutations

ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**12, 10**400, -(10**30), 0.5, 1e308, -1e308, float("nan"),
    float("inf"), 1e-320, "", "x", "x" * 3000, "\0", "../../../etc/passwd", "/dev/zero", "\x1b[31mred", "\ud7ff", "é",
    "(a+)+$", "^(.*)*$", "12", "p.bin", [], {}, [[]], [None], {"": {}}, [1, 2, 3], ["a"] * 5000, [0.5] * 3,
]  # fmt: skip


def nested(levels: int, kind: str) -> str:
    return "[" * levels + "]" * levels if kind == "list" else '{"a":' * levels + "1" + "}" * levels


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Damage that knows nothing of the format."""
    at, to = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    choices: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[:at] + content[to:],
        lambda: content[:at] + content[at:to] * rng.choice((2, 9)) + content[to:],
        lambda: content[:at] + bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 64)))) + content[at:],
        lambda: bytes(b ^ (rng.randrange(256) if rng.random() < 0.02 else 0) for b in content),
        lambda: content[:at] + b"\0" * rng.choice((1, 4096)) + content[at:],
        lambda: content.decode(errors="replace").encode(rng.choice(("utf-16", "utf-32", "utf-16-le", "cp037"))),
        lambda: rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0")) + content,
        lambda: content[:at] + "ü".encode("latin-1") + content[at:],
        lambda: b"",
        lambda: nested(rng.choice((150, 300, 5000, 100_000)), rng.choice(("list", "dict"))).encode(),
        lambda: content[:at] + nested(rng.choice((150, 5000)), "list").encode() + content[to:],
        lambda: content[:at] + b"<a>" * 20_000 + content[to:],
        lambda: content[:at] + b"\n- " * 2000 + content[to:],
        lambda: content[:at] + b"9" * rng.choice((20, 400, 5000)) + content[at:],
        lambda: content[::-1],
        lambda: content.replace(b"\n", b"\r"),
    ]
    return rng.choice(choices)()


def mutate_words(rng: random.Random, content: bytes) -> bytes:
    """One or a few words or numbers of the text changed."""
    text = content.decode(errors="replace")
    for _ in range(rng.choice((1, 1, 3))):
        words = [*re.finditer(r"[\w.\-]+|[^\w\s]", text)]
        if words:
            word, new = rng.choice(words), rng.choice(ODD)
            shown = new if isinstance(new, str) else json.dumps(new)
            text = text[: word.start()] + rng.choice((shown, "", word[0] * 2)) + text[word.end() :]
    return text.encode(errors="replace")


def places(value: object) -> Iterator[tuple[object, object]]:
    """(container, key) of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """Values of other types, keys gone or new, in JSON that is well formed."""
    lines = content.splitlines() if content.count(b"\n{") else [content]
    at = rng.randrange(len(lines))
    value = json.loads(lines[at])
    for _ in range(rng.choice((1, 1, 1, 3))):
        found = [*places(value)]
        if not found:
            break
        holder, key = rng.choice(found)
        action = rng.choice(("odd", "odd", "odd", "delete", "rename", "wrap", "text", "huge", "copy"))
        if action == "odd":
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif action == "delete":
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[rng.choice([o for o in ODD if isinstance(o, str)])] = holder.pop(key)
        elif action == "wrap":
            holder[key] = [holder[key]]
        elif action == "text":
            holder[key] = str(holder[key])
        elif action == "huge" and len(json.dumps(holder[key])) < 500:
            holder[key] = [holder[key]] * 2000
        elif action == "copy":
            holder[key] = copy.deepcopy(rng.choice(found)[0] if len(json.dumps(value)) < 10_000 else None)
    lines[at] = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="replace")
    return b"\n".join(lines) + b"\n"


def mutate(rng: random.Random, content: bytes) -> bytes:
    try:
        json.loads(content.splitlines()[0] if content.count(b"\n{") else content)
        kind = rng.choice((mutate_json, mutate_json, mutate_words, mutate_bytes))
    except ValueError:
        kind = rng.choice((mutate_words, mutate_words, mutate_bytes))
    return kind(rng, content)


# ---------------------------------------------------------------------------------------------------------------------
# Trials


def escapes(text: str) -> bool:
    """Whether a message could command a terminal."""
    return any(not (c.isprintable() or c == "\n") for c in text)


class Hang(BaseException):
    """No code that is tried may catch it."""


def attempt(target: Target, folder: Path) -> str | None:
    """What is wrong with how a changed file is read: the last lines of a traceback, or None."""

    def stop(*_: object) -> None:
        raise Hang

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    for timer, seconds in LIMITS.items():
        signal.setitimer(timer, seconds)
    try:
        target.read(folder)
    except InputError as error:
        return f"escape codes in {error.problems[0].code}" if escapes(str(error)) else None
    except Hang:
        return "a hang: " + "".join(traceback.format_exc().splitlines(keepends=True)[-8:])
    except Exception:
        return "".join(traceback.format_exc().splitlines(keepends=True)[-6:])
    finally:
        for timer in LIMITS:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return None


def fuzz(name: str, trials: range, seed: int, folder: Path) -> Iterator[tuple[int, bytes, str]]:
    """Tries a target; yields number, content and what is wrong of each trial that fails.

    Raises:
        AssertionError: the unchanged file is not read.
    """
    target = TARGETS[name]
    folder.mkdir()
    file = target.make(folder)
    if "*" in str(file):
        file = sorted(folder.glob(file.relative_to(folder).as_posix()))[0]
    content = file.read_bytes()
    kept = folder.with_name(f"{folder.name}-kept")
    shutil.copytree(folder, kept)
    target.read(folder)
    outside = not file.is_relative_to(folder)
    for number in trials:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        changed = mutate(random.Random(f"{seed} {name} {number}"), content)
        file.write_bytes(changed)
        wrong = attempt(target, folder)
        if wrong:
            yield number, changed, wrong
    if outside:
        file.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    datasets.disable_progress_bars()
    faulthandler.dump_traceback_later(3600, exit=True)
    each, failed, began = -(-args.trials // len(args.target)), 0, time.monotonic()
    for name in args.target:
        with tempfile.TemporaryDirectory() as place:
            start, kinds = time.monotonic(), collections.Counter[str]()
            for number, content, wrong in fuzz(name, range(each), args.seed, Path(place, "x")):
                kinds[wrong.splitlines()[-1][:150]] += 1
                if kinds[wrong.splitlines()[-1][:150]] == 1:
                    print(f"--- {name} {number}: {content[:300]!r}\n{wrong}")
            failed += kinds.total()
            print(f"{name}: {each} trials, {kinds.total()} failed, {time.monotonic() - start:.0f} s", flush=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    took = f"{time.monotonic() - began:.0f} s, {memory:.1f} GiB"
    print(f"{each * len(args.target)} trials, {failed} failed, {took}, {ROOT}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
