"""Layouts, splits, the datasets builder, prompts, masks and the training stream."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import COLOURS, write_image, write_mask
from folders import make_mvtec, make_seed_layout
from PIL import Image
from toy_model import make_samples

from defectfill.drawn.small_base import WORDS
from defectfill.random_base import make_tokenizer
from defectfill_dataset import (
    DefectPairs,
    InputError,
    binarise,
    boxes_mask,
    build_prompts,
    builder,
    check_pairs,
    data_digest,
    find_objects,
    is_grey,
    load_defect_pairs,
    load_image,
    load_prepared,
    pool_mask,
    random_boxes,
    random_mask,
    sampling_schedule,
    select_defects,
    split_names,
    tokenize_prompts,
    two_tones,
    upsample_mask,
)
from defectfill_dataset import samples as samples_module
from defectfill_dataset.splits import split_rows


def problems(call, *args, **kwargs) -> list[str]:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    return str(caught.value).splitlines()


# Layouts and splits


def test_mvtec_layout_and_the_first_third(tmp_path):
    """One test image per defect in training."""
    make_mvtec(tmp_path / "nut", {"hole": 4, "scratch": 6})
    write_image(tmp_path / "nut/test/good/100.png")
    data = load_defect_pairs(tmp_path / "nut")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 2 + 2, "test": 2 + 4, "good": 4}
    assert data["train"]["source_file"] == [f"test/{d}/00{i}.png" for d in ("hole", "scratch") for i in (0, 1)]
    assert not set(data["train"]["source_file"]) & set(data["test"]["source_file"])
    assert set(data["train"]["object"]) == {"nut"}
    assert data["good"]["defect"] == ["good"] * 4 and data["good"][0]["mask"] is None


def test_seed_layout_keeps_its_own_split(tmp_path):
    data = load_defect_pairs(make_seed_layout(tmp_path / "nut", {"hole": 4}))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 4, "good": 3}
    data = load_defect_pairs(tmp_path / "nut", split="first_third")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 2, "test": 2, "good": 3}


def test_each_row_pairs_an_image_with_its_own_mask(tmp_path):
    make_mvtec(tmp_path / "nut", {"hole": 3, "stain": 3})
    for row in load_defect_pairs(tmp_path / "nut", split="all")["train"]:
        painted = np.abs(np.asarray(row["image"]).astype(int) - COLOURS[row["defect"]]).sum(axis=-1) == 0
        assert np.array_equal(painted, binarise(row["mask"]))


def test_split_rules_and_files(tmp_path, data):
    assert set(load_defect_pairs(data, split="all")) == {"train", "good"}
    first = load_defect_pairs(data)
    (tmp_path / "split.json").write_text(json.dumps(split_names(first)))
    assert (
        load_defect_pairs(data, split=str(tmp_path / "split.json"))["train"]["source_file"]
        == first["train"]["source_file"]
    )
    names = json.loads((tmp_path / "split.json").read_text())
    swapped = tmp_path / "swapped.json"
    swapped.write_text(json.dumps({"train": names["test"], "test": names["train"]}))
    assert load_defect_pairs(data, split=str(swapped))["train"]["source_file"] == names["test"]


def test_wrong_split_files_are_told_in_full(tmp_path, data):
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"train": ["test/hole/000.png", "test/hole/9.png"], "test": ["test/hole/000.png"]}))
    told = problems(load_defect_pairs, data, split=str(file))
    assert len(told) == 5 and all(line.startswith("DF165") for line in told)  # unknown, twice, three unassigned
    assert "neither a rule" in problems(load_defect_pairs, data, split="frist_third")[0]
    file.write_text("{]")
    assert "neither a rule" in problems(load_defect_pairs, data, split=str(file))[0]


def test_objects_are_found_at_or_below_the_root(tmp_path):
    make_mvtec(tmp_path / "nut"), make_seed_layout(tmp_path / "plate")
    assert list(find_objects(tmp_path)) == ["nut", "plate"]
    assert list(find_objects(tmp_path / "nut")) == ["nut"]
    assert load_defect_pairs(tmp_path, "plate")["train"]["object"][0] == "plate"
    assert "choose one with --object: nut, plate" in problems(load_defect_pairs, tmp_path)[0]
    assert "Did you mean 'plate'?" in problems(load_defect_pairs, tmp_path, "palte")[0]


def test_a_folder_without_a_layout_is_explained(tmp_path, data):
    assert problems(find_objects, tmp_path / "nowhere")[0].startswith("DF160")
    leaf = problems(find_objects, data / "test" / "hole")[0]
    assert leaf.startswith("DF161") and f"'{data}' looks right" in leaf
    (tmp_path / "empty").mkdir()
    assert "Found: nothing" in problems(find_objects, tmp_path / "empty")[0]


def test_masks_are_paired_by_name_and_every_misfit_is_told(tmp_path, data):
    (data / "ground_truth/hole/001_mask.png").rename(data / "ground_truth/hole/007_mask.png")
    shutil.copy(data / "test/hole/002.png", data / "test/hole/002.jpg")
    write_image(data / "test/._000.png")
    (data / "test/hole/Thumbs.db").write_text("")
    told = problems(load_defect_pairs, data)
    assert [line[:5] for line in told] == ["DF143", "DF142", "DF144", "DF109"]
    assert "007_mask.png" in told[0] and "001.png" in told[1] and "002.jpg" in told[2]


def test_upper_case_extensions_and_plain_mask_names(tmp_path):
    mask = write_mask(tmp_path / "nut/ground_truth/hole/a.PNG")
    write_image(tmp_path / "nut/test/hole/a.JPG", mask=mask)
    assert len(load_defect_pairs(tmp_path / "nut")["train"]) == 1


def test_only_good_images(tmp_path):
    make_mvtec(tmp_path / "nut", good=2)
    shutil.rmtree(tmp_path / "nut/test"), shutil.rmtree(tmp_path / "nut/ground_truth/hole")
    assert problems(load_defect_pairs, tmp_path / "nut")[0].startswith("DF163")


# The builder and its cache


@pytest.mark.parametrize("change", ["edit image", "edit mask", "add", "remove"])
def test_changed_files_are_noticed(data, change):
    before = data_digest(load_defect_pairs(data, split="all")["train"])
    if change == "edit image":
        Image.new("RGB", (48, 48), "white").save(data / "test/hole/000.png")
    elif change == "edit mask":
        Image.fromarray(~np.asarray(Image.open(data / "ground_truth/hole/000_mask.png"))).save(
            data / "ground_truth/hole/000_mask.png"
        )
    elif change == "add":
        write_image(data / "test/hole/009.png", mask=write_mask(data / "ground_truth/hole/009_mask.png"))
    else:
        (data / "test/hole/000.png").unlink(), (data / "ground_truth/hole/000_mask.png").unlink()
    after = load_defect_pairs(data, split="all")["train"]
    assert data_digest(after) != before
    assert len(after) == 4 + {"add": 1, "remove": -1}.get(change, 0)


def test_digest_follows_content_not_place(tmp_path, data):
    shutil.copytree(data, tmp_path / "elsewhere" / "nut")
    first, second = (load_defect_pairs(root)["train"] for root in (data, tmp_path / "elsewhere" / "nut"))
    assert data_digest(first) == data_digest(second)
    Image.new("RGB", (48, 48)).save(data / "test/hole/000.png")
    assert data_digest(load_defect_pairs(data)["train"]) != data_digest(second)


def test_a_prepared_parquet_copy_loads_and_is_the_same_data(tmp_path, data):
    original = load_defect_pairs(data)
    digest = data_digest(original["train"])
    builder = DefectPairs(dataset_name="pairs", config_name="nut", data_dir=str(data))
    builder.download_and_prepare(str(tmp_path / "prepared"), file_format="parquet")
    (tmp_path / "parquet/data").mkdir(parents=True)
    for split in original:  # the names that push_to_hub gives
        file = tmp_path / "prepared" / f"pairs-{split}.parquet"
        file.rename(tmp_path / "parquet/data" / f"{split}-00000-of-00001.parquet")
    shutil.rmtree(data)
    prepared = load_prepared(str(tmp_path / "parquet"), None, None)
    assert {split: len(rows) for split, rows in prepared.items()} == {"train": 2, "test": 2, "good": 3}
    assert prepared["train"].features == original["train"].features and data_digest(prepared["train"]) == digest
    check_pairs(prepared["train"])
    assert "Did you mean 'nut'?" in problems(load_prepared, str(tmp_path / "parquet"), None, "nuts")[0]
    assert problems(load_prepared, str(tmp_path / "nothing"), None, None)[0].startswith("DF160")


def test_a_new_split_rule_is_noticed(data, monkeypatch):
    """The cache follows what the split is, not only the files."""
    before = load_defect_pairs(data)["train"]["source_file"]

    def reversed_rule(rows, root, rule):
        splits = split_rows(rows, root, rule)
        return splits | {"train": splits["test"], "test": splits["train"]}

    monkeypatch.setattr(builder, "split_rows", reversed_rule)
    assert not set(load_defect_pairs(data)["train"]["source_file"]) & set(before)


def test_a_split_file_without_references_and_names_that_cannot_be(tmp_path, data):
    file = tmp_path / "split.json"
    names = [f"test/hole/{i:03d}.png" for i in range(4)]
    file.write_text(json.dumps({"train": [], "test": names}))
    assert problems(load_defect_pairs, data, split=str(file))[0].startswith("DF163 --split")
    assert problems(load_defect_pairs, make_mvtec(tmp_path / "nut:1"))[0].startswith("DF162")


def test_select_defects(tmp_path):
    data = load_defect_pairs(make_mvtec(tmp_path / "nut", {"hole": 3, "scratch": 3}))
    chosen = select_defects(data, ["scratch"])
    assert set(chosen["train"]["defect"]) == set(chosen["test"]["defect"]) == {"scratch"} and len(chosen["good"]) == 3
    assert len(select_defects(data, None)["train"]) == 2
    assert "Did you mean 'scratch'?" in problems(select_defects, data, ["scrach"])[0]


def test_pixel_problems_are_told_all_at_once(data):
    Image.new("L", (48, 48)).save(data / "ground_truth/hole/000_mask.png")
    Image.new("L", (48, 48), 255).save(data / "ground_truth/hole/001_mask.png")
    Image.new("L", (40, 48), 255).save(data / "ground_truth/hole/002_mask.png")
    broken = data / "test/hole/003.png"
    broken.write_bytes(broken.read_bytes()[:200])
    told = problems(check_pairs, load_defect_pairs(data, split="all")["train"])
    assert [(line[:5], line.split(":")[0][-7:]) for line in told] == [
        ("DF145", "000.png"), ("DF146", "001.png"), ("DF140", "002.png"), ("DF103", "003.png"),
    ]  # fmt: skip
    assert "48x48, its mask 40x48" in told[2]


# Prompts


def test_the_papers_prompts_for_one_type():
    (pair,) = build_prompts(["hole"], "metal nut").values()
    assert pair.defect.text == "A photo of sks" and pair.object.text == "A metal nut with sks"


def test_several_types_are_named_by_their_words():
    pairs = build_prompts(["hole", "broken_large"], "metal nut")
    assert pairs["broken_large"].object.text == "A metal nut with broken large"
    assert pairs["hole"].defect.text == "A photo of hole"
    told = problems(build_prompts, ["hole", "cut"], "nut", "sks")[0]
    assert told.startswith("DF172") and "{defect}" in told
    assert problems(build_prompts, ["hole"], "nut", None, "A photo")[0].startswith("DF173")


def test_phrase_is_found_by_token_ids_and_its_sub_tokens_averaged():
    """Position guessed from words, first sub-token only; a new token never trained."""
    tokenizer = make_tokenizer(WORDS)
    size = len(tokenizer)
    pairs = build_prompts(["broken_large"], "metal_nut", "[V*] {defect}")
    tokens = tokenize_prompts(tokenizer, pairs.values())
    row = tokens.index[pairs["broken_large"].object]
    ids, weights = tokens.input_ids[row], tokens.phrase_weights[row]
    inside = tokenizer.convert_ids_to_tokens(ids[weights > 0].tolist())
    assert "".join(inside).replace("</w>", " ") == "[ v *] broken large "
    assert weights[weights > 0].tolist() == pytest.approx([1 / len(inside)] * len(inside)) and weights.sum() == 1
    assert len(tokenizer) == size and len(inside) > 3


def test_phrase_position_is_not_confused_by_the_object():
    tokenizer = make_tokenizer(WORDS)
    pairs = build_prompts(["hole"], "hole plate", "hole", object_prompt="A {phrase} in a {object}")
    tokens = tokenize_prompts(tokenizer, pairs.values())
    assert tokens.phrase_weights[tokens.index[pairs["hole"].object]].nonzero().tolist() == [[2]]


def test_prompts_that_do_not_fit_or_glue_the_phrase_are_refused():
    tokenizer = make_tokenizer(WORDS)
    told = problems(tokenize_prompts, tokenizer, build_prompts(["hole"], "nut " * 90).values())[0]
    assert told.startswith("DF174") and "77" in told
    told = problems(
        tokenize_prompts, tokenizer, build_prompts(["hole"], "nut", "o", object_prompt="A ph{phrase}to").values()
    )
    assert told[0].startswith("DF171")


def test_defect_types_that_become_the_same_words_are_refused():
    for names in (["broken-large", "broken_large"], ["Hole", "hole"]):
        told = problems(build_prompts, names, "nut")[0]
        assert told.startswith("DF172") and all(name in told for name in names)


def test_the_object_may_stand_in_the_phrase():
    assert build_prompts(["hole"], "nut", "{object} {defect}")["hole"].defect.text == "A photo of nut hole"


# Images and masks


def test_images_that_rgb_would_falsify_are_refused():
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    for image, words in (
        (Image.fromarray((ramp * 4095).astype(np.uint16)), "brightest value is 4095 of 65535: 12 bits"),
        (Image.fromarray(ramp.astype(np.float32)), "16 bits .*mode F"),
        (Image.fromarray((ramp * 65535).astype(np.int32)), "16 bits .*mode I"),
        (clear, "transparent"),
    ):
        with pytest.raises(ValueError, match=words):
            load_image(image)
    opaque = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    assert load_image(opaque).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_sixteen_bits_are_scaled_by_their_full_range(tmp_path, extension):
    """Pillow's own conversion to RGB makes them white."""
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / f"x.{extension}")
    image = load_image(Image.open(tmp_path / f"x.{extension}"))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image)[..., 0], np.rint(deep / 257))


def test_a_sixteen_bit_big_endian_and_a_turned_image():
    deep = np.full((4, 8), 257 * 9, dtype=np.uint16)
    deep[0] = 257 * 200
    swapped = Image.frombytes("I;16B", (8, 4), deep.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(load_image(swapped))[..., 1], deep // 257)
    turned = Image.fromarray(deep)
    turned.getexif()[0x0112] = 6
    assert load_image(turned).size == (4, 8) and np.array_equal(
        np.asarray(load_image(turned))[..., 0], np.rot90(deep // 257, -1)
    )


@pytest.mark.parametrize(
    ("colours", "tones"),
    [
        ([(9, 9, 9), (3, 3, 3)], (3, 9)),
        ([(0, 0, 0), (255, 0, 0)], None),
        ([(3, 3, 3)], None),
        ([(1, 1, 1), (2, 2, 2), (3, 3, 3)], None),
    ],
)
def test_two_tones_are_two_greys_and_no_more(colours, tones):
    image = Image.new("RGB", (4, 4), colours[0])
    for x, colour in enumerate(colours[1:]):
        image.putpixel((x, 2), colour)
    assert two_tones(image) == tones


def test_an_image_without_colour():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert is_grey(grey)
    grey.putpixel((3, 3), (9, 9, 10))
    assert not is_grey(grey)


def test_masks_of_unclear_coding_are_refused():
    classes = np.zeros((8, 8), dtype=np.uint8)
    classes[2, 2:4] = 1, 3
    palette = Image.fromarray(classes).convert("P")
    palette.putpalette([0, 0, 0, 0, 0, 255, 0, 0, 0, 255, 255, 0])
    hidden = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    for mask, words in (
        (Image.fromarray(classes), "value is 3"),
        (palette, "several palette colours. It holds 0 .62 pixels., 1 .1 pixels., 3"),
        (hidden, "transp"),
    ):
        with pytest.raises(ValueError, match=words):
            binarise(mask)
    two = Image.fromarray((classes > 0).astype(np.uint8)).convert("P")
    two.putpalette([0, 0, 0, 255, 255, 255])
    assert binarise(two).sum() == 2


def test_binarise_reads_both_codings_and_ignores_jpeg_ringing():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:4, 2:4] = 1
    for coded in (mask, mask * 255):
        assert binarise(Image.fromarray(coded)).sum() == 4
        assert binarise(Image.fromarray(coded.astype(np.uint16) * 257 if coded.max() > 1 else coded)).sum() == 4
    assert binarise(Image.fromarray(mask.astype(np.uint16))).sum() == 4
    with pytest.raises(ValueError, match="code it as 0 and 65535"):
        binarise(Image.fromarray(mask.astype(np.uint16) * 255))
    ringing = mask * 250 + 4
    assert binarise(Image.fromarray(ringing)).sum() == 4
    assert binarise(Image.fromarray(mask * 0)).sum() == 0


@pytest.mark.parametrize("offset", range(8))
def test_a_one_pixel_crack_survives_on_the_grid(offset):
    """A small defect vanishes under nearest and its loss is 0/0."""
    mask = np.zeros((64, 64), dtype=bool)
    mask[offset + 8, 8:40] = True
    grid = pool_mask(mask, 8)
    assert grid.shape == (1, 8, 8) and grid.sum() == 4 and grid[0, 1 + (offset + 8) // 16 * 0, 1:5].all()
    assert F.interpolate(torch.from_numpy(mask)[None, None].float(), (8, 8)).sum() in (0, 4)  # what nearest does


def test_stock_nearest_downsampling_undoes_cover():
    grid = (torch.rand(1, 1, 8, 8) > 0.7).float()
    pixels = upsample_mask(grid, 8)
    assert pixels.shape == (1, 1, 64, 64)
    assert torch.equal(F.interpolate(pixels, size=(8, 8)), grid)


def test_grids_of_odd_sizes_lose_nothing():
    for height, width in ((37, 101), (5, 7), (64, 64)):
        mask = np.zeros((height, width), dtype=bool)
        mask[height // 2, width // 3] = True
        assert pool_mask(mask, 16).sum() >= 1


def test_thirty_random_boxes_within_their_range():
    boxes = random_boxes(np.random.default_rng(0))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert boxes.shape == (30, 4) and sides.min() >= 0.03 and sides.max() <= 0.25
    assert boxes.min() >= 0 and boxes.max() <= 1
    mask = boxes_mask(boxes, 128)
    assert mask.shape == (128, 128) and 0.1 < mask.mean() < 0.9
    assert boxes_mask(np.array([[0, 0, 0.001, 0.001]]), 64).sum() == 1


def test_random_masks_stay_inside_and_differ():
    masks = [random_mask(np.random.default_rng(i), 60, 90) for i in range(50)]
    assert all(m.shape == (60, 90) and 4 < m.sum() < 60 * 90 / 10 for m in masks)
    assert not any(m[0].any() or m[-1].any() or m[:, 0].any() or m[:, -1].any() for m in masks)
    assert len({m.tobytes() for m in masks}) == 50


# The training stream


@pytest.fixture
def three_types(tmp_path):
    make_mvtec(tmp_path / "nut", {"hole": 3, "scratch": 3, "stain": 3})
    return load_defect_pairs(tmp_path / "nut", split="all")["train"]


def test_items_have_the_promised_shapes_and_ranges(three_types):
    samples, *_ = make_samples(three_types)
    item = samples[3, 1, 4]
    assert item["pixel_values"].shape == (3, 32, 32) and item["pixel_values"].abs().max() <= 1
    assert item["mask"].shape == item["random_mask"].shape == (1, 8, 8)
    assert set(item["mask"].unique().tolist()) == {0, 1}


def test_each_sample_has_its_own_defects_prompt(three_types):
    """Every sample gets the first file's defect name."""
    samples, prompts, tokens = make_samples(three_types, max_scale=1.0)
    seen = set()
    for step in range(20):
        item = samples[step, 0, 1]
        defect = three_types["defect"][item["index"]]
        assert item["object_prompt"] == tokens.index[prompts[defect].object]
        assert item["defect_prompt"] == tokens.index[prompts[defect].defect]
        inside = upsample_mask(item["mask"], 4)[0] > 0.5
        colour = (item["pixel_values"][:, inside] * 127.5 + 127.5).T
        nearest = (colour - torch.tensor(COLOURS[defect])).abs().sum(dim=1).min()
        assert nearest < 25  # the picture shows the defect that its prompt names
        seen.add(defect)
    assert len(seen) == 3


def test_every_random_number_is_a_function_of_seed_step_and_sample(three_types):
    first, second = make_samples(three_types)[0], make_samples(three_types)[0]
    other = make_samples(three_types, seed=1)[0]
    second[0, 0, 2]  # what was drawn before does not matter
    for key in ((5, 0, 2), (5, 1, 2), (6, 0, 2)):
        a, b, c = first[key], second[key], other[key]
        assert all(torch.equal(a[k], b[k]) for k in ("pixel_values", "mask", "random_mask")) and a["seed"] == b["seed"]
        assert a["seed"] != c["seed"]
    assert len({first[key]["seed"] for key in ((5, 0, 2), (5, 1, 2), (6, 0, 2))}) == 3


def test_each_epoch_shows_every_image_once_and_epochs_differ(three_types):
    samples, *_ = make_samples(three_types)
    epochs = [[samples.crop_index(9 * e + i) for i in range(9)] for e in range(3)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.parametrize("number", [1, 3])
def test_fewer_images_than_the_batch_fill_it(tmp_path, number):
    """Drop_last with fewer images than the batch loops for ever."""
    data = load_defect_pairs(make_mvtec(tmp_path / "nut", {"hole": number}), split="all")["train"]
    samples, *_ = make_samples(data)
    loader = torch.utils.data.DataLoader(samples, batch_sampler=sampling_schedule(0, 3, 4))
    assert [len(batch["index"]) for batch in loader] == [4, 4, 4]


def test_processes_share_one_order():
    alone = sampling_schedule(0, 2, 4)
    pair = [sampling_schedule(0, 2, 2, rank, 2) for rank in range(2)]
    assert [[*a, *b] for a, b in zip(*pair)] == alone
    assert sampling_schedule(1, 2, 4) == alone[1:]


def test_a_crop_far_larger_than_the_model_is_shrunk_once(tmp_path, monkeypatch):
    """Nothing that the model can see changes: not a pixel by 2 of 255, and no cell of the mask is lost."""
    mask = np.zeros((400, 500), dtype=bool)
    mask[200:300, 100:250] = mask[50, 400] = True
    folder = tmp_path / "nut"
    (folder / "test/hole").mkdir(parents=True), (folder / "ground_truth/hole").mkdir(parents=True)
    y, x = np.mgrid[:400, :500]
    picture = np.stack([127 + 100 * np.sin(x / 40), 127 + 100 * np.cos(y / 30), 200 * mask], axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(folder / "test/hole/0.png")
    Image.fromarray(mask).save(folder / "ground_truth/hole/0_mask.png")
    data = load_defect_pairs(folder, split="all")["train"]
    shrunk, *_ = make_samples(data)
    monkeypatch.setattr(samples_module, "shrink", lambda crop, side: crop)
    whole, *_ = make_samples(data)
    assert shrunk.crops[0].image.size == (72, 72) and whole.crops[0].image.size == (500, 400)
    for step in range(5):
        a, b = shrunk[step, 0, 1], whole[step, 0, 1]
        assert (a["pixel_values"][:2] - b["pixel_values"][:2]).abs().max() < 2 / 127.5
        assert (a["mask"] >= b["mask"]).all() and (a["mask"] != b["mask"]).sum() <= 4
        assert torch.equal(a["random_mask"], b["random_mask"])


def test_image_and_mask_are_cropped_as_one(tmp_path):
    """The mask of a white square is where the square is, whatever the resize and crop."""
    mask = np.zeros((100, 100), dtype=bool)
    mask[30:60, 50:90] = True
    folder = tmp_path / "nut"
    (folder / "test/hole").mkdir(parents=True), (folder / "ground_truth/hole").mkdir(parents=True)
    Image.fromarray(mask).convert("RGB").save(folder / "test/hole/0.png")
    Image.fromarray(mask).convert("L").save(folder / "ground_truth/hole/0.png")
    samples, *_ = make_samples(load_defect_pairs(folder)["train"], resolution=64, vae_scale_factor=1, max_scale=1.5)
    places = set()
    for step in range(20):
        item = samples[step, 0, 1]
        white = item["pixel_values"].mean(dim=0) > 0
        assert (white ^ (item["mask"][0] > 0.5)).float().mean() < 0.05
        places.add(tuple(item["mask"][0].nonzero()[0].tolist()))
    assert len(places) > 5
    centred, *_ = make_samples(load_defect_pairs(folder)["train"], resolution=64, vae_scale_factor=1, center_crop=True)
    assert torch.equal(centred.resize_and_crop(samples.crops[0].image, mask, FixedRandom())[1], pool_mask(mask, 64))


def test_image_and_mask_are_cropped_to_the_same_pixel(three_types):
    """Enlarged to the size that they have already, so that no pixel of either is changed."""
    samples, *_ = make_samples(three_types, resolution=64, vae_scale_factor=1, max_scale=1.5)
    mask = np.random.default_rng(0).random((96, 96)) < 0.5
    crops = set()
    for seed in range(10):
        pixels, cropped = samples.resize_and_crop(Image.fromarray(mask).convert("RGB"), mask, LargestScale(seed))
        assert torch.equal(pixels, cropped.expand(3, 64, 64) * 2 - 1)
        crops.add(cropped.numpy().tobytes())
    assert len(crops) == 10


class LargestScale:
    def __init__(self, seed: int):
        self.integers = np.random.default_rng(seed).integers

    def uniform(self, low, high):
        return high


class FixedRandom:
    def uniform(self, low, high):
        return low

    def integers(self, low, high, size):
        return np.zeros(size, dtype=int)


def test_a_crop_never_loses_the_whole_defect(tmp_path):
    folder = tmp_path / "nut"
    mask = np.zeros((64, 64), dtype=bool)
    mask[0, 0] = True
    (folder / "test/hole").mkdir(parents=True), (folder / "ground_truth/hole").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "test/hole/0.png")
    Image.fromarray(mask).convert("L").save(folder / "ground_truth/hole/0.png")
    samples, *_ = make_samples(load_defect_pairs(folder)["train"], max_scale=2.0)
    assert all(samples[step, 0, 1]["mask"].any() for step in range(30))


def test_images_turned_by_exif_are_turned_back(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert load_image(Image.open(tmp_path / "x.jpg")).size == (10, 20)


def test_the_toy_tokenizer_keeps_its_words_whole_and_is_always_the_same():
    first, second = make_tokenizer(WORDS), make_tokenizer(reversed(WORDS))
    assert first.get_vocab() == second.get_vocab()
    text = " ".join(WORDS)
    assert first.tokenize(text) == second.tokenize(text) == [f"{word}</w>" for word in WORDS]
    assert first.tokenize("photoxyz") and first.unk_token_id not in first("photoxyz ø").input_ids[1:-1]
