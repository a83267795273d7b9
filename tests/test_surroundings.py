"""Masks placed where the image looks as around the references' defects."""

import numpy as np
import pytest
from PIL import Image
from runs import generate, read_lines
from scipy import ndimage

from defectfill_dataset import InputError, LikeSurroundings, PlacedShapes, load_mask_rows, read_patches
from defectfill_dataset.synthesis import placement, surroundings
from defectfill_dataset.synthesis.shapes import Transform
from defectfill_dataset.synthesis.surroundings import changed, covered, differences


FAST = ["--num_inference_steps", 1, "--num_candidates", 1, "--selection", "none"]
TRACKS = (20, 52, 80)  # the left edges of a board's tracks
WIDTH = 8


def board(tracks=TRACKS, size=96, turned=False) -> np.ndarray:
    """(size, size) grey levels: dark vertical tracks on bright ground, or horizontal ones."""
    pixels = np.full((size, size), 220, np.uint8)
    for left in tracks:
        pixels[:, left : left + WIDTH] = 30
    return pixels.T if turned else pixels


def image_of(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert("RGB")


@pytest.fixture
def broken(tmp_path):
    """A dataset of three boards with a break across a track, a little wider than it is."""
    for name in ("test/hole", "ground_truth/hole", "train/good"):
        (tmp_path / "board" / name).mkdir(parents=True)
    for i, left in enumerate(TRACKS):
        mask, pixels = np.zeros((96, 96), bool), board()
        mask[30 + 9 * i : 36 + 9 * i, left - 2 : left + WIDTH + 2] = True
        image_of(np.where(mask, 220, pixels).astype(np.uint8)).save(tmp_path / f"board/test/hole/{i:03d}.png")
        Image.fromarray(mask).convert("L").save(tmp_path / f"board/ground_truth/hole/{i:03d}_mask.png")
    for i, tracks in enumerate([(10,), (44,), (70,)]):
        image_of(board(tracks)).save(tmp_path / f"board/train/good/{i:03d}.png")
    return tmp_path / "board"


def patches_of(folder):
    return read_patches(load_mask_rows(folder, None, "all", "hole", False))


def never(rng, size):
    raise AssertionError("a mask was placed anywhere")


def place(folder, pixels: np.ndarray, number: int = 12, roi=None, max_rotation: float = 180, masks: int = 1) -> list:
    like = LikeSurroundings(patches_of(folder), max_rotation)
    source = PlacedShapes(never, None, number=masks, surroundings=like)
    return [source(image_of(pixels), seed, None, roi) for seed in range(number)]


def test_what_surrounds_a_reference_is_read(broken):
    patches = patches_of(broken)
    assert [patch.name for patch in patches] == ["test/hole/000.png", "test/hole/001.png", "test/hole/002.png"]
    for patch in patches:
        assert patch.mask.sum() == 6 * (WIDTH + 4) and patch.image_area == 96 * 96
        assert not (patch.rim & patch.mask).any() and {*np.unique(patch.pixels[patch.rim]).round(2)} == {0.12, 0.86}


def breaks(mask: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether what is left of a board's tracks, with a mask's pixels taken away, falls into one piece more."""
    return ndimage.label((pixels < 128) & ~mask)[1] == ndimage.label(pixels < 128)[1] + 1


@pytest.mark.parametrize("turned", [False, True])
def test_a_break_is_put_across_a_track(broken, turned):
    pixels = board((40,), turned=turned)
    all_placed = place(broken, pixels)
    assert all(breaks(placed.mask, pixels) for placed in all_placed)
    assert len({(placed.defects[0].top, placed.defects[0].left) for placed in all_placed}) > 3
    areas = [placed.mask.sum() / (6 * (WIDTH + 4)) for placed in all_placed]
    assert len({*areas}) > 3 and 0.4 < min(areas) and max(areas) < 1.7


def test_without_rotation_no_mask_is_turned(broken):
    shapes = [placed.defects[0].shape.shape for placed in place(broken, board((40,)), max_rotation=0)]
    assert all(height < width for height, width in shapes)


def test_the_region_decides_before_the_surroundings(broken):
    pixels, roi = board((12, 60)), np.zeros((96, 96), bool)
    roi[:, 48:] = True
    for placed in place(broken, pixels, roi=roi):
        assert not (placed.mask & ~roi).any() and breaks(placed.mask, pixels)


def test_several_masks_of_an_image_do_not_touch(broken):
    [placed] = place(broken, board((30,)), number=1, masks=2)
    assert ndimage.label(placed.mask)[1] == 2 and len(placed.defects) == 2


def test_a_larger_image_is_searched_shrunk(broken, monkeypatch):
    """Masks keep their share of the image, and lie where they should up to the pixels that were lost."""
    monkeypatch.setattr(surroundings, "SEARCHED_SIDE", 96)
    pixels = np.kron(board((40,)), np.ones((2, 2), np.uint8))
    for placed in place(broken, pixels):
        assert 4 * 0.8**2 < placed.mask.sum() / (6 * (WIDTH + 4)) < 4 * 1.25**2 and breaks(placed.mask, pixels)


def test_a_hair_has_places_in_a_larger_image_too(tmp_path, monkeypatch):
    """Where it is searched, it is thinner than a pixel."""
    monkeypatch.setattr(surroundings, "SEARCHED_SIDE", 96)
    mask, pixels = np.zeros((384, 384), bool), np.kron(board((40,)), np.ones((4, 4), np.uint8))
    mask[[*range(100, 180)], [*range(150, 230)]] = True
    hair = [
        surroundings.Patch(
            "hair", mask[90:190, 140:240], pixels[90:190, 140:240] / 255, ~mask[90:190, 140:240], 384**2
        )
    ]
    source = PlacedShapes(never, None, surroundings=LikeSurroundings(hair, 0))
    for seed in range(6):
        [defect] = source(image_of(pixels), seed, None, None).defects
        assert (
            ndimage.label(defect.shape, np.ones((3, 3)))[1] == 1 and 50 < defect.shape.sum() < 200
        )  # of 80, and torn nowhere


def test_brighter_images_look_the_same(broken):
    [patch, *_] = patches_of(broken)
    pixels = board((40,)) / 255
    assert np.abs(differences(patch, pixels) - differences(patch, pixels + 0.1)).max() < 1e-6
    assert differences(patch, patch.pixels).item() == pytest.approx(0, abs=1e-9)


def test_a_patch_turns_with_its_mask(broken):
    [patch, *_] = patches_of(broken)
    turned = changed(patch, Transform(angle=90, flip=True))
    assert np.array_equal(turned.mask, np.rot90(patch.mask[:, ::-1])) and turned.mask.shape == patch.mask.shape[::-1]
    assert differences(turned, turned.pixels).item() == pytest.approx(0, abs=1e-9)


def test_coverage_is_that_of_a_count():
    mask, allowed = np.array([[1, 1], [0, 1]], bool), np.random.default_rng(0).random((5, 6)) < 0.5
    expected = [[(allowed[y : y + 2, x : x + 2] & mask).sum() / 3 for x in range(5)] for y in range(4)]
    assert np.allclose(covered(mask, allowed), expected, atol=1e-5)


def test_where_there_is_no_such_place_masks_go_anywhere(broken, caplog):
    placement._warn_once.cache_clear()
    source = PlacedShapes(
        lambda rng, size: ("dot", np.ones((2, 2), bool)), None, surroundings=LikeSurroundings(patches_of(broken), 180)
    )
    roi = np.zeros((96, 96), bool)
    roi[:4, :4] = True
    placed = source(image_of(board()), 0, None, roi)
    assert placed.mask.sum() == 4 and "like_surroundings: no such place in some images" in caplog.text


def test_without_patches_nothing_is_proposed():
    """References that fill their images have none."""
    whole = np.ones((96, 96), bool)
    assert not [*LikeSurroundings([], 180).propose(image_of(board()), whole, 1, np.random.default_rng())]


def test_the_command_places_masks_like_the_surroundings(trained, broken):
    argv = ["--lora", trained, "--image", broken / "train/good", "--reference_data", broken, "--split", "all", *FAST]
    argv += ["--defect", "hole", "--foreground", "none", "--output_dir", broken.parent / "out"]
    generate(*argv, "--placement", "like_surroundings")
    lines = read_lines(broken.parent / "out/manifest.jsonl")
    assert len(lines) == 3
    for line in lines:
        mask = np.asarray(Image.open(broken.parent / "out" / line["mask"])) > 0
        pixels = np.asarray(Image.open(broken / "train/good" / f"{line['good_image'].split('/')[-1]}").convert("L"))
        assert breaks(mask, pixels)
    [plan, *_] = read_lines(broken.parent / "out/plan.jsonl")
    assert plan["placement"] == "like_surroundings" and plan["reference_images_sha256"]
    with pytest.raises(InputError, match="DF320 placement: .*'like_surroundings', now it is 'anywhere'"):
        generate(*argv, "--placement", "anywhere")
    image_of(board((5,))).save(broken / "test/hole/000.png")
    with pytest.raises(InputError, match="DF320 reference_images_sha256"):
        generate(*argv, "--placement", "like_surroundings")


def test_large_references_are_drawn_as_often_as_small_ones(broken, monkeypatch):
    """The surroundings of a speck are found everywhere, and nearly equal."""
    speck = [patch._replace(name="speck") for patch in patches_of(broken)[:1]]

    def unlike(patch, pixels):
        places = np.array(pixels.shape) - patch.mask.shape + 1
        return np.full(places, 0.0 if patch.name == "speck" else 0.4)

    monkeypatch.setattr(surroundings, "differences", unlike)
    source = PlacedShapes(never, None, surroundings=LikeSurroundings([*patches_of(broken), *speck], 180))
    names = [source(image_of(board()), seed, None, None).defects[0].name for seed in range(24)]
    assert 1 <= names.count("speck") <= 12
