"""Files that would hang, fill the memory or be loaded as code: each is refused by name, at once."""

import json
import os
import pickle
import time

import numpy as np
import pytest
import torch
from annotated import make_cvat, make_label_studio
from drawn import square, write_image
from folders import make_coco, make_yolo, write_json
from pycocotools import mask as coco_mask
from readings import masks_of, told
from runs import generate, options
from safetensors.torch import load_file, save_file
from skimage import draw
from toy_model import toy_pipeline

import train_defectfill
from defectfill.base_model import load_models, read_base
from defectfill.lora import LORA_FILE, add_lora, read_lora, save_lora
from defectfill.runs.checkpoint import find_checkpoint
from defectfill.runs.flags import parse_generation_args
from defectfill.runs.record import LossLog
from defectfill_dataset import InputError
from defectfill_dataset.masks import polygon_mask
from defectfill_dataset.readers import read_object
from defectfill_dataset.readers.marks import coco_rle, polygon, uncompressed
from defectfill_dataset.text import Schema, parse_json, read_bytes, read_csv, read_json, read_text, read_xml, read_yaml
from defectfill_scripts import check_data, preview_masks


pytestmark = pytest.mark.timeout(60)  # a pipe that is opened waits for ever
SPECIAL = {"pipe": lambda file: os.mkfifo(file), "device": lambda file: file.symlink_to("/dev/zero")}


@pytest.fixture(params=SPECIAL)
def special(request):
    """Makes a file of a kind that never ends."""
    return SPECIAL[request.param]


def put(special, file):
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    special(file)
    return file


# The reader


@pytest.mark.parametrize("read", [read_text, read_json, read_yaml, read_csv, read_xml])
def test_only_regular_files_are_read(tmp_path, special, read):
    with pytest.raises(InputError, match="DF166 .*it is not a regular file"):
        read(put(special, tmp_path / "x"))


def test_files_are_read_up_to_a_size(tmp_path):
    (tmp_path / "x").write_bytes(b"a" * 100)
    assert read_bytes(tmp_path / "x", most=100)
    with pytest.raises(OSError, match="it has 100 bytes; at most 99 are read"):
        read_bytes(tmp_path / "x", most=99)
    with (tmp_path / "y").open("wb") as stream:
        stream.truncate(2**40)  # of holes: nothing on the disk
    with pytest.raises(InputError, match=r"DF166 .*y: cannot be read: it has 1,099,511,627,776 bytes"):
        read_json(tmp_path / "y")


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 300 + "]" * 300, '{"a":' * 300 + "1" + "}" * 300])
def test_depth_is_bounded(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="DF166 .*recursion limit"):
        read_json(tmp_path / "x.json")


class Small(Schema):
    step: int
    loss: float | None = None
    names: dict[str, str] = {}


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "cannot be read as JSON: EOF"),
        ("9" * 5000, "cannot be read as JSON: number out of range"),
        ("[1]", "holds a list, not an object"),
        ("null", "holds a NoneType, not an object"),
        ("{}", "has no 'step'"),
        ('{"step": "1"}', "'step' is '1': input must be a valid integer"),
        ('{"step": true}', "'step' is True"),
        ('{"step": 1.0}', "'step' is 1.0"),
        ('{"step": 1, "loss": 1%s}' % ("0" * 400), "'loss' is 1000"),
        ('{"step": 1, "names": {"a": 5}}', "'names.a' is 5: input must be a valid string"),
        ('{"step": [], "loss": ""}', "'step' is []: input must be a valid integer (and 1 more)"),
    ],
)
def test_a_schema_names_the_value(text, words):
    with pytest.raises(ValueError) as caught:
        parse_json(text, Small)
    assert words in str(caught.value) and len(str(caught.value)) < 200


def test_unknown_keys_and_the_values_as_they_are_written_stay():
    assert parse_json('{"step": 1, "loss": 2, "new": [NaN]}', Small)["loss"] == 2
    assert list(parse_json('{"b": 1, "step": 1, "a": {}}', Small)) == ["b", "step", "a"]


def test_a_table_with_an_endless_cell_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n" + "x" * 200_000 + ",1\n")
    with pytest.raises(InputError, match="DF166 .*is not a table: field larger than"):
        read_csv(tmp_path / "x.csv")


def test_yaml_does_not_grow(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    root = make_yolo(tmp_path / "nut")
    (root / "data.yaml").write_text("\n".join([*lines, "names: *a11"]))
    assert told(root)[0].startswith("DF166") and "an alias (*a0) is not read" in told(root)[0]
    began = time.monotonic()
    (root / "data.yaml").write_text("names: " + "[" * 50_000)
    assert "is nested more than 50 deep" in told(root)[0] and time.monotonic() - began < 60
    (root / "data.yaml").write_text("names: [" + "x, " * 2**20 + "]")
    assert "at most 262,144 are read" in told(root)[0]


@pytest.mark.parametrize("name", ["labels/x.txt", "x.json", "x.xml", "data.yaml", "metadata.csv", "metadata.jsonl"])
def test_a_dataset_with_a_file_that_never_ends(tmp_path, special, name):
    root = make_yolo(tmp_path / "nut")
    put(special, root / name)
    reading = read_object(root, "nut")  # what is no file is passed over, or told
    assert reading.rows or reading.problems


# Weights


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def toy_base(tmp_path):
    toy_pipeline().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the weights"])
@pytest.mark.parametrize(
    "name", ["p.bin", "../p.safetensors", "sub/p.safetensors", "/p.safetensors", "p.safetensors\0"]
)
@pytest.mark.parametrize("part, stem", [("text_encoder", "model"), ("unet", "diffusion_pytorch_model")])
def test_an_index_names_nothing_but_safetensors_files_beside_it(tmp_path, toy_base, part, stem, name, beside):
    weights = toy_base / part / f"{stem}.safetensors"
    torch.save(Payload(tmp_path / "unpickled"), toy_base / part / "p.bin", pickle_module=pickle)
    names = dict.fromkeys(load_file(weights), name)
    write_json(toy_base / part / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": names})
    if not beside:
        weights.unlink()
    with pytest.raises(InputError, match="DF182 .*pickled weights are not loaded"):
        load_models(read_base(str(toy_base)), None, torch.float32)
    assert not (tmp_path / "unpickled").exists()


def test_a_base_is_loaded_in_place_of_no_other(toy_base):
    """transformers would load the model that the adapter's configuration names."""
    write_json(toy_base / "text_encoder/adapter_config.json", {"base_model_name_or_path": "elsewhere/else"})
    with pytest.raises(InputError, match="DF182 .*is an adapter in a base model"):
        read_base(str(toy_base))


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "tokenizer/vocab.json", "unet/config.json", "vae/x.txt"])
def test_a_base_of_files_that_never_end(toy_base, special, name):
    put(special, toy_base / name)
    with pytest.raises(InputError, match="DF176 .*is not a regular file"):
        read_base(str(toy_base))


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("text_encoder", "num_hidden_layers", 10**9),
        ("unet", "layers_per_block", 10**9),
        ("unet", "transformer_layers_per_block", [10**9]),
        ("vae", "layers_per_block", 10**9),
        ("vae", "block_out_channels", [8] * 5000),
        ("unet", "in_channels", 10**400),
    ],
)
def test_a_configuration_does_not_build_for_ever(toy_base, part, key, value):
    file = toy_base / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(InputError, match=f"DF176 .*{part}/config.json: cannot be used: '{key}"):
        read_base(str(toy_base))


@pytest.fixture
def lora(tmp_path):
    """A LoRA without alphas among its tensors: they come from peft's configuration."""
    pipe = toy_pipeline()
    add_lora(pipe.unet, pipe.text_encoder, 4, 8, 0.0)
    save_lora(tmp_path / LORA_FILE, pipe.unet, pipe.text_encoder, {})
    return {name: x for name, x in load_file(tmp_path / LORA_FILE).items() if not name.endswith(".alpha")}


SLOW = "(a+)+$"
CONFIGS = {
    "one pattern": ({"target_modules": SLOW}, "'target_modules' is '(a+)+$'"),
    "word": ({"target_modules": "all-linear"}, "'target_modules' is 'all-linear': input must be a valid list"),
    "list": ({"target_modules": ["to_k", SLOW]}, "'target_modules.1' is '(a+)+$'"),
    "rank": ({"rank_pattern": {SLOW: 4}}, "'rank_pattern.(a+)+$.[key]'"),
    "alpha": ({"alpha_pattern": {SLOW: 4}}, "'alpha_pattern.(a+)+$.[key]'"),
    "excluded": ({"exclude_modules": SLOW}, "'exclude_modules'"),
    "layers": ({"layers_pattern": [SLOW]}, "'layers_pattern"),
    "many": ({"alpha_pattern": {f"x{n}": 4 for n in range(20_000)}}, "'alpha_pattern'"),
    "text": ({"lora_alpha": "8"}, "'lora_alpha' is '8'"),
    "infinite": ({"lora_alpha": float("inf")}, "'lora_alpha' is inf"),
}


@pytest.mark.parametrize("place", ["header", "file"])
@pytest.mark.parametrize("config, words", CONFIGS.values(), ids=CONFIGS)
def test_metadata_of_a_lora_names_layers_only(tmp_path, lora, config, words, place):
    config = {"lora_alpha": 8} | config
    began = time.monotonic()
    if place == "header":
        header = {f"{model}.{key}": value for key, value in config.items() for model in ("unet", "text_encoder")}
        save_file(lora, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps(header)})
        file = tmp_path / "x.safetensors"
    else:
        file = tmp_path / "adapter_model.safetensors"
        save_file(lora, file)
        write_json(tmp_path / "adapter_config.json", config)
    with pytest.raises(InputError) as caught:
        read_lora(file)
    assert str(caught.value).startswith("DF402") and words in str(caught.value)
    assert time.monotonic() - began < 60


def test_names_of_layers_are_read(tmp_path, lora):
    header = {"unet.lora_alpha": 8, "text_encoder.lora_alpha": 4, "unet.target_modules": ["to_k", "to_out.0"]}
    header |= {"unet.rank_pattern": {"^down_blocks.0.attentions.0.proj_in$": 4}, "unet.alpha_pattern": {"to_k": 2}}
    save_file(lora, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps(header)})
    alphas = {name: x.item() for name, x in read_lora(tmp_path / "x.safetensors").tensors.items() if "alpha" in name}
    assert {alpha for name, alpha in alphas.items() if "_to_k." in name and "unet" in name} == {2}
    assert {alpha for name, alpha in alphas.items() if "_to_q." in name} == {8}
    assert {alpha for name, alpha in alphas.items() if "lora_te" in name} == {4}


@pytest.mark.parametrize(
    "record",
    ["{", "[]", {"prompts": []}, {"prompts": {"a": 1}}, {"resolution": "512"}, {"resolution": 10**9}, {"base": 3},
     {"appearance": {"hole": {"mean": [1], "covariance": [], "strangest": 1}}}, {"zoom": [3, 0.1]},
     {"zoom": {"context": 0}}],
)  # fmt: skip
def test_a_record_of_another_form_is_refused(tmp_path, lora, record):
    text = record if isinstance(record, str) else json.dumps(record)
    save_file(lora, tmp_path / "x.safetensors", metadata={"defectfill": text})
    with pytest.raises(InputError, match="DF402 .*its metadata"):
        read_lora(tmp_path / "x.safetensors", 8)


def test_a_lora_of_odd_tensors_is_refused(tmp_path, lora):
    name = next(name for name in lora if "lora_down" in name)
    for odd in (torch.tensor(1.0), lora[name].int()):
        save_file(lora | {name: odd}, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match=f"DF402 .*{name}"):
            read_lora(tmp_path / "x.safetensors", 8)


# Runs


@pytest.mark.parametrize(
    "line",
    [
        {"num_images": 10**12},
        {"num_images": 10**400},
        {"num_inference_steps": 10**9},
        {"masks_per_image": 10**9, "mask_source": "procedural"},
        {"output_dir": None},
        {"sede": None},
        {"seed": {"a": 1}},
        {"seed": [[1]]},
        [1],
        None,
        "text",
    ],
)
def test_lines_of_cases_are_bounded(tmp_path, line):
    if isinstance(line, dict):
        line = {"image": "photos", "mask_source": "random"} | line
    (tmp_path / "cases.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="DF416 .*line 1: "):
        parse_generation_args("", ["--lora", "x", "--cases", str(tmp_path / "cases.jsonl"), "--output_dir", "out"])


def test_cases_are_bounded_together(tmp_path):
    line = json.dumps({"image": "photos", "mask_source": "random", "num_images": 600_000})
    (tmp_path / "cases.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(InputError, match="DF416 .*asks for 1,200,000 images; one run makes at most 1,000,000"):
        parse_generation_args("", ["--lora", "x", "--cases", str(tmp_path / "cases.jsonl"), "--output_dir", "out"])


@pytest.mark.parametrize("flag", ["--num_images", "--num_inference_steps", "--num_candidates", "--max_attempts"])
def test_flags_of_generation_are_bounded(capsys, flag):
    with pytest.raises(SystemExit):
        argv = ["--lora", "x", "--image", "x", "--mask", "x", "--output_dir", "out"]
        parse_generation_args("", [*argv, flag, str(10**12)])
    assert f"{flag} 1000000000000: must be at least 1 and at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, flags",
    [
        (check_data, ("nut", "--resolution", 10**12)),
        (check_data, ("nut", "--vae_scale_factor", 0)),
        (preview_masks, ("--image", "x", "--mask", "x", "--output", "x.png", "--number", 10**12)),
    ],
)
def test_flags_of_scripts_are_bounded(capsys, script, flags):
    with pytest.raises(SystemExit):
        script.parse_args([*map(str, flags)])
    assert "must be at least 1 and at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--max_train_steps", 10**9), "--max_train_steps 1000000000: must be at most 10,000,000"),
        (("--max_train_steps", 10**7, "--train_batch_size", 99), "990,000,000 samples in a process; at most"),
        (("--num_random_boxes", 10**12), "--num_random_boxes 1000000000000: must be at most 10,000"),
        (("--rank", 10**9), "--rank 1000000000: must be at most"),
        (("--validation_inference_steps", 10**9), "must be at most 1,000"),
    ],
)
def test_flags_of_training_are_bounded(tmp_path, flags, words):
    args = train_defectfill.parse_args(options(tmp_path, tmp_path, tmp_path, *map(str, flags)))
    with pytest.raises(InputError) as caught:
        train_defectfill.check_training_args(args)
    assert str(caught.value).startswith("DF187") and words in str(caught.value)


@pytest.mark.parametrize("name", ["plan.jsonl", "manifest.jsonl", "settings.json"])
def test_a_generation_run_of_files_that_never_end(trained, inputs, tmp_path, special, name):
    put(special, tmp_path / "out" / name)
    argv = ["--lora", trained, *inputs, "--output_dir", tmp_path / "out", "--selection", "none"]
    with pytest.raises(InputError, match=f"DF192 .*{name} of something else"):
        generate(*argv)


def test_a_training_run_of_files_that_never_end(tmp_path, special):
    with pytest.raises(InputError, match="DF310 .*losses.jsonl.*not a regular file"):
        LossLog(put(special, tmp_path / "losses.jsonl"), 3)
    folder = tmp_path / "checkpoint-2"
    put(special, folder / "manifest.json")
    with pytest.raises(InputError, match="DF310 .*its manifest cannot be read: it is not a regular file"):
        find_checkpoint(tmp_path, "checkpoint-2")
    (folder / "manifest.json").unlink()
    put(special, folder / "state.json")
    entry = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    write_json(folder / "manifest.json", {"schema": 1, "step": 2, "files": {"state.json": entry}})
    assert find_checkpoint(tmp_path, "latest") is None


# Run lengths and polygons

MARKED = square(3, 5, 9, 40)
RLE = coco_mask.encode(np.asfortranarray(MARKED.astype(np.uint8)))["counts"].decode()
RUNS = uncompressed(RLE)
WRONG_RUNS = {
    "fraction": [RUNS[0] + 0.5, *RUNS[1:-1], RUNS[-1] - 0.5],
    "whole fractions": [float(run) for run in RUNS],
    "texts": [str(run) for run in RUNS],
    "bools": [True, 48 * 48 - 1],
    "negative": [RUNS[0] + 5, -5, *RUNS[2:]],
    "negative, filling the image": [48 * 48 + 5, -5],
    "few": RUNS[:-1],
    "many": [*RUNS, 1],
    "huge": [10**400],
    "none": [],
    "null": None,
    "number": 48 * 48,
    "mapping": {"a": 1},
    "text too short": RLE[:-3],
    "text too long": RLE + "1",
    "text that does not end": RLE + "o",
    "text of other characters": RLE[:3] + "é" + RLE[3:],
    "negative text": "N" + RLE[1:],
    "text of a huge number": "o" * 50 + "1",
}


@pytest.mark.parametrize("counts", WRONG_RUNS.values(), ids=WRONG_RUNS)
def test_run_lengths_are_counted_before_they_are_decoded(tmp_path, monkeypatch, counts):
    root = make_coco(tmp_path / "nut")
    file = root / "annotations/instances.json"
    content = json.loads(file.read_text())
    content["annotations"][1]["segmentation"]["counts"] = counts
    write_json(file, content)
    monkeypatch.setattr(coco_mask, "decode", None)
    assert [problem.code for problem in read_object(root, "nut").problems] == ["DF167"]


@pytest.mark.parametrize("extra", [[], [0], [0, 0]])
def test_right_run_lengths_mean_the_same_in_every_form(extra):
    expected = coco_rle({"size": [48, 48], "counts": RLE}, (48, 48))
    assert expected == RLE and RUNS[1] == 6
    assert coco_rle({"size": [48, 48], "counts": [*RUNS, *extra]}, (48, 48)) == RLE
    parted = [RUNS[0], 2, 0, 4, *RUNS[2:]]
    assert coco_rle({"size": [48, 48], "counts": parted}, (48, 48)) == RLE
    full, none = (coco_rle({"size": [2, 3], "counts": counts}, (3, 2)) for counts in ([0, 6], [6]))
    for counts, area in ((full, 6), (none, 0)):
        assert coco_mask.area({"size": [2, 3], "counts": counts.encode()}) == area


def test_run_lengths_of_other_programs_are_counted_too(tmp_path):
    root = make_cvat(tmp_path / "cvat")
    file = next(root.glob("*.xml"))
    text = file.read_text()
    rle = text.split('rle="')[1].split('"')[0]
    for wrong in ("1.5, 1.5, 1", f"{rle}, 1", f"-1, 1, {rle}", "nan", f"1e400, {rle}", f"1{'0' * 14}, {rle}"):
        file.write_text(text.replace(f'rle="{rle}"', f'rle="{wrong}"'))
        assert [p.code for p in read_object(root, "cvat").problems] == ["DF167"], wrong
    root = make_label_studio(tmp_path / "studio")
    file = next(root.glob("*.json"))
    content = json.loads(file.read_text())
    data = next(r["value"] for t in content for a in t["annotations"] for r in a["result"] if "rle" in r["value"])
    rle = data["rle"]
    for wrong in (rle[:-1], [*rle, 1], [rle[0] + 0.5, *rle[1:]], [float(x) for x in rle], [-1, *rle[1:]]):
        data["rle"] = wrong
        write_json(file, content)
        assert "DF167" in [p.code for p in read_object(root, "studio").problems], wrong[:4]


def test_polygons_and_shapes_are_bounded(tmp_path):
    def corners():
        yield from [[1, 1]] * 10_001
        raise AssertionError("it reads on")

    with pytest.raises(ValueError, match="more than 10,000 corners"):
        polygon(corners(), (48, 48))
    root = make_coco(tmp_path / "nut")
    file = root / "annotations/instances.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = [[10, 10, 20, 10, 20, 20] * 400_000]
    write_json(file, content)
    began = time.monotonic()
    (problem,) = read_object(root, "nut").problems
    assert problem.code == "DF167" and "corners" in problem.what and time.monotonic() - began < 60
    content["annotations"][0]["segmentation"] = [[10, 10, 20, 10, 20, 20]] * 20_000
    write_json(file, content)
    (problem,) = read_object(root, "nut").problems
    assert "it has 20,000 shapes; at most 10,000 are read" in problem.what


def test_a_number_of_400_digits_is_none(tmp_path):
    root = make_coco(tmp_path / "nut")
    file = root / "annotations/instances.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = [[10**400, 10, 20, 10, 20, 20]]
    write_json(file, content)
    (problem,) = read_object(root, "nut").problems
    assert problem.code == "DF167" and problem.what.endswith("0 is not a number")


@pytest.mark.parametrize("grid", [0, 1, 2, 4])
def test_a_polygon_is_filled_in_bands_as_at_once(grid):
    """Corners anywhere, and on whole, half and quarter pixels, where they meet the centres."""
    rng = np.random.default_rng(grid)
    for number in rng.integers(3, 200, 50):
        width, height = (int(side) for side in rng.integers(5, 120, 2))
        corners = rng.random((number, 2)) * (width, height)
        corners = np.round(corners * grid) / grid if grid else corners
        expected = np.zeros((height, width), dtype=bool)
        expected[draw.polygon(corners[:, 1] - 0.5, corners[:, 0] - 0.5, expected.shape)] = True
        found = polygon_mask([tuple(corner) for corner in corners], (width, height))
        assert np.array_equal(found & expected, expected)
        area = abs(np.sum(corners[:, 0] * np.roll(corners[:, 1], -1) - corners[:, 1] * np.roll(corners[:, 0], -1))) / 2
        if 2 * area >= np.hypot(*(np.roll(corners, -1, axis=0) - corners).T).sum():  # else its outline is drawn too
            assert np.array_equal(found, expected)


def test_ten_thousand_corners_take_seconds():
    around = np.linspace(0, 2 * np.pi, 10_000, endpoint=False)
    corners = np.stack([1024 + 1000 * np.cos(around), 1024 + 1000 * np.sin(around)], axis=1)
    began = time.monotonic()
    assert polygon_mask(corners, (2048, 2048)).sum() == pytest.approx(np.pi * 1e6, rel=1e-3)
    assert time.monotonic() - began < 60  # all at once it would be minutes


def test_a_large_right_polygon_is_read(tmp_path):
    write_image(tmp_path / "nut/images/x.png")
    around = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    corners = np.stack([24 + 15 * np.cos(around), 24 + 15 * np.sin(around)], axis=1)
    make_coco(tmp_path / "nut")
    file = tmp_path / "nut/annotations/instances.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = [corners.round(3).ravel().tolist()]
    write_json(file, content)
    assert masks_of(tmp_path / "nut")["images/0.png"].sum() == pytest.approx(np.pi * 15**2, rel=0.02)


def test_metadata_of_millions_of_numbers_is_not_parsed(tmp_path, lora):
    numbers = json.dumps({"appearance": {"hole": {"mean": [0] * 2_000_000}}})
    save_file(lora, tmp_path / "x.safetensors", metadata={"defectfill": numbers})
    with pytest.raises(InputError, match="DF402 .*: its metadata holds [0-9,]+ characters in one entry; at most"):
        read_lora(tmp_path / "x.safetensors")
