"""Check this machine's GPU: do training and generation run, how fast, in how much memory, with which flags.

    python scripts/gpu_check.py --output_dir gpu-check
    python scripts/gpu_check.py --output_dir gpu-check --minutes 10 --only train-bf16-b1 generate

Each step runs the real commands in a process of its own with a time limit. When it ends, results.jsonl gets its line
and gpu_check.md, the page to read, is updated. The most useful steps come first; those that no longer fit into
--minutes are skipped. Nothing is downloaded: the images are synthetic, and speed and memory are measured on random
weights of Stable Diffusion 2's size. Without a GPU, only the steps with the small base run.
"""

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from defectfill.markdown import markdown_table


SMALL_BASE = Path(__file__).resolve().parent / "tiny_base"
COMMANDS = ("train_defectfill", "generate_defectfill", "defectfill_scripts.make_demo_data")
OPTIONAL = ("bitsandbytes", "xformers")  # libraries that use CUDA when they are imported
DRAWN = 128  # px a side of the drawn images
CARDS = (6, 8, 12, 16, 24)  # GB, of the page's advice
OVERHEAD = 0.7  # GiB that CUDA itself and a desktop take
WORK = ".tmp-defectfill-gpu-check"  # a folder that is deleted, with a name that nothing else has
CPU_TOLERANCE = 0.01  # of a loss; cuDNN's convolutions are in TF32


class Sizes(NamedTuple):
    """How much work the steps do."""

    small_resolution: int = 128  # of the steps with the small base
    small_steps: int = 20
    resolution: int = 512
    steps: int = 15
    images: int = 4
    candidates: int = 8
    inference_steps: int = 50
    fast_steps: int = 20


TOY = Sizes(
    small_resolution=32,
    small_steps=12,
    resolution=32,
    steps=7,
    images=1,
    candidates=2,
    inference_steps=2,
    fast_steps=2,
)


class Step(NamedTuple):
    """A step: what it does, and the flags that make it what it is."""

    run: Callable  # (check, name, flags) -> what was measured
    flags: str = ""
    limit: int = 120  # seconds


class StepError(Exception):
    """A step that did not end well: `status` is failed, timeout, out of memory, refused, not available or skipped."""

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------------------------------
# Child processes


def preload() -> None:
    """Imports the commands and their libraries, so that a forked child need not.

    Without bitsandbytes and xformers: they use CUDA at import, after which no forked child could.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whether there is a GPU is asked of the driver, not of CUDA
    sys.modules |= dict.fromkeys(OPTIONAL)  # type: ignore[arg-type]
    for name in COMMANDS:
        importlib.import_module(name)
    for name in OPTIONAL:
        del sys.modules[name]


def child(log: Path, result: Path, call: Callable, given: tuple) -> None:
    """The child: all it prints goes into the log, what `call` returns into the result as JSON."""
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    result.write_text(json.dumps(call(*given)))


def run_command(module: str, argv: list[str], environment: dict[str, str]) -> dict:
    """Runs a command as `python FILE ARGV` would; on CUDA returns its peak memory."""
    import torch

    from defectfill.runs.speed import peak_memory

    os.environ |= environment
    sys.argv[1:] = argv
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    return peak_memory(torch.device("cuda")) if torch.cuda.is_initialized() else {}


def describe_machine() -> dict:
    """The GPU, tried, and versions."""
    import torch

    from defectfill.runs.record import versions

    if torch.cuda._is_in_bad_fork():  # type: ignore[attr-defined]
        raise RuntimeError("CUDA was used before the fork")
    found = versions() | {"cpus": os.cpu_count(), "gpu": None}
    for name in ("torchvision", *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        torch.ones(8, device="cuda").sum().item()
        card = torch.cuda.get_device_properties(0)
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(ask, capture_output=True, text=True).stdout if shutil.which("nvidia-smi") else ""
        found |= {
            "gpu": card.name,
            "gpu_memory_gib": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
            "bf16": torch.cuda.is_bf16_supported(),
            "cuda": torch.version.cuda,
            "driver": driver.strip().splitlines()[0] if driver.strip() else None,
        }
    return found


def save_random_base(folder: str) -> dict:
    """Saves random weights of Stable Diffusion 2's size, made on the GPU."""
    import torch

    from defectfill.random_base import random_sd2_pipeline

    random_sd2_pipeline(torch.device("cuda"), torch.bfloat16).save_pretrained(folder)
    return {"gib_on_disk": round(sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors")) / 2**30, 2)}


def kill_group(pid: int | None) -> None:
    """Ends a child and its children."""
    with contextlib.suppress(ProcessLookupError):
        if pid:
            os.killpg(pid, signal.SIGKILL)


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def failure(log: Path) -> StepError:
    """Why the child of this log ended."""
    text, line = log.read_text(errors="replace"), last_line(log)
    if "unrecognized arguments" in line:
        return StepError("not available", line.partition("error: ")[2])
    if "OutOfMemoryError" in text:
        return StepError("out of memory", line)
    refused = re.search(r"\bDF(?!32[34])\d{3}\b", line)  # those two are of runs that had begun
    return StepError("refused" if refused else "failed", line)


# ---------------------------------------------------------------------------------------------------------------------
# The check


class Check:
    """Where the check works, how long it may, and what the steps share, each made when it is first needed."""

    def __init__(self, output_dir: Path, sizes: Sizes, base: str | None, minutes: float):
        self.output_dir, self.work, self.logs = output_dir, output_dir / WORK, output_dir / "logs"
        self.sizes, self.given_base = sizes, base
        self.start_method = "fork"
        self.machine: dict = {}
        self.step_ends = self.ends = time.monotonic() + 60 * minutes
        self.step_name = ""

    def call(self, function: Callable, *given, stop: Callable[[], bool] = lambda: False) -> dict:
        """What `function` returns in a child; {} if `stop` ended it.

        Raises:
            StepError: it failed or took too long.
        """
        log, result = self.logs / f"{self.step_name}.log", self.work / "result.json"
        log.touch(), result.unlink(missing_ok=True)
        context = multiprocessing.get_context(self.start_method)
        process = context.Process(target=child, args=(log, result, function, given))
        process.start()
        try:
            while process.is_alive():
                if stop():
                    return {}
                if time.monotonic() > self.step_ends:
                    raise StepError("timeout", f"ended by its time limit; last line: {last_line(log)}")
                process.join(0.02)
        finally:
            kill_group(process.pid)
            process.kill(), process.join()
        if process.exitcode or not result.exists():
            raise failure(log)
        return json.loads(result.read_text())

    def command(self, module: str, argv: str, stop: Callable[[], bool] = lambda: False, **environment: str) -> dict:
        return self.call(run_command, module, argv.split(), environment, stop=stop)

    def pictures(self, size: int) -> str:
        """A folder of drawn nuts with holes, and good ones."""
        folder = self.work / f"pictures-{size}"
        if not folder.exists():
            from defectfill.drawn.parts import enlarge

            drawn = min(size, DRAWN)
            argv = f"--size {drawn} --parts nut --defects 3 --good {self.sizes.images} --output_dir {folder}"
            self.command("defectfill_scripts.make_demo_data", argv)
            self.call(enlarge, str(folder), size)
        return f"{folder}/nut"

    @functools.cached_property
    def base(self) -> str:
        """The base model whose speed is measured."""
        if self.given_base:
            return self.given_base
        if not self.machine.get("gpu"):
            raise StepError("skipped", "no GPU; --base scripts/tiny_base measures the small base")
        folder = self.work / "sd2-random"
        self.call(save_random_base, str(folder))
        return str(folder)

    @functools.cached_property
    def lora(self) -> str:
        """A LoRA of the base."""
        found = sorted(self.work.glob("train-*/pytorch_lora_weights.safetensors"))
        if found:
            return str(found[0].parent)
        self.command("train_defectfill", self.training("lora", self.base, self.sizes.resolution, "", steps=1))
        return str(self.work / "lora")

    def training(self, name: str, base: str | Path, resolution: int, flags: str, steps: int) -> str:
        """The flags of a training."""
        return f"""--pretrained_model_name_or_path {base} --train_data_dir {self.pictures(resolution)} --defect hole
            --split all --zoom off --resolution {resolution} --max_train_steps {steps} --validation_steps 0
            --report_to none --seed 0 --checkpointing_steps 1000000 --output_dir {self.work / name} {flags}"""

    def losses(self, name: str) -> list[float]:
        """Of each step of a training, all of them there and finite."""
        lines = list(map(json.loads, (self.work / name / "losses.jsonl").read_text().splitlines()))
        losses = [line["loss"] for line in lines]
        if [line["step"] for line in lines] != [*range(1, len(lines) + 1)] or None in losses:
            raise StepError("failed", f"losses of steps {[line['step'] for line in lines]}: {losses}")
        return losses


def environment(check: Check, name: str, flags: str) -> dict:
    """Looks at the machine. If a forked child cannot use its GPU, each child imports the libraries for itself."""
    limit, check.step_ends = check.step_ends, min(check.step_ends, time.monotonic() + 30)
    try:
        check.machine = check.call(describe_machine)
    except StepError:
        check.start_method, check.step_ends = "spawn", limit
        check.machine = check.call(describe_machine)
        if not check.machine["gpu"]:
            check.start_method = "fork"
    return check.machine | {"start_method": check.start_method}


def killed_and_resumed(check: Check, name: str, flags: str) -> dict:
    """A training with the small base, killed after its first checkpoint, resumed to its end."""
    often = f"{flags} --checkpointing_steps 5 --checkpoints_total_limit 2"
    size, output = check.sizes.small_resolution, check.work / name
    endless = check.training(name, SMALL_BASE, size, often, steps=100_000)
    check.command("train_defectfill", endless, stop=lambda: any(output.glob("checkpoint-*5")))
    resumed = check.training(
        name, SMALL_BASE, size, f"{often} --resume_from_checkpoint latest", check.sizes.small_steps
    )
    check.command("train_defectfill", resumed)
    losses = check.losses(name)
    if len(losses) != check.sizes.small_steps:
        raise StepError("failed", f"{len(losses)} steps of {check.sizes.small_steps} in losses.jsonl")
    return {"first_loss": losses[0], "last_loss": losses[-1]}


def same_as_cpu(check: Check, name: str, flags: str) -> dict:
    """The losses of five fp32 steps on this device and on the CPU, which have to agree."""
    losses = []
    for device, environment in (("device", {}), ("cpu", {"ACCELERATE_USE_CPU": "true"})):
        run = f"{name}-{device}"
        check.command(
            "train_defectfill", check.training(run, SMALL_BASE, check.sizes.small_resolution, flags, 5), **environment
        )
        losses.append(check.losses(run))
    difference = max(abs(a - b) / abs(b) for a, b in zip(*losses))
    if difference > CPU_TOLERANCE:
        raise StepError("failed", f"losses on the GPU {losses[0]}, on the CPU {losses[1]}")
    return {"largest_difference": float(f"{difference:.2g}")}


def make_base(check: Check, name: str, flags: str) -> dict:
    """The base that is measured, and the pictures."""
    check.pictures(check.sizes.resolution)
    return {"base": Path(check.base).name}


def train(check: Check, name: str, flags: str) -> dict:
    """A short training; seconds a step and peak memory by its own record."""
    check.command(
        "train_defectfill", check.training(name, check.base, check.sizes.resolution, flags, check.sizes.steps)
    )
    losses = check.losses(name)
    record = json.loads((check.work / name / "run_record.json").read_text())
    speed, batch_size = record["speed"], record["options"]["train_batch_size"]
    rate = {"samples_per_second": round(batch_size / speed["seconds_per_step"], 2), "batch_size": batch_size}
    return speed | rate | {"last_loss": losses[-1]}


def generate(check: Check, name: str, flags: str) -> dict:
    """Generates images; seconds an image by its own record, without loading and the first batch."""
    sizes = check.sizes
    argv = f"""--lora {check.lora} --image {check.pictures(sizes.resolution)}/train/good --mask_source random
        --zoom off --num_images {sizes.images} --num_candidates {sizes.candidates}
        --num_inference_steps {sizes.inference_steps} --selection rmse --seed 0 --output_dir {check.work / name}
        {flags}"""
    peaks = check.command("generate_defectfill", argv)
    speed = json.loads((check.work / name / "speed.json").read_text())
    seconds = speed["warm_seconds_per_image"] or speed["seconds_per_image"]
    return {"seconds_per_image": seconds, "first_batch_seconds": speed["first_batch_seconds"], **peaks}


BF16 = "--mixed_precision bf16 --train_batch_size"
# In order of worth. Flags that a command does not know are reported as not available.
STEPS: dict[str, Step] = {
    "environment": Step(environment),
    "small-fp16": Step(killed_and_resumed, "--mixed_precision fp16"),
    "small-bf16": Step(killed_and_resumed, "--mixed_precision bf16"),
    "base": Step(make_base),
    "train-bf16-b1": Step(train, f"{BF16} 1"),
    "train-bf16-b4": Step(train, f"{BF16} 4"),
    "generate": Step(generate),
    # One variant of each image, so that the cache is full before the steps that count.
    "train-cached-b4": Step(train, f"{BF16} 4 --cache_latents 1"),
    "train-bf16-b2": Step(train, f"{BF16} 2"),
    "train-checkpointing-b1": Step(train, f"{BF16} 1 --gradient_checkpointing"),
    "train-cached-b1": Step(train, f"{BF16} 1 --cache_latents 1"),
    "generate-fast": Step(generate, "--scheduler unipc --num_inference_steps {fast_steps}"),
    "small-8bit": Step(killed_and_resumed, "--mixed_precision bf16 --use_8bit_adam"),
    "train-fp16-b1": Step(train, "--mixed_precision fp16 --train_batch_size 1"),
    "train-checkpointing-b4": Step(train, f"{BF16} 4 --gradient_checkpointing"),
    "train-cached-b2": Step(train, f"{BF16} 2 --cache_latents 1"),
    # Half of it runs on the CPU.
    "small-fp32": Step(same_as_cpu, "--mixed_precision no --lora_dropout 0 --lr_warmup_steps 0"),
    "train-8bit-b1": Step(train, f"{BF16} 1 --use_8bit_adam"),
    "generate-fuse-lora": Step(generate, "--fuse_lora"),
    "train-compile-b4": Step(train, f"{BF16} 4 --torch_compile", 240),
    "train-channels-last-b4": Step(train, f"{BF16} 4 --channels_last"),
    "generate-channels-last": Step(generate, "--channels_last"),
    "generate-b16": Step(generate, "--batch_size 16"),
    "generate-b4": Step(generate, "--batch_size 4"),
    "generate-compile": Step(generate, "--fuse_lora --torch_compile", 240),
    "train-xformers-b1": Step(train, f"{BF16} 1 --enable_xformers_memory_efficient_attention"),
    "generate-half-guidance": Step(generate, "--guidance_interval 0 0.5"),
}


def run_step(check: Check, name: str, expected: float) -> dict:
    """The result of a step: name, ok, status, seconds, what was measured or the error."""
    step, began = STEPS[name], time.monotonic()
    flags = step.flags.format(**check.sizes._asdict())
    check.step_name, check.step_ends = name, min(check.ends, began + step.limit)
    method = check.start_method
    if "xformers" in step.flags or "8bit" in step.flags:
        check.start_method = "spawn"  # a forked child's diffusers was imported without these libraries
    result = {"name": name, "ok": False, "status": "ok", "flags": flags}
    (check.logs / f"{name}.log").unlink(missing_ok=True)  # of an earlier check
    try:
        if began + expected > check.ends:
            raise StepError("skipped", "no time left; raise --minutes or choose with --only")
        result |= step.run(check, name, flags)
        result["ok"] = True
    except StepError as error:
        result |= {"status": error.status, "error": str(error)}
    except Exception as error:  # a result that cannot be read is this step's failure, not the check's end
        result |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    if name != "environment":
        check.start_method = method
    return result | {"seconds": round(time.monotonic() - began, 1)}


# ---------------------------------------------------------------------------------------------------------------------
# The page

COLUMNS = {
    "seconds_per_step": "s a step", "samples_per_second": "samples a s", "seconds_per_image": "s an image",
    "peak_memory_gib": "peak GiB", "peak_reserved_gib": "reserved GiB", "seconds": "whole step, s",
}  # fmt: skip


def describe(result: dict) -> str:
    """What a result says besides the columns."""
    if not result["ok"]:
        return f"{result['status']}: {result['error']}"
    names = ("first_loss", "last_loss", "largest_difference", "first_batch_seconds")
    return ", ".join(f"{name.replace('_', ' ')} {result[name]:.4g}" for name in names if name in result) or "ok"


def advice(results: list[dict]) -> list[str]:
    """For each size of card the fastest training and generation whose memory fits."""
    rows = [["card", "training, fastest that fits", "generation, fastest that fits"]]
    measured = [result for result in results if result.get("peak_reserved_gib")]
    for card in CARDS:
        fitting = [r for r in measured if r["peak_reserved_gib"] + OVERHEAD <= card]
        cells = []
        for key, sign in (("samples_per_second", 1), ("seconds_per_image", -1)):
            best = max((r for r in fitting if key in r), key=lambda r: sign * r[key], default=None)
            cells.append(
                f"`{best['flags'] or 'no flags'}` ({best['peak_reserved_gib']} GiB)" if best else "none measured"
            )
        rows.append([f"{card} GB", *cells])
    note = f"Reserved memory and {OVERHEAD} GiB for CUDA and a desktop, as measured on this card."
    return [*markdown_table(rows).splitlines(), "", note] if measured else ["No memory was measured."]


def page(check: Check, results: list[dict]) -> str:
    """gpu_check.md."""
    machine, sizes = check.machine, check.sizes
    card = machine.get("gpu")
    title = f"{card}, {machine['gpu_memory_gib']} GiB, driver {machine['driver']}" if card else "no GPU: on the CPU"
    base = check.given_base or "random weights of Stable Diffusion 2's size"
    rows = [
        [f"`{r['name']}`", describe(r).replace("|", "/"), *(str(r.get(key, "")) for key in COLUMNS)]
        for r in results
        if r["name"] != "environment" or not r["ok"]
    ]
    return "\n".join([
        "# GPU check", "", title, "",
        ", ".join(f"{k} {v}" for k, v in machine.items() if v is not None and "gpu" not in k), "",
        f"Training and generation: {base}, {sizes.resolution} px; an image is the best by RMSE of {sizes.candidates} "
        f"candidates of {sizes.inference_steps} steps. Steps named small: the small base, "
        f"{sizes.small_resolution} px.", "",
        markdown_table([["step", "result", *COLUMNS.values()], *rows]),
        "## Which flags fit", "", *advice(results), "",
    ])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output_dir", type=Path, metavar="DIR", default=Path("gpu-check"), help="Default: %(default)s.")
    add(
        "--minutes",
        type=float,
        default=3,
        metavar="N",
        help="Time limit for all steps together, imports excluded. Default: %(default)s.",
    )
    add("--only", nargs="+", choices=STEPS, metavar="NAME", help="Run only these steps. Default: all.")
    add("--base", metavar="DIR", help="Inpainting model to measure. Default: random weights of SD 2's size.")
    add("--toy", action="store_true", help="Use tiny images and few steps, to try out the check itself.")
    add("--list", action="store_true", help="List the steps with their flags and exit.")
    return parser.parse_args(input_args)


def check_output(folder: Path) -> None:
    """Ends the command if the folder holds results that are not of this script, or cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, begins in (("results.jsonl", b'{"name": "environment"'), ("gpu_check.md", b"# GPU check")):
            file = folder / name
            if file.exists() and not (file.is_file() and file.read_bytes()[: len(begins)] in (b"", begins)):
                sys.exit(f"{json.dumps(str(file))} is not of this script; choose another --output_dir")
    except OSError as error:
        sys.exit(f"--output_dir {json.dumps(str(folder))} cannot be used: {error.strerror}")


def main(args: argparse.Namespace) -> None:
    if args.list:
        for name, step in STEPS.items():
            print(f"{name:24} {step.flags}")
        return
    check_output(args.output_dir)
    preload()
    check = Check(args.output_dir.resolve(), TOY if args.toy else Sizes(), args.base, args.minutes)
    shutil.rmtree(check.work, ignore_errors=True)
    for folder in (check.work, check.logs):
        folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that no child is left running
    results: list[dict] = []
    expected: dict[Callable, float] = {}  # seconds of the last step of its kind
    with (args.output_dir / "results.jsonl").open("w") as file:
        for name in dict.fromkeys(["environment", *(args.only or STEPS)]):
            result = run_step(check, name, expected.get(STEPS[name].run, 0))
            results.append(result)
            if result["ok"]:
                expected[STEPS[name].run] = result["seconds"]
            print(json.dumps(result), file=file, flush=True)
            os.fsync(file.fileno())
            print(json.dumps(result), flush=True)
            (args.output_dir / "gpu_check.md").write_text(page(check, results))
    shutil.rmtree(check.work, ignore_errors=True)
    print(f"{args.output_dir / 'gpu_check.md'}: the page to read; results.jsonl and logs/ are beside it")
    if any(result["status"] in ("failed", "timeout") for result in results):
        sys.exit(1)


def command() -> None:
    main(parse_args())


if __name__ == "__main__":
    command()
