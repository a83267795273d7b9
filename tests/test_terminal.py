"""Names and texts of strangers reach a terminal spelt out: no escape code, no line of their own, no turned text."""

import ast
import json
import logging
import sys

from offline import ROOT

import pytest
from drawn import write_image, write_mask
from folders import write_lines
from tqdm import tqdm

from defectfill.runs import checkpoint
from defectfill_dataset import commands
from defectfill_dataset.errors import one_line
from defectfill_scripts import check_data, export_generated, merge_lora, prepare_data, preview_masks


EVIL = "a\x1b[31m\x07\nForged line\r\x1b]8;;http:evil\x07b\x1b]8;;\x07\u202ec\x9b2J\u2028d"


@pytest.fixture
def told(capfd, monkeypatch):
    """Runs a command; all that it writes to the terminal, which must be plain and name the stranger's name."""
    tqdm._instances.clear()  # a bar that an earlier test left open would move the cursor

    def run(command, *argv) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
        try:
            command.command()
        except SystemExit:
            pass
        captured = capfd.readouterr()
        return plain(captured.out + captured.err)

    return run


def plain(text: str) -> str:
    lines = text.replace("\r", "\n").split("\n")  # tqdm's bars begin with \r
    assert all(line.isprintable() and not line.lstrip().startswith("Forged") for line in lines), lines
    assert r"a\x1b[31m\x07\nForged line" in text
    return text


def make_evil(root):
    """An object whose defect types, images, masks and stray files have such names, one of them without its mask."""
    for i, stem in enumerate((EVIL, "b")):
        write_image(root / f"pictures/{stem}.png", mask=write_mask(root / f"marks/{stem}.png"), seed=i)
    pairs = [(EVIL, EVIL), ("b", "b"), (f"{EVIL}-lost", EVIL)]
    lines = [{"file_name": f"pictures/{a}.png", "mask_file_name": f"marks/{b}.png", "defect": EVIL} for a, b in pairs]
    (root / f"pictures/{EVIL}.psd").write_text("x")
    write_lines(root / "metadata.jsonl", lines)
    return lines


def test_check_data(tmp_path, told):
    lines = make_evil(tmp_path / "nut")
    assert "DF166" in told(check_data, tmp_path / "nut", "--output_dir", tmp_path / "out")
    write_lines(tmp_path / "nut/metadata.jsonl", lines[:2])
    assert "DF107" in told(check_data, tmp_path / "nut")


def test_prepare_data(tmp_path, told):
    lines = make_evil(tmp_path / "nut")
    assert "DF166" in told(prepare_data, tmp_path / "nut", "--output_dir", tmp_path / "out")
    write_lines(tmp_path / "nut/metadata.jsonl", lines[:2])
    write_image(tmp_path / f"nut/pictures/{EVIL}.png", 8)
    argv = [tmp_path / "nut", "--output_dir", tmp_path / "out", "--skip_problems", "--split", "all"]
    assert "left out: DF1" in told(prepare_data, *argv)
    assert all(line.isprintable() for line in (tmp_path / "out/README.md").read_text().split("\n"))


def test_export_generated(tmp_path, generated, photos, told):
    lines = [json.loads(line) for line in (generated / "manifest.jsonl").read_text().splitlines()]
    lines[0]["image"], lines[1]["defect"], lines[2]["mask"] = f"images/{EVIL}.png", EVIL, EVIL
    (generated / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (photos / f"{EVIL}.png").write_bytes(b"\x1b[31m no image")
    argv = [generated, "--format", "coco", "--good", photos, "--output_dir", tmp_path / "out"]
    assert "DF196" in told(export_generated, *argv)


def test_preview_masks(tmp_path, told):
    write_image(tmp_path / "photos" / f"{EVIL}.png")
    write_mask(tmp_path / "wrong" / f"{EVIL}1.png")
    argv = ["--image", tmp_path / "photos", "--mask_source", "procedural", "--output", tmp_path / "x.png"]
    assert "DF142" in told(preview_masks, *argv, "--foreground", tmp_path / "wrong")


def test_what_training_logs(tmp_path, capfd):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / checkpoint.MANIFEST).write_text(
        json.dumps({"files": {f"{EVIL}/x": {"bytes": 1, "sha256": ""}}, "step": 3})
    )
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        commands.start_logging(logging.INFO)
        assert checkpoint.find_checkpoint(tmp_path, "latest") is None
        try:
            raise ValueError("of a library")
        except ValueError:
            logging.getLogger("x").exception("went wrong")
    finally:
        root.handlers = handlers
    told = capfd.readouterr().err
    assert "skipping checkpoint-3" in told and "\nTraceback (most recent call last):\n" in told
    plain(told)


def test_what_a_command_logs_without_a_configuration(capfd):
    """Such as generation's warnings."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        commands.exit_on_input_error(lambda: logging.getLogger("defectfill.x").warning(f"lost: {EVIL}"))
    finally:
        root.handlers = handlers
    plain(capfd.readouterr().err)


def test_how_a_command_ends(capfd):
    def main():
        raise SystemExit(f"Not generated:\n{one_line(EVIL)}\x1b[31m")

    with pytest.raises(SystemExit):
        commands.exit_on_input_error(main)
    plain(capfd.readouterr().err)


def test_wrong_flags(capfd):
    with pytest.raises(SystemExit):
        commands.Parser(prog="x").parse_args([f"--{EVIL}"])
    plain(capfd.readouterr().err)


def test_one_function_prints():
    """All else that is printed is constant, or JSON, which spells out what is not ASCII, or of developers' tools."""
    found = []
    files = [*ROOT.glob("*.py"), *(f for room in ("defectfill*", "scripts") for f in ROOT.glob(f"{room}/**/*.py"))]
    for file in files:
        if file.name in ("gpu_check.py", "write_docs.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "tqdm.write", "sys.stdout.write"):
                known = [isinstance(a, ast.Constant) or ast.unparse(a).startswith("json.dumps(") for a in node.args]
                found += [] if all(known) else [f"{file.name}: {ast.unparse(node)}"]
    assert [line.partition(":")[0] for line in found] == ["commands.py"], found


def test_no_command_takes_a_shortened_flag(capsys):
    """--lora is not --lora_alpha."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("defectfill*/**/*.py")]:
        for call in file.read_text().split("ArgumentParser(")[1:]:
            head = call.partition("\n\n")[0]
            assert "allow_abbrev=False" in head or head.startswith("):"), file  # or the class that sets it
    with pytest.raises(SystemExit):
        merge_lora.parse_args(["lora", "--output_dir", "x", "--lora", "y"])
    assert "unrecognized arguments: --lora y" in capsys.readouterr().err
