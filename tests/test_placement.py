"""Shapes, the part in a picture, places, and every mask source through the real commands."""

import json

import numpy as np
import pytest
from drawn import write_image
from folders import make_mvtec
from PIL import Image
from runs import generate, read_lines
from scipy import ndimage

import generate_defectfill as g
from defectfill.drawn import parts
from defectfill.runs import report as page
from defectfill_dataset import (
    SHAPES,
    InputError,
    PlacedShapes,
    find_foreground,
    held_out_source,
    load_mask_rows,
    load_masks,
    principal_axis,
    procedural_shapes,
    random_source,
    reference_shapes,
)
from defectfill_dataset.synthesis import locations, placement
from defectfill_dataset.synthesis.foreground import cover_defect
from defectfill_dataset.synthesis.locations import (
    CLEARANCE,
    CONTACT,
    TO_BORDER,
    TO_PART,
    LikeReferences,
    X,
    Y,
    choose_placement,
    locate,
    map_object,
    reference_location,
)
from defectfill_dataset.synthesis.placement import GAP, NamedMask, find_place
from defectfill_dataset.synthesis.shapes import SCALES, Transform, cut_out, random_transform, transform, union
from defectfill_scripts import preview_masks


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def count_components(mask: np.ndarray) -> int:
    return ndimage.label(mask, np.ones((3, 3)))[1]


def is_cut(shape: np.ndarray) -> bool:
    return (
        shape.any() and shape.dtype == bool and all(e.any() for e in (shape[0], shape[-1], shape[:, 0], shape[:, -1]))
    )


@pytest.fixture
def some_shapes() -> list[np.ndarray]:
    """A spot, a diagonal hair of one pixel, and an L with a grain beside it."""
    ell = np.zeros((40, 30), dtype=bool)
    ell[:, :6], ell[34:], ell[4:8, 20:24] = True, True, True
    return [np.hypot(*np.mgrid[-9:10, -9:10]) < 9.5, np.eye(60, dtype=bool), ell]


# Shapes


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("angle", [0, 33, 90, -120])
def test_a_transform_keeps_the_area_within_the_scale_and_tears_nothing(some_shapes, scale, angle):
    for i, shape in enumerate(some_shapes):
        changed = transform(shape, Transform(angle, scale, bool(i % 2), 0.02), rng(i))
        assert is_cut(changed) and count_components(changed) <= count_components(shape)
        ratio = changed.sum() / shape.sum() / scale**2
        assert 0.97 < ratio < (1.1 if i != 1 else 3 / min(scale, 1))  # a hair gets no thinner than a pixel


def test_a_transform_that_changes_nothing_is_exact(some_shapes):
    for shape in some_shapes:
        assert np.array_equal(transform(shape, Transform(), rng()), shape)
        assert np.array_equal(transform(shape, Transform(flip=True), rng()), shape[:, ::-1])
        assert np.array_equal(transform(shape, Transform(angle=90), rng()), np.rot90(shape))


def test_a_rotation_turns_the_principal_axis_counter_clockwise():
    bar = np.ones((8, 60), dtype=bool)
    assert principal_axis(bar) == (pytest.approx(0, abs=1e-6), pytest.approx(7.5, rel=0.01))
    for angle in (25, 90, 140):
        turned, length = principal_axis(transform(bar, Transform(angle), rng()))
        assert turned == pytest.approx(angle, abs=1) and length == pytest.approx(7.5, rel=0.1)


@pytest.mark.parametrize("scale", [0.01, 0.3])
def test_a_tiny_shape_never_vanishes(scale):
    for shape in (np.ones((1, 1), dtype=bool), np.ones((3, 2), dtype=bool)):
        assert transform(shape, Transform(45, scale), rng()).sum() >= 1


def test_a_drawn_transform_keeps_to_its_limits():
    drawn = [random_transform(rng(i), 10) for i in range(100)]
    assert all(abs(t.angle) <= 10 and SCALES[0] <= t.scale <= SCALES[1] for t in drawn)
    assert len({t.angle for t in drawn}) == 100 and {t.flip for t in drawn} == {True, False}


def test_a_union_joins_both(some_shapes):
    spot, hair, _ = some_shapes
    for i in range(20):
        both = union(spot, hair, rng(i))
        assert is_cut(both) and count_components(both) == 1
        assert max(spot.sum(), hair.sum()) <= both.sum() < spot.sum() + hair.sum()  # a pixel at least is shared


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("side", [24, 200])
def test_drawn_shapes_are_whole_of_the_size_said_and_seeded(kind, side):
    drawn = [SHAPES[kind](rng(i), side) for i in range(30)]
    for shape in drawn:
        assert is_cut(shape) and count_components(shape) == 1 and max(shape.shape) <= 0.65 * side + 3
    assert all(np.array_equal(shape, SHAPES[kind](rng(i), side)) for i, shape in enumerate(drawn))
    assert len({shape.tobytes() for shape in drawn}) >= 20
    if side == 200:
        share = np.mean([shape.sum() for shape in drawn]) / side**2
        low, high = {"stroke": (4, 14), "scratch": (1.5, 6), "blob": (10, 25), "crack": (1.5, 7), "box": (10, 30)}[
            kind
        ]
        assert low < 1000 * share < high


# The part


@pytest.mark.parametrize("size", [48, 160, 300])
def test_the_nut_is_found_on_its_ground(size):
    for i in range(3):
        surface = parts.nut(rng(i), size)
        image = Image.fromarray((parts.light(rng(i), surface, 1.0) * 255).astype(np.uint8))
        found = find_foreground(image)
        assert found.shape == (size, size) and not found.all() and count_components(found) == 1
        nut = ndimage.binary_dilation(surface.part, iterations=max(2, size // 12))  # `part` leaves its edge out
        assert (found & nut).sum() > 0.95 * found.sum() and (found & surface.part).sum() > 0.85 * surface.part.sum()


@pytest.mark.parametrize("part", ["plate", "cloth"])
@pytest.mark.parametrize("size", [48, 160])
def test_a_surface_that_fills_the_picture_is_all_part(part, size):
    assert all(find_foreground(parts.render(part, None, size, (7, i))[0]).all() for i in range(4))


def test_flat_pictures_and_small_marks_have_no_ground():
    plain = Image.new("RGB", (90, 60), (120, 130, 140))
    assert find_foreground(plain).all() and find_foreground(plain).shape == (60, 90)
    plain.paste((0, 0, 0), (40, 30, 48, 38))
    assert find_foreground(plain).all()  # 1 % of the picture: a mark on the surface
    plain.paste((0, 0, 0), (20, 10, 60, 50))
    plain.paste((120, 130, 140), (35, 25, 45, 35))
    found = find_foreground(plain)
    assert found[12:48, 22:58].all() and found[:, :18].sum() == 0  # the hole in it is filled


def test_a_large_defect_on_a_surface_is_not_taken_for_the_part(tmp_path):
    mask = np.zeros((48, 48), dtype=bool)
    mask[10:20, :12] = True
    write_image(tmp_path / "a.png", mask=mask, colour=(20, 20, 20))
    image = Image.open(tmp_path / "a.png")
    assert not find_foreground(image).all() and find_foreground(cover_defect(image, mask)).all()
    assert cover_defect(image, mask | True) is image
    part = np.zeros((48, 48), dtype=bool)
    part[8:40, 8:40], mask = True, mask & False
    mask[20:24, 4:20] = True  # broken off from the edge
    write_image(tmp_path / "b.png", 48, (250, 220, 90), part & ~mask)
    found = find_foreground(cover_defect(Image.open(tmp_path / "b.png"), mask))
    assert (found ^ part).mean() < 0.08


# Places


def test_a_place_is_any_that_is_good_and_no_other():
    allowed, taken, shape = np.zeros((12, 16), dtype=bool), np.zeros((12, 16), dtype=bool), np.ones((4, 5), dtype=bool)
    allowed[2:9, 2:11], taken[4, 8] = True, True
    shape[0, 0] = False

    def good(top: int, left: int, coverage: float) -> bool:
        window = np.s_[top : top + 4, left : left + 5]
        return (allowed[window] & shape).sum() >= coverage * shape.sum() and not (taken[window] & shape).any()

    for coverage in (1.0, 0.8, 0.05):
        expected = {(y, x) for y in range(9) for x in range(12) if good(y, x, coverage)}
        assert {find_place(shape, allowed, taken, coverage, rng(i)) for i in range(1000)} == expected
    assert find_place(shape, ~allowed & False, taken, 0.99, rng()) is None
    assert find_place(np.ones((13, 2), dtype=bool), ~taken, taken, 0.99, rng()) is None  # larger than the image
    assert find_place(np.ones((12, 16), dtype=bool), allowed | True, taken & False, 1.0, rng()) == (0, 0)


def test_the_one_place_is_found_by_searching_all_except_in_very_large_areas(monkeypatch):
    allowed, taken = np.zeros((300, 300), dtype=bool), np.zeros((300, 300), dtype=bool)
    allowed[100:120, 70:95], allowed[:, 200:] = True, True
    taken[:, 200:] = True
    allowed[200:210, 10:60] = allowed[150:160, 10:60] = True  # much that is allowed and too narrow
    shape = np.ones((20, 25), dtype=bool)
    assert {find_place(shape, allowed, taken, 1.0, rng(i)) for i in range(5)} == {(100, 70)}
    monkeypatch.setattr(placement, "PLACES", 0)
    assert find_place(shape, allowed, taken, 1.0, rng()) == (100, 70)
    monkeypatch.setattr(placement, "MOST_PIXELS", 10_000)
    assert find_place(shape, allowed, taken, 1.0, rng()) is None


@pytest.fixture(scope="module")
def nut() -> Image.Image:
    return parts.render("nut", None, 160, (0, 0))[0]


@pytest.fixture(scope="module")
def references() -> list[NamedMask]:
    masks = [parts.render("nut", defect, 120, (0, 5))[1] for defect in ("hole", "crack")]
    return [NamedMask(name, np.asarray(mask) > 0) for name, mask in zip(("hole", "crack"), masks)]


@pytest.fixture(params=["references", "procedural"])
def shapes(request, references):
    return reference_shapes(references, 180) if request.param == "references" else procedural_shapes(list(SHAPES))


@pytest.mark.parametrize("coverage", [1.0, 0.8])
def test_masks_lie_on_the_part_and_in_the_roi_and_apart(shapes, nut, coverage):
    part, roi = find_foreground(nut), np.zeros((160, 160), dtype=bool)
    roi[:, 70:] = True
    placed = 0
    for seed in range(12):
        result = PlacedShapes(shapes, coverage=coverage, number=2)(nut, seed, None, roi)
        if result is None:
            continue
        placed += 1
        union = np.zeros((160, 160), dtype=int)
        for name, top, left, shape in result.defects:
            window = np.s_[top : top + shape.shape[0], left : left + shape.shape[1]]
            assert name and (shape & part[window] & roi[window]).sum() >= coverage * shape.sum() > 0
            union[window] += shape
        assert union.max() == 1 and np.array_equal(union > 0, result.mask)
        one, other = (np.zeros((160, 160), dtype=bool) for _ in range(2))
        for whole, (_, top, left, shape) in zip((one, other), result.defects):
            whole[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
        assert ndimage.distance_transform_edt(~one)[other].min() > GAP * 160
    assert placed >= 6


def test_a_mask_is_a_function_of_the_seed(shapes, nut):
    source = PlacedShapes(shapes)
    first, again, other = (source(nut, seed, None, None).mask for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_given_areas_go_before_what_is_found(references, nut):
    corner = np.zeros((160, 160), dtype=bool)
    corner[:60, :60] = True
    source = PlacedShapes(procedural_shapes(["blob"]), coverage=1.0)
    assert not (source(nut, 3, corner, None).mask & ~corner).any()
    everywhere = PlacedShapes(procedural_shapes(["blob"]), None)
    off = [(everywhere(nut, seed, None, None).mask & ~find_foreground(nut)).any() for seed in range(8)]
    assert any(off)
    mine = PlacedShapes(procedural_shapes(["blob"]), lambda image: corner, coverage=1.0)
    assert not (mine(nut, 3, None, None).mask & ~corner).any()


def test_no_place_is_a_value(nut):
    tiny = np.zeros((160, 160), dtype=bool)
    tiny[80:82, 80:82] = True
    assert PlacedShapes(procedural_shapes(["box"]))(nut, 0, None, tiny) is None
    assert PlacedShapes(procedural_shapes(["box"]))(nut, 0, None, tiny & False) is None
    assert PlacedShapes(procedural_shapes(["blob"]), number=60)(nut, 0, None, None) is None  # not so many fit


def test_references_keep_their_share_of_the_image(references):
    sample_shape = reference_shapes(references[:1], 180)
    for size in ((60, 60), (120, 120), (480, 240)):
        areas = [shape.sum() for name, shape in (sample_shape(rng(i), size) for i in range(60)) if "+" not in name]
        relative = np.array(areas) / np.prod(size) / references[0].pixels.mean()
        assert SCALES[0] ** 2 * 0.9 < relative.min() and relative.max() < SCALES[1] ** 2 * 1.15
    names = [sample_shape(rng(i), (60, 60))[0] for i in range(100)]
    assert set(names) == {"hole", "hole + hole"} and names.count("hole") > 70


def test_held_out_masks_are_taken_as_they_are_and_the_leak_is_named(references, nut, caplog):
    source = held_out_source(references)
    assert "has seen the shapes and positions of the defects it is tested on" in caplog.text
    assert source(nut, 0) is None  # none of its size
    image = nut.resize((120, 120))
    taken = [source(image, seed) for seed in range(10)]
    assert {placed.defects[0].name for placed in taken} == {"hole", "crack"}
    pixels = {mask.name: mask.pixels for mask in references}
    assert all(np.array_equal(placed.mask, pixels[placed.defects[0].name]) for placed in taken)


def test_masks_of_a_dataset(tmp_path):
    def load(data, split, defect, held_out=False) -> list[NamedMask]:
        return load_masks(load_mask_rows(data, None, split, defect, held_out))

    data = make_mvtec(tmp_path / "nut", {"hole": 4, "scratch": 2})
    names = [mask.name for mask in load(data, "auto", "hole")]
    assert names == ["test/hole/000.png", "test/hole/001.png"]
    assert len(load(data, "auto", None)) == 3
    held_out = load(data, "auto", "hole", True)
    assert [mask.name for mask in held_out] == ["test/hole/002.png", "test/hole/003.png"]
    written = Image.open(data / "ground_truth/hole/002_mask.png")
    assert np.array_equal(held_out[0].pixels, np.asarray(written) > 0)
    with pytest.raises(InputError, match="DF341 .*no held-out mask of 'hole' with --split all"):
        load(data, "all", "hole", True)
    with pytest.raises(InputError, match="DF162 .*Did you mean 'hole'"):
        load(data, "auto", "hle")
    Image.new("L", (48, 48)).save(data / "ground_truth/hole/000_mask.png")
    with pytest.raises(InputError, match="DF145"):
        load(data, "auto", "hole")


# Places like the references'


def disc(size: int = 160) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.hypot(y, x) < 0.42 * size


def plate(size: int = 160) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[size // 8 : -size // 8, size // 5 : -size // 5] = True
    return mask


def ellipse(size: int, centre: tuple[float, float], angle: float, length: float, width: float) -> np.ndarray:
    """An (H, W) mask; `angle` in degrees counter-clockwise, `centre` (y, x) and half axes in pixels."""
    y, x = np.mgrid[:size, :size]
    y, x = centre[0] - y, x - centre[1]
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return ((x * cosine + y * sine) / length) ** 2 + ((y * cosine - x * sine) / width) ** 2 < 1


def breaks_of_a_disc(angles, half_axes=(16, 7), turn: float = 90) -> list[np.ndarray]:
    """Halves of ellipses at its border, at these angles in degrees: along the border, or `turn` from its normal."""
    radius, masks = 0.42 * 160, []
    for angle in angles:
        centre = 79.5 - radius * np.sin(np.radians(angle)), 79.5 + radius * np.cos(np.radians(angle))
        masks.append(ellipse(160, centre, angle + turn, *half_axes) & disc())
    return masks


def measured(masks, part) -> list:
    return [reference_location(mask, part, rng(i)) for i, mask in enumerate(masks)]


def placed_like(masks, part, number: int = 24, **options) -> np.ndarray:
    """The (number, 6) locations of masks placed on a part like these references."""
    values = np.array([reference.values for reference in measured(masks, part)])
    shapes = reference_shapes([NamedMask(str(i), mask) for i, mask in enumerate(masks)], 180)
    source = PlacedShapes(shapes, None, like_references=LikeReferences(values), **options)
    found = []
    for seed in range(number):
        [(_, top, left, shape)] = source(Image.new("RGB", part.shape[::-1]), seed, part, None).defects
        found.append(locate(shape, np.array([[top, left]]), map_object(part))[1][0])
    return np.array(found)


def apart(first, second) -> np.ndarray:
    """The angles between axes given as twice their angle in radians, in degrees."""
    return np.degrees(abs(np.angle(np.exp(1j * (first - second))))) / 2


def test_a_location_is_measured():
    part = plate()  # rows 20-139, columns 32-127
    size = np.sqrt(120 * 96)
    bar = np.ones((4, 30), dtype=bool)
    places = np.array([[20, 40], [24, 60], [78, 65]])
    _, found = locate(bar, places, map_object(part))
    assert np.allclose(found[:, CLEARANCE], [0, 4 / size, 33 / size])
    assert np.allclose(found[:, X], [(55 - 32) / 96, (75 - 32) / 96, 0.5])
    assert np.allclose(found[:, Y], [2 / 120, 6 / 120, 0.5])
    assert found[0, CONTACT] > 0.7 and (found[1:, CONTACT] == 0).all()
    assert (apart(found[:, TO_PART], 0) < 1e-6).all()  # the plate is not long: against the rows
    assert (apart(found[:2, TO_BORDER], 0) < 8).all()
    _, [upright] = locate(bar.T, np.array([[60, 32]]), map_object(part))
    assert upright[CLEARANCE] == 0 and apart(upright[TO_BORDER], 0) < 8 and apart(upright[TO_PART], np.pi) < 1e-6
    _, [spot] = locate(np.ones((5, 5), dtype=bool), np.array([[70, 80]]), map_object(part))
    assert np.isnan(spot[[TO_BORDER, TO_PART]]).all()  # a spot has no direction
    kept, _ = locate(bar, np.array([[0, 40], [18, 40], [20, 110], [50, 50]]), map_object(part), coverage=0.9)
    assert kept.tolist() == [[50, 50]]


def test_locations_do_not_depend_on_the_images_size():
    [small], [large] = (
        measured([np.kron(mask, np.ones((k, k))) > 0], np.kron(disc(), np.ones((k, k))) > 0)
        for k in (1, 5)
        for mask in breaks_of_a_disc([200])
    )
    assert np.allclose(small.values[: Y + 1], large.values[: Y + 1], atol=0.06)
    assert (apart(small.values[TO_BORDER:], large.values[TO_BORDER:]) < 10).all()  # to the nearest pixel


def test_breaks_at_the_left_edge_come_out_there_and_along_the_edge():
    masks, part = breaks_of_a_disc([150, 170, 185, 200, 210]), disc()
    placement, reason = choose_placement([reference_location(m, part & ~m, rng(1)) for m in masks], rng())
    assert placement == "like_references" and "5 references is not random (p = " in reason
    found = placed_like(masks, part)
    assert (found[:, CLEARANCE] < 0.015).all() and found[:, CLEARANCE].mean() < 0.004
    assert (found[:, X] < 0.35).all() and np.nanmax(apart(found[:, TO_BORDER], 0)) < 40
    assert found[:, CONTACT].mean() > 0.4  # the flat side outwards


def test_cracks_from_the_border_inwards_stay_against_it():
    masks = breaks_of_a_disc([0, 60, 130, 190, 250, 310], half_axes=(30, 5), turn=0)
    found = placed_like(masks, disc())
    assert (found[:, CLEARANCE] < 0.015).all() and np.nanmedian(apart(found[:, TO_BORDER], np.pi)) < 12
    assert np.ptp(found[:, X]) > 0.5 and np.ptp(found[:, Y]) > 0.5  # all around


def test_marks_in_the_centre_stay_central():
    centres = [(80, 80), (76, 84), (84, 78), (79, 74), (82, 85)]
    masks, part = [ellipse(160, centre, 40 * i, 8, 8) for i, centre in enumerate(centres)], plate()
    assert choose_placement(measured(masks, part), rng())[0] == "like_references"
    found = placed_like(masks, part)
    assert (abs(found[:, [X, Y]] - 0.5) < 0.3).all() and (abs(found[:, [X, Y]] - 0.5).mean(axis=0) < 0.12).all()
    assert (found[:, CLEARANCE] > 0.2).all()


def test_lines_of_one_direction_keep_it_wherever_they_are():
    part = np.ones((120, 200), dtype=bool)
    masks = []
    for i in range(10):
        mask = np.zeros(part.shape, dtype=bool)
        top, left = rng(i, 1).integers((5, 5), (110, 160))
        mask[top : top + 3, left : left + 30] = True
        masks.append(mask)
    placement, reason = choose_placement(measured(masks, part), rng())
    assert placement == "like_references" and reason.startswith("direction on the object")
    found = placed_like(masks, part)
    assert np.nanmedian(apart(found[:, TO_PART], 0)) < 12 and np.ptp(found[:, X]) > 0.6


def test_uniform_places_are_not_taken_for_a_habit(monkeypatch):
    """One in a hundred sets of random places may be; and few references say nothing."""
    monkeypatch.setattr(locations, "DRAWS", 999)
    part = plate()
    source = PlacedShapes(reference_shapes([NamedMask("spot", ellipse(160, (80, 80), 0, 14, 7))], 180), None)
    image = Image.new("RGB", (160, 160))
    taken_for = []
    for trial in range(15):
        masks = [source(image, 10 * trial + i, part, None).mask for i in range(6)]
        taken_for.append(choose_placement(measured(masks, part), rng(trial))[0])
    assert taken_for.count("like_references") <= 1
    few = choose_placement(measured(breaks_of_a_disc([170, 180, 190]), disc()), rng())
    assert few == ("anywhere", "fewer than 4 references (3)")


def test_a_wide_reference_that_fits_nowhere_else_says_nothing():
    part = plate()
    whole = np.roll(plate(), 1, axis=0) & part
    assert choose_placement(measured([whole] * 6, part), rng())[0] == "anywhere"


def test_the_width_of_the_kernel_shrinks_slowly():
    location = measured(breaks_of_a_disc([180]), disc())[0].values
    widths = [LikeReferences(np.array([location] * n)).widths[X] for n in (1, 4, 16, 64)]
    assert widths[0] == pytest.approx(0.29)
    assert all(0.25 < after / before < 0.5 for before, after in zip(widths, widths[1:]))


def test_like_references_keeps_to_roi_coverage_and_gaps_and_is_seeded(caplog):
    masks, part = breaks_of_a_disc([150, 180, 210]), disc()
    like = LikeReferences(np.array([reference.values for reference in measured(masks, part)]))
    shapes = reference_shapes([NamedMask("break", mask) for mask in masks], 180)
    source = PlacedShapes(shapes, None, coverage=1.0, number=2, like_references=like)
    image, roi = Image.new("RGB", (160, 160)), np.zeros((160, 160), dtype=bool)
    roi[:80] = True
    for seed in range(6):
        first, again = (source(image, seed, part, roi) for _ in range(2))
        assert np.array_equal(first.mask, again.mask) and not (first.mask & ~(part & roi)).any()
        assert count_components(first.mask) >= 2 and len(first.defects) == 2
    assert not np.array_equal(source(image, 1, part, roi).mask, source(image, 2, part, roi).mask)
    assert "no such place" not in caplog.text
    far = np.zeros((160, 160), dtype=bool)
    far[50:110, 90:140] = True  # inside, on the right
    placement._warn_once.cache_clear()
    for seed in range(3):
        placed = PlacedShapes(shapes, None, like_references=like)(image, seed, part, far)
        assert placed.mask.any() and (placed.mask & ~far).sum() <= 0.01 * placed.mask.sum()
    assert caplog.text.count("like_references: no such place in some images; there, masks go anywhere") == 1
    none = np.zeros((160, 160), dtype=bool)
    assert PlacedShapes(shapes, None, like_references=like)(image, 0, part, none) is None


# The commands

FAST = ["--num_inference_steps", 1, "--num_candidates", 1, "--selection", "none"]


@pytest.fixture
def folder(tmp_path):
    """Good images of two sizes, each a plain ground with a part; a dataset of 48 px; an ROI for each image."""
    for i, size in enumerate((48, 70, 48)):
        part = np.zeros((size, size), dtype=bool)
        part[size // 6 : -size // 6, size // 6 : -size // 6] = True
        write_image(tmp_path / "good" / f"{i:03d}.png", size, (250, 220, 90), part, seed=3)
        roi = np.zeros((size, size), dtype=bool)
        roi[:, size // 2 :] = True
        (tmp_path / "rois").mkdir(exist_ok=True)
        Image.fromarray(roi).convert("L").save(tmp_path / "rois" / f"{i:03d}.png")
    make_mvtec(tmp_path / "data/nut", {"hole": 4})
    make_mvtec(tmp_path / "data/bolt", {"hole": 4})
    return tmp_path


def masks_of(out) -> dict[str, np.ndarray]:
    return {file.stem: np.asarray(Image.open(file)) > 0 for file in sorted((out / "masks").glob("*.png"))}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["references", "procedural"])
def test_placed_masks_through_the_command(trained, folder, source):
    argv = ["--lora", trained, "--image", folder / "good", "--mask_source", source, *FAST, "--masks_per_image", 2]
    argv += ["--roi", folder / "rois", "--coverage", 1]
    argv += ["--reference_data", folder / "data/nut"] if source == "references" else ["--shapes", "blob", "scratch"]
    for run, seed in (("a", 0), ("again", 0), ("other", 1)):
        generate(*argv, "--output_dir", folder / run, "--seed", seed)
    lines, masks = read_lines(folder / "a/manifest.jsonl"), masks_of(folder / "a")
    assert list(masks) == ["000", "001", "002"]
    for line in lines:
        good, mask = Image.open(folder / "good" / line["good_image"]), masks[line["name"]]
        roi = np.asarray(Image.open(folder / "rois" / line["good_image"])) > 0
        assert mask.any() and not (mask & ~(find_foreground(good) & roi)).any()
        kinds = {"blob", "scratch"} if source == "procedural" else {"test/hole/000.png", "test/hole/001.png"}
        assert len(line["mask_parts"]) == 2 and count_components(mask) == 2
        assert {name for part in line["mask_parts"] for name in part["from"].split(" + ")} <= kinds
        painted = np.asarray(Image.open(folder / "a" / line["image"]))
        assert np.array_equal(painted[~mask], np.asarray(good)[~mask])
    again, other = masks_of(folder / "again"), masks_of(folder / "other")
    assert all(np.array_equal(masks[k], again[k]) and not np.array_equal(masks[k], other[k]) for k in masks)
    assert not np.array_equal(masks["000"], masks["002"])  # another image, another mask
    settings = json.loads((folder / "a/plan.jsonl").read_text().splitlines()[0])
    assert settings["coverage"] == 1 and settings["foreground"] == "auto" and settings["masks_per_image"] == 2
    assert settings["zone"] is True and settings["given_zone_sha256"]  # plans of earlier versions go on


@pytest.fixture
def edge_folder(folder):
    """A dataset whose eight masks all lie at the left edge of the image, along it."""
    root = folder / "edge/nut"
    for i in range(8):
        mask = np.zeros((48, 48), dtype=bool)
        top = int(rng(i, 2).integers(2, 30))
        mask[top : top + 14, :5] = True
        write_image(root / f"test/hole/{i:03d}.png", mask=mask, colour=(20, 20, 20))
        (root / "ground_truth/hole").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).convert("L").save(root / f"ground_truth/hole/{i:03d}_mask.png")
    for i in range(3):
        write_image(root / f"train/good/{i:03d}.png")
    return folder


@pytest.mark.parametrize("source", ["references", "procedural"])
def test_the_command_places_like_the_references_if_they_say_so(trained, edge_folder, source, caplog):
    argv = ["--lora", trained, "--image", edge_folder / "edge/nut/train/good", "--mask_source", source, *FAST]
    argv += ["--output_dir", edge_folder / "auto", *(["--shapes", "stroke"] if source == "procedural" else [])]
    of_data = ["--reference_data", edge_folder / "edge/nut", "--split", "all"]
    generate(*argv, *of_data)
    [plan, *_] = read_lines(edge_folder / "auto/plan.jsonl")
    assert plan["placement"] == "like_references" and "8 references is not random" in plan["placement_reason"]
    assert f"--placement auto for 'hole': like_references; {plan['placement_reason']}" in caplog.text
    masks = masks_of(edge_folder / "auto").values()
    assert all(mask[:, :12].any() and not mask[:, 24:].any() for mask in masks)
    generate(*argv, *of_data, "--placement", "like_references")  # the same
    with pytest.raises(InputError, match=r"DF320 placement: .*'like_references', now it is 'anywhere'"):
        generate(*argv, *(of_data if source == "references" else []), "--placement", "anywhere")


def test_a_plan_made_without_the_flag_means_anywhere(trained, edge_folder):
    argv = ["--lora", trained, "--image", edge_folder / "edge/nut/train/good", "--split", "all", *FAST]
    argv += ["--reference_data", edge_folder / "edge/nut", "--output_dir", edge_folder / "old"]
    generate(*argv, "--placement", "anywhere")
    before = masks_of(edge_folder / "old")
    plan = edge_folder / "old/plan.jsonl"
    lines = [{k: v for k, v in line.items() if k != "placement"} for line in read_lines(plan)]
    plan.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"DF320 placement: .*'anywhere', now .*'like_references'.*--placement any"):
        generate(*argv)
    (edge_folder / "old/masks/001.png").unlink()
    generate(*argv, "--placement", "anywhere", "--num_images", 4)
    after = masks_of(edge_folder / "old")
    assert len(after) == 4 and all(np.array_equal(before[name], after[name]) for name in before if name in after)


def test_other_reference_images_are_noticed(trained, edge_folder):
    """The object in them decides places, so it stands in the plan."""
    argv = ["--lora", trained, "--image", edge_folder / "good", "--split", "all", *FAST]
    argv += ["--reference_data", edge_folder / "edge/nut", "--output_dir", edge_folder / "out"]
    generate(*argv, "--placement", "like_references")
    part = np.zeros((48, 48), dtype=bool)
    part[8:-8, 8:-8] = True
    for file in (edge_folder / "edge/nut/test/hole").iterdir():
        write_image(file, 48, (250, 220, 90), part)
    with pytest.raises(InputError, match="DF320 reference_places_sha256"):
        generate(*argv, "--placement", "like_references")


def test_held_out_masks_through_the_command(trained, folder, caplog):
    """The image of another size than the masks' gets none."""
    argv = ["--image", folder / "good", "--mask_source", "held_out", "--reference_data", folder / "data"]
    with pytest.raises(SystemExit) as ended:
        generate("--lora", trained, *argv, "--object", "nut", "--output_dir", folder / "out", *FAST)
    assert ended.value.code == "Not generated:\nDF340 001.png: no room for its mask"
    assert "has seen the shapes and positions" in caplog.text
    held_out = [np.asarray(Image.open(folder / f"data/nut/ground_truth/hole/{i:03d}_mask.png")) > 0 for i in (2, 3)]
    masks = masks_of(folder / "out")
    assert list(masks) == ["000", "002"] and all(any(np.array_equal(m, h) for h in held_out) for m in masks.values())
    assert Image.open(folder / "out/contact_sheet.png").height == 2 * (page.CELL + 24)


def test_images_without_a_place_are_listed_and_the_rest_goes_on(trained, folder, capsys):
    roi = np.zeros((48, 48), dtype=np.uint8)
    roi[20, 20] = 255
    Image.fromarray(roi).save(folder / "rois/000.png")
    argv = ["--lora", trained, "--image", folder / "good", "--mask_source", "procedural", "--roi", folder / "rois"]
    argv += ["--shapes", "box", *FAST]
    for _ in range(2):  # the second run does it no differently
        with pytest.raises(SystemExit) as ended:
            generate(*argv, "--output_dir", folder / "out")
        assert ended.value.code == "Not generated:\nDF340 000.png: no room for its mask"
        assert [line["name"] for line in read_lines(folder / "out/manifest.jsonl")] == ["001", "002"]
        assert capsys.readouterr().out.startswith("2 images in ")
    with pytest.raises(SystemExit, match="DF340 000.png"):
        generate(*argv[:2], "--image", folder / "good/000.png", *argv[4:], "--output_dir", folder / "none")
    assert not (folder / "none/contact_sheet.png").exists()


def test_other_masks_or_areas_are_noticed(trained, folder):
    argv = ["--lora", trained, "--image", folder / "good", "--mask_source", "references", *FAST]
    argv += ["--reference_data", folder / "data/nut", "--foreground", folder / "rois", "--output_dir", folder / "out"]
    generate(*argv)
    with pytest.raises(InputError, match="DF320 max_rotation"):
        generate(*argv, "--max_rotation", 10)
    Image.new("L", (48, 48), 255).save(folder / "rois/002.png")
    with pytest.raises(InputError, match="DF320 002: was generated from another image or mask"):
        generate(*argv)
    write_mask = Image.open(folder / "data/nut/ground_truth/hole/002_mask.png")
    write_mask.save(folder / "data/nut/ground_truth/hole/001_mask.png")
    with pytest.raises(InputError, match="DF320 reference_masks_sha256"):
        generate(*argv)


@pytest.mark.parametrize("flag", ["--foreground", "--roi"])
def test_bad_areas_are_refused(trained, folder, monkeypatch, flag):
    monkeypatch.setattr(g, "load_pipeline", None)
    argv = ["--lora", trained, "--image", folder / "good", "--mask_source", "procedural", *FAST]
    argv += [flag, folder / "rois", "--output_dir", folder / "out"]
    Image.new("L", (48, 48)).save(folder / "rois/000.png")
    with pytest.raises(InputError, match=f"DF145 .*good/000.png: its {flag[2:]} is empty"):
        generate(*argv)
    Image.new("L", (20, 48), 255).save(folder / "rois/000.png")
    with pytest.raises(InputError, match=f"DF140 .*48x48, its {flag[2:]} 20x48"):
        generate(*argv)
    (folder / "rois/000.png").write_text("no image")
    with pytest.raises(
        InputError,
        match=f"DF103 .*000.png: its {flag[2:]} cannot be read: .*rois/000.png: it is not an",
    ):
        generate(*argv)
    (folder / "rois/000.png").rename(folder / "rois/009.png")
    with pytest.raises(InputError, match=rf"DF142 .*000.png.* \({flag} ") as caught:
        generate(*argv)
    assert "DF143" not in str(caught.value)  # an area without an image does no harm
    with pytest.raises(InputError, match=f"DF160 {flag}"):
        generate(*argv, flag, folder / "nowhere")
    with pytest.raises(InputError, match="DF192"):
        (folder / "out/masks").mkdir(parents=True)
        Image.new("L", (48, 48), 255).save(folder / "out/masks/roi.png")
        generate(*argv, "--image", folder / "good/000.png", flag, folder / "out/masks/roi.png")


def test_one_roi_serves_images_of_its_size(trained, folder):
    (folder / "good/001.png").unlink()
    argv = ["--image", folder / "good", "--mask_source", "procedural", "--roi", folder / "rois/000.png"]
    generate("--lora", trained, *argv, "--foreground", "none", "--output_dir", folder / "out", *FAST)
    assert all((mask[:, 24:].sum() >= 0.99 * mask.sum() > 0) for mask in masks_of(folder / "out").values())


def test_the_old_name_of_the_roi_is_read(folder):
    """--zone, and "zone" in a line of --cases; `null` there takes the command's away."""
    images, first, second = folder / "good", folder / "rois/000.png", folder / "rois/002.png"
    lines = [{}, {"roi": str(second)}, {"zone": str(second)}, {"roi": None}, {"zone": None}]
    (folder / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("--roi", "--zone"):
        argv = ["--image", images, "--mask_source", "procedural", name, first]
        assert preview_masks.parse_args([str(a) for a in [*argv, "--output", folder / "x.png"]]).roi == first
        argv += ["--lora", "l", "--output_dir", folder / "out", "--cases", folder / "cases.jsonl"]
        requests = g.parse_args([str(a) for a in argv]).requests
        assert [request.roi for request in requests] == [first, second, second, None, None]


@pytest.mark.parametrize(
    "wrong",
    [
        "--mask_source references",
        "--mask_source held_out",
        "--mask_source procedural --reference_data d --placement anywhere",
        "--mask_source random --reference_data d",
        "--mask m --placement anywhere",
        "--mask_source procedural --placement like_references",
        "--mask_source procedural --reference_data d --placement like_surroundings",
        "--mask_source held_out --reference_data d --placement like_surroundings",
        "--mask_source held_out --reference_data d --placement like_references",
        "--mask_source procedural --mask m",
        "--mask m --roi z",
        "--mask_source random --masks_per_image 2",
        "--mask_source held_out --reference_data d --coverage 0.5",
        "--mask_source held_out --reference_data d --foreground none",
        "--mask_source procedural --split all",
        "--mask_source procedural --object nut",
        "--mask_source procedural --max_rotation 5",
        "--mask_source references --reference_data d --shapes box",
        "--mask_source procedural --coverage 0",
        "--mask_source procedural --coverage nan",
        "--mask_source procedural --masks_per_image 0",
        "--mask_source references --reference_data d --max_rotation 200",
    ],
)
def test_flags_that_contradict(wrong):
    for parse, argv in ((g.parse_args, "--lora l --output_dir o"), (preview_masks.parse_args, "--output p")):
        with pytest.raises(SystemExit) as ended:
            parse([*argv.split(), "--image", "i", *wrong.split()])
        assert ended.value.code == 2


def preview(*argv) -> None:
    preview_masks.main(preview_masks.parse_args([str(a) for a in argv]))


@pytest.mark.parametrize("placement", ["anywhere", "like_references"])
def test_the_preview_shows_the_masks_of_the_command(trained, folder, capsys, monkeypatch, placement):
    common = ["--image", folder / "good", "--mask_source", "references", "--reference_data", folder / "data/nut"]
    common += ["--max_rotation", 20, "--placement", placement]
    generate("--lora", trained, *common, "--num_images", 6, "--output_dir", folder / "out", *FAST)
    shown, outlined = [], preview_masks.outlined
    monkeypatch.setattr(preview_masks, "outlined", lambda i, areas: (shown.append(areas[-1]), outlined(i, areas))[1])
    capsys.readouterr()
    preview(*common, "--defect", "hole", "--number", 6, "--output", folder / "new/masks.png")
    lines = read_lines(folder / "out/manifest.jsonl")
    expected = [np.asarray(Image.open(folder / "out" / line["mask"])) > 0 for line in lines]
    drawn = [area for area, colour in shown if colour == preview_masks.RED]
    assert len(drawn) == 6 and all(np.array_equal(a, b) for a, b in zip(drawn, expected))
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("drawn: 6 masks, area ") and told[3].startswith("references: 2 masks, area ")
    assert told[2].startswith("distance to the border: ") and told[4].startswith("their distance to the border: ")
    shares = [(find_foreground(Image.open(folder / f"good/{i % 3:03d}.png")) & m).sum() / m.sum() for i, m in
              enumerate(expected)]  # fmt: skip
    assert (
        told[1]
        == f"on the object: {100 * np.mean(shares):.2f} % of a mask's pixels, {100 * min(shares):.2f} % at least"
    )
    both = np.asarray(Image.open(folder / "new/masks.png"))
    assert both.shape == (2 * (preview_masks.CELL + 8), 6 * (preview_masks.CELL + 4) + 4, 3)
    above, picture = np.split(both, 2)  # two references, six masks
    for i in range(2):
        assert (above[:, i * 196 : (i + 1) * 196] == preview_masks.GREEN).all(-1).any()
    for i in range(6):
        cell = picture[:, i * (preview_masks.CELL + 4) : (i + 1) * (preview_masks.CELL + 4)]
        assert (cell == preview_masks.RED).all(-1).any() and (cell == preview_masks.BLUE).all(-1).any()


def test_the_preview_of_given_and_random_masks_and_without_a_place(folder, capsys):
    preview("--image", folder / "good", "--mask", folder / "rois", "--output", folder / "given.png")
    preview("--image", folder / "good", "--mask_source", "random", "--output", folder / "random.png", "--shown", 2)
    assert Image.open(folder / "random.png").width == 2 * (preview_masks.CELL + 4) + 4
    told = capsys.readouterr().out
    assert told.count("drawn: 3 masks, area") == 2 and "area 50.000 | 50.000 | 50.000 %" in told
    argv = ["--image", folder / "good", "--mask_source", "held_out", "--reference_data", folder / "data/bolt"]
    with pytest.raises(SystemExit, match="Without a mask, 2 of 6:\nDF340 001.png, image 1.*\nDF340 001.png, image 2"):
        preview(*argv, "--number", 6, "--output", folder / "held_out.png")
    with pytest.raises(SystemExit) as ended:
        preview(*argv, "--number", 0, "--output", folder / "held_out.png")
    assert ended.value.code == 2


def test_the_random_source_is_random_mask_as_it_was():
    placed = random_source(Image.new("RGB", (50, 40)), 5)
    assert placed.mask.shape == (40, 50) and placed.defects == []
    rows, columns = np.nonzero(placed.mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (21, 27, 39, 47)


def test_cut_out_is_the_bounding_box():
    mask = np.zeros((9, 12), dtype=bool)
    mask[3, 4] = mask[6, 2] = True
    assert cut_out(mask).shape == (4, 3) and cut_out(mask).sum() == 2
