"""Masks of more than two values: told apart, mapped by --mask_classes, or refused with what they hold."""

import io
import json

import numpy as np
import pytest
from drawn import write_image
from folders import make_mvtec
from PIL import Image, ImageFilter

from defectfill_dataset import InputError, MaskClasses, binarise, check_pairs, load_defect_pairs
from defectfill_dataset.mask_values import nonzero


def boxes(*values: tuple, size: int = 64, ground=0) -> np.ndarray:
    """(size, size) or (size, size, 3) pixels with (value, top, left, bottom, right) boxes."""
    first = values[0][0]
    pixels = np.full((size, size, 3) if isinstance(first, tuple) else (size, size), ground, dtype=np.uint8)
    for value, top, left, bottom, right in values:
        pixels[top:bottom, left:right] = value
    return pixels


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> Image.Image:
    """The picture as a file of this format gives it back."""
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, kind, **options)
    return Image.open(stream)


ONE = boxes((255, 10, 10, 30, 40))
CLASSES = boxes((85, 5, 5, 15, 30), (170, 25, 40, 35, 60), (255, 45, 5, 55, 20))


@pytest.mark.parametrize(
    "pixels, words",
    [
        (CLASSES, "several values. It holds 0 .3496 pixels., 85 .250 pixels., 170 .200 pixels., 255 .150 pixels."),
        (boxes((255, 8, 8, 42, 62), (1, 10, 10, 40, 60)), "0 .2260 pixels., 1 .1500 pixels., 255 .336 pixels."),
        (boxes((255, 8, 8, 42, 62), (100, 50, 3, 51, 60)), "100 .57 pixels."),  # a crack a pixel wide
        (boxes(((250, 50, 83), 5, 5, 15, 30), ground=(128, 64, 0)), "ground is not black. It holds 128,64,0"),
        (boxes(((255, 0, 0), 5, 5, 15, 30), ((0, 255, 0), 25, 5, 35, 30)), "several colours. .* 255,0,0 .250"),
        (boxes((255, 5, 5, 15, 30), ground=200), "ground is not black"),
        (boxes((3, 5, 5, 15, 30), (1, 30, 5, 40, 30)), "greatest value is 3; code it as 0 and 255"),
    ],
)
def test_values_that_may_be_classes_are_refused_with_what_there_is(pixels, words):
    with pytest.raises(ValueError, match=words) as caught:
        binarise(encoded(pixels))
    assert "--mask_classes VALUE=NAME" in str(caught.value)


def test_palettes_and_jpegs_of_classes_are_refused_too():
    palette = Image.fromarray(boxes((1, 5, 5, 15, 30), (2, 25, 5, 35, 30)), mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    with pytest.raises(ValueError, match=r"several palette colours. It holds 0 .* 1 \(250 pixels\), 2 \(250 pixels\)"):
        binarise(encoded(palette))
    with pytest.raises(ValueError, match="several values"):
        binarise(encoded(CLASSES, "JPEG", quality=95))


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_noise_of_a_jpeg_is_no_class_and_no_defect(quality):
    jpeg = encoded(ONE, "JPEG", quality=quality)
    for mask in (jpeg, encoded(jpeg.convert("L"))):  # also saved as PNG afterwards
        assert (binarise(mask) != (ONE > 0)).mean() < 0.005
    assert np.array_equal(nonzero(jpeg), binarise(jpeg))


def test_soft_edges_are_cut_at_half():
    large = Image.fromarray(np.kron(ONE, np.ones((4, 4), dtype=np.uint8)))
    for soft in (
        Image.fromarray(ONE).filter(ImageFilter.GaussianBlur(3)),
        Image.fromarray(ONE).resize((96, 96), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BILINEAR),
        large.resize((64, 64), Image.Resampling.LANCZOS),
    ):
        assert (binarise(encoded(soft)) != (ONE > 0)).mean() < 0.02
    red = np.stack([np.asarray(Image.fromarray(ONE).filter(ImageFilter.GaussianBlur(1))), ONE * 0, ONE * 0], axis=-1)
    assert (binarise(encoded(red)) != (ONE > 0)).mean() < 0.02


def test_a_mark_that_half_would_lose_is_refused():
    """A thin crack whose mask was made smaller with soft edges."""
    pixels = ONE.copy()
    pixels[50, 5:60] = np.linspace(60, 110, 55)
    with pytest.raises(ValueError, match="faint marks"):
        binarise(encoded(pixels))


def test_one_dark_colour_on_black_is_the_defect():
    dark = boxes(((100, 0, 0), 5, 5, 15, 30))
    assert np.array_equal(binarise(encoded(dark)), dark.any(axis=-1))


# --mask_classes


@pytest.mark.parametrize(
    "text", ["85", "=scratch", "85=", "85=good", "x=hole", "1,2=hole", "256,0,0=hole", "#12345=hole", "70000=hole"]
)
def test_a_wrong_class_is_told(text):
    with pytest.raises(InputError, match="DF169 --mask_classes '.*': write VALUE=NAME"):
        MaskClasses.parse([text])


def test_a_class_given_twice_is_told():
    with pytest.raises(InputError, match="DF169 .*: 85 is given twice"):
        MaskClasses.parse(["85=hole", "85=crack"])


def make_coded(root, mask: np.ndarray | Image.Image, number: int = 3):
    """A folder of images that all have this class-coded mask."""
    for i in range(number):
        write_image(root / f"images/{i}.png", 64)
        (root / "masks").mkdir(exist_ok=True)
        encoded(mask).save(root / f"masks/{i}.png")
    write_image(root / "good/x.png", 64)
    return root


def read(root, *classes: str) -> dict[str, dict[str, np.ndarray]]:
    """Image name -> defect type -> mask."""
    rows = load_defect_pairs(root, split="all", mask_classes=classes)["train"]
    check_pairs(rows)
    found: dict[str, dict[str, np.ndarray]] = {}
    for row in rows:
        found.setdefault(row["source_file"], {})[row["defect"]] = binarise(row["mask"])
    return found


def test_values_become_types_and_ignored_ones_none(tmp_path):
    root = make_coded(tmp_path / "nut", CLASSES)
    with pytest.raises(InputError, match="DF103 images/0.png: its mask cannot be read: 0.png: it has several values"):
        check_pairs(load_defect_pairs(root, split="all")["train"])
    found = read(root, "85=scratch", "170=ignore", "255=hole")
    assert len(found) == 3
    for masks in found.values():
        assert masks.keys() == {"scratch", "hole"}
        assert np.array_equal(masks["scratch"], CLASSES == 85) and np.array_equal(masks["hole"], CLASSES == 255)
    (both,) = {frozenset(masks) for masks in read(root, "85=mark", "170=mark", "255=hole").values()}
    assert both == {"mark", "hole"}
    assert np.array_equal(
        read(root, "85=mark", "170=mark", "255=ignore")["images/0.png"]["mark"], (CLASSES == 85) | (CLASSES == 170)
    )


def test_a_border_that_is_to_be_ignored(tmp_path):
    pixels = boxes((255, 8, 8, 42, 62), (1, 10, 10, 40, 60))
    found = read(make_coded(tmp_path / "nut", pixels), "1=hole", "255=ignore")
    assert np.array_equal(found["images/0.png"]["hole"], pixels == 1)


def test_colours_on_a_ground_of_their_own(tmp_path):
    pixels = boxes(((250, 50, 83), 5, 5, 15, 30), ((0, 9, 9), 30, 5, 40, 30), ground=(128, 64, 0))
    root = make_coded(tmp_path / "nut", pixels)
    found = read(root, "128,64,0=ignore", "#fa3253=hole", "0,9,9=stain")["images/2.png"]
    assert np.array_equal(found["hole"], pixels[..., 0] == 250) and np.array_equal(found["stain"], pixels[..., 0] == 0)


def test_palettes_by_number_or_colour(tmp_path):
    palette = Image.fromarray(boxes((1, 5, 5, 15, 30), (2, 25, 5, 35, 30)), mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    root = make_coded(tmp_path / "nut", palette)
    for classes in (("1=hole", "2=crack"), ("128,0,0=hole", "0,128,0=crack")):
        found = read(root, *classes)["images/0.png"]
        assert np.array_equal(found["hole"], np.asarray(palette) == 1) and found["crack"].sum() == 250


def test_a_value_that_no_class_names_is_refused(tmp_path):
    root = make_coded(tmp_path / "nut", CLASSES)
    with pytest.raises(InputError, match=r"does not name: 255 \(150 pixels\); name them too"):
        read(root, "85=scratch", "170=stain")
    (root / "masks/1.png").unlink()
    Image.fromarray(CLASSES).save(root / "masks/1.jpg", quality=95)
    with pytest.raises(InputError, match="DF103 images/1.png.*JPEG blurs the values of classes; save the mask as PNG"):
        read(root, "85=scratch", "170=stain", "255=hole")
    Image.fromarray(CLASSES * 0).save(root / "masks/1.png")
    (root / "masks/1.jpg").unlink()
    with pytest.raises(InputError, match="DF145 images/1.png: its mask is empty"):
        read(root, "85=scratch", "170=stain", "255=hole")


@pytest.mark.slow
def test_training_learns_one_class_of_coded_masks(tmp_path, train):
    root = make_coded(tmp_path / "nut", CLASSES)
    output = train("--mask_classes", "85=scratch", "170=ignore", "255=hole", "--defect", "hole", data=root)
    record = json.loads((output / "run_record.json").read_text())
    assert "hole" in json.dumps(record) and "scratch" not in (output / "README.md").read_text()


# JPEG masks, in every layout that reads mask files by name


@pytest.mark.parametrize("layout", ["mvtec", "folder", "visa", "ksdd2", "btad"])
def test_jpeg_masks(tmp_path, layout):
    """Their noise is no defect, and makes no good image defective."""
    places = {
        "mvtec": ("test/hole/{}.png", "ground_truth/hole/{}_mask.jpg"),
        "folder": ("images/{}.png", "masks/{}.jpg"),
        "visa": ("Data/Images/Anomaly/{}.JPG", "Data/Masks/Anomaly/{}.jpg"),
        "ksdd2": ("train/{}.png", "train/{}_GT.jpg"),
        "btad": ("test/ko/{}.png", "ground_truth/ko/{}.JPG"),
    }
    root = tmp_path / "part"
    for i in range(2):
        image, mask = (root / place.format(i) for place in places[layout])
        write_image(image, 64)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ONE).save(mask, quality=75)
    if layout == "ksdd2":
        write_image(root / "train/9.png", 64)
        Image.fromarray(ONE * 0).save(root / "train/9_GT.jpg", quality=75)
    data = load_defect_pairs(root, split="all")
    check_pairs(data["train"])
    assert len(data["train"]) == 2
    for row in data["train"]:
        assert (binarise(row["mask"]) != (ONE > 0)).mean() < 0.005


def test_mvtec_masks_stay_the_files_they_are(tmp_path):
    data = load_defect_pairs(make_mvtec(tmp_path / "nut"))
    assert all(mask["bytes"] is None for mask in data["train"].data.column("mask").to_pylist())
