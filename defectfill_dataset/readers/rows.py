"""What every reader returns: the rows of one object's images, what is wrong, and what is worth a look."""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import Problem
from ..masks import Mask, MaskUnion
from ..prompts import to_words


ONE_TYPE = "defect"  # the defect type where the format names none
GOOD = "good"
SPLITS = {"train": "train", "val": "test", "valid": "test", "validation": "test", "test": "test"}
SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|valid|validation|test)(?![a-z])", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Row:
    """One image of one object; an image with defects of several types has a row for each type.

    Args:
        image: absolute path.
        mask: None for a good image.
        defect: the defect type's name, "good" for a good image.
        split: "train", "test" or "good" where the layout says so, None where a split rule decides.
        object: its name where a table holds several, None where the folder is the object.
    """

    image: Path
    mask: Mask | None
    defect: str
    split: str | None
    object: str | None = None


@dataclasses.dataclass
class Reading:
    """What a reader found in an object's folder.

    Args:
        rows: every image that can be used.
        problems: why training refuses the dataset.
        notes: what a person should know all the same.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    notes: list[Problem] = dataclasses.field(default_factory=list)

    def __iadd__(self, other: "Reading") -> "Reading":
        self.rows += other.rows
        self.problems += other.problems
        self.notes += other.notes
        return self

    def add_good(self, images: Iterable[Path]) -> None:
        self.rows += [Row(image, None, GOOD, GOOD) for image in images]

    def missing(self, where: Path | str, what: str, fix: str = "", code: str = "DF166") -> None:
        """A problem of a table or annotation file, which leaving out an image would not mend."""
        self.problems.append(Problem(code, where, what, fix))

    def blame(self, code: str, image: Path, root: Path, what: str, fix: str = "", where: str | None = None) -> None:
        """A problem for which this one image cannot be used; `where` names its annotation, if not the image itself."""
        name = relative(image, root)
        self.problems.append(Problem(code, where or name, what, fix, name))


def relative(file: Path, root: str | Path) -> str:
    """The file's name seen from the object's folder, with forward slashes; whole if it lies elsewhere."""
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()


def split_of(*names: str) -> str | None:
    """The split that a folder or file name speaks of, the first that does."""
    found = next((match for name in names if (match := SPLIT_WORD.search(name))), None)
    return SPLITS[found[1].lower()] if found else None


def label_key(label: str) -> str:
    """What spellings of one label share: no accents apart, no case, no spaces at its ends, - and _ as spaces."""
    words = re.split(r"[\s_\-]+", unicodedata.normalize("NFKC", label).casefold().strip())
    return " ".join(word for word in words if word)


def unite(reading: Reading, root: Path) -> Reading:
    """The reading with one row for each image and defect type, and one spelling for each type.

    The most frequent spelling stays (of equals, the first by name). An image that is both good and defective, or
    that is listed twice with one label, is a problem (DF144).
    """
    spellings: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in reading.rows:
        spellings[label_key(row.defect)][row.defect] += 1
    chosen = {key: tidy(min(names, key=lambda name: (-names[name], name))) for key, names in spellings.items()}
    for key, names in spellings.items():
        if len(names) > 1:
            listed = ", ".join(f"{name!r} ({number})" for name, number in sorted(names.items()))
            reading.notes.append(
                Problem("DF156", root, f"one defect type is spelt in several ways: {listed}", f"all are read as "
                        f"'{chosen[key]}'; rename them if they differ")
            )  # fmt: skip
    together: dict[tuple[Path, str], list[Row]] = {}
    for row in reading.rows:
        row = dataclasses.replace(row, defect=chosen[label_key(row.defect)])
        together.setdefault((row.image, row.defect), []).append(row)
    for row in reading.rows:
        for file in (row.image, *(row.mask.paths if row.mask else ())):
            if not is_unicode(str(file)):
                reading.blame(
                    "DF115", row.image, root, "its name or path is not UTF-8", "rename it", relative(file, root)
                )
    for name in dict.fromkeys(chosen.values()):
        if not to_words(name) or not is_unicode(name):
            what = f"a defect type is called '{name}', which gives no words for a prompt"
            reading.problems.append(Problem("DF162", root, what, "rename it"))
    good = {image for image, defect in together if defect == GOOD}
    listed_twice = {image for image, defect in together if defect != GOOD} & good
    counts = collections.Counter((row.image, row.defect) for row in reading.rows)
    listed_twice |= {image for (image, _), number in counts.items() if number > 1}
    for image in sorted(listed_twice):
        reading.blame("DF144", image, root, "is listed more than once", "keep one")
    reading.rows = list(_merged(rows for (image, _), rows in together.items() if image not in listed_twice))
    return reading


def is_unicode(name: str) -> bool:
    """Whether a name, as the system gives it, is Unicode; names from old archives may be other bytes."""
    return name == name.encode(errors="replace").decode()


def tidy(label: str) -> str:
    """The label without spaces at its ends, in the usual form of Unicode."""
    return unicodedata.normalize("NFC", label).strip()


def _merged(groups: Iterable[list[Row]]) -> Iterator[Row]:
    for rows in groups:
        masks = tuple(dict.fromkeys(row.mask for row in rows if row.mask))
        yield dataclasses.replace(rows[0], mask=MaskUnion.of(masks) if masks else None)
