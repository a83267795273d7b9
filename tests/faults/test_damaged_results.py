"""Generated files that were damaged or changed since: a restart finds them and generates them again, byte for byte."""

import json
import os
import shutil
import time

import pytest
from drawn import write_image, write_mask
from generated_folder import export
from runs import FAST, content, generate, read_lines

import generate_defectfill as g
from defectfill.runs import manifest
from defectfill_dataset import InputError


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    """The flags of a finished run, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    for i, size in enumerate((48, 70, 33)):
        write_mask(folder / f"masks/{i:03d}_mask.png", size)
        write_image(folder / f"good/{i:03d}.png", size)
    argv = ["--lora", trained, "--image", folder / "good", "--mask", folder / "masks", *FAST]
    generate(*argv, "--output_dir", folder / "out")
    return argv, folder / "out"


@pytest.fixture
def run(finished, tmp_path):
    """A finished run in tmp_path / "out": run(*more) starts it again."""
    argv, folder = finished
    shutil.copytree(folder, tmp_path / "out")
    return lambda *more: generate(*argv, "--output_dir", tmp_path / "out", *more)


def edit(file, change) -> None:
    lines = read_lines(file)
    change(lines[1])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def swap(one, other) -> None:
    one.rename(one.with_suffix(".was")), other.rename(one), one.with_suffix(".was").rename(other)


def later(file) -> None:
    """As if it was written a second from now."""
    os.utime(file, ns=(time.time_ns() + 10**9,) * 2)


def flip(file) -> None:
    """One bit, and the times as they were."""
    data, times = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


DAMAGE = {
    "empty": lambda out: (out / "images/001.png").write_bytes(b""),
    "half": lambda out: os.truncate(out / "masks/001.png", (out / "masks/001.png").stat().st_size // 2),
    "half, older than its line": lambda out: (os.truncate(out / "masks/001.png", 9), later(out / "manifest.jsonl")),
    "bit": lambda out: flip(out / "mask_changed/001.png"),
    "another mask": lambda out: swap(out / "masks/001.png", out / "masks/002.png"),
    "no sheet": lambda out: (out / "contact/001.png").write_bytes(b"x" * 99),
    "defect": lambda out: edit(out / "manifest.jsonl", lambda line: line.update(defect="scratch")),
    "boxes": lambda out: edit(out / "manifest.jsonl", lambda line: line.update(boxes=[])),
    "digest": lambda out: edit(out / "manifest.jsonl", lambda line: line["files"]["masks"].update(bytes=1)),
    "no digest": lambda out: edit(out / "manifest.jsonl", lambda line: line.pop("line_sha256")),
    "types": lambda out: edit(out / "manifest.jsonl", lambda line: line.update(files=7)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_result_is_named_and_generated_again(run, tmp_path, caplog, kind):
    out = tmp_path / "out"
    before = content(out)
    DAMAGE[kind](out)
    assert content(out) != before
    run()
    assert content(out) == before
    assert "DF330" in caplog.text and "001" in caplog.text and "000" not in caplog.text


def test_what_was_not_touched_is_not_even_read(run, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    before, table = content(out), (out / "manifest.parquet").read_bytes()
    time.sleep(0.05)
    run()  # the files are now older than the manifest by more than a tick of the clock
    monkeypatch.setattr(g, "load_pipeline", None)
    monkeypatch.setattr(manifest, "file_digest", None)
    run()
    assert content(out) == before and (out / "manifest.parquet").read_bytes() == table and not caplog.text


def test_verify_reads_everything(run, tmp_path, caplog):
    """A disk that changes a bit changes no time."""
    out = tmp_path / "out"
    before = content(out)
    flip(out / "images/001.png")
    later(out / "manifest.jsonl")
    run()
    assert content(out) != before and not caplog.text
    later(out / "manifest.jsonl")
    run("--verify")
    assert content(out) == before and "DF330 images/001.png: is not what was written" in caplog.text


def test_a_copied_folder_is_as_good(run, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    before = content(out)
    for file in sorted(out.rglob("*")):
        os.utime(file)
    monkeypatch.setattr(g, "load_pipeline", None)
    run()
    assert content(out) == before and not caplog.text


def test_a_manifest_of_an_earlier_version_is_resumed(run, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    lines = read_lines(out / "manifest.jsonl")
    old = [{k: v for k, v in line.items() if k not in ("files", "line_sha256")} for line in lines]
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    with monkeypatch.context() as patch:
        patch.setattr(g, "load_pipeline", None)
        run()
    assert read_lines(out / "manifest.jsonl") == old
    assert "3 images of an earlier version have no digests" in caplog.text
    (out / "masks/001.png").write_bytes(b"")
    run()
    assert "DF330 masks/001.png" in caplog.text
    assert ["files" in line for line in read_lines(out / "manifest.jsonl")] == [False, True, False]


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_damaged_result_is_not_exported(run, tmp_path, kind):
    out = tmp_path / "out"
    export(tmp_path / "whole", "coco", out)
    flip(out / kind / "001.png")
    with pytest.raises(
        InputError, match=f"DF330 .*manifest.jsonl, line 2: '{kind}/001.png' is not what was generated"
    ):
        export(tmp_path / "bad", "coco", out)
    assert not (tmp_path / "bad").exists()
