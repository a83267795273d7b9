"""The one reader of text, of ours and of others: JSON, JSON lines, YAML, XML, tables.

A file is opened if it is a regular one of a bounded size; decoded by its byte order mark or as UTF-8, never guessed;
parsed to a bounded depth; and checked by a schema where one is given. What is wrong is one `InputError`.
"""

import codecs
import csv
import io
import itertools
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import charset_normalizer
import defusedxml
import defusedxml.ElementTree
import pydantic
import pydantic_core
import yaml

from .errors import InputError, Problem


MOST_BYTES = 2**28  # of a text file: tens of thousands of images in COCO, as densely marked as its own
MOST_RUN_BYTES = 2**32  # of what a run writes, a line for each of a million images or steps
MOST_YAML_BYTES, MOST_YAML_DEPTH = 2**18, 50  # its parser needs seconds for more
MARKS = {  # the longer first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


OTHER_ENCODINGS = ["gb18030", "big5", "cp932", "euc_jp", "euc_kr", "cp1252", "cp1250", "cp1251"]  # by how common
GUESSED = 2**20  # bytes that are looked at to name another encoding
MEND = "mend or remove it"


class Schema(pydantic.BaseModel):
    """What a JSON object must hold for the code that uses it. Unknown keys are allowed, no value is converted."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=True)


def unreadable(file: Path | str, what: str, fix: str = MEND, code: str = "DF166") -> InputError:
    return InputError(Problem(code, file, what, fix))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_bytes(file: Path, most: int = MOST_BYTES) -> bytes:
    """A file's content.

    Raises:
        OSError: no regular file (a pipe would be waited for, a device never ends), or larger than `most` bytes.
    """
    try:
        status = file.stat()
    except ValueError as error:  # a name with a zero byte
        raise OSError(str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is not a regular file")
    with file.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(f"it has {max(status.st_size, most + 1):,} bytes; at most {most:,} are read")
    return content


def read_text(file: Path, code: str = "DF166", fix: str = MEND, most: int = MOST_BYTES) -> str:
    """A file's text, by its byte order mark or as UTF-8.

    Raises:
        InputError: no regular file, too large, or another encoding, with this code and fix.
    """
    try:
        content = read_bytes(file, most)
    except OSError as error:
        raise unreadable(file, f"cannot be read: {error.strerror or error}", fix, code) from error
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    if encoding in ("utf-8", "utf-8-sig") and b"\0" in content:
        what = "holds zero bytes, as UTF-16 without its byte order mark does"
        raise unreadable(file, what, "save it as UTF-8", code)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        found = charset_normalizer.from_bytes(content[:GUESSED], cp_isolation=OTHER_ENCODINGS, threshold=0.5)
        names = ", ".join(match.encoding for match in found) or "unknown"
        byte = f"byte {content[error.start]:#04x} at {error.start}"
        what = f"is not {encoding.upper()} ({byte}); its encoding may be {names}"
        raise unreadable(file, what, "save it as UTF-8", code) from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, numbered from 1; only a line end ends one, as in JSON lines."""
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def holds_text(file: Path, *words: str, most: int = MOST_BYTES) -> bool:
    """Whether a file holds all these words, in any Unicode encoding; it is not parsed. `most` bytes of it are read."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        content = stream.read(most)
    encodings = ("utf-8", "utf-16-le", "utf-16-be") if b"\0" in content[:64] else ("utf-8",)
    return any(all(word.encode(encoding) in content for word in words) for encoding in encodings)


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def parse_json(text: str | bytes, schema: type[Schema] | None = None) -> Any:
    """The JSON value; raises ValueError for what is none, is nested over 200 deep, or is not of the schema."""
    try:
        value = pydantic_core.from_json(text)
    except ValueError as error:
        raise ValueError(f"cannot be read as JSON: {error}") from error
    if schema is not None:
        check_schema(value, schema)
    return value


def check_schema(value: object, schema: type[Schema]) -> None:
    """Raises ValueError, with the first value that is wrong and its place, unless the value is of the schema."""
    try:
        schema.model_validate(value)
    except pydantic.ValidationError as error:
        first, *others = error.errors(include_url=False, include_context=False)
        place = ".".join(str(part) for part in first["loc"])
        more = f" (and {len(others)} more)" if others else ""
        if first["type"] == "model_type" and not place:
            raise ValueError(f"holds a {type(value).__name__}, not an object") from error
        if first["type"] == "missing":
            raise ValueError(f"cannot be used: has no '{place}'{more}") from error
        what = first["msg"][:1].lower() + first["msg"][1:].replace("should", "must")
        raise ValueError(f"cannot be used: '{place}' is {reprlib.repr(first['input'])}: {what}{more}") from error


def is_of(value: object, schema: type[Schema]) -> bool:
    """Whether the value is of the schema."""
    try:
        check_schema(value, schema)
    except ValueError:
        return False
    return True


def read_json(file: Path, schema: type[Schema] | None = None, code: str = "DF166", fix: str = MEND) -> Any:
    """The file's JSON value.

    Raises:
        InputError: it cannot be read, or is not of the schema, with this code and fix.
    """
    text = read_text(file, code, fix)
    try:
        return parse_json(text, schema)
    except ValueError as error:
        raise unreadable(file, str(error), fix, code) from error


class Loader(yaml.BaseLoader):
    """Makes nothing but mappings, lists and strings; no value refers to another, or nine lines could be gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*{self.peek_event().anchor}) is not read; write the value out")
        return super().compose_node(parent, index)


def read_yaml(file: Path) -> Any:
    """The file's YAML as mappings, lists and strings: `no`, `007` and `1.0` stay as they are written.

    Raises:
        InputError: it cannot be read (DF166).
    """
    text = read_text(file, most=MOST_YAML_BYTES)
    depths = itertools.accumulate((c in "[{") - (c in "]}") for c in text if c in "[]{}")
    if max(depths, default=0) > MOST_YAML_DEPTH:
        raise unreadable(file, f"is nested more than {MOST_YAML_DEPTH} deep")
    try:
        return yaml.load(text, Loader)  # noqa: S506 (makes nothing but strings)
    except (yaml.YAMLError, RecursionError) as error:
        raise unreadable(file, f"is not YAML: {' '.join(str(error).split())}") from error


def read_xml(file: Path) -> Element:
    """The file's root element; entities and external references are refused (DF166), as is what is no XML."""
    try:
        return defusedxml.ElementTree.fromstring(read_bytes(file))  # XML says its encoding itself
    except (OSError, ParseError, ValueError, LookupError, defusedxml.DefusedXmlException) as error:
        raise unreadable(file, f"is not XML that can be read: {error}") from error


def read_csv(file: Path) -> list[dict[str, str]]:
    """The lines of a table by its header's names; raises InputError (DF166) if it cannot be read."""
    try:
        lines = csv.DictReader(io.StringIO(read_text(file), newline=""))
        return [{k: v or "" for k, v in line.items() if k} for line in lines]
    except csv.Error as error:
        raise unreadable(file, f"is not a table: {error}") from error
