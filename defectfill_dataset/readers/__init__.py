"""Readers: from an object's folder, in any known layout, to the rows of its images."""

from .discovery import LAYOUTS, can_name, check_names, find_objects, layout_of, read_object
from .files import IMAGE_EXTENSIONS, file_inside, image_files, is_outside, pair_by_name
from .rows import GOOD, ONE_TYPE, Reading, Row, is_unicode, relative


__all__ = [
    "GOOD",
    "IMAGE_EXTENSIONS",
    "LAYOUTS",
    "ONE_TYPE",
    "Reading",
    "Row",
    "can_name",
    "check_names",
    "file_inside",
    "find_objects",
    "image_files",
    "is_outside",
    "is_unicode",
    "layout_of",
    "pair_by_name",
    "read_object",
    "relative",
]
