"""Have somebody sort generated and original images who sees nothing but the images.

    python scripts/sort_blind.py --generated generated/images --originals mvtec/hazelnut/test/hole --output_dir sorting

The first run copies both, in random order and under numbers, to the folder `pictures`, with an empty answers.txt
beside them; which is which stands in key.json. Give that folder alone to somebody who has not seen the images. They
write a line for each picture, its number and `generated` or `original`. The next run tells, for each folder, how many
were taken for originals.
"""

import argparse
import random
import tempfile
from pathlib import Path

import defectfill.quiet  # noqa: F401

from PIL import Image

from defectfill.markdown import markdown_table
from defectfill.runs import checkpoint
from defectfill.runs.disks import NOTHING_WRITTEN, told_if_unwritable
from defectfill.runs.files import (
    TEMPORARY,
    clear_leftovers,
    exclusive_lock,
    is_record,
    publish_dir,
    save_image,
    write_json,
)
from defectfill_dataset import InputError, Problem, load_image, open_image
from defectfill_dataset.commands import Parser, exit_on_input_error, say
from defectfill_dataset.images import UNREADABLE
from defectfill_dataset.readers import image_files
from defectfill_dataset.text import read_json, read_text


KEY, ANSWERS = "key.json", "pictures/answers.txt"
WORDS = ("generated", "original")


def draw(args: argparse.Namespace) -> tuple[list[dict[str, str]], list[Image.Image]]:
    """The pictures' sources in random order, and the pictures, as RGB.

    Raises:
        InputError: a folder has too few images (DF352), or an image cannot be read (DF103).
    """
    rng, sources, pictures = random.Random(args.seed), [], []
    for kind, folders in ((WORDS[0], args.generated), (WORDS[1], args.originals)):
        for folder in folders:
            files = image_files(Path(folder)) if Path(folder).is_dir() else []
            if len(files) < (args.number or 1):
                fix = f"give a folder with at least {args.number or 1}"
                raise InputError(Problem("DF352", folder, f"{len(files)} images in it", fix))
            chosen = rng.sample(files, args.number or len(files))
            sources += [{"kind": kind, "folder": folder, "image": file.name} for file in chosen]
    rng.shuffle(sources)
    for source in sources:
        file = Path(source["folder"], source["image"])
        try:
            pictures.append(load_image(open_image(file)))
        except UNREADABLE as error:
            raise InputError(Problem("DF103", file, f"the image cannot be read: {error}")) from error
    return sources, pictures


def write(sources: list[dict[str, str]], pictures: list[Image.Image], options: dict, output_dir: Path) -> None:
    """Writes the numbered pictures, without metadata, and the key, whole or not at all."""
    clear_leftovers(output_dir)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=output_dir) as temporary:
        answers = Path(temporary) / ANSWERS
        answers.parent.mkdir()
        for place, picture in enumerate(pictures):
            save_image(picture, answers.with_name(f"{place:03d}.png"))
        answers.write_text("".join(f"{place:03d} \n" for place in range(len(pictures))))
        write_json(Path(temporary) / KEY, {"options": options, "pictures": sources})
        publish_dir(Path(temporary), output_dir, KEY)


def read_answers(file: Path, number: int) -> list[str]:
    """The answer to each picture, in the order of their numbers."""
    answers: dict[int, str] = {}
    for line in filter(None, map(str.strip, read_text(file).splitlines())):
        place, word = [*line.split(maxsplit=1), ""][:2]
        if not place.isdecimal() or int(place) >= number or int(place) in answers or word not in WORDS:
            fix = f"write each number up to {number - 1:03d} once, followed by {' or '.join(WORDS)}"
            raise InputError(Problem("DF356", file, f"line '{line}'", fix))
        answers[int(place)] = word
    if missing := [f"{place:03d}" for place in range(number) if place not in answers]:
        raise InputError(Problem("DF356", file, f"no answer to {', '.join(missing[:5])}", "write those lines too"))
    return [answers[place] for place in range(number)]


def table(pictures: list[dict[str, str]], answers: list[str]) -> str:
    """Markdown: how many images of each folder, and of all, were taken for originals."""
    taken: dict[tuple[str, str], list[bool]] = {}
    for picture, answer in zip(pictures, answers):
        for of in (picture["folder"], "all folders"):
            taken.setdefault((picture["kind"], of), []).append(answer == "original")
    rows = [("images", "folder", "of", "taken for originals", "share")]
    for (kind, folder), found in sorted(taken.items()):
        rows.append((kind, folder, str(len(found)), str(sum(found)), f"{sum(found) / len(found):.0%}"))
    return markdown_table(rows)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--generated", nargs="+", required=True, metavar="DIR", help="Folders of generated images.")
    add("--originals", nargs="+", required=True, metavar="DIR", help="Folders of original defect images.")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="Folder of pictures, answers and key.")
    add("--number", type=int, metavar="N", help="Number of images to draw from each folder. Default: all.")
    add("--seed", type=int, default=0, metavar="N", help="Seed of the draw and the order. Default: %(default)s.")
    args = parser.parse_args(input_args)
    if args.number is not None and args.number < 1:
        parser.error(f"--number {args.number}: must be at least 1")
    return args


def main(args: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(args).items() if name != "output_dir"}
    if is_record(args.output_dir / KEY, "options", "pictures"):
        key = read_json(args.output_dir / KEY)
        checkpoint.check_identity(key["options"], options)
        say(*table(key["pictures"], read_answers(args.output_dir / ANSWERS, len(key["pictures"]))).splitlines())
        return
    sources, pictures = draw(args)
    with exclusive_lock(args.output_dir), told_if_unwritable(args.output_dir, NOTHING_WRITTEN):
        write(sources, pictures, options, args.output_dir)
    sizes = {kind: {p.size for p, source in zip(pictures, sources) if source["kind"] == kind} for kind in WORDS}
    if sizes["generated"] != sizes["original"]:
        say("Their sizes alone may tell generated images and originals apart; better crop or scale them first.")
    say(f"Give {(args.output_dir / ANSWERS).parent} to somebody; run this again when {ANSWERS} is filled in.")


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
