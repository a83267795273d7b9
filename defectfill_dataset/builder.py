"""The Hugging Face `datasets` builder of defect images with masks, one config an object."""

import dataclasses
import hashlib
import io
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from PIL import Image

from .checks import find_problems, refusal, skippable, without
from .errors import InputError, Problem, did_you_mean
from .images import UNREADABLE
from .mask_values import MaskClasses
from .masks import Mask
from .readers import Row, check_names, find_objects, read_object, relative
from .readers.visa import COMBINED
from .splits import SPLIT_RULES, split_rows


logger = logging.getLogger(__name__)

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "mask": datasets.Image(),  # None for a good image
        "object": datasets.Value("string"),
        "defect": datasets.Value("string"),
        "source_file": datasets.Value("string"),  # relative to the object's folder, with forward slashes
    }
)


@dataclasses.dataclass
class DefectPairsConfig(datasets.BuilderConfig):
    """Config of one object; its name, or `object` if that is given, is the object's folder name.

    Args:
        split: a rule of `split_rows` or the path of a split file.
        layout: a name in `LAYOUTS`, or auto for the one the folder shows.
        mask_classes: what the values of class-coded masks mean, as `MaskClasses.parse` takes it.
        skipped: names of images that are left out.
        object: where the cache of `datasets` has another name for it: a folder's, with more before and behind it.
        fingerprint: digest of the splits, their files and shapes, so that the cache of `datasets` notices any change.
    """

    split: str = "auto"
    layout: str = "auto"
    mask_classes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    object: str = ""
    fingerprint: str = ""


class DefectPairs(datasets.GeneratorBasedBuilder):
    """Reads an object in any of `LAYOUTS` (recognised by itself) from `data_dir`.

    Splits: `train` (reference defects), `test` (held-out defects), `good`; one without images is not there.
    """

    VERSION = datasets.Version("1.2.0")
    BUILDER_CONFIG_CLASS = DefectPairsConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description="Defect images with masks, and good images.", features=FEATURES)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        root = self.config.data_dir  # no `Path`: `datasets` makes that, here, one without names that hold "::"
        name = self.config.object or self.config.name
        reading = read_object(root, name, self.config.layout, MaskClasses.parse(self.config.mask_classes))
        reading = without(reading, self.config.skipped, root)
        if reading.problems:
            raise InputError(*reading.problems)
        rows = reading.rows
        masks = dict(zip(rows, _encode_masks(rows, root)))
        splits = split_rows(rows, root, self.config.split)
        return [
            datasets.SplitGenerator(name, gen_kwargs={"rows": rows, "masks": [masks[row] for row in rows]})
            for name, rows in splits.items()
            if rows
        ]

    def _generate_examples(self, rows: list[Row], masks: list[str | dict | None]) -> Iterator[tuple[str, dict]]:
        root = Path(self.config.data_dir)
        for row, mask in zip(rows, masks):
            name = relative(row.image, root)
            yield (
                f"{row.defect}/{name}",
                {
                    "image": str(row.image),
                    "mask": mask,
                    "object": self.config.object or self.config.name,
                    "defect": row.defect,
                    "source_file": name,
                },
            )


def _encode_mask(mask: Mask) -> str | dict:
    """What the dataset keeps of a mask: the path of its file as it stands, or else a PNG of what it marks."""
    if mask.plain:
        return str(mask.plain)
    stream = io.BytesIO()
    Image.fromarray(mask.render()).convert("L").save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


def _encode_masks(rows: list[Row], root: str | Path) -> list[str | dict | None]:
    """`_encode_mask` of each row, None for a good one; raises InputError with all problems if one cannot be read."""
    try:
        return [_encode_mask(row.mask) if row.mask else None for row in rows]
    except UNREADABLE as error:
        raise refusal(find_problems(rows, root)) from error


class DefectData(DatasetDict):
    """The splits of one object, and the names of the images left out, for their problems or by a split file."""

    skipped: list[str]


def load_defect_pairs(
    data_dir: str | Path,
    object_name: str | None = None,
    split: str = "auto",
    cache_dir: str | None = None,
    layout: str = "auto",
    mask_classes: Sequence[str] = (),
    skip_problems: bool = False,
) -> DefectData:
    """The splits of `DefectPairs` for one object in `data_dir` (the object's folder, or one above several).

    An image with defects of several types has a row for each type, with the mask of that type alone.

    Args:
        split, layout, mask_classes: as in `DefectPairsConfig`.
        skip_problems: leave out images that cannot be used, with a warning for each, rather than refuse them all.

    Raises:
        InputError: unknown or missing object (DF162), no defect images (DF163), a mask that cannot be rendered
            (DF103), or what the layout's reader finds.
    """
    objects = find_objects(data_dir, layout)
    name = _choose_object(data_dir, objects, object_name)
    root = objects[name]
    reading = read_object(root, name, layout, MaskClasses.parse(mask_classes))
    skipped: list[str] = []
    if skip_problems:
        bad = [*reading.problems, *find_problems(reading.rows, root, good=True)]
        if all(skippable(problem) for problem in bad):
            for problem in bad:
                logger.warning("left out: %s", problem)
            skipped = sorted({problem.image for problem in bad if problem.image})
            reading = without(reading, skipped, root)
    if reading.problems:  # problems of the pixels are reported at once
        raise refusal([*reading.problems, *find_problems(reading.rows, root)])
    rows = reading.rows
    if all(row.mask is None for row in rows):
        what = f"no defect images, only {len(rows)} good ones"
        raise InputError(Problem("DF163", root, what, "add at least one with its mask"))
    splits = split_rows(rows, root, split)
    if not splits["train"]:
        raise InputError(Problem("DF163", f"--split {split}", "leaves no defect image to train on"))
    for note in reading.notes:
        logger.warning("%s", note)
    builder = DefectPairs(
        dataset_name="defect_pairs",
        config_name=name if name.isascii() and len(name) <= 32 else hashlib.sha256(name.encode()).hexdigest()[:16],
        object=name,
        data_dir=str(root),
        split=split if split in SPLIT_RULES else str(Path(split).resolve()),
        layout=layout,
        mask_classes=tuple(mask_classes),
        skipped=tuple(skipped),
        fingerprint=_fingerprint(splits),
        cache_dir=cache_dir,
    )
    builder.download_and_prepare()
    data = DefectData(builder.as_dataset())
    kept = {row.image for part in splits.values() for row in part}
    data.skipped = sorted({*skipped, *(relative(row.image, root) for row in rows if row.image not in kept)})
    return data


def _fingerprint(splits: dict[str, list[Row]]) -> str:
    digest = hashlib.sha256()
    for split, rows in splits.items():
        for row in rows:
            files = [(str(f), file_digest(f)) for f in (row.image, *(row.mask.paths if row.mask else ()))]
            digest.update(json.dumps([split, row.defect, repr(row.mask), files]).encode())
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of a file; empty where it cannot be read, which is a problem for the checks."""
    if not (file.is_file() and os.access(file, os.R_OK)):
        return ""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_prepared(name: str, config: str | None, object_name: str | None, cache_dir: str | None = None) -> DatasetDict:
    """The splits of one object in a prepared copy of `DefectPairs`: a folder `load_dataset` reads, or a Hub id.

    Raises:
        InputError: cannot be loaded (DF160), lacks columns (DF161), or unknown, missing or ill-named object (DF162).
    """
    try:
        data = datasets.load_dataset(name, config, cache_dir=cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(Problem("DF160", f"--dataset_name {name}", f"cannot be loaded: {error}")) from error
    missing = FEATURES.keys() - set(data["train"].column_names if "train" in data else ())
    if missing:
        what = f"its split 'train' lacks {', '.join(sorted(missing))}"
        raise InputError(Problem("DF161", f"--dataset_name {name}", what))
    if data["train"].info.builder_name != "imagefolder":  # which reads files of its own folder only
        _check_rows_hold_images(data, name)
    wanted = _choose_object(name, data["train"].unique("object"), object_name)
    check_names([wanted], name)
    return DatasetDict({split: _rows_where(rows, "object", [wanted]) for split, rows in data.items()})


def _check_rows_hold_images(data: DatasetDict, name: str) -> None:
    """Raises InputError (DF201): a row that has a path and no content would be read from this machine's disk."""
    fix = "write the images into it, as scripts/prepare_data.py does"
    for split, rows in data.items():
        for column in ("image", "mask"):
            cells = rows.cast_column(column, datasets.Image(decode=False)).data[column]
            empty = pc.and_(pc.is_null(pc.struct_field(cells, "bytes")), pc.is_valid(pc.struct_field(cells, "path")))
            if (row := pc.index(empty, True).as_py()) >= 0:
                path = cells[row]["path"].as_py()
                what = f"row {row} of its split '{split}' names the {column} {path!r} on this machine"
                raise InputError(Problem("DF201", f"--dataset_name {name}", what, fix))


def _choose_object(source: str | Path, objects: Iterable[str], wanted: str | None) -> str:
    objects = list(objects)
    if wanted is None and len(objects) > 1:
        fix = f"choose one with --object: {', '.join(objects)}"
        raise InputError(Problem("DF162", source, "holds several objects", fix))
    if wanted is not None and wanted not in objects:
        raise InputError(Problem("DF162", f"--object {wanted}", f"not in {source}.{did_you_mean(wanted, objects)}"))
    return wanted or objects[0]


def _rows_where(dataset: Dataset, column: str, values: Collection[str]) -> Dataset:
    return dataset.select([i for i, value in enumerate(dataset[column]) if value in values])


def single_types(known: Iterable[str]) -> list[str]:
    """The defect types to learn when none are named: all but `combined`, a word for several that names no appearance.

    Raises:
        InputError: there is only `combined` (DF163).
    """
    known = sorted(set(known))
    single = [defect for defect in known if defect.casefold() != COMBINED]
    what = "is not learnt, because the word names no appearance"
    if known and not single:
        raise InputError(Problem("DF163", f"defect type {known[0]}", what, f"name it with --defect {known[0]}"))
    for defect in known:
        if defect not in single:
            logger.warning(f"{defect} {what}; name it with --defect to learn it too")
    return single


def defect_types(data: DatasetDict) -> set[str]:
    """The defect types of the splits train and test."""
    return {defect for split in ("train", "test") if split in data for defect in data[split].unique("defect")}


def select_defects(data: DatasetDict, defects: Sequence[str] | None) -> DatasetDict:
    """The dataset with only these defect types in train and test (all for None).

    Raises:
        InputError: a type that is not there (DF162).
    """
    splits, known = [split for split in ("train", "test") if split in data], defect_types(data)
    if unknown := [defect for defect in defects or () if defect not in known]:
        raise InputError(
            *(Problem("DF162", f"--defect {d}", f"no such defect type.{did_you_mean(d, known)}") for d in unknown)
        )
    return DatasetDict(data | {split: _rows_where(data[split], "defect", defects or known) for split in splits})


def other_types(rows: Dataset, selected: Dataset) -> Dataset:
    """Of `rows`, those of further defect types in the images of `selected`: what its crops should not show."""
    taken = set(zip(selected["source_file"], selected["defect"]))
    images = set(selected["source_file"])
    names = zip(rows["source_file"], rows["defect"])
    return rows.select([i for i, name in enumerate(names) if name[0] in images and name not in taken])
