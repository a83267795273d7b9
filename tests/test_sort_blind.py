"""scripts/sort_blind.py: generated and original images, sorted by somebody who does not know which is which."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defectfill_dataset import InputError
from defectfill_scripts import sort_blind


def write(file: Path, grey: int, side: int = 16) -> None:
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", (side, side), (grey, grey, grey)).save(file)


def sort(folder: Path, *more: str) -> None:
    words = ["--generated", folder / "ours", "--originals", folder / "theirs", "--output_dir", folder / "sorting"]
    sort_blind.main(sort_blind.parse_args([*map(str, words), *more]))


def test_images_sorted_blind_are_counted(tmp_path, capsys):
    for i in range(6):
        write(tmp_path / "ours" / f"{i}.png", i)
        write(tmp_path / "theirs" / f"{i}.jpg", 100 + i)
    sort(tmp_path, "--number", "4")
    pictures = json.loads((tmp_path / "sorting/key.json").read_text())["pictures"]
    files = sorted((tmp_path / "sorting/pictures").glob("*.png"))
    dark = [np.asarray(Image.open(file)).mean() < 50 for file in files]
    assert dark == [picture["kind"] == "generated" for picture in pictures] and sum(dark) == 4 == len(dark) - 4
    assert dark != sorted(dark) and dark != sorted(dark, reverse=True)

    answers = tmp_path / "sorting/pictures/answers.txt"
    for text, message in (
        (answers.read_text(), "line '000'"),
        ("000 original\n000 original\n", "line '000 original'"),
        ("000 orignal\n", "followed by generated or original"),
        ("000 original or not\n", "line '000 original or not'"),
        ("008 original\n", "each number up to 007"),
        ("000 original\n", "no answer to 001, 002"),
    ):
        answers.write_text(text)
        with pytest.raises(InputError, match=message):
            sort(tmp_path, "--number", "4")
    taken = dark.index(True)  # the only generated one; and one original is not
    words = ["generated" if d and i != taken or i == dark.index(False) else "original" for i, d in enumerate(dark)]
    answers.write_text("\n".join(f"{i} {word}" for i, word in enumerate(words)))
    capsys.readouterr()
    sort(tmp_path, "--number", "4")
    told = capsys.readouterr().out
    assert "| generated | all folders | 4 | 1 | 25% |" in told and "| original | all folders | 4 | 3 | 75% |" in told
    with pytest.raises(InputError, match="number: the run was started with 4, now it is 5"):
        sort(tmp_path, "--number", "5")


def test_a_blind_sorting_needs_images_that_can_be_read(tmp_path, capsys):
    write(tmp_path / "ours/0.png", 0)
    with pytest.raises(InputError, match="theirs: 0 images in it; give a folder with at least 1"):
        sort(tmp_path)
    write(tmp_path / "theirs/0.png", 0)
    (tmp_path / "theirs/0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="DF103.*the image cannot be read"):
        sort(tmp_path)
    assert not (tmp_path / "sorting").exists()
    write(tmp_path / "theirs/0.png", 0, side=9)
    sort(tmp_path)
    assert "Their sizes alone" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sort(tmp_path, "--number", "0")


def test_a_sorting_leaves_other_files_alone(tmp_path):
    write(tmp_path / "ours/0.png", 0)
    write(tmp_path / "theirs/0.png", 0)
    (tmp_path / "sorting").mkdir()
    (tmp_path / "sorting/key.json").write_text("{}")
    with pytest.raises(InputError, match="holds another key.json"):
        sort(tmp_path)
    assert [file.name for file in (tmp_path / "sorting").iterdir() if file.name[0] != "."] == ["key.json"]
