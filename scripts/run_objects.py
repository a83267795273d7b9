"""Train a LoRA and generate images for each object and defect type of a dataset; a run that was killed goes on.

    python scripts/run_objects.py mvtec --output_dir runs --num_images 500 \\
        --train_args="--mixed_precision bf16 --validation_steps 0" --generate_args="--batch_size 32"

Each object and defect type is a job with a folder of its own, OUTPUT/OBJECT/DEFECT: lora/ and generated/ as the two
commands write them, the log of each, the good images as links, and job.json, which says what is done. Jobs that fail
are listed at the end, with exit status 1; the others go on. summary.csv has a line for each job. The same command
again does only what is not done.

Images are generated on the object's good images, those for training if its folders tell, and with masks like those of
the training defects.
"""

import argparse
import csv
import hashlib
import itertools
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import defectfill.quiet  # noqa: F401

import filelock
import torch

from defectfill.base_model import read_local_base
from defectfill.runs import signals
from defectfill.runs.disks import told_if_unwritable
from defectfill.runs.files import LONGEST_NAME, atomic_write, exclusive_lock, write_json
from defectfill.runs.flags import parse_generation_args, parse_training_args, refuse_flags
from defectfill_dataset import InputError, MaskClasses, Problem, file_digest, find_objects, single_types
from defectfill_dataset.commands import (
    Parser,
    add_reading_flags,
    exit_on_input_error,
    quoted_flags,
    reading_arguments,
    say,
)
from defectfill_dataset.errors import did_you_mean, one_line
from defectfill_dataset.readers import Row, read_object, relative
from defectfill_dataset.readers.rows import split_of
from defectfill_dataset.splits import SPLIT_RULES, split_rows
from defectfill_dataset.text import Schema, read_bytes, read_json


STAGES = {"train": "lora", "generate": "generated"}  # and the folder that each writes
COMMANDS = {stage: [sys.executable, "-m", f"{stage}_defectfill"] for stage in STAGES}
COLUMNS = ["object", "defect", "status", "train_seconds", "generate_seconds", "images"]
SUMMARY, JOB = "summary.csv", "job.json"
MOST_PROCESSES = 1000
PATIENCE = 60  # seconds for the command of a start that was killed to write its checkpoint


class Job(NamedTuple):
    """One defect type of one object."""

    object: str
    defect: str
    folder: Path
    good: dict[str, Path]  # good images to generate on, by the names they get
    sha256: str  # of what is learnt from, and of the names and sizes of the good images

    @property
    def name(self) -> str:
        return f"{self.object}/{self.defect}"


class Stage(Schema):
    """What job.json holds of a command: how it was called, the seconds of all its starts, and if it is done."""

    command: list[str]
    seconds: float
    done: bool
    inputs_sha256: str | None = None  # none in earlier versions


class JobFile(Schema):
    """job.json."""

    train: Stage | None = None
    generate: Stage | None = None
    failed: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """A job for each object and defect type with a training image.

    Raises:
        InputError: all that is wrong with the names and annotations; images are checked by the jobs.
    """
    objects = find_objects(args.data_dir, args.layout)
    problems = [
        Problem("DF162", f"--objects {name}", f"not in {args.data_dir}.{did_you_mean(name, objects)}")
        for name in args.objects or ()
        if name not in objects
    ]
    jobs: list[Job] = []
    for name in objects:
        if name not in (args.objects or objects):
            continue
        root = objects[name]
        reading = read_object(root, name, args.layout, MaskClasses.parse(args.mask_classes))
        problems += [] if args.skip_problems else reading.problems
        splits = split_rows(reading.rows, root, args.split)
        good = {relative(row.image, root): row.image for row in splits["good"]}
        for_training = {k: v for k, v in good.items() if split_of(*k.split("/")) == "train"}
        good = {k.replace("/", "-"): v for k, v in (for_training or good).items()}
        for image in (image for name, image in good.items() if len(os.fsencode(name)) > LONGEST_NAME):
            problems.append(Problem("DF202", image, "its path gives too long a name", "move or rename it"))
        defects = single_types(row.defect for row in splits["train"])
        if not defects:
            problems.append(Problem("DF163", root, "no defect images", f"leave out {name}, with --objects"))
        if not good and "--image" not in shlex.split(args.generate_args):
            fix = "add some, or give --image in --generate_args"
            problems.append(Problem("DF160", root, "holds no good images to generate on", fix))
        folders = {defect: args.output_dir / name / re.sub(r"[^\w-]+", "_", defect) for defect in defects}
        if not problems:
            jobs += [
                Job(name, defect, folder, good, inputs_digest(root, splits["train"], defect, good))
                for defect, folder in folders.items()
            ]
        for one, other in itertools.combinations(defects, 2):
            if folders[one] == folders[other]:
                what = f"{one!r} and {other!r} would have one folder"
                problems.append(Problem("DF162", root, what, "rename one"))
    if problems:
        raise InputError(*problems)
    return jobs


def inputs_digest(root: Path, rows: Sequence[Row], defect: str, good: dict[str, Path]) -> str:
    """What changes with the images and masks of a type, and with the list of good images."""
    digest = hashlib.sha256()
    for row in sorted((row for row in rows if row.defect == defect), key=lambda row: row.image):
        masks = "".join(map(file_digest, row.mask.paths)) or repr(row.mask)
        digest.update(f"{relative(row.image, root)} {file_digest(row.image)} {masks}\n".encode(errors="replace"))
    for name, image in sorted(good.items()):
        digest.update(f"{name} {image.stat().st_size if image.is_file() else None}\n".encode(errors="replace"))
    return digest.hexdigest()


def arguments(job: Job, args: argparse.Namespace) -> dict[str, list[str]]:
    """The arguments of each stage's command.

    Raises:
        InputError: --train_args or --generate_args hold a flag that is set here (DF188).
    """
    reading = [f"--object={job.object}", "--split", args.split, *reading_arguments(args)]
    lora, generated = (str(job.folder / folder) for folder in STAGES.values())
    ours = {
        "train": ["--train_data_dir", args.data_dir, f"--defect={job.defect}", *reading, "--output_dir", lora,
                  "--resume_from_checkpoint", "latest"],
        "generate": ["--lora", lora, "--reference_data", args.data_dir, *reading, "--num_images",
                     str(args.num_images), "--output_dir", generated],
    }  # fmt: skip
    given = {stage: getattr(args, f"{stage}_args") for stage in STAGES}
    problems = [p for stage, own in ours.items() for p in refuse_flags(f"--{stage}_args", given[stage], own)]
    if problems:
        raise InputError(*problems)
    first = {"train": [], "generate": ["--image", str(job.folder / "good")]}  # which the user may give otherwise
    return {stage: [*first[stage], *shlex.split(given[stage]), *ours[stage]] for stage in STAGES}


def read_job(job: Job) -> dict:
    """What job.json says, with all keys; raises InputError (DF310) if it is damaged."""
    file = job.folder / JOB
    found = read_json(file, JobFile, "DF310", "delete it; nothing is lost") if file.exists() else {}
    return {"train": None, "generate": None, "failed": False} | found


def to_do(job: Job, args: argparse.Namespace) -> dict[str, list[str]]:
    """The stages that are not done with these arguments, and all that follow them."""
    record = read_job(job)

    def is_done(item: tuple[str, list[str]]) -> bool:
        kept = record[item[0]]
        if not kept or not kept["done"] or kept["command"] != item[1]:
            return False
        return kept.get("inputs_sha256") in (None, job.sha256)

    return dict(itertools.dropwhile(is_done, arguments(job, args).items()))


# ---------------------------------------------------------------------------------------------------------------------
# Running


class Children:
    """The commands that are running. A signal stops them, training with a checkpoint; a second one kills them."""

    def __init__(self):
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.RLock()
        self.number, self.since = 0, 0.0  # of the first signal
        for number in signals.STOPPING:
            signal.signal(number, self.stop)

    def stop(self, number, frame) -> None:
        """The signal's handler."""
        # SIGUSR1 because the system may signal them too, and two others would end them without a checkpoint.
        passed_on = signals.GENTLE or signal.SIGTERM
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > signals.TOGETHER:  # not the same wish, sent twice
            passed_on = signal.SIGKILL
        with self.lock:
            for process in self.running:
                process.send_signal(passed_on)

    def run(self, command: list[str], log: Path, gpu: str | None) -> int:
        """The exit status of a command, whose output goes to the end of `log`; -1 if it was not started."""
        environment = os.environ | {signals.LAUNCHED: "1"} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        with log.open("ab") as stream:
            with self.lock:
                if self.number:
                    return -1
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment,
                    start_new_session=True,  # a Ctrl-C in the terminal is for this process alone
                )  # fmt: skip
                self.running.add(process)
            status = process.wait()
        with self.lock:
            self.running.remove(process)
        return status


def run_job(job: Job, args: argparse.Namespace, children: Children, gpu: str | None) -> str | None:
    """Runs what is not done of a job; returns why it failed, None if it did not."""
    try:
        with exclusive_lock(job.folder):
            return run_stages(job, args, children, gpu)
    except InputError as error:
        if error.problems[0].code == "DF191":
            say(f"{job.name}: another start of this script is at it")
            return None
        return error.text()


def run_stages(job: Job, args: argparse.Namespace, children: Children, gpu: str | None) -> str | None:
    """`run_job`, once the job's folder is locked."""
    for stage, argv in to_do(job, args).items():
        if stage == "generate":
            link_images(job)
        if (folder := job.folder / STAGES[stage]).exists():
            with suppress(filelock.Timeout), filelock.FileLock(folder / ".lock", timeout=PATIENCE):
                pass  # nobody writes there: the command of a start that was killed has ended
        log, began = job.folder / f"{stage}.log", time.monotonic()
        status = children.run([*COMMANDS[stage], *argv], log, gpu)
        record = read_job(job)
        seconds = time.monotonic() - began + (record[stage]["seconds"] if record[stage] else 0)
        record[stage] = {"command": argv, "seconds": round(seconds, 1), "done": status == 0}
        record[stage]["inputs_sha256"] = job.sha256
        if stage == "train" and record["generate"]:
            record["generate"]["done"] = False  # it was with another LoRA
        record["failed"] = bool(status) and not children.number
        write_json(job.folder / JOB, record)
        if status:
            return None if children.number else f"{stage} failed with status {status}: {last_line(log)} ({log})"
        say(f"{job.name}: {stage} done in {seconds:.0f} s")
    return None


def link_images(job: Job) -> None:
    """Makes good/ anew: `--image` takes one folder, and good images may lie in several, or beside others.

    Raises:
        InputError: it holds something else than links (DF192).
    """
    folder = job.folder / "good"
    if (
        folder.is_symlink()
        or folder.exists()
        and not (folder.is_dir() and all(f.is_symlink() for f in folder.iterdir()))
    ):
        raise InputError(Problem("DF192", folder, "is not of this script", "choose another --output_dir"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, image in job.good.items():
        (folder / name).symlink_to(image)


def last_line(log: Path) -> str:
    lines = log.read_bytes()[-10_000:].decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def gpu_names() -> list[str]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def write_summary(folder: Path, jobs: list[Job]) -> None:
    """summary.csv: a line for each job, of whatever share."""
    with filelock.FileLock(folder / ".lock"), atomic_write(folder / SUMMARY) as temporary:
        with temporary.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            for job in jobs:
                writer.writerow(summary_line(job))


def summary_line(job: Job) -> list:
    """The cells of a job under `COLUMNS`."""
    try:
        record = read_job(job)
    except InputError:
        return [job.object, job.defect, "failed", None, None, None]
    stages = [record[stage] or {"seconds": None, "done": False} for stage in STAGES]
    done = all(stage["done"] for stage in stages)
    status = "failed" if record["failed"] else "done" if done else "not done"
    images = len(list((job.folder / STAGES["generate"] / "images").glob("*.png")))
    return [job.object, job.defect, status, *(stage["seconds"] for stage in stages), images]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def shard(text: str) -> tuple[int, int]:
    """`I/N` as numbers."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text} must be I/N, with I from 0 to N - 1")
    return int(found[1]), int(found[2])


def slurm_shard() -> str:
    """The shard of a task of a SLURM array, 0/1 outside of one; no shard if numbers are missing between the tasks'."""
    given = {
        name: os.environ.get(f"SLURM_ARRAY_TASK_{name}") or default
        for name, default in (("ID", "0"), ("MIN", "0"), ("MAX", "0"), ("COUNT", "1"))
    }
    if not all(re.fullmatch("[0-9]{1,9}", value) for value in given.values()):
        return "a SLURM array without its numbers"
    task, first, last, count = map(int, given.values())
    return f"{task - first}/{count}" if last - first + 1 == count else "a SLURM array with gaps"


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("data_dir", metavar="DIR", help="Folder of one object, or a folder above several.")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="Folder of all jobs and of summary.csv.")
    add("--objects", nargs="+", metavar="NAME", help="Only these objects. Default: all.")
    add("--num_images", type=int, default=100, metavar="N", help="Images to generate for each job.")
    add(
        "--train_args",
        type=quoted_flags,
        default="",
        metavar="FLAGS",
        help="Flags for train_defectfill.py. Default: none.",
    )
    add(
        "--generate_args",
        type=quoted_flags,
        default="",
        metavar="FLAGS",
        help="Flags for generate_defectfill.py. Default: none.",
    )
    split_help = "Which defects train: auto, first_third or all, as in training."
    add("--split", choices=SPLIT_RULES, default="auto", help=split_help)
    add_reading_flags(add, "DIR")
    processes_help = "Jobs at once; each has one GPU, if there are any. Default: one for each GPU, or 1."
    add("--processes", type=int, metavar="N", help=processes_help)
    add(
        "--shard",
        type=shard,
        default=slurm_shard(),
        metavar="I/N",
        help="Do every N-th job, from job I on, counted from 0: one share for each of N machines with a common disk. "
        "Default: the task of a SLURM array, or all jobs.",
    )
    add("--plan", action="store_true", help="Print what is not done, with the commands, and do nothing.")
    args = parser.parse_args(input_args)
    for name in ("num_images", "processes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if (args.processes or 1) > MOST_PROCESSES:
        parser.error(f"--processes {args.processes}: must be at most {MOST_PROCESSES:,}")
    return args


def check_output(folder: Path) -> None:
    """Raises InputError (DF192) if the folder holds a summary that is not ours."""
    file = folder / SUMMARY
    try:
        ours = not file.exists() or read_bytes(file).startswith(",".join(COLUMNS).encode())
    except OSError:
        ours = False
    if not ours:
        raise InputError(Problem("DF192", file, "is not of this script", "choose another --output_dir"))


def print_plan(jobs: list[Job], args: argparse.Namespace) -> None:
    todo = [(job, stages) for job in jobs if (stages := to_do(job, args))]
    say(f"{len(jobs)} jobs, {len(jobs) - len(todo)} of them done")
    for job, stages in todo:
        commands = [["python", *COMMANDS[stage][1:], *argv] for stage, argv in stages.items()]
        say(job.name, *(f"    {shlex.join(words)}" for words in commands))


def main(args: argparse.Namespace) -> None:
    jobs = find_jobs(args)
    argv = arguments(jobs[0], args)
    training = parse_training_args("", argv["train"])  # wrong flags end it here
    parse_generation_args("", argv["generate"])
    if base := read_local_base(training.pretrained_model_name_or_path):
        jobs = [job._replace(sha256=f"{job.sha256} {base.digest}") for job in jobs]
    check_output(args.output_dir)
    number, of = args.shard
    mine = jobs[number::of]
    if args.plan:
        print_plan(mine, args)
        return
    with told_if_unwritable(args.output_dir, "make room there, and run the same command again"):
        args.output_dir.mkdir(parents=True, exist_ok=True)
        run_jobs(jobs, mine, args)


def run_jobs(jobs: list[Job], mine: list[Job], args: argparse.Namespace) -> None:
    """Runs the jobs of this share, so many at once; ends with exit status 1 if one failed."""
    children, failed = Children(), dict[str, str]()
    gpus: list = gpu_names() or [None]
    processes = args.processes or len(gpus)
    slots = queue.SimpleQueue[str | None]()
    for gpu in itertools.islice(itertools.cycle(gpus), processes):
        slots.put(gpu)

    def work(job: Job) -> None:
        gpu = slots.get()
        try:
            failure = None if children.number else run_job(job, args, children, gpu)
        finally:
            slots.put(gpu)
        if failure:
            failed[job.name] = failure
            say(f"{job.name}: {failure}")
        write_summary(args.output_dir, jobs)

    with ThreadPoolExecutor(processes) as workers:
        list(workers.map(work, mine))
    if children.number:
        say("Stopped. Run the same command again to go on.")
        raise SystemExit(128 + children.number)
    if failed:
        raise SystemExit("\n".join(["Failed:", *(f"{one_line(name)}: {why}" for name, why in failed.items())]))
    say(f"All {len(mine)} jobs are done or under way elsewhere: {args.output_dir / SUMMARY}")


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
