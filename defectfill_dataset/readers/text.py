"""Text that others wrote: decoded by its byte order mark or as UTF-8, never guessed; JSON, YAML, XML and tables."""

import codecs
import csv
import io
import json
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import charset_normalizer
import defusedxml
import defusedxml.ElementTree
import yaml

from ..errors import InputError, Problem


MARKS = {  # the longer first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


OTHER_ENCODINGS = ["gb18030", "big5", "cp932", "euc_jp", "euc_kr", "cp1252", "cp1250", "cp1251"]  # by how common


def unreadable(file: Path | str, what: str, fix: str = "mend or remove it") -> InputError:
    return InputError(Problem("DF166", file, what, fix))


def read_text(file: Path) -> str:
    """A file's text, by its byte order mark or as UTF-8.

    Raises:
        InputError: no such file, or another encoding (DF166).
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise unreadable(file, f"cannot be read: {error.strerror or error}") from error
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    if encoding in ("utf-8", "utf-8-sig") and b"\0" in content:
        raise unreadable(file, "holds zero bytes, as UTF-16 without its byte order mark does", "save it as UTF-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        found = charset_normalizer.from_bytes(content, cp_isolation=OTHER_ENCODINGS, threshold=0.5)
        names = ", ".join(match.encoding for match in found) or "unknown"
        what = f"is not UTF-8 (byte {content[error.start]:#04x} at {error.start}); its encoding may be {names}"
        raise unreadable(file, what, "save it as UTF-8") from error


def parse_json(text: str) -> Any:
    """The JSON value; raises ValueError for what is none, or is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_json(file: Path) -> Any:
    """The file's JSON value; raises InputError (DF166) if it cannot be read."""
    try:
        return parse_json(read_text(file))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise unreadable(file, f"is not JSON: {error}") from error


def read_yaml(file: Path) -> Any:
    """The file's YAML as mappings, lists and strings: `no`, `007` and `1.0` stay as they are written.

    Raises:
        InputError: it cannot be read (DF166).
    """
    try:
        return yaml.load(read_text(file), yaml.BaseLoader)  # noqa: S506 (makes nothing but strings)
    except (yaml.YAMLError, RecursionError) as error:
        raise unreadable(file, f"is not YAML: {' '.join(str(error).split())}") from error


def read_xml(file: Path) -> Element:
    """The file's root element; entities and external references are refused (DF166), as is what is no XML."""
    try:
        return defusedxml.ElementTree.fromstring(file.read_bytes())  # XML says its encoding itself
    except (OSError, ParseError, ValueError, LookupError, defusedxml.DefusedXmlException) as error:
        raise unreadable(file, f"is not XML that can be read: {error}") from error


def read_csv(file: Path) -> list[dict[str, str]]:
    """The lines of a table by its header's names; raises InputError (DF166) if it cannot be read."""
    try:
        lines = csv.DictReader(io.StringIO(read_text(file), newline=""))
        return [{k: v or "" for k, v in line.items() if k} for line in lines]
    except csv.Error as error:
        raise unreadable(file, f"is not a table: {error}") from error


def holds_text(file: Path, *words: str, most: int | None = None) -> bool:
    """Whether a file holds all these words, in any Unicode encoding; it is not parsed. `most` bytes of it are read."""
    with file.open("rb") as stream:
        content = stream.read(most)
    encodings = ("utf-8", "utf-16-le", "utf-16-be") if b"\0" in content[:64] else ("utf-8",)
    return any(all(word.encode(encoding) in content for word in words) for encoding in encodings)
