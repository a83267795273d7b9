"""scripts/prepare_data.py: a dataset written for others, read back by `datasets`, by the project and by training."""

import io
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from drawn import write_image, write_mask
from folders import EXAMPLES, make_metadata, make_mvtec, make_seed_layout, write_lines
from PIL import Image
from toy_model import RESOLUTION

import train_defectfill
from defectfill.runs.cards import markdown_text, size_category
from defectfill.runs.files import exclusive_lock
from defectfill_dataset import (
    InputError,
    binarise,
    check_pairs,
    find_objects,
    load_defect_pairs,
    load_image,
    load_prepared,
)
from defectfill_dataset.writers import datasets as writers
from defectfill_scripts import prepare_data


GPS, CAMERA, ORIENTATION = 0x8825, 0x0110, 0x0112  # EXIF tags


def run(data: Path, out: Path, *more) -> int:
    """The command's exit status."""
    try:
        prepare_data.main(prepare_data.parse_args([str(a) for a in (data, "--output_dir", out, *more)]))
    except SystemExit as ended:
        return ended.code
    return 0


def told(data: Path, out: Path, *more) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        run(data, out, *more)
    return tuple(str(caught.value).splitlines())


def contents(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.rglob("*") if f.is_file() and f.name != ".lock")
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def pixels(data: datasets.DatasetDict) -> dict[tuple, tuple]:
    """(split, object, name) -> defect, image and mask as training sees them."""
    return {
        (split, row["object"], row["source_file"]): (
            row["defect"],
            np.asarray(load_image(row["image"])).tobytes(),
            binarise(row["mask"]).tobytes() if row["mask"] else None,
        )
        for split, rows in data.items()
        for row in rows
    }


def originals(root: Path, split: str = "auto") -> dict[tuple, tuple]:
    return {k: v for name in find_objects(root) for k, v in pixels(load_defect_pairs(root, name, split)).items()}


def head(out: Path) -> dict:
    return yaml.safe_load((out / "README.md").read_text().split("---\n")[1])


def photo(file: Path, size: tuple[int, int], place: bool) -> None:
    """A noisy picture; one that tells its place and camera is turned by its EXIF tag."""
    exif = Image.Exif()
    if place:
        exif[ORIENTATION] = 6
        exif.get_ifd(GPS).update({1: "N", 2: (48.0, 8.0, 0.0)})
        exif[CAMERA] = "Kodak-7"
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, exif=exif if place else b"")


# Parquet


def test_parquet_of_several_objects_is_the_same_data(tmp_path):
    make_mvtec(tmp_path / "parts/nut", {"hole": 4, "scratch": 2}), make_seed_layout(tmp_path / "parts/bolt")
    before = originals(tmp_path / "parts")
    assert run(tmp_path / "parts", tmp_path / "out") == 0
    shutil.rmtree(tmp_path / "parts")
    assert contents(tmp_path / "out").keys() == {
        "README.md", *(f"data/{split}-00000-of-00001.parquet" for split in {split for split, _, _ in before})
    }  # fmt: skip
    data = datasets.load_dataset(str(tmp_path / "out"))
    assert data["train"].features == writers.FEATURES and pixels(data) == before
    nut = load_prepared(str(tmp_path / "out"), None, "nut")
    assert set(nut["train"]["object"]) == {"nut"} and len(nut["good"]) == 3
    check_pairs(nut["train"], nut["good"])


def test_one_object_of_several_and_a_split(tmp_path):
    make_mvtec(tmp_path / "parts/nut"), make_mvtec(tmp_path / "parts/bolt", good=0)
    run(tmp_path / "parts", tmp_path / "out", "--object", "bolt", "--split", "all")
    data = datasets.load_dataset(str(tmp_path / "out"))
    assert data.keys() == {"train"} and data["train"]["object"] == ["bolt"] * 4
    assert told(tmp_path / "parts", tmp_path / "x", "--object", "bold") == (
        f"DF162 --object bold: not in {tmp_path / 'parts'}; there are bolt, nut",
    )


def test_shards_are_bounded_and_the_same_every_time(tmp_path, data, monkeypatch):
    monkeypatch.setattr(writers, "GROUP_BYTES", 1)
    monkeypatch.setattr(writers, "SHARD_BYTES", 10_000)
    before = originals(data, "all")
    for out in ("one", "two"):
        run(data, tmp_path / out, "--split", "all")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    shards = sorted((tmp_path / "one/data").glob("train-*"))
    assert [f.name for f in shards] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert [pq.ParquetFile(f).num_row_groups for f in shards] == [2, 2]  # one a picture: memory is bounded
    assert pixels(datasets.load_dataset(str(tmp_path / "one"))) == before


def test_examples_are_read_one_at_a_time(tmp_path, data, monkeypatch):
    monkeypatch.setattr(writers, "GROUP_BYTES", 1)
    made, written = [], []
    write = pq.ParquetWriter.write_table
    monkeypatch.setattr(pq.ParquetWriter, "write_table", lambda *args: (written.append(len(made)), write(*args)))
    one = {"image": {"bytes": b"x", "path": "x"}, "mask": None, "object": "a", "defect": "b", "source_file": "c"}
    writers.write_parquet(tmp_path, "train", (made.append(i) or one for i in range(3)))
    assert written == [1, 2, 3]


@pytest.mark.parametrize("file_format", writers.WRITERS)
def test_a_dataset_prepared_anew_is_not_the_old_one_of_the_cache(tmp_path, data, file_format):
    out = tmp_path / "again"
    for seed in (1, 2):
        write_image(data / "test/hole/000.png", seed=seed)
        run(data, out, "--format", file_format)
        assert pixels(load_prepared(str(out), None, None)).items() <= originals(data).items()
        shutil.rmtree(out)


@pytest.mark.slow
def test_training_from_parquet(tmp_path, base, data, train):
    run(data, tmp_path / "prepared")
    expected = train(output=tmp_path / "direct")
    argv = f"--pretrained_model_name_or_path {base} --dataset_name {tmp_path}/prepared --resolution {RESOLUTION}"
    argv += " --max_train_steps 2 --train_batch_size 2 --lr_warmup_steps 2 --rank 4 --lora_alpha 8 --output_dir "
    argv += f"{tmp_path}/out --validation_steps 0 --report_to none"
    train_defectfill.main(train_defectfill.parse_args(argv.split()))
    losses = [(out / "losses.jsonl").read_text() for out in (expected, tmp_path / "out")]
    records = [json.loads((out / "run_record.json").read_text()) for out in (expected, tmp_path / "out")]
    assert records[0]["images"] == records[1]["images"] == {"train": 2, "test": 2, "good": 3}
    assert [[line["loss"] for line in map(json.loads, text.splitlines())] for text in losses][0] == [
        line["loss"] for line in map(json.loads, losses[1].splitlines())
    ]


# Imagefolder


@pytest.mark.parametrize("layout", EXAMPLES)
def test_every_layout_becomes_an_imagefolder_that_both_read(tmp_path, layout):
    root = EXAMPLES[layout](tmp_path / layout)
    split = "auto" if layout in ("ksdd2", "mvtec") else "all"
    before = originals(root, split)
    out = tmp_path / "out"
    assert run(root, out, "--format", "imagefolder", "--split", split) == 0
    ours = load_defect_pairs(out)  # all that this project needs to know is the folder
    assert sorted(map(repr, pixels(ours).values())) == sorted(map(repr, before.values()))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(out))
    assert isinstance(theirs["train"].features["mask"], datasets.Image)
    assert pixels(theirs) == {key: value for key, value in before.items() if key[0] != "good"}
    good = datasets.load_dataset(str(out), "good")["good"]
    assert {("good", row["object"], row["source_file"]) for row in good} == {k for k in before if k[0] == "good"}
    assert datasets.load_dataset(str(out)).keys() == theirs.keys()
    check_pairs(load_prepared(str(out), None, layout)["train"])


def test_images_keep_their_bytes_and_masks_become_png(tmp_path):
    root = EXAMPLES["visa"](tmp_path / "candle")  # masks of several values, images *.JPG
    run(root, tmp_path / "out", "--format", "imagefolder", "--split", "all")
    files = contents(tmp_path / "out")
    assert files.keys() == {
        "README.md", "train/metadata.jsonl", *(f"train/images/0000{i}.jpg" for i in range(2)),
        *(f"train/masks/0000{i}.png" for i in range(2)), "good/metadata.jsonl", "good/images/00000.jpg",
    }  # fmt: skip
    assert files["train/images/00001.jpg"] == (root / "Data/Images/Anomaly/001.JPG").read_bytes()
    mask = Image.open(io.BytesIO(files["train/masks/00000.png"]))
    assert mask.mode == "L" and mask.format == "PNG" and np.unique(mask).tolist() == [0, 255]
    assert json.loads(files["train/metadata.jsonl"].splitlines()[0]) == {
        "file_name": "images/00000.jpg", "mask_file_name": "masks/00000.png", "object": "candle",
        "defect": "anomaly", "source_file": "Data/Images/Anomaly/000.JPG",
    }  # fmt: skip


def test_an_imagefolder_of_ours_is_prepared_again(tmp_path):
    make_mvtec(tmp_path / "parts/nut"), make_mvtec(tmp_path / "parts/bolt")
    run(tmp_path / "parts", tmp_path / "one", "--format", "imagefolder")
    assert list(find_objects(tmp_path / "one")) == ["bolt", "nut"]
    run(tmp_path / "one", tmp_path / "two", "--format", "imagefolder")
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(one[k] == two[k] for k in one if "/images/" in k or "/masks/" in k)


# What photos tell besides their pixels


@pytest.mark.parametrize("file_format", ["parquet", "imagefolder"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_a_photo_that_tells_its_place_becomes_a_bare_png_of_the_same_pixels(tmp_path, capsys, suffix, file_format):
    root = tmp_path / "nut"
    for folder in ("images", "masks", "good"):
        (root / folder).mkdir(parents=True)
    photo(root / f"images/a{suffix}", (48, 32), place=True)
    photo(root / f"images/b{suffix}", (32, 48), place=False)
    write_mask(root / "masks/a.png"), write_mask(root / "masks/b.png")
    for name in "ab":
        Image.open(root / f"masks/{name}.png").crop((0, 0, 32, 48)).save(root / f"masks/{name}.png")
    before = originals(root, "all")
    run(root, tmp_path / "out", "--format", file_format, "--split", "all")
    coded = suffix in (".jpg", ".png")  # so that it can be proved that they hold nothing else
    kept, rewritten = "1 the source's files, byte for byte; ", "written anew as upright PNG of the same pixels"
    told = f"Of 2 images, {kept}1 {rewritten}" if coded else f"Of 2 images, 2 {rewritten}"
    assert told in capsys.readouterr().out and f"{told}.\n" in (tmp_path / "out/README.md").read_text()
    rows = datasets.load_dataset(str(tmp_path / "out"))["train"]
    assert pixels({"train": rows}) == before
    assert b"Kodak-7" not in b"".join(contents(tmp_path / "out").values())
    bare, plain = rows.cast_column("image", datasets.Image(decode=False))["image"]
    bare = bare["bytes"] or Path(bare["path"]).read_bytes()
    image = Image.open(io.BytesIO(bare))
    assert image.format == "PNG" and image.size == (32, 48) and not image.info and not image.getexif()
    plain = plain["bytes"] or Path(plain["path"]).read_bytes()
    assert (plain == (root / f"images/b{suffix}").read_bytes()) is coded


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16", "CMYK"])
def test_pixels_of_any_mode_are_kept(tmp_path, mode):
    values = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    image = Image.fromarray(values) if mode == "I;16" else Image.fromarray((values >> 8).astype(np.uint8))
    image = image if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION], exif[CAMERA] = 8, "camera"
    image.save(tmp_path / "x.tif", exif=exif)
    bare, how = writers.image_bytes(tmp_path / "x.tif")
    bare = Image.open(io.BytesIO(bare))
    assert how == "rewritten" and bare.mode == ("RGB" if mode in ("CMYK", "P") else mode)
    assert np.array_equal(load_image(bare), load_image(Image.open(tmp_path / "x.tif")))
    assert mode != "I;16" or np.array_equal(np.sort(bare, axis=None), np.sort(values, axis=None))  # all 16 bits


# The card


def test_the_card_tells_what_there_is(tmp_path):
    make_mvtec(tmp_path / "parts/nut", {"hole": 4, "scratch": 2}), make_mvtec(tmp_path / "parts/bolt", {"stain": 3})
    more = ("--license", "cc-by-nc-sa-4.0", "--source", "https://example.org/a_b")
    run(tmp_path / "parts", tmp_path / "out", *more)
    card = (tmp_path / "out/README.md").read_text()
    (config,) = head(tmp_path / "out")["configs"]
    assert config.pop("description").startswith("sha256 ")
    assert head(tmp_path / "out") | {"configs": [config]} == {
        "license": "cc-by-nc-sa-4.0",
        "task_categories": ["image-segmentation"],
        "tags": ["anomaly-detection", "defect-detection", "defectfill"],
        "size_categories": "n<1K",
        "configs": [
            {"config_name": "default", "data_files": [
                {"split": split, "path": f"data/{split}-*"} for split in ("train", "test", "good")
            ]},
        ],
    }  # fmt: skip
    for line in ("| bolt | stain | 1 | 2 |  |", "| nut | hole | 2 | 2 |  |", "| nut | good |  |  | 3 |"):
        assert line in card
    assert "<https://example.org/a_b>" in card and "`cc-by-nc-sa-4.0`" in card and "255" in card
    assert "first third" in card and str(tmp_path) not in card
    run(tmp_path / "parts/nut", tmp_path / "bare", "--split", "all")
    assert "license" not in head(tmp_path / "bare") and "not stated" in (tmp_path / "bare/README.md").read_text()


def test_names_in_a_card_are_words_and_nothing_else(tmp_path):
    evil = "<img src=x onerror=alert(1)>|`x`\n---\nlicense: mit\n---\n[a](http://b)"
    root = make_metadata(tmp_path / "data", "metadata.jsonl")
    lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    write_lines(root / "metadata.jsonl", [line | {"defect": evil} if i < 2 else line for i, line in enumerate(lines)])
    run(root, tmp_path / "out", "--source", evil, "--license", "other")
    card = (tmp_path / "out/README.md").read_text()
    assert head(tmp_path / "out")["license"] == "other" and card.count("\n---\n") == 1
    assert "<img" not in card and "](http" not in card and markdown_text(evil) in card
    assert markdown_text("a_b|c & <d>\n`e`") == r"a\_b&#124;c &#38; &#60;d&#62; \`e\`"
    assert datasets.load_dataset(str(tmp_path / "out"))["train"]["defect"] == [evil]


@pytest.mark.parametrize("number, size", [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (12345, "10K<n<100K")])
def test_sizes_are_named_as_the_hub_does(number, size):
    assert size_category(number) == size


# What is refused, and what a crash leaves


def test_all_problems_of_all_objects_are_told_and_nothing_is_written(tmp_path):
    for name in ("nut", "bolt"):
        root = make_mvtec(tmp_path / "parts" / name)
        (root / "ground_truth/hole/000_mask.png").unlink()
        Image.new("L", (48, 48)).save(root / "ground_truth/hole/001_mask.png")
    problems = told(tmp_path / "parts", tmp_path / "out")
    assert sorted(line.split(":")[0] for line in problems) == [
        "DF142 bolt", "DF142 nut", "DF145 bolt", "DF145 nut"
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()
    shutil.rmtree(root / "test")
    shutil.rmtree(root / "ground_truth/hole")
    assert [line[:10] for line in told(root, tmp_path / "out")] == ["DF163 bolt"]


def test_a_split_without_references_is_refused(tmp_path, data):
    names = [f"test/hole/{i:03d}.png" for i in range(4)]
    (tmp_path / "split.json").write_text(json.dumps({"train": [], "test": names}))
    assert told(data, tmp_path / "out", "--split", tmp_path / "split.json")[0].startswith("DF163 nut: --split")


def test_a_licence_is_the_hubs_identifier(tmp_path, data):
    (line,) = told(data, tmp_path / "out", "--license", "CC BY-NC-SA 4.0")
    assert line.startswith("DF194 --license CC BY-NC-SA 4.0: ") and "cc-by-nc-sa-4.0" in line


def test_the_same_data_stays_other_data_is_refused(tmp_path, data, capsys):
    out = tmp_path / "out"
    run(data, out)
    before, inode = contents(out), (out / "data").stat().st_ino
    (out / ".env").write_text("secret")  # hidden files are not ours to judge
    run(data, out, "--license", "mit")
    assert (out / "data").stat().st_ino == inode and head(out)["license"] == "mit"
    run(data, out)
    assert {k: v for k, v in contents(out).items() if k != ".env"} == before
    (out / "notes.txt").write_text("x")
    assert told(data, out) == (
        f"DF193 {out}: holds notes.txt, which is not of this dataset; choose another --output_dir or empty it",
    )
    (out / "notes.txt").unlink()
    original = (data / "test/hole/000.png").read_bytes()
    write_image(data / "test/hole/000.png", seed=7)
    assert "holds another data/train-00000-of-00001.parquet" in told(data, out)[0]
    assert "DF193" in told(data, out, "--format", "imagefolder")[0]
    (data / "test/hole/000.png").write_bytes(original)
    (out / "data/good-00000-of-00001.parquet").unlink()  # a part of it is not the dataset
    assert "holds a data/ without data/good-00000-of-00001.parquet" in told(data, out)[0]
    del before["data/good-00000-of-00001.parquet"]
    assert {k: v for k, v in contents(out).items() if k != ".env"} == before
    assert "DF193" in told(data, data)[0] and not list(data.glob(".tmp*"))


def test_a_crash_leaves_nothing_that_looks_whole_and_the_next_run_mends_it(tmp_path, data, monkeypatch):
    out = tmp_path / "out"

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "write_dataset_card", crash)
        with pytest.raises(KeyboardInterrupt):
            run(data, out)
    assert contents(out) == {}
    (out / ".tmp-defectfill-old").mkdir()  # of a process that was killed
    run(data, out, "--format", "imagefolder")
    whole = contents(out)
    shutil.rmtree(out / "good"), (out / "README.md").unlink()  # killed between two of the moves
    run(data, out, "--format", "imagefolder")
    assert contents(out) == whole and not list(out.glob(".tmp*"))


def test_the_card_comes_last_and_one_process_at_a_time(tmp_path, data, monkeypatch):
    out, moved = tmp_path / "out", []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(Path(new)), replace(old, new)))
    run(data, out, "--format", "imagefolder")
    names = [path.name for path in moved if path.parent == out]
    assert sorted(names[:-1]) == ["good", "test", "train"] and names[-1] == "README.md"
    with exclusive_lock(out):
        assert told(data, out)[0].startswith("DF191")
