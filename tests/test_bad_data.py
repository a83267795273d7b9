"""Bad inputs: each is refused by its code, file and fix before a model is loaded, or read right."""

import json
import logging
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
from bad_data import ACCEPTED, FOLDERS, NAMES, REFUSED, SIZE, make_pair, png, write_table
from PIL import Image
from runs import check, fork, wait_for

import train_defectfill
from defectfill.runs.source_images import SourceImage, check_source_images
from defectfill_dataset import InputError, binarise, find_objects, load_defect_pairs, load_image
from defectfill_dataset.images import open_image, upright_size


@pytest.fixture
def refusal(train, monkeypatch):
    """The problems for which training refuses a dataset; fails the test if a model is loaded."""

    def problems(data) -> tuple[str, ...]:
        with pytest.raises(InputError) as caught:
            train("--split", "all", data=data)
        return tuple(str(caught.value).splitlines())

    monkeypatch.setattr(train_defectfill, "load_models", None)
    return problems


def checked(root, capsys) -> tuple[int, list[str]]:
    """The exit status of check_data, and the lines with a code that it prints."""
    status = check(root, "--split", "all", "--resolution", SIZE)
    return status, [line for line in capsys.readouterr().out.splitlines() if line.startswith("DF")]


def names_it(line: str, row: str, code: str, words: str) -> bool:
    return line.startswith(f"{code} ") and row.split("\n")[0] in line and words in line


@pytest.mark.parametrize("row", REFUSED)
def test_a_bad_pair_is_refused(row, tmp_path, capsys, refusal):
    make, code, words = REFUSED[row]
    make(make_pair(tmp_path / "bolt", row))
    status, lines = checked(tmp_path / "bolt", capsys)
    assert status == 2 and names_it(lines[0], row, code, words), lines
    assert names_it(refusal(tmp_path / "bolt")[0], row, code, words)


def test_all_bad_pairs_are_told_at_once_by_check_data_training_and_generation(tmp_path, capsys, refusal):
    pairs = {row: make_pair(tmp_path / "bolt", row) for row in REFUSED}
    for row, pair in pairs.items():
        REFUSED[row][0](pair)
    status = check(tmp_path / "bolt", "--split", "all", "--resolution", SIZE, "--output_dir", tmp_path / "report")
    (found,) = json.loads((tmp_path / "report/report.json").read_text())["objects"]
    lines, printed = found["problems"], capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("DF103")]) == 21 and "more like these" in "".join(printed)
    told = refusal(tmp_path / "bolt")
    source_images = [SourceImage(pair.image, pair.mask) for pair in pairs.values() if pair.mask.exists()]
    with pytest.raises(InputError) as caught:
        check_source_images(source_images)
    assert status == 2 and sum(file.stat().st_size for file in tmp_path.rglob("*.*") if file.is_file()) < 2e6
    for row, (_, code, words) in REFUSED.items():
        for found in (lines, told):
            assert any(names_it(line, row, code, words) for line in found), row
        if pairs[row].mask.exists() and code not in ("DF143", "DF144"):
            assert any(names_it(line, row, code, words) for line in str(caught.value).splitlines()), row


def test_a_jpeg_without_its_end_does_not_pass_in_silence(tmp_path, capsys):
    """Pillow reads some of them."""
    for i in range(8):
        make_pair(tmp_path / "bolt", f"{i:03d}").edit(lambda content: content[:-2], ".jpg", quality=98)
    _, lines = checked(tmp_path / "bolt", capsys)
    assert {line[:5] for line in lines} == {"DF103", "DF104"}
    assert all(any(f"{i:03d}.jpg" in line for line in lines) for i in range(8))


@pytest.mark.parametrize("row", ACCEPTED)
def test_an_odd_pair_is_read_right(row, tmp_path, capsys):
    make, code = ACCEPTED[row]
    make(pair := make_pair(tmp_path / "bolt", row))
    status, lines = checked(tmp_path / "bolt", capsys)
    assert status == 0 and [line[:5] for line in lines] == [code] * bool(code)
    (image,) = load_defect_pairs(tmp_path / "bolt", split="all")["train"]
    pixels = np.asarray(load_image(image["image"])).astype(int)
    assert pixels.shape == pair.pixels.shape
    assert np.abs(pixels - pair.pixels).max() <= (12 if code in ("DF104", "DF105", "DF125") else 0)
    assert np.array_equal(binarise(image["mask"]), pair.area)


def test_what_is_odd_in_several_pairs(tmp_path, capsys):
    """Masks inverted, all the same, a held-out image among the references."""
    pairs = [make_pair(tmp_path / "bolt", f"{i:03d}") for i in range(4)]
    for pair in pairs:
        pair.save_mask(~pairs[0].area)
    pairs[3].save(pairs[0].pixels)
    assert check(tmp_path / "bolt", "--resolution", SIZE) == 0
    told = "\n".join(line for line in capsys.readouterr().out.splitlines() if line.startswith("DF"))
    assert re.findall(r"^(DF\d+)", told, re.M) == ["DF150", "DF155", "DF154"]
    assert "all 4 masks are the same" in told and "000.png, test/hole/003.png: the same image, held out" in told


def test_training_and_generation_warn_of_what_is_odd(train, tmp_path, caplog, monkeypatch):
    pairs = [make_pair(tmp_path / "bolt", f"{i:03d}") for i in range(2)]
    for pair in pairs:
        pair.edit(lambda content: content + b"more")
    monkeypatch.setattr(train_defectfill, "train", lambda *args: None)
    with caplog.at_level(logging.WARNING):
        train("--split", "all", data=tmp_path / "bolt")
        check_source_images([SourceImage(pair.image, pair.mask) for pair in pairs])
    told = [record.getMessage() for record in caplog.records]
    assert "DF104 test/hole/000.png, test/hole/001.png: does not end as PNG requires" in told[0]
    assert told[-1].startswith(f"DF104 {pairs[0].image}, {pairs[1].image}: does not end") and len(told) == 2


def test_bombs_are_refused_in_little_memory(tmp_path):
    """Half a GiB more than the tests have; each would need as much or more."""
    bombs = [row for row in REFUSED if "pixels" in row or "bomb" in row]
    for row in bombs:
        REFUSED[row][0](make_pair(tmp_path / "bolt", row))

    def checked_in_little_memory():
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, resource.getrlimit(resource.RLIMIT_AS)[1]))
        with pytest.raises(MemoryError):
            bytes(12000 * 10000 * 5)
        assert check(tmp_path / "bolt", "--split", "all", "--output_dir", tmp_path / "report") == 2

    assert wait_for(fork(checked_in_little_memory, seconds=60)) == 0
    [found] = json.loads((tmp_path / "report/report.json").read_text())["objects"]
    told = [line for line in found["problems"] if "too large" in line]
    assert len(told) == len(bombs) == 3


def test_images_of_8192_pixels_a_side_are_no_bombs(tmp_path, recwarn):
    (tmp_path / "large.png").write_bytes(png(8192, 8192))
    assert open_image(tmp_path / "large.png").size == (8192, 8192) and not recwarn.list


def test_a_file_that_may_not_be_read_is_named(tmp_path, refusal):
    image = make_pair(tmp_path / "bolt", "000").image
    image.chmod(0)
    if os.access(image, os.R_OK):
        pytest.skip("the superuser may read everything")
    assert refusal(tmp_path / "bolt")[0].startswith("DF103 test/hole/000.png: the image cannot be read: [Errno 13]")


@pytest.mark.parametrize("row", FOLDERS)
def test_a_bad_folder_is_refused(row, tmp_path, refusal):
    make, code, words = FOLDERS[row]
    (tmp_path / "data").mkdir()
    folder = make(tmp_path / "data")
    (told,) = refusal(folder)
    assert told.startswith(f"{code} ") and words in told and str(folder) in told


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_name_of_an_object_is_refused(name, tmp_path, refusal):
    told = refusal(write_table(tmp_path / "bolt", name))
    assert len(told) == 1 and "an object cannot be called" in told[0] and told[0].startswith(f"DF162 {tmp_path}")
    assert "\n" not in told[0]


def test_names_of_objects_that_are_good(tmp_path):
    for name in ("metal_nut", "pipe fryum", "Größe-2.5+x (new), a&b", "螺母"):
        make_pair(tmp_path / name, "000")
    assert len(find_objects(tmp_path)) == 4


def test_a_file_that_is_gone_is_said_to_be(tmp_path):
    with pytest.raises(OSError, match="it is missing; put a file there"):
        open_image(tmp_path / "gone.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_upright_size_is_that_of_the_pixels(tmp_path, suffix, orientation):
    """Pillow turns a TIFF file by itself, and no other."""
    exif, file = Image.Exif(), tmp_path / f"x.{suffix}"
    exif[0x0112] = orientation
    Image.new("RGB", (40, 48)).save(file, exif=exif)
    assert upright_size(file) == load_image(Image.open(file)).size == ((48, 40) if orientation > 4 else (40, 48))
