"""Label Studio's JSON: what is made of its tasks, and of wrong ones."""

from pathlib import Path

import numpy as np
import pytest
from annotated import (
    BOTTOM,
    LEFT,
    RIGHT,
    SPECKS,
    TOP,
    annotated,
    is_oval,
    make_label_studio,
    marks,
    packed,
    rectangle,
    result,
    rgba,
    task,
    turned_box,
)
from drawn import square, write_image
from folders import write_json
from readings import codes, masks_of, table, told

from defectfill_dataset.readers import read_object
from defectfill_dataset.readers.brush import decode_brush


# Label Studio


def test_label_studio(tmp_path):
    root = make_label_studio(tmp_path / "nut")
    rows = table(root)
    assert {name for name, row in rows.items() if row[0] == "good"} == {"images/clean.png", "images/fine.png"}
    masks = masks_of(root)
    assert np.array_equal(masks["images/outline.png"], square(12, 10, 30, 20))
    assert np.array_equal(masks["images/box.png"], square(TOP, LEFT, BOTTOM, RIGHT))
    assert np.array_equal(masks["images/turned.png"], turned_box(30, about="corner"))
    assert is_oval(masks["images/oval.png"], 24, 20, 16, 6, 30)
    assert np.array_equal(masks["images/brush.png"], SPECKS)
    assert marks(root, "images/two.png").keys() == {"hole", "crack"} and marks(root, "images/apart.png").keys() == {
        "pit"
    }
    assert not read_object(root, "nut").notes


def one_task(root: Path, *tasks: dict) -> Path:
    write_image(root / "images/a.png")
    write_json(root / "tasks.json", list(tasks))
    return root


@pytest.mark.parametrize(
    "found, words",
    [
        (result("keypointlabels", x=5, y=5, width=1), "result r1: the type 'keypointlabels' marks no area"),
        (result("bitmasklabels", imageDataURL="data:"), "result r1: the type 'bitmasklabels' marks no area"),
        (result("choices", choices=["scratched"]), "is tagged 'scratched' as a whole"),
        (result("brushlabels", maskUrl="https://x.org/1.png"), "result r1: its brush has no RLE"),
        (result("brushlabels", format="rle", rle=[0, 0, 1]), "result r1: its RLE ends too early"),
        (result("brushlabels", format="rle", rle=packed(rgba(square(0, 0, 4, 4, 40)))), "6400 values of 8 bits"),
        (result("brushlabels", format="rle", rle=packed(rgba(SPECKS))[:-2]), "ends too early"),
        (result("brushlabels", format="rle", rle=[*packed(rgba(SPECKS)), 0, 7]), "goes on past the last pixel"),
        (result("brushlabels", format="rle", rle="abc"), "not a list of bytes"),
        (result("brushlabels", format="rle", rle=[256, -1]), "not a list of bytes"),
        (result("polygonlabels", points=[[1, 1], [5, 5]]), "2 corners"),
        (result("polygonlabels", points=[[1, 1], [5, 5], [150, 3]]), "(72, 1.44) is not in the image"),
        (result("rectanglelabels", x=1, y=1, width=0, height=4), "0 wide"),
        (result("rectanglelabels", x=1, y=1, width=4), "has no 'height'"),
        (result("rectangle", x=1, y=1, width=4, height=4), "has no label"),
        (rectangle() | {"image_rotation": 90}, "the image was turned by 90 degrees"),
        (result("rectanglelabels", ["good"], x=1, y=1, width=4, height=4), "cannot be called 'good'"),
    ],
)
def test_wrong_label_studio(tmp_path, found, words):
    root = one_task(tmp_path / "nut", task("a.png", annotated(found)))
    (problem,) = told(root)
    assert problem.startswith("DF167 tasks.json, task 3: its annotation cannot be used: ") and words in problem


def test_label_studio_of_several_annotators(tmp_path):
    one, other = annotated(rectangle()), annotated(rectangle(20), id=12)
    root = one_task(tmp_path / "nut", task("a.png", one, annotated(rectangle(), id=12)))
    assert table(root) == {"images/a.png": ("hole", None)}
    one_task(root, task("a.png", one, other))
    assert told(root) == ("DF144 tasks.json, task 3: its annotations 11, 12 differ; keep one of them",)
    one_task(root, task("a.png", one, other | {"was_cancelled": True}))
    assert np.array_equal(marks(root, "images/a.png")["hole"], square(TOP, LEFT, BOTTOM, RIGHT))
    one_task(root, task("a.png", one), task("a.png", other, id=4))
    assert codes(told(root)) == ["DF144"]


def test_label_studio_tasks_that_were_not_labelled(tmp_path):
    root = one_task(tmp_path / "nut", task("a.png", predictions=[{"result": [rectangle()]}]))
    write_image(root / "images/b.png"), write_image(root / "images/c.png"), write_image(root / "good/d.png")
    one_task(
        root,
        task("a.png", predictions=[{"result": [rectangle()]}]),
        task("b.png", annotated(was_cancelled=True), id=4),
    )
    assert told(root) == (
        "DF142 tasks.json, task 3: its task was not labelled: it has no annotation; label it, or remove the image",
        "DF142 tasks.json, task 4: its task was skipped; label it, or remove the image",
    )
    assert table(root) == {"good/d.png": ("good", "good")}
    assert sorted(str(note).split("; ")[0] for note in read_object(root, "nut").notes) == [
        f"DF158 {root}: not read: 1 images that no annotation file names, 'images/c.png' the first",
        "DF158 tasks.json: not read: the predictions of 1 tasks",
    ]


def test_label_studio_names_of_images(tmp_path):
    root = one_task(tmp_path / "nut", task("/data/upload/1/12345678-a.png", annotated(rectangle())))
    assert table(root) == {"images/a.png": ("hole", None)}
    write_image(root / "images/12345678-a.png")
    assert table(root) == {"images/12345678-a.png": ("hole", None)}
    write_image(root / "more/12345678-a.png")
    assert told(root) == (
        "DF144 tasks.json, task 3: '/data/upload/1/12345678-a.png' may be images/12345678-a.png, more/12345678-a.png; "
        "keep one of them",
    )  # fmt: skip
    one_task(root, task("/data/local-files/?d=more%2F12345678-a.png", annotated(rectangle())))
    assert table(root) == {"more/12345678-a.png": ("hole", None)}
    one_task(root, task("gone.png", annotated()), task("text", annotated(), id=4))
    assert codes(told(root)) == ["DF143", "DF166"]
    one_task(root, task("a.png", annotated(rectangle() | {"original_width": 40})))
    assert codes(told(root)) == ["DF140"]


def test_label_studio_of_other_forms(tmp_path):
    """One annotation a file, as cloud storage gets them, and the export that leaves out what was skipped."""
    root = one_task(tmp_path / "nut")
    (root / "tasks.json").unlink()
    write_json(root / "5.json", annotated(rectangle(), task={"id": 3, "data": {"image": "s3://b/a.png"}}))
    assert table(root) == {"images/a.png": ("hole", None)}
    write_json(root / "6.json", annotated(rectangle(5), task={"id": 3, "data": {"image": "s3://b/a.png"}}))
    assert codes(told(root)) == ["DF144"]
    (root / "5.json").unlink(), (root / "6.json").unlink()
    small = {"image": "a.png", "id": 3, "label": [{"x": 1}], "annotator": 1, "annotation_id": 11}
    write_json(root / "min.json", [small])
    assert told(root) == (
        "DF166 min.json: is not of Label Studio's form: it is a JSON-MIN export; export it as JSON",
    )  # fmt: skip
    write_json(root / "min.json", [{"data": {"image": "a.png"}, "annotations": [{"result": [3]}]}])
    assert codes(told(root)) == ["DF167"]


def test_brushes_of_every_kind():
    rng = np.random.default_rng(0)
    for mask in (
        np.zeros((5, 7), bool),
        np.ones((5, 7), bool),
        rng.random((31, 17)) > 0.5,
        rng.random((40, 9)) > 0.95,
    ):
        size = mask.shape[1], mask.shape[0]
        assert np.array_equal(decode_brush(packed(rgba(mask)), size), mask)
        assert np.array_equal(decode_brush(packed(rgba(mask, (255, 255, 255, 255)), sizes=(1, 2, 4, 12)), size), mask)
    with pytest.raises(ValueError, match="140 values of 4 bits"):
        decode_brush(packed(np.zeros(140), size=4), (7, 5))
