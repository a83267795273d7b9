"""scripts/export_generated.py: every format, read back by the project, pixel for pixel where that can be."""

import collections
import csv
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from generated_folder import drawn, export, make_generated, marks, read_back
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

from defectfill.runs.files import exclusive_lock
from defectfill_dataset import InputError, binarise, find_objects
from defectfill_dataset.masks import components, polygon_mask
from defectfill_dataset.readers.rows import SPLITS
from defectfill_dataset.writers.exports import EXPORTERS, NORMAL_ONLY
from defectfill_dataset.writers.polygons import exact_polygon, joined_polygon, outlines
from defectfill_scripts import export_generated


def told(*argv) -> list[str]:
    with pytest.raises(InputError) as caught:
        export(*argv)
    return str(caught.value).splitlines()


def files(folder: Path) -> list[str]:
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and f.name[0] != ".")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[k][0] == other[k][0] and np.array_equal(one[k][1], other[k][1]) for k in one
    )


# Outlines


def noise_masks():
    rng = np.random.default_rng(0)
    for smooth in (0, 0.6, 1, 2) * 6:
        yield ndimage.gaussian_filter(rng.normal(size=rng.integers(5, 40, 2)), smooth) > 0.05


def decoded(polygon: np.ndarray, shape) -> np.ndarray:
    return coco_mask.decode(coco_mask.frPyObjects([polygon.ravel().tolist()], *shape))[..., 0] > 0


def test_outlines_run_exactly_along_the_pixels():
    some_with_holes = some_exact = 0
    for mask in noise_masks():
        whole = np.zeros_like(mask)
        for left, top, component in components(mask):
            place = np.zeros_like(mask)
            place[top : top + component.shape[0], left : left + component.shape[1]] = component
            whole |= place
            outer, *holes = (line + [left, top] for line in outlines(component))
            assert np.array_equal(decoded(outer, mask.shape), ndimage.binary_fill_holes(place))
            assert len(holes) == ndimage.label(~np.pad(component, 1))[1] - 1
            joined = joined_polygon(component) + [left, top]
            assert np.array_equal(decoded(joined, mask.shape), place)
            seen = polygon_mask(joined, mask.shape[::-1])  # adds a pixel around what is under two pixels wide
            assert (seen >= place).all() and (seen <= ndimage.binary_dilation(place, np.ones((3, 3)))).all()
            exact = exact_polygon(component)
            if exact is not None:
                assert not holes and np.array_equal(polygon_mask(exact + [left, top], mask.shape[::-1]), place)
            some_with_holes, some_exact = some_with_holes + bool(holes), some_exact + (exact is not None)
        assert np.array_equal(whole, mask)
    assert some_with_holes > 20 and some_exact > 40


# The formats


def test_mvtec_is_read_back_pixel_for_pixel(tmp_path, generated, photos):
    out = export(tmp_path / "out", "mvtec", generated, "--good", photos)
    assert list(find_objects(out)) == ["metal nut"] and same(read_back(out)[0], marks(generated))
    names = files(out / "metal nut")
    assert "test/hole/000_0.png" in names and "ground_truth/hole/000_0_mask.png" in names
    assert (out / "metal nut/test/hole/000_0.png").read_bytes() == (generated / "images/000_0.png").read_bytes()
    good = {split: [n for n in names if n.startswith(f"{split}/good")] for split in ("train", "test")}
    assert len(good["train"]) + len(good["test"]) == 12 and good["train"]
    assert {f"test/good/good_{i:03d}.png" for i in range(6)} <= set(good["test"])  # the painted ones


def test_anomalib_folders_and_table_agree(tmp_path, generated, photos):
    out = export(tmp_path / "out", "anomalib", generated, "--good", photos)
    with (out / "samples.csv").open(newline="") as table:
        lines = list(csv.DictReader(table))
    assert lines[0].keys() == {"image_path", "label_index", "mask_path", "split", "defect"}
    listed = {line[key] for line in lines for key in ("image_path", "mask_path") if line[key]}
    assert {*listed, "samples.csv"} == set(files(out)) and len(lines) == 24
    places = {
        "normal": ("0", "train", ""), "normal_test": ("0", "test", ""), "abnormal": ("1", "test", "masks"),
    }  # fmt: skip
    for line in lines:
        place = Path(line["image_path"]).parent.name
        assert (line["label_index"], line["split"], str(Path(line["mask_path"]).parent).strip(".")) == places[place]
    abnormal, masks = ({Path(n).stem for n in files(out / place)} for place in ("abnormal", "masks"))
    assert abnormal == masks == marks(generated).keys()


def test_coco_is_read_back_pixel_for_pixel_and_says_areas_and_boxes(tmp_path, generated, photos):
    out = export(tmp_path / "out", "coco", generated, "--good", photos)
    assert same(read_back(out)[0], marks(generated))
    seen = collections.Counter()
    for split in ("train", "test"):
        coco = COCO(out / f"annotations_{split}.json")
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == ["defect", "hole"]
        for image in coco.loadImgs(coco.getImgIds()):
            found = coco.loadAnns(coco.getAnnIds(image["id"]))
            if image["file_name"].startswith("good_"):
                assert not found
                continue
            defect, mask = marks(generated)[Path(image["file_name"]).stem]
            parts = [coco.annToMask(a) > 0 for a in found]
            assert np.array_equal(sum(parts), mask) and len(parts) == ndimage.label(mask, np.ones((3, 3)))[1]
            for annotation, part in zip(found, parts):
                y, x = np.nonzero(part)
                assert annotation["area"] == part.sum() and annotation["category_id"] == 1 + (defect == "hole")
                left, top, width, height = annotation["bbox"]
                assert (left, top, left + width, top + height) == (x.min(), y.min(), x.max() + 1, y.max() + 1)
                polygon = isinstance(annotation["segmentation"], list)
                assert polygon == (len(outlines(part)) == 1 and not np.array_equal(mask, drawn("crack")))
                seen[polygon] += 1
    assert seen[True] > 4 and seen[False] > 4


def test_coco_of_one_split_is_one_file_and_the_same_every_time(tmp_path, generated):
    one, two = (export(tmp_path / n, "coco", generated, "--test_share", 0) for n in ("one", "two"))
    lines = (generated / "manifest.jsonl").read_text().splitlines(keepends=True)
    (generated / "manifest.jsonl").write_text("".join(lines[::-1]))  # ids do not depend on the order
    export(two, "coco", generated, "--test_share", 0)
    assert (one / "annotations.json").read_bytes() == (two / "annotations.json").read_bytes()
    assert [n for n in files(one) if "/" not in n] == ["annotations.json"]
    assert same(read_back(one)[0], marks(generated))


def test_yolo_polygons_lose_no_pixel_and_add_one_around_thin_lines_alone(tmp_path, generated, photos):
    out = export(tmp_path / "out", "yolo", generated, "--good", photos)
    found, splits = read_back(out)
    for name, (defect, mask) in marks(generated).items():
        assert found[name][0] == defect and (found[name][1] >= mask).all()
        assert (found[name][1] <= ndimage.binary_dilation(mask, np.ones((3, 3)))).all()
        assert np.array_equal(found[name][1], mask) or np.array_equal(mask, drawn("crack"))
    config = yaml.safe_load((out / "data.yaml").read_text())
    assert config == {"train": "images/train", "val": "images/val", "names": {0: "defect", 1: "hole"}}
    assert len(files(out / "images")) == 24 and len(files(out / "labels")) == 12
    assert set(splits.values()) == {"train", "test"} and SPLITS["val"] == "test"


def test_yolo_boxes_are_those_of_the_pieces(tmp_path, generated):
    out = export(tmp_path / "out", "yolo-detect", generated)
    found, _ = read_back(out)
    for name, (_, mask) in marks(generated).items():
        boxes = np.zeros_like(mask)
        for left, top, component in components(mask):
            boxes[top : top + component.shape[0], left : left + component.shape[1]] = True
        assert np.array_equal(found[name][1], boxes)
    texts = [f.read_text().splitlines() for f in (out / "labels").rglob("*.txt")]
    assert all(len(line.split()) == 5 for lines in texts for line in lines) and len(texts) == 12


@pytest.mark.parametrize("file_format", ["imagefolder", "parquet"])
def test_datasets_reads_what_the_other_writers_write(tmp_path, generated, photos, file_format):
    out = export(tmp_path / "out", file_format, generated, "--good", photos)
    data = datasets.load_dataset(str(out))
    good = data["good"] if "good" in data else datasets.load_dataset(str(out), "good")["good"]
    rows = [*data["train"], *data["test"]]
    assert same(
        {Path(r["source_file"]).stem: (r["defect"], binarise(r["mask"])) for r in rows}, marks(generated)
    ) and set(good["source_file"]) == {f"photos/{i:03d}.png" for i in range(12)}
    assert {row["object"] for row in rows} == set(good["object"]) == {"metal nut"}
    assert "hash of the good image" in (out / "README.md").read_text()


# The split


def sides(out: Path) -> dict[str, set[str]]:
    """Split -> the photographs that its images show."""
    names = files(out / "images")
    return {side: {re.search(r"\d{3}", name)[0] for name in names if side in name} for side in ("train", "val")}


@pytest.mark.parametrize("digest", [True, False])
def test_what_shows_one_photograph_stays_together(tmp_path, photos, digest):
    make_generated(tmp_path / "one", 12, digest=digest), make_generated(tmp_path / "two", 12, digest=digest)
    out = export(tmp_path / "out", "yolo", tmp_path / "one", tmp_path / "two", "--good", photos, "--test_share", 0.4)
    found = sides(out)
    assert len(found["train"]) + len(found["val"]) == 12 and not found["train"] & found["val"]
    assert len(files(out / "images")) == 12 + 2 * 24
    smaller = sides(export(tmp_path / "less", "yolo", tmp_path / "one", "--test_share", 0.2))
    assert smaller["val"] <= found["val"]  # a photograph keeps its side


def test_a_photograph_is_known_by_its_content(tmp_path, generated, photos):
    for file in photos.iterdir():
        file.rename(file.with_name(f"x{file.name}"))
    out = export(tmp_path / "out", "mvtec", generated, "--good", photos)
    assert {f"good_x{i:03d}.png" for i in range(6)} <= set(files(out / "metal nut/test/good"))


def test_a_small_share_still_tests_something(tmp_path, generated, photos):
    out = export(tmp_path / "out", "yolo", generated, "--test_share", 1e-9)
    assert len(files(out / "images/val")) == 2
    for number in range(6):
        (photos / f"{number:03d}.png").unlink()
    out = export(tmp_path / "mvtec", "mvtec", generated, "--good", photos, "--test_share", 1e-9)
    assert [len(files(out / "metal nut" / split / "good")) for split in ("train", "test")] == [5, 1]


# Good photographs


def test_photographs_lose_their_metadata_and_are_upright(tmp_path, generated, photos):
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = 6, "Kodak-7"
    turned = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    turned.save(photos / "told.jpg", exif=exif)
    del exif[0x0110]
    turned.save(photos / "turned.jpg", exif=exif), turned.resize((64, 48)).save(photos / "plain.JPG")
    for file_format in ("mvtec", "anomalib", "coco", "yolo"):
        out = export(tmp_path / file_format, file_format, generated, "--good", photos)
        found = {f.stem: f for f in out.rglob("good_*.*")}
        for name in ("told", "turned"):
            image = Image.open(found[f"good_{name}"])
            assert image.format == "PNG" and image.size == (40, 60) and not image.getexif()
        plain = found["good_plain"]
        assert plain.suffix == (".png" if file_format == "mvtec" else ".jpg")
        assert np.array_equal(Image.open(plain), Image.open(photos / "plain.JPG"))


@pytest.mark.parametrize("file_format", [f for f in EXPORTERS if f not in NORMAL_ONLY])
def test_formats_that_need_no_good_photograph_do_without(tmp_path, generated, file_format):
    assert len(files(export(tmp_path / "out", file_format, generated))) > 2


# Problems


def test_every_problem_is_told_at_once_and_nothing_written(tmp_path, photos):
    one, two = (make_generated(tmp_path / f"{part}/run", digest=False) for part in "ab")
    Image.new("L", (10, 10), 255).save(one / "masks/000_0.png")
    (one / "images/000_1.png").unlink(), (one / "masks/001_0.png").unlink()
    lines = (two / "manifest.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace("metal nut", "../nut")
    lines[1] = lines[1].replace("null", '"good"')
    lines[4] = lines[4].replace('"metal nut"', "null")
    lines[2:4] = ["[1]", '{"name": "003_0"']
    (two / "manifest.jsonl").write_text("\n".join(lines))
    (tmp_path / "empty").mkdir(), (tmp_path / "none").mkdir()
    (tmp_path / "none/manifest.jsonl").touch()
    more = (one, two, tmp_path / "empty", tmp_path / "none", "--test_share", 1)
    problems = told(tmp_path / "out", "mvtec", *more)
    assert problems[0] == "DF199 --format mvtec: trains on good images; give a folder of them with --good"
    assert problems[1] == "DF199 --test_share 1: must be at least 0 and less than 1"
    assert problems[2] == f"DF197 {one}/manifest.jsonl, line 2: names 'images/000_1.png', which is not there; " + (
        "generate it again"
    )
    assert problems[3].startswith(f"DF197 {one}/manifest.jsonl, line 3: names 'masks/001_0.png'")
    assert problems[4:6] == [
        f"DF196 {two}/manifest.jsonl, line 1: the object '../nut' cannot name a folder of defects; rename it there",
        f"DF196 {two}/manifest.jsonl, line 2: the defect 'good' cannot name a folder of defects; rename it there",
    ]
    assert [p[: p.index(": is not of")] for p in problems[6:8]] == [
        f"DF196 {two}/manifest.jsonl, line {number}" for number in (3, 4)
    ]
    assert problems[8].startswith(f"DF196 {two}/manifest.jsonl, line 5: the object '' cannot name")
    assert problems[9:11] == [
        f"DF196 {tmp_path}/empty: holds no manifest.jsonl; give a folder that generate_defectfill.py wrote",
        f"DF196 {tmp_path}/none/manifest.jsonl: lists no image; generate some",
    ]
    assert problems[11] == "DF140 run/images/000_0.png: the image is 64x48, its mask 10x10; they must match"
    assert problems[12:] == [
        f"DF198 {one}/images, {two}/images: both hold an image to be called 'run_000_0'; rename one"
    ]
    assert not (tmp_path / "out").exists()


def test_several_folders_are_told_apart_by_their_names(tmp_path, photos):
    one, two = make_generated(tmp_path / "one"), make_generated(tmp_path / "two", defects=("scratch",))
    found, _ = read_back(export(tmp_path / "out", "coco", one, two))
    assert same(found, {f"{f.name}_{name}": mark for f in (one, two) for name, mark in marks(f).items()})


def test_impossible_wishes(tmp_path, generated, photos):
    out = tmp_path / "out"
    assert told(out, "coco", generated, "--good", tmp_path / "no") == [
        f"DF199 --good {tmp_path}/no: no such folder; give a folder of good images"
    ]
    (tmp_path / "none").mkdir()
    assert told(out, "coco", generated, "--good", tmp_path / "none") == [
        f"DF199 --good {tmp_path}/none: no images in it; give a folder of good images"
    ]
    (photos / "lost.png").symlink_to("nowhere.png")
    (line,) = told(out, "coco", generated, "--good", photos)
    assert line.startswith("DF103 photos/lost.png: the image cannot be read")
    (photos / "lost.png").unlink()
    for number in range(6, 12):
        (photos / f"{number:03d}.png").unlink()
    (line,) = told(out, "mvtec", generated, "--good", photos)
    assert line.startswith(f"DF199 --good {photos}: leaves no good image to train on: those that defects")
    (line,) = told(out, "yolo", generated, "--test_share", 0)
    assert line.startswith("DF199 --test_share 0: leaves no defect to test; all images generated from one good image")
    (line,) = told(out, "coco", make_generated(tmp_path / "one", 1))
    assert line.startswith("DF199 --test_share 0.2: leaves no defect to train;")
    text = (generated / "manifest.jsonl").read_text()
    (generated / "manifest.jsonl").write_text(text.replace("metal nut", "bolt", 1))
    (line,) = told(out, "coco", generated, "--good", photos)
    assert line == (
        f"DF199 --good {photos}: holds one object, the generated images show bolt, metal nut; "
        "export one object at a time"
    )
    assert not out.exists()


def test_an_export_is_whole_or_not_there(tmp_path, generated, monkeypatch):
    out = export(tmp_path / "out", "coco", generated)
    before = {name: (out / name).read_bytes() for name in files(out)}
    (out / ".tmp-defectfill-killed").mkdir()
    export(out, "coco", generated)
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    assert not list(out.glob(".tmp*"))
    assert told(out, "yolo", generated)[0].startswith(f"DF193 {out}: holds annotations_test.json, which is not of")
    with exclusive_lock(out):
        assert told(out, "coco", generated)[0].startswith("DF191")
    monkeypatch.setattr(export_generated, "publish_dir", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "other", "coco", generated)
    assert files(tmp_path / "other") == []
