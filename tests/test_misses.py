"""`--like`: masks of the size and shape of what a detector missed, on the good images near it."""

import json
import math

import numpy as np
import pytest
import torch
from drawn import write_image
from folders import make_mvtec
from PIL import Image
from runs import FAST, generate, launch, read_lines
from scipy import ndimage

import generate_defectfill as g
from defectfill.runs.misses import Miss, load_missed_images, misses_of_type, order_good_images, read_misses
from defectfill.runs.source_images import SourceImage
from defectfill_dataset import InputError, principal_axis, shapes_like
from defectfill_dataset.masks import bounds
from defectfill_dataset.synthesis.placement import NamedMask
from defectfill_dataset.synthesis.shapes import ellipse_elongation
from defectfill_scripts import preview_masks


LINES = [
    {"image": "test/hole/003.png", "box": [10, 12, 18, 20], "area": 50, "missed_by": 1.0},
    {"image": "test/hole/002.png", "box": [4, 20, 24, 25], "area": 80, "missed_by": 0.6},
]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ellipse(long: float, short: float, angle: float, side: int = 200) -> np.ndarray:
    """(side, side) bool, with half axes in pixels and an angle in degrees."""
    y, x = np.mgrid[:side, :side] - side / 2
    turn = np.radians(angle)
    along, across = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    return (along / long) ** 2 + (across / short) ** 2 <= 1


def size_of(mask: np.ndarray) -> tuple[int, int]:
    left, top, right, bottom = bounds(mask)
    return right - left, bottom - top


# Shapes


@pytest.mark.parametrize("angle", [0, 30, 45, 90])
@pytest.mark.parametrize("long, short", [(20, 20), (40, 10), (60, 5)])
def test_an_ellipses_elongation_is_known_from_its_box_and_area_at_any_angle(long, short, angle):
    mask = ellipse(long, short, angle)
    assert ellipse_elongation(size_of(mask), mask.sum()) == pytest.approx(long / short, rel=0.4)


@pytest.mark.parametrize("long, short, angle", [(10, 9, 0), (50, 8, 20), (30, 4, 45), (16, 10, 90)])
def test_shapes_have_the_area_and_elongation_of_the_missed_defect(long, short, angle):
    missed = ellipse(long, short, angle)
    masks = [NamedMask("round", ellipse(12, 10, 0)), NamedMask("long", ellipse(30, 6, 70))]
    sample = shapes_like(masks, size_of(missed), int(missed.sum()), 180)
    for seed in range(8):
        name, shape = sample(np.random.default_rng(seed), (200, 200))
        assert name == ("long" if long / short > 2 else "round")
        assert shape.sum() == pytest.approx(missed.sum(), rel=0.03)
        assert principal_axis(shape)[1] == pytest.approx(long / short, rel=0.3)
        assert ndimage.label(shape, np.ones((3, 3)))[1] == 1


def test_the_nearest_connected_defect_is_taken_and_one_like_the_miss_stays_as_it_is():
    both = ellipse(20, 20, 0) & (np.indices((200, 200))[1] < 60)
    both[:10, :30] = True
    sample = shapes_like([NamedMask("both", both)], (30, 10), 300, 0)
    shapes = [sample(np.random.default_rng(seed), (200, 200))[1] for seed in range(6)]
    assert all(shape.sum() == pytest.approx(300, rel=0.02) for shape in shapes)
    assert all(shape.shape == pytest.approx((10, 30), abs=2) for shape in shapes)


@pytest.mark.parametrize("size, area", [((1, 1), 0), ((9, 9), 3), ((65536, 65536), 2**32), ((65536, 1), 5)])
def test_no_miss_needs_much_memory_or_leaves_nothing(size, area):
    shape = shapes_like([NamedMask("round", ellipse(12, 10, 0))], size, area, 180)(np.random.default_rng(0), (60, 80))[
        1
    ]
    assert shape.any() and max(shape.shape) <= 2.5 * math.hypot(60, 80)


# Good images


def describe(image: Image.Image) -> torch.Tensor:
    return torch.tensor([float(np.asarray(image).mean())])


def test_good_images_are_ordered_by_distance(tmp_path):
    images = []
    for i, level in enumerate((200, 20, 90, 150)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{i}.png")
        images.append(SourceImage(tmp_path / f"{i}.png"))
    missed = {name: {"image": Image.new("RGB", (8, 8), (level,) * 3)} for name, level in (("a", 100), ("b", 190))}
    assert order_good_images(images, missed, describe) == {"a": [2, 3, 1, 0], "b": [0, 3, 2, 1]}


# Files


def test_a_file_of_the_evaluation_is_read(tmp_path):
    misses = read_misses(write_lines(tmp_path / "m.jsonl", [*LINES, LINES[0] | {"box": [5, 5, 5, 6], "area": 0}]))
    assert misses[0] == Miss("test/hole/003.png", [10, 12, 18, 20], 50)
    assert [miss.size for miss in misses] == [(8, 8), (20, 5), (1, 1)]


@pytest.mark.parametrize(
    "line",
    [
        [],
        {"image": "a"},
        LINES[0] | {"image": None},
        LINES[0] | {"box": [1, 2, 3]},
        LINES[0] | {"box": [9, 2, 3, 4]},
        LINES[0] | {"box": [0, 0, 10**9, 4]},
        LINES[0] | {"area": -1},
        LINES[0] | {"area": "many"},
        LINES[0] | {"area": 1.5},
    ],
)
def test_wrong_lines_are_one_error(tmp_path, line):
    file = write_lines(tmp_path / "m.jsonl", [LINES[0], line, LINES[1], "x"])
    with pytest.raises(InputError) as raised:
        read_misses(file)
    assert [(p.code, str(p.where).endswith(f"line {n}")) for p, n in zip(raised.value.problems, (2, 4))] == [
        ("DF354", True)
    ] * 2


def test_no_file_and_an_empty_one(tmp_path):
    with pytest.raises(InputError, match="DF160"):
        read_misses(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="DF354.*names no missed defect"):
        read_misses(write_lines(tmp_path / "m.jsonl", []))


# The command


@pytest.fixture
def like(tmp_path):
    """A dataset, five good images beside it, and a file of misses."""
    make_mvtec(tmp_path / "nut")
    for i in range(5):
        write_image(tmp_path / f"good/{i:03d}.png", 48, seed=i)
    file = write_lines(tmp_path / "misses.jsonl", LINES)
    source = ["--reference_data", tmp_path / "nut", "--foreground", "none", "--placement", "anywhere"]
    return ["--image", tmp_path / "good", *source, "--like", file, *FAST]


def test_only_reference_masks_are_like_a_miss(tmp_path, capsys):
    argv = ["--lora", "x", "--image", "y", "--output_dir", "z", "--like", "m.jsonl"]
    for source in (["--mask", "m.png"], ["--mask_source", "procedural"], ["--mask_source", "random"]):
        with pytest.raises(SystemExit):
            g.parse_args([*argv, *source])
        assert "--like: only with --mask_source references" in capsys.readouterr().err


def test_missed_images_are_found_by_their_name(tmp_path, like):
    argv = ["--lora", "x", "--output_dir", "z", *like]
    [request] = g.parse_args([str(a) for a in argv]).requests
    misses = [*read_misses(request.like), Miss("elsewhere.png", [0, 0, 1, 1], 1)]
    assert load_missed_images(request, misses, None).keys() == {"test/hole/002.png", "test/hole/003.png"}


def test_each_type_has_its_own_misses(tmp_path, like):
    make_mvtec(tmp_path / "nut", {"hole": 4, "scratch": 4})
    lines = [*LINES, LINES[0] | {"image": "test/scratch/002.png"}, LINES[0] | {"image": "elsewhere.png"}]
    write_lines(tmp_path / "misses.jsonl", lines)
    [request] = g.parse_args([str(a) for a in ["--lora", "x", "--output_dir", "z", *like]]).requests
    images = {defect: [m.image for m in misses_of_type(request, defect, None)] for defect in ("hole", "scratch", None)}
    assert images["hole"] == ["test/hole/003.png", "test/hole/002.png", "elsewhere.png"]
    assert images["scratch"] == ["test/scratch/002.png", "elsewhere.png"] and len(images[None]) == 4
    write_lines(tmp_path / "misses.jsonl", LINES)
    with pytest.raises(InputError, match="DF354.*names no missed defect of 'scratch'; choose other types"):
        misses_of_type(request, "scratch", None)


def test_the_command_makes_more_of_what_was_missed(trained, tmp_path, like):
    out = tmp_path / "out"
    argv = ["--lora", trained, *like, "--output_dir", out]
    generate(*argv, "--num_images", 6)
    lines = read_lines(out / "manifest.jsonl")
    plan = read_lines(out / "plan.jsonl")
    assert [line["like"] for line in plan] == [
        {k: LINES[i % 2][k] for k in ("image", "box", "area")} for i in range(6)
    ]
    for line in lines:
        mask = np.asarray(Image.open(out / line["mask"])) > 0
        assert mask.sum() == pytest.approx(line["like"]["area"], rel=0.05)
    by_miss = [[line["good_image"] for line in plan[i::2]] for i in range(2)]
    assert all(len(set(images)) == 3 for images in by_miss)  # the nearest, then the next
    assert len({(line["good_image"], line["seed"]) for line in plan}) == 6
    generate(*argv, "--num_images", 8)  # a run grows
    assert read_lines(out / "plan.jsonl")[:6] == plan
    write_lines(tmp_path / "misses.jsonl", [LINES[0] | {"area": 40}, LINES[1]])
    with pytest.raises(InputError, match="DF320 like: the run was started with"):
        generate(*argv, "--num_images", 8)


def test_images_that_are_not_in_the_data_are_said_once(trained, tmp_path, like, caplog):
    write_lines(tmp_path / "misses.jsonl", [line | {"image": f"other/{i}.png"} for i, line in enumerate(LINES)])
    generate("--lora", trained, *like, "--output_dir", tmp_path / "out", "--num_images", 4)
    assert [line["good_image"] for line in read_lines(tmp_path / "out/plan.jsonl")] == [f"00{i}.png" for i in range(4)]
    assert sum("2 of its images are not in" in message for message in caplog.messages) == 1


@pytest.mark.slow
def test_any_number_of_processes_plans_the_same(trained, tmp_path, like):
    argv = ["--lora", trained, *like, "--num_images", 4, "--output_dir"]
    generate(*argv, tmp_path / "one")
    launch(g.__file__, *argv, tmp_path / "two")
    assert read_lines(tmp_path / "one/plan.jsonl") == read_lines(tmp_path / "two/plan.jsonl")


def test_the_preview_shows_the_same_masks(tmp_path, like, capsys):
    argv = [*like[: -len(FAST)], "--number", 4, "--output", tmp_path / "masks.png"]
    preview_masks.main(preview_masks.parse_args([str(a) for a in argv]))
    assert "drawn: 4 masks, area 2.1" in capsys.readouterr().out  # 50 and 80 of 48 x 48 pixels
