"""Class-coded masks: one row for each defect type that `--mask_classes` finds in an image's mask."""

import dataclasses
from pathlib import Path

from ..images import UNREADABLE, open_image
from ..mask_values import MaskClasses
from ..masks import MaskFiles
from .rows import Reading, Row


def split_classes(reading: Reading, classes: MaskClasses, root: Path) -> Reading:
    """The reading with a row for each type in place of each row with a mask file.

    An image whose mask holds no named type keeps its row, whose mask is then empty.
    """
    rows: list[Row] = []
    for row in reading.rows:
        if not isinstance(row.mask, MaskFiles) or row.mask.classes:
            rows.append(row)
            continue
        try:
            found = {name for path in row.mask.paths for name in classes.areas(open_image(path))}
        except UNREADABLE as error:
            reading.blame("DF103", row.image, root, f"its mask cannot be read: {error}")
            continue
        for name in sorted(found) or [row.defect]:
            mask = dataclasses.replace(row.mask, nonzero=False, classes=classes, defect=name)
            rows.append(dataclasses.replace(row, mask=mask, defect=name))
    reading.rows = rows
    return reading
