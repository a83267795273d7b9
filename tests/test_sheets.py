"""The report picture: what it shows of a dataset, whole and at its aspect, with letters that can be read."""

from pathlib import Path

import numpy as np
import pytest
from folders import make_mvtec
from PIL import Image, ImageDraw, ImageFont

from defectfill_dataset import letters, sheets
from defectfill_dataset.letters import Letters
from defectfill_dataset.report import check_object
from defectfill_dataset.sheets import CELL, COLUMNS, contact_sheet


GREY = (128, 128, 128)


def add_image(root: Path, defect: str, name: str, size: tuple[int, int], box=None, colour=GREY) -> None:
    """A flat image of this (W, H); its mask is the box, (left, top, right, bottom), with a dot at its corner."""
    image = Image.new("RGB", size, colour)
    image.putpixel((3, len(list(root.rglob("*.png"))) + 1), (90, 90, 90))  # no two alike
    file = root / ("test" if box else "train") / defect / name
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    if box:
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
        (root / "ground_truth" / defect).mkdir(parents=True, exist_ok=True)
        mask.save(root / "ground_truth" / defect / f"{file.stem}_mask.png")


def report_of(root: Path, **changes):
    return check_object(root, root.name, 512, 64, **changes)


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """All that is written into pictures, a line each."""
    texts, text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, xy, line, *more: (texts.append(line), text(self, xy, line, *more))
    )
    return texts


def shown(monkeypatch, root: Path, **changes) -> tuple[Image.Image, list[sheets.Entry]]:
    """The sheet and its entries."""
    kept, laid_out = [], sheets.laid_out
    monkeypatch.setattr(sheets, "laid_out", lambda name, parts: (kept.extend(parts), laid_out(name, parts))[1])
    page = contact_sheet(report_of(root, **changes))
    return page, [entry for _, entries in kept for entry in entries]


def test_aspect_is_kept_and_both_colours_of_the_outline_are_there(tmp_path, monkeypatch):
    add_image(tmp_path, "hole", "a.png", (400, 100), (20, 20, 90, 80), (200, 0, 0))
    add_image(tmp_path, "hole", "b.png", (90, 360), (20, 20, 70, 80))
    _, entries = shown(monkeypatch, tmp_path)
    assert [e.pictures[0].size for e in entries] == [(CELL, round(CELL / 4)), (round(CELL / 4), CELL)]
    for entry in entries:
        (picture,) = (np.asarray(p) for p in entry.pictures)
        for colour in (sheets.NEAR, sheets.FAR):
            assert (picture == colour).all(axis=-1).sum() > 50
    outline = (np.asarray(entries[0].pictures[0]) == sheets.NEAR).all(axis=-1)
    rows, columns = (np.flatnonzero(outline.any(axis=axis)) for axis in (1, 0))
    scale = CELL / 400
    assert [columns[0], rows[0], columns[-1], rows[-1]] == pytest.approx(
        [20 * scale, 20 * scale, 90 * scale, 80 * scale], abs=3
    )


def test_captions_are_whole(tmp_path, drawn):
    name = "a_very_long_name_of_a_camera-" + "x" * 90 + " 1.png"
    add_image(tmp_path, "hole", name, (200, 100), (20, 20, 90, 80))
    page = contact_sheet(report_of(tmp_path))
    text = "".join(drawn)
    assert f"test/hole/{name}" in text and "hole, 21 % of 200 x 100 px" in text
    assert all(ImageFont.load_default(letters.SIZE).getlength(line.rstrip()) <= page.width for line in drawn)
    assert sum(CELL - 30 < ImageFont.load_default(letters.SIZE).getlength(line.rstrip()) <= CELL for line in drawn) > 2


def test_each_image_tells_whether_it_trains(tmp_path, monkeypatch, drawn):
    make_mvtec(tmp_path / "nut", {"hole": 4, "stain": 1})
    _, entries = shown(monkeypatch, tmp_path / "nut")
    marks = {entry.caption.split("\n")[1]: entry.mark for entry in entries}
    assert marks == {
        "test/hole/000.png": "reference", "test/hole/001.png": "reference", "test/hole/002.png": "held out",
        "test/hole/003.png": "held out", "test/stain/000.png": "reference",
        "train/good/000.png": "good", "train/good/001.png": "good", "train/good/002.png": "good",
    }  # fmt: skip
    assert [drawn.count(mark) for mark in ("reference", "held out", "good")] == [3, 2, 3]
    titles = "hole: 4 images, 2 references, 2 held out", "stain: 1 image, 1 reference", "good: 3 images"
    assert all(title in drawn for title in titles)
    del drawn[:]
    _, entries = shown(monkeypatch, tmp_path / "nut", split=str(tmp_path / "missing.json"))
    assert {e.mark for e in entries} == {""}  # with the split in error, nothing is known


def test_a_defect_too_small_or_thin_to_see_is_shown_enlarged_too(tmp_path, monkeypatch):
    add_image(tmp_path, "hole", "crack.png", (1000, 800), (100, 300, 900, 302))
    add_image(tmp_path, "hole", "large.png", (1000, 800), (300, 300, 500, 500))
    add_image(tmp_path, "hole", "small.png", (1000, 800), (970, 700, 990, 712))
    _, entries = shown(monkeypatch, tmp_path)
    crack, large, small = sorted(entries, key=lambda entry: entry.caption.split("\n")[1])
    assert len(large.pictures) == 1 and "right" not in large.caption
    for entry, side in ((crack, CELL // 2), (small, 60)):
        assert entry.caption.endswith(f"right: the {side} x {side} px in the frame, at {100 * CELL / side:.0f} %")
        whole, zoomed = entry.pictures
        assert whole.size == (CELL, round(0.8 * CELL)) and zoomed.size == (CELL, CELL)
        assert (np.asarray(zoomed) == sheets.NEAR).all(axis=-1).sum() > 4 * 40  # its outline there
        assert (np.asarray(whole) == (255, 255, 255)).all(axis=-1).sum() >= 4 * 14  # the frame around the place
    assert sheets.detail_box(np.pad(np.ones((4, 4), bool), 22)) is None  # 48 pixels are enlarged as they are


def test_the_window_lies_on_the_largest_piece_and_in_the_image():
    mask = np.zeros((8192, 4096), bool)
    mask[10:13, 10:13] = mask[8000:8030, 4070:4096] = True
    left, top, right, bottom = sheets.detail_box(mask)
    assert (right, top <= 8000, bottom >= 8030, right - left) == (4096, True, True, bottom - top)
    assert mask[top:bottom, left:right].sum() == 30 * 26
    for shape, size in (((8192, 4096), (113, 226)), ((3, 5), (50, 30)), ((7, 7), (7, 7))):
        dots = np.zeros(shape, bool)
        dots[shape[0] // 2, shape[1] - 1] = True
        assert sheets.pooled(dots, size).any() and sheets.pooled(dots, size).shape == size[::-1]  # nothing gets lost


def test_the_page_is_as_wide_as_its_pictures(tmp_path, monkeypatch):
    for number, columns in ((1, 1), (2, 2), (8, 8), (9, 5)):
        root = tmp_path / str(number)
        for i in range(number):
            add_image(root, "hole", f"{i}.png", (100, 100), (20, 20, 70, 80))
        page = np.asarray(contact_sheet(report_of(root)))
        assert page.shape[1] == columns * (CELL + sheets.GAP) + sheets.GAP <= 2000
        assert (page[:, -CELL // 2] == GREY).all(axis=-1).sum() > 50  # a picture in the last column


def test_each_type_is_shown_and_the_numbers_are_fair(tmp_path, monkeypatch):
    assert sheets.fair_shares([100, 3, 1], 48) == [44, 3, 1]
    assert sheets.fair_shares([5] * 60, 48) == [1] * 60 and sheets.fair_shares([0, 2], 48) == [0, 2]
    assert sheets.fair_shares([244, 257, 268, 259, 223, 247], 48) == [8] * 6
    monkeypatch.setattr(sheets, "MOST_DEFECTS", 6)
    make_mvtec(tmp_path / "nut", {"hole": 9, "stain": 1}, good=12)
    page, entries = shown(monkeypatch, tmp_path / "nut")
    assert [e.caption.split(",")[0] for e in entries] == ["hole"] * 5 + ["stain"] + ["good"] * COLUMNS
    assert [e.mark for e in entries[:5]] == ["reference"] * 2 + ["held out"] * 3  # as in the whole: a third


@pytest.mark.parametrize("defects", [{}, {"hole": 1}])
def test_without_usable_defects_there_is_a_picture_all_the_same(tmp_path, monkeypatch, drawn, defects):
    for i in range(2):
        add_image(tmp_path, "good", f"{i}.png", (100, 100))
    (tmp_path / "test").mkdir()
    (tmp_path / "ground_truth").mkdir()
    for defect in defects:
        add_image(tmp_path, defect, "a.png", (100, 100), (20, 20, 70, 80))
        (tmp_path / "test" / defect / "a.png").write_text("no image")
        for file in (tmp_path / "train/good").iterdir():
            file.write_text("no image")
    page, entries = shown(monkeypatch, tmp_path)
    assert [entry.mark for entry in entries] == ([] if defects else ["good", "good"])
    assert ("No image can be shown." in "".join(drawn)) == bool(defects)
    assert ("hole: 1 image, 1 reference, 1 with problems" in "".join(drawn)) == bool(defects)


def test_letters_without_a_glyph_are_spelt_out(monkeypatch, drawn):
    monkeypatch.setattr(letters, "FONTS", ("no such font.ttf",))
    own = Letters(["a\u5212 \x07e\udc80"])
    assert own.shown("a\u5212 \x07e\udc80") == "a\\u5212 \\x07e\\udc80"
    own.block("a\u5212", 200)
    assert drawn == ["a\\u5212"]


def test_the_font_that_has_most_letters_writes(monkeypatch):
    names = {size: ImageFont.load_default(size) for size in (13, 14, 15)}
    has = {13: "abc", 14: "abc\u5212", 15: "abc\u5212\u75d5"}
    monkeypatch.setattr(letters, "fonts", lambda: iter(names.values()))
    monkeypatch.setattr(letters, "has", lambda font, c: c in has[font.size])
    assert Letters(["a b", "c"]).font is names[13]  # Pillow's own where it will do: the same picture everywhere
    assert Letters(["a", "\u5212"]).font is names[14]
    most = Letters(["a\u5212\u75d5\u4ef6"])
    assert most.font is names[15] and most.shown("a\u5212\u4ef6") == "a\u5212\\u4ef6"
    assert Letters(["e\u0301"]).shown("e\u0301") == "\\xe9"  # one letter, not two


def test_a_font_of_the_system_writes_chinese(drawn):
    if not any(letters.has(font, "\u5212") for font in letters.fonts()):
        pytest.skip("needs a font with Chinese letters")
    written = Letters(["\u5212\u75d5"])
    assert np.asarray(written.block("\u5212\u75d5", 200)).min() < 100 and drawn == ["\u5212\u75d5"]
