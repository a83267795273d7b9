"""Annotation files, and the images that they name."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from ..errors import InputError, Problem
from ..text import read_xml
from .files import all_images, spelt
from .labelme import GOOD_FOLDERS
from .marks import Mark
from .rows import Reading, relative


class NamedImages:
    """The images in an object's folder and below it, by the names that annotation files give them.

    Args:
        reading: gets the problems of names that mean no image, or several.
    """

    def __init__(self, reading: Reading, root: Path):
        self.reading = reading
        self.root = root
        self.all = all_images(root)
        self.named: set[Path] = set()
        self._by_name: dict[str, list[Path]] = {}
        for image in self.all:
            for name in (image.name, image.stem):
                self._by_name.setdefault(spelt(name).casefold(), []).append(image)

    def candidates(self, path: str, folder: str = "") -> list[Path]:
        """The images of this name, with or without its suffix, that agree in the most folders of the path.

        Args:
            folder: where several do, those in or below a folder of this name.
        """
        *folders, name = re.split(r"[\\/]+", spelt(path))
        found = self._by_name.get(name.casefold(), [])
        agreeing = {image: _agreeing(image, folders) for image in found}
        found = [image for image in found if agreeing[image] == max(agreeing.values())]
        found = [image for image in found if folder and folder in image.parent.parts] or found
        return [image for image in found if spelt(image.name) == name] or found

    def choose(self, found: Sequence[Path], name: str, place: str) -> Path | None:
        """The one image that was found; None, and a problem of the annotation at `place`, if it is not one."""
        self.named.update(found)
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(relative(image, self.root) for image in found)
            self.reading.missing(place, f"'{name}' may be {listed}", "keep one of them", "DF144")
        else:
            self.reading.missing(
                place, f"the image '{name}' is not in {self.root}", "add it, or remove its annotation", "DF143"
            )
        return None

    def find(self, name: str, place: str, folder: str = "") -> Path | None:
        return self.choose(self.candidates(name, folder), name, place)

    def add_rest(self) -> None:
        """Images that no annotation names: good in good/ (or normal/, ok/), else passed over with a note."""
        rest = [image for image in self.all if image not in self.named]
        good = [image for image in rest if image.parent.name.casefold() in GOOD_FOLDERS]
        self.reading.add_good(good)
        if others := [image for image in rest if image not in set(good)]:
            first = relative(others[0], self.root)
            note(self.reading, self.root, f"{len(others)} images that no annotation file names, '{first}' the first",
                 "good ones belong in good/")  # fmt: skip


def _agreeing(image: Path, folders: Sequence[str]) -> int:
    """How many folders above the image are those of the path, from the last on."""
    count = 0
    for there, wanted in zip(reversed(image.parent.parts), reversed(folders)):
        if spelt(there).casefold() != wanted.casefold():
            break
        count += 1
    return count


def note(reading: Reading, where: Path | str, what: str, fix: str) -> None:
    """What is passed over, though it may hold something."""
    reading.notes.append(Problem("DF158", where, f"not read: {what}", fix))


def check_tags(marks: Sequence[Mark], tags: Iterable[str]) -> None:
    """Raises ValueError for an image without a shape that is tagged, with anything but "good", "normal" or "ok"."""
    named = [tag for tag in tags if tag.strip().casefold() not in GOOD_FOLDERS]
    if named and not marks:
        raise ValueError(f"is tagged '{named[0]}' as a whole, which marks no area; draw the defect")


def xml_roots(files: Iterable[Path], tag: str, reading: Reading, root: Path) -> Iterator[tuple[Path, Element]]:
    """Each XML file with its root element, if that is of this name, else with a note; what is no XML is a problem."""
    for file in files:
        try:
            content = read_xml(file)
        except InputError as error:
            reading.problems += [dataclasses.replace(p, where=relative(file, root)) for p in error.problems]
            continue
        if content.tag == tag:
            yield file, content
        else:
            note(reading, relative(file, root), f"XML of <{content.tag}>", f"these annotations are in <{tag}>")
