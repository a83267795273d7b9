"""Tables of image and mask names: metadata.csv and metadata.jsonl, in the folder or in its splits' folders."""

from pathlib import Path

from ..errors import InputError
from ..masks import MaskFiles
from ..text import holds_text, parse_json, read_csv, read_text, unreadable
from .files import Place, child, file_inside
from .marks import MALFORMED, said
from .rows import GOOD, ONE_TYPE, SPLITS, Reading, Row, relative, split_of, tidy


def is_metadata(place: Place) -> bool:
    return bool(metadata_files(place.folder))


def metadata_files(root: Path) -> list[Path]:
    places = [root, *(child(root, split) for split in (*SPLITS, "good"))]
    files = [child(place, name) for place in places for name in ("metadata.csv", "metadata.jsonl")]
    return [f for f in dict.fromkeys(files) if f.is_file() and holds_text(f, "mask_file_name")]


def _read_jsonl(file: Path) -> list[dict[str, str]]:
    lines = []
    for number, text in enumerate(read_text(file).splitlines(), 1):
        try:
            if text.strip():
                lines.append({key: "" if value is None else str(value) for key, value in parse_json(text).items()})
        except MALFORMED as error:
            raise unreadable(f"{file}, line {number}", f"is not a JSON object: {said(error)}") from error
    return lines


def read_metadata(root: Path) -> Reading:
    """A table with file_name and mask_file_name, relative to itself; defect and object may be there.

    An image with defects of several types has a line for each.

    Source: the `imagefolder` of Hugging Face datasets.
    """
    reading = Reading()
    for file in metadata_files(root):
        try:
            lines = read_csv(file) if file.suffix.lower() == ".csv" else _read_jsonl(file)
        except InputError as error:
            reading.problems += error.problems
            continue
        columns = dict.fromkeys(column for line in lines for column in line)
        if "file_name" not in columns:
            reading.missing(
                relative(file, root), f"has no column file_name; its columns are {', '.join(map(str, columns))}"
            )
            continue
        for number, line in enumerate(lines, 1):
            _add_line(reading, root, file, line, f"{relative(file, root)}, row {number}")
    if None in (objects := {row.object for row in reading.rows}) and len(objects) > 1:
        reading.missing(root, "its table names the object of some images only", "name it for all or none")
    return reading


def _add_line(reading: Reading, root: Path, file: Path, line: dict[str, str], place: str) -> None:
    image, mask = (file_inside(root, file.parent, line.get(k)) for k in ("file_name", "mask_file_name"))
    defect, kind = tidy(line.get("defect", "")), line.get("object") or None
    defect = GOOD if defect.casefold() == GOOD else defect
    if image is None:
        reading.missing(place, f"names the image '{line.get('file_name')}', which is not in {root}")
    elif mask is None and (line.get("mask_file_name") or defect not in ("", GOOD)):
        wanted = line.get("mask_file_name")
        reading.blame(
            "DF142", image, root, f"the mask of {line['file_name']} is missing", f"expected '{wanted}'", place
        )
    elif mask is None:
        reading.rows.append(Row(image, None, GOOD, GOOD, kind))
    elif defect == GOOD:
        reading.blame("DF167", image, root, "a good image with a mask", "name the defect, or remove the mask", place)
    else:
        split = split_of(file.parent.name) if file.parent != root else None
        reading.rows.append(Row(image, MaskFiles((mask,)), defect or ONE_TYPE, split, kind))
