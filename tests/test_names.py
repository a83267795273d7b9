"""check_data and training judge names alike: what one accepts the other does, and neither ends in a traceback."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from drawn import write_image, write_mask
from folders import write_lines
from generated_folder import export
from runs import options, reset_accelerate

import train_defectfill
from defectfill_dataset import InputError, load_defect_pairs
from defectfill_scripts import check_data


USED = {  # names that are accepted
    "defect": [
        "hole", "..", "/etc/x", "CON", "a\x1b[31m\nb", "a\u202eb", "{phrase}", "{object}", "😀", "刮痕", "'s", '"',
        "<|endoftext|>", "&lt;", "a\\b", "a::b", "%s", "straße", "ﬁ", "e\u0301", "x...",
    ],
    "object": ["nut", "a.", "_", "ab " * 20 + "a", "刮" * 9, "nut+bolt (1)"],
    "image": ["x" * 250, "刮" * 83, "a::b", "a\x1b\nb", "%41#", "nul", "http:", "a*b[1]"],
}  # fmt: skip
REFUSED = {
    "defect": ["x" * 80, "a b " * 60, "刮痕" * 20, "_", "--", "\udc80", "combined", "y" * 300, "Good"],
    "object": ["刮" * 67, "x" * 101, "x" * 100, "lpt1.x", "{defect}", "a/b", ".."],
}  # fmt: skip


def write_data(root: Path, kind: str, name: str) -> Path:
    """Three images with masks; this name is that of their object, of the defect of all, or of an image."""
    stems = [name if kind == "image" else "a", "b", "c"]
    for i, stem in enumerate(stems):
        write_image(root / f"p/{stem}.png", mask=write_mask(root / f"m/{stem}.png"), seed=i)
    common = {"defect": name if kind == "defect" else "hole", "object": name if kind == "object" else "nut"}
    lines = [{"file_name": f"p/{s}.png", "mask_file_name": f"m/{s}.png", **common} for s in stems]
    if kind == "defect":  # two types, so that prompts hold their names
        lines[1]["defect"] = "dent" if name != "combined" else name
    write_lines(root / "metadata.jsonl", lines)
    return root


def accepts(function, *args) -> bool:
    """Whether a command accepts its input; it may end in no other error."""
    try:
        function(*args)
    except InputError:
        return False
    except SystemExit as end:
        assert end.code == 2
        return False
    return True


def check(base: Path, data: Path, out: Path) -> None:
    argv = [data, "--output_dir", out, "--pretrained_model_name_or_path", base, "--resolution", 64]
    check_data.main(check_data.parse_args([str(a) for a in argv]))


def train(base: Path, data: Path, out: Path) -> None:
    """All that training does before its first step."""
    reset_accelerate()
    args = train_defectfill.parse_args(options(base, data, out))
    out.mkdir()
    accelerator = Accelerator(cpu=True)
    train_defectfill.start_run(args, train_defectfill.prepare(args, accelerator), accelerator)


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in USED.items() for name in names])
def test_names_that_both_accept(tmp_path, base, kind, name):
    data = write_data(tmp_path / "nut", kind, name)
    assert accepts(check, base, data, tmp_path / "report") and accepts(train, base, data, tmp_path / "out")


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in REFUSED.items() for name in names])
def test_names_that_both_refuse(tmp_path, base, kind, name):
    data = write_data(tmp_path / "nut", kind, name)
    assert not accepts(check, base, data, tmp_path / "report") and not accepts(train, base, data, tmp_path / "out")


def test_without_a_base_a_long_prompt_is_a_warning(tmp_path, capsys):
    write_data(tmp_path / "nut", "defect", "a b " * 30)
    check_data.main(check_data.parse_args([str(tmp_path / "nut")]))
    told = capsys.readouterr().out
    assert "DF174 'A nut with a b a b" in told and "--pretrained_model_name_or_path" in told


def test_the_cache_holds_objects_of_any_name_under_a_short_one(tmp_path):
    name = "刮" * 66
    data = load_defect_pairs(write_data(tmp_path / "nut", "object", name), cache_dir=str(tmp_path / ("c" * 100)))
    assert data["train"]["object"] == [name] and all(f.name.isascii() for f in tmp_path.rglob("*.arrow"))


def test_an_exports_names_are_no_longer_than_file_systems_take(tmp_path, generated, photos):
    (photos / f"{'x' * 245}.png").write_bytes((photos / "000.png").read_bytes())
    with pytest.raises(InputError) as caught:
        export(tmp_path / "out", "mvtec", generated, "--good", photos)
    (problem,) = caught.value.problems
    assert problem.code == "DF202" and not (tmp_path / "out").exists()
