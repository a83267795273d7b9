"""Many pictures in one run: the plan, several LoRAs, cases from a file, processes, kills."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from offline import ROOT

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from drawn import COLOURS, write_image, write_mask
from folders import make_mvtec
from PIL import Image
from runs import content, generate, options, read_lines, reset_accelerate
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.spatial.distance import cdist
from toy_model import RESOLUTION

import generate_defectfill as g
import train_defectfill
from defectfill import colour_stats
from defectfill.lora import LORA_FILE, read_lora
from defectfill_dataset import InputError, image_tensor, load_defect_pairs, pool_mask
from defectfill_dataset.masks import component_boxes


FAST = ["--num_inference_steps", 1, "--num_candidates", 2, "--selection", "rmse"]


@pytest.fixture
def good(tmp_path):
    for i in range(3):
        write_image(tmp_path / "good" / f"{i:03d}.png", 40)
    return tmp_path / "good"


@pytest.fixture(scope="module")
def several(base, tmp_path_factory):
    """A LoRA that knows holes and scratches."""
    folder = tmp_path_factory.mktemp("several")
    reset_accelerate()
    data = make_mvtec(folder / "bolt", {"hole": 2, "scratch": 2})
    train_defectfill.main(train_defectfill.parse_args(options(base, data, folder / "lora", "--seed", "3")))
    reset_accelerate()
    return folder / "lora"


def launched(*argv, machine: tuple = ("--num_machines", 1)) -> subprocess.CompletedProcess:
    """The command in two processes on the CPU, or that of one machine."""
    launch = "--multi_gpu --num_processes 2 --mixed_precision no --dynamo_backend no".split()
    script = ROOT / "generate_defectfill.py"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *machine, script, *argv]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_more_pictures_than_images_differ_in_mask_and_seed(trained, good, tmp_path):
    out = tmp_path / "out"
    argv = ["--lora", trained, "--image", good, "--mask_source", "random", "--output_dir", out, *FAST]
    generate(*argv, "--num_images", 5)
    lines = read_lines(out / "manifest.jsonl")
    names = ["000", "001", "002", "000-0001", "001-0001"]
    assert [line["name"] for line in lines] == [line["name"] for line in read_lines(out / "plan.jsonl")] == names
    assert len({s for line in lines for w in line["windows"] for s in w["candidate_seeds"]}) == 10
    assert len({(out / line["mask"]).read_bytes() for line in lines}) == 5
    before = content(out)
    generate(*argv, "--num_images", 7)  # a run grows, and keeps what it has
    after = content(out)
    assert all(after[file] == before[file] for file in before if file.startswith(("images", "masks")))
    assert [line["name"] for line in after["manifest"]] == [*names, "002-0001", "000-0002"]
    assert after["manifest"][:5] == before["manifest"]


def test_the_manifest_says_what_each_picture_is_and_is_a_table_too(trained, good, tmp_path):
    out = tmp_path / "out"
    source = ["--mask_source", "procedural", "--masks_per_image", 2, "--foreground", "none"]
    generate("--lora", trained, "--image", good, *source, "--output_dir", out, *FAST)
    lines = read_lines(out / "manifest.jsonl")
    for line in lines:
        mask = np.asarray(Image.open(out / line["mask"])) > 0
        assert [tuple(box) for box in line["boxes"]] == component_boxes(mask) and line["boxes"]
        assert line["defect"] == "hole" and line["object"] == "nut" and len(line["mask_parts"]) == 2
    table = pq.read_table(out / "manifest.parquet").to_pylist()
    assert [row["name"] for row in table] == [line["name"] for line in lines]
    assert [row["windows"][0]["scores"] for row in table] == [line["windows"][0]["scores"] for line in lines]


@pytest.mark.slow
def test_the_page_shows_every_defect_type_in_one_file(trained, several, good, tmp_path):
    out = tmp_path / "<b>out"
    argv = ["--image", good, "--mask_source", "random", "--num_images", 2, *FAST, "--output_dir", out]
    generate("--lora", trained, several, "--defect", "hole", "scratch", *argv)
    page = (out / "summary.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6 and page.count("<svg") == 7 and "http" not in page
    assert (
        "<tr><td>bolt<td>scratch<td>2<td>2<td>0<td>0<td>0<td>0<td>0" in page
        and "&lt;b&gt;out" in page
        and "<b>" not in page
    )
    assert "Not generated" not in page and "<figcaption>001-scratch<" in page


def test_the_page_lists_what_was_not_painted(trained, good, tmp_path, monkeypatch):
    (tmp_path / "rois").mkdir()
    for name in ("000", "001", "002"):  # the first may be painted anywhere, the others in a corner without room
        roi = np.full((40, 40), 255, dtype=np.uint8)
        roi[2 if name != "000" else 40 :] = 0
        roi[:, 2 if name != "000" else 40 :] = 0
        Image.fromarray(roi).save(tmp_path / f"rois/{name}.png")
    source = ["--mask_source", "procedural", "--shapes", "box", "--foreground", "none", "--roi", tmp_path / "rois"]
    argv = ["--lora", trained, "--image", good, *source, "--output_dir", tmp_path / "out", *FAST, "--batch_size", 6]
    with pytest.raises(SystemExit, match="Not generated:\nDF340 001.png"):
        generate(*argv)
    monkeypatch.setattr(g, "load_pipeline", None)  # started again, it sees without a model that nothing can be painted
    with pytest.raises(SystemExit, match="Not generated:\nDF340 001.png.*\nDF340 002.png"):
        generate(*argv)
    page = (tmp_path / "out/summary.html").read_text()
    assert (
        "<li>DF340 001.png: no room for its mask" in page
        and "<tr><td>nut<td>hole<td>3<td>1<td>0<td>2<td>0<td>0<td>0" in page
    )


def test_piece_boxes_are_those_of_connected_pieces():
    mask = np.zeros((20, 30), dtype=bool)
    mask[2:5, 3:9], mask[5, 9], mask[15, 20] = True, True, True
    assert component_boxes(mask) == [(3, 2, 10, 6), (20, 15, 21, 16)]


@pytest.mark.slow
def test_several_loras_and_defects_paint_their_share_each(trained, several, good, tmp_path):
    out = tmp_path / "out"
    argv = ["--image", good, "--mask_source", "random", "--num_images", 2, *FAST, "--output_dir", out]
    generate("--lora", trained, several, "--defect", "hole", "scratch", *argv)
    lines = read_lines(out / "manifest.jsonl")
    made = [(line["name"], line["prompt"]) for line in lines]
    assert made == [
        ("000-hole", "A photo of sks"), ("001-hole", "A photo of sks"),
        ("000-hole-0001", "A photo of hole"), ("001-hole-0001", "A photo of hole"),
        ("000-scratch", "A photo of scratch"), ("001-scratch", "A photo of scratch"),
    ]  # fmt: skip
    assert len({line["lora_sha256"] for line in lines}) == 2
    alone = tmp_path / "alone"
    generate("--lora", several, "--defect", "scratch", *argv[:-1], alone)
    for line in read_lines(alone / "manifest.jsonl"):  # the LoRA before left nothing behind
        other = out / "images" / f"{line['name']}-scratch.png"
        assert (alone / line["image"]).read_bytes() == other.read_bytes()


def test_the_defect_prompt_of_each_lora(trained, several, good, tmp_path):
    out = tmp_path / "out"
    argv = ["--image", good / "000.png", "--mask_source", "random", *FAST]
    generate("--lora", trained, several, "--defect", "hole", "scratch", *argv, "--output_dir", out)
    lines = read_lines(out / "manifest.jsonl")
    assert [line["prompt"] for line in lines] == ["A photo of sks", "A photo of hole", "A photo of scratch"]
    assert {line["generation_prompt"] for line in lines} == {"defect"}
    of_object = ["--generation_prompt", "object", "--output_dir", tmp_path / "object"]
    generate("--lora", trained, *argv, *of_object)
    assert {line["prompt"] for line in read_lines(tmp_path / "object/manifest.jsonl")} == {"A nut with sks"}
    assert (out / "images/000-hole.png").read_bytes() != (tmp_path / "object/images/000.png").read_bytes()
    with pytest.raises(
        InputError, match="DF320 generation_prompt: the run was started with 'object', now it is 'defect'"
    ):
        generate("--lora", trained, *argv, *of_object[2:])


def test_a_lora_without_defect_prompts_generates_with_its_others(trained, good, tmp_path):
    with safe_open(trained / LORA_FILE, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    record = json.loads(header["defectfill"])
    del record["defect_prompts"]
    save_file(tensors, tmp_path / "old.safetensors", metadata=header | {"defectfill": json.dumps(record)})
    argv = ["--lora", tmp_path / "old.safetensors", "--image", good, "--mask_source", "random", *FAST]
    generate(*argv, "--output_dir", tmp_path / "old")
    assert {line["prompt"] for line in read_lines(tmp_path / "old/manifest.jsonl")} == {"A nut with sks"}
    with pytest.raises(InputError, match="DF411 .*has no defect prompts; give --prompt"):
        generate(*argv, "--generation_prompt", "defect", "--output_dir", tmp_path / "out")


def test_a_run_is_not_continued_with_other_pictures(trained, several, good, tmp_path):
    argv = ["--image", good, "--mask_source", "random", *FAST, "--output_dir", tmp_path / "out"]
    generate("--lora", trained, *argv)
    with pytest.raises(InputError, match="DF320 000, 001, 002: 3 images of the earlier run are no longer"):
        generate("--lora", trained, several, "--defect", "hole", *argv)


@pytest.mark.slow
def test_another_seed_is_told_once(trained, good, tmp_path):
    argv = ["--lora", trained, "--image", good, "--mask_source", "random", "--num_images", 9, *FAST]
    generate(*argv, "--output_dir", tmp_path / "out")
    with pytest.raises(InputError) as caught:
        generate(*argv, "--seed", 1, "--num_inference_steps", 2, "--output_dir", tmp_path / "out")
    assert [str(problem) for problem in caught.value.problems] == [
        "DF320 num_inference_steps: the run was started with 1, now it is 2",
        "DF320 seed: the run was started with 0, now it is 1",
    ]


@pytest.mark.parametrize("kind", g.KINDS)
def test_folders_of_something_else_are_never_written_into(trained, good, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(g, "load_pipeline", None)
    write_image(tmp_path / "data" / kind / "mine.png")
    argv = ["--lora", trained, "--image", good, "--mask_source", "random", *FAST]
    with pytest.raises(InputError, match=f"DF192 .*data: holds {kind} of something else"):
        generate(*argv, "--output_dir", tmp_path / "data")
    with pytest.raises(InputError, match="DF192 .*would overwrite"):
        generate(*argv, "--output_dir", good)


@pytest.mark.slow
def test_a_picture_without_a_place_does_not_hold_up_other_processes(trained, good, tmp_path):
    roi = np.zeros((40, 40), dtype=np.uint8)
    roi[0, 0] = 255
    Image.fromarray(roi).save(tmp_path / "roi.png")
    source = [
        "--mask_source",
        "procedural",
        "--shapes",
        "box",
        "--foreground",
        "none",
        "--roi",
        tmp_path / "roi.png",
    ]
    done = launched("--lora", trained, "--image", good, *source, *FAST, "--output_dir", tmp_path / "out")
    assert done.returncode != 0 and "Not generated:\nDF340 000.png" in done.stderr
    assert launched("--lora", trained, "--image", good, *source, *FAST, "--seed", 1, "--output_dir",
                    tmp_path / "out").returncode != 0  # refused by one process, all end  # fmt: skip


def test_defects_that_no_lora_knows_and_loras_of_other_sizes_are_refused(
    trained, several, good, tmp_path, train, monkeypatch
):
    larger = train("--resolution", "64", output=tmp_path / "larger")
    monkeypatch.setattr(g, "load_pipeline", None)
    argv = ["--image", good, "--mask_source", "random", *FAST, "--output_dir", tmp_path / "out"]
    with pytest.raises(InputError, match="DF411 --defect dent: no --lora knows it"):
        generate("--lora", trained, several, "--defect", "hole", "dent", *argv)
    with pytest.raises(InputError, match="DF411 .*trained0/lora.*knows none of --defect scratch"):
        generate("--lora", trained, several, "--defect", "scratch", *argv)
    with pytest.raises(InputError, match="DF414 .*larger.*resolution 64"):
        generate("--lora", trained, larger, *argv)
    with pytest.raises(InputError, match="DF411.*knows several defects"):
        generate("--lora", trained, several, *argv)


def test_cases_come_from_a_file_each_line_over_the_flags(trained, good, tmp_path):
    mask = write_mask(tmp_path / "mask.png", 40)
    lines = [
        {"image": str(good / "000.png"), "mask": str(tmp_path / "mask.png"), "seed": 5, "guidance_scale": 3,
         "prompt": None, "generation_prompt": "defect"},
        {"image": str(good), "mask_source": "procedural", "shapes": ["blob", "box"], "foreground": "none",
         "num_images": 2, "num_inference_steps": 2, "zoom": "on", "zoom_context": 2, "prompt": "A nut with moss",
         "guidance_interval": [0, 0.5]},
    ]  # fmt: skip
    file = tmp_path / "cases.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    generate("--lora", trained, "--cases", file, *FAST, "--prompt", "A plum", "--output_dir", out)
    first, *others = read_lines(out / "manifest.jsonl")
    assert [first["name"], *(line["name"] for line in others)] == ["000", "000-0001", "001"]
    assert (first["seed"], first["guidance_scale"], first["zoom"], first["prompt"]) == (5, 3, None, "A photo of sks")
    assert np.array_equal(np.asarray(Image.open(out / first["mask"])) > 0, mask)
    assert first["guidance_interval"] == [0, 1]
    for line in others:
        assert line["guidance_interval"] == [0, 0.5]
        assert (line["prompt"], line["num_inference_steps"], line["seed"]) == ("A nut with moss", 2, 0)
        assert line["generation_prompt"] is None
        assert line["zoom"]["context"] == 2 and line["shapes"] == ["blob", "box"]


def test_all_wrong_lines_of_cases_are_told_at_once(trained, good, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "load_pipeline", None)
    lines = [
        json.dumps({"image": str(good), "mask_source": "random"}),
        "{",
        "[1]",
        json.dumps({"image": str(good), "mask_source": "drawn"}),
        json.dumps({"image": str(good), "mask_source": "random", "sede": 3}),
        json.dumps({"image": str(good)}),
        json.dumps({"image": str(good), "mask_source": "random", "num_inference_steps": 0}),
        json.dumps({"mask_source": "random"}),
        json.dumps({"image": str(good), "mask_source": "random", "output_dir": "elsewhere"}),
        json.dumps({"image": str(good), "mask_source": "random", "guidance_interval": [0.5, 0.2]}),
    ]
    file = tmp_path / "cases.jsonl"
    file.write_text("\n".join(lines))
    argv = ["--lora", trained, "--cases", file, *FAST, "--output_dir", tmp_path / "out"]
    with pytest.raises(InputError) as caught:
        generate(*argv)
    told = str(caught.value).splitlines()
    assert [int(line.split("line ")[1].split(":")[0]) for line in told] == list(range(2, 11))
    named = ("", "", "drawn", "--sede", "--mask", "at least 1", "--image", "--output_dir", "START < END")
    for words, line in zip(named, told):
        assert line.startswith("DF416") and words in line
    file.write_text("")
    with pytest.raises(InputError, match="DF416 .*is empty"):
        generate(*argv)
    twice = json.dumps({"image": str(good / "000.png"), "mask_source": "random"})
    file.write_text(f"{twice}\n{twice}\n")
    with pytest.raises(InputError, match="DF415 000.png, hole: is requested twice with --seed 0"):
        generate(*argv)
    with pytest.raises(InputError, match="DF160 --cases"):
        generate(*argv[:3], tmp_path / "none.jsonl", *argv[4:])


@pytest.mark.slow
def test_pictures_painted_in_common_batches_do_not_depend_on_what_is_done(trained, good, tmp_path):
    out = tmp_path / "out"
    argv = ["--lora", trained, "--image", good, "--mask_source", "random", "--num_images", 6, *FAST]
    generate(*argv, "--batch_size", 8, "--output_dir", out)  # four pictures in the first batch, two in the second
    before = content(out)
    for name in ("001", "002-0001"):
        (out / "images" / f"{name}.png").unlink()
    generate(*argv, "--batch_size", 8, "--output_dir", out)
    assert content(out) == before
    generate(*argv, "--output_dir", tmp_path / "single")
    single = content(tmp_path / "single")
    assert all(single[file] == before[file] for file in single if file.startswith("masks"))
    for file in (f for f in single if f.startswith("images")):
        pictures = [np.asarray(Image.open(folder / file), dtype=int) for folder in (out, tmp_path / "single")]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1  # another batch rounds otherwise


# Gates


def test_colours_of_a_defect_are_against_its_surroundings():
    picture, mask = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 64, 64)
    mask[:, 20:30, 40:52] = 1
    inside = picture[:, 20:30, 40:52].clone()
    picture[:, 16:34, 36:56] = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1)  # 4 pixels wide
    picture[:, 20:30, 40:52] = inside
    expected = inside.flatten(1).T - torch.tensor([0.2, 0.4, 0.6])
    torch.testing.assert_close(colour_stats.defect_colours(picture, mask).float(), expected)
    torch.testing.assert_close(colour_stats.defect_colours(picture + 0.1, mask).float(), expected)
    assert colour_stats.defect_colours(picture, torch.ones(1, 64, 64)).mean().abs() < 1e-6  # no surroundings


def test_deviation_is_the_distance_from_the_references_beside_the_strangest_of_them():
    rng = np.random.default_rng(0)
    references = [rng.normal(mean, (0.05, 0.1, 0.02), (200, 3)) for mean in (-0.3, -0.2, -0.35)]

    def farthest(colours, among):
        covariance = np.cov(np.concatenate(among).T, bias=True) + (16 / 255) ** 2 * np.eye(3)
        apart = cdist(colours, np.concatenate(among).mean(axis=0)[None], "mahalanobis", VI=np.linalg.inv(covariance))
        return np.quantile(apart, 0.95)

    known = colour_stats.reference_statistics([torch.from_numpy(r) for r in references])
    strangest = max(farthest(references[i], references[:i] + references[i + 1 :]) for i in range(3))
    assert known["strangest"] == pytest.approx(strangest)
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:16, 8:16] = 1
    spots = torch.full((2, 3, 32, 32), 0.5) + torch.tensor([-0.3, 0.4]).view(2, 1, 1, 1) * mask
    expected = [farthest(np.full((64, 3), value), references) / strangest for value in (-0.3, 0.4)]
    assert colour_stats.colour_distances(spots, mask, known) == pytest.approx(expected, rel=1e-5)
    assert expected[0] < 0.5 and expected[1] > 2
    assert colour_stats.reference_statistics([torch.from_numpy(references[0])])["strangest"] is None


@pytest.mark.parametrize("lora, data, number", [("several", "bolt", 1), ("trained", "nut", 2)])
def test_the_record_says_how_the_references_look(lora, data, number, request):
    folder = request.getfixturevalue(lora)
    record = read_lora(folder).record
    train = load_defect_pairs(folder.parent / data)["train"]
    assert set(record["appearance"]) == set(train["defect"])
    for defect, known in record["appearance"].items():
        colours = []
        for row in (row for row in train if row["defect"] == defect):
            picture = image_tensor(row["image"].convert("RGB"), RESOLUTION) / 2 + 0.5
            mask = pool_mask(np.asarray(row["mask"].convert("L")) > 127, RESOLUTION)
            colours.append(colour_stats.defect_colours(picture, mask))
        assert known == colour_stats.reference_statistics(colours) | {"seam_step": known["seam_step"]}
        assert len(colours) == number


def test_windows_of_one_photograph_are_one_reference(base, tmp_path):
    reset_accelerate()
    data = make_mvtec(tmp_path / "nut", {"hole": 2})
    for i in range(2):  # two holes far apart each
        mask = np.zeros((256, 256), dtype=bool)
        mask[20:30, 20:30] = mask[220:232, 200:210] = True
        Image.fromarray(mask).convert("L").save(data / f"ground_truth/hole/{i:03d}_mask.png")
        write_image(data / f"test/hole/{i:03d}.png", 256, COLOURS["hole"], mask, seed=i)
    argv = options(base, data, tmp_path / "lora", "--zoom", "on", "--split", "all")
    job = train_defectfill.prepare(train_defectfill.parse_args(argv), train_defectfill.Accelerator(cpu=True))
    reset_accelerate()
    crops = job.samples.crops
    assert len(crops) == 4
    colours = [
        torch.cat([
            colour_stats.defect_colours(image_tensor(w.image, RESOLUTION) / 2 + 0.5, pool_mask(w.mask, RESOLUTION))
            for w in crops
            if w.source_file == name
        ])
        for name in job.data["train"]["source_file"]
    ]  # fmt: skip
    known = job.record["appearance"]["hole"]
    assert known.pop("seam_step") > 0
    assert known == colour_stats.reference_statistics(colours) and len(colours) == 2


@pytest.fixture
def painted(good, monkeypatch):
    """Call it with what `paint` is to give; the list of the seeds of each call comes back.

    What it gives is a function of the image's number, the attempt at it and the (3, S, S) image in [0, 1].
    """
    calls: list = []

    def replace(picture):
        images = [image_tensor(Image.open(file), RESOLUTION) for file in sorted(good.iterdir())]
        attempts = [0] * len(images)

        def paint(pipe, batch, grids, prompt, seeds, **sampling):
            calls.append(seeds)
            result = torch.empty(len(batch), len(seeds[0]), 3, RESOLUTION, RESOLUTION)
            for place, image in enumerate(batch):
                [number] = [i for i, known in enumerate(images) if torch.equal(known, image)]
                attempts[number] += 1
                for candidate in range(len(seeds[0])):
                    result[place, candidate] = picture(pipe, number, attempts[number], candidate, image / 2 + 0.5)
            return result

        monkeypatch.setattr(g, "inpaint", paint)
        return calls

    return replace


def refusals(**numbers: int) -> dict[str, int]:
    return dict.fromkeys(g.REJECTIONS, 0) | {name.replace("_", " "): number for name, number in numbers.items()}


def test_a_picture_without_a_defect_is_painted_again_and_given_up_at_last(trained, good, tmp_path, painted):
    def faint(pipe, number, attempt, candidate, image):
        """The first two attempts at the first image, and all at the second, leave what the autoencoder would."""
        nothing = number == 1 or (number == 0 and attempt < 3)
        return g.reconstruct(pipe, image[None] * 2 - 1)[0] if nothing else torch.ones_like(image)

    calls = painted(faint)
    argv = ["--lora", trained, "--image", good, "--mask_source", "random", *FAST, "--batch_size", 6]
    with pytest.raises(
        SystemExit, match="Not generated:\nDF342 001.png: .* 3 attempts: .*6 no defect.*relax --min_change"
    ):
        generate(*argv, "--min_change", 1.5, "--output_dir", tmp_path / "out")
    lines = {line["name"]: line["windows"][0] for line in read_lines(tmp_path / "out/manifest.jsonl")}
    assert {name: crop["attempts"] for name, crop in lines.items()} == {"000": 3, "002": 1}
    assert [crop["refused"] for crop in lines.values()] == [refusals(no_defect=4), refusals()]
    page = (tmp_path / "out/summary.html").read_text()  # planned, made, retried, not painted
    assert "<tr><td>nut<td>hole<td>3<td>2<td>1<td>1<td>0<td>4<td>0" in page and "<li>DF342 001.png" in page
    for crop in lines.values():
        assert min(crop["changes"]) > 1.5
    assert [len(seeds) for seeds in calls] == [3, 2, 2] and len({s for c in calls for row in c for s in row}) == 14
    calls.clear()
    generate(*argv, "--max_attempts", 1, "--output_dir", tmp_path / "ungated")
    assert len(calls) == 1


def test_an_artefact_is_never_kept_however_far_it_is_from_the_good_image(trained, good, tmp_path, painted):
    hole = torch.tensor(COLOURS["hole"]).view(3, 1, 1) / 255

    def garish(pipe, number, attempt, candidate, image):
        """From the second attempt on the second candidate has the references' colours; the others glow."""
        return hole.expand_as(image) if attempt > 1 and candidate == 1 else torch.ones_like(image)

    painted(garish)
    argv = ["--lora", trained, "--image", good, "--mask_source", "random", *FAST]
    generate(*argv, "--max_deviation", 1.25, "--composite", "exact", "--output_dir", tmp_path / "out")
    for line in read_lines(tmp_path / "out/manifest.jsonl"):
        [crop] = line["windows"]
        assert (crop["chosen"], crop["attempts"], crop["refused"]) == (1, 2, refusals(artefact=3))
        assert crop["deviations"][1] < 1.25 < crop["deviations"][0]
        mask = np.asarray(Image.open(tmp_path / "out" / line["mask"])) > 0
        colours = np.asarray(Image.open(tmp_path / "out" / line["image"]))[mask]
        np.testing.assert_allclose(colours - np.array(COLOURS["hole"]), 0, atol=1)
    generate(*argv, "--selection", "none", "--max_deviation", 1.25, "--output_dir", tmp_path / "none")
    assert all(line["windows"][0]["chosen"] == 1 for line in read_lines(tmp_path / "none/manifest.jsonl"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_what_is_not_a_number_or_black_is_painted_again(trained, good, tmp_path, painted, value):
    def broken(pipe, number, attempt, candidate, image):
        return torch.full_like(image, value if number == 0 or attempt == 1 else 1)

    painted(broken)
    argv = ["--lora", trained, "--image", good, "--mask_source", "random", *FAST]
    with pytest.raises(SystemExit, match="DF342 000.png: .* in 3 attempts: 6 broken.* use --mixed_precision no"):
        generate(*argv, "--output_dir", tmp_path / "out")
    crops = [line["windows"][0] for line in read_lines(tmp_path / "out/manifest.jsonl")]
    assert [(crop["attempts"], crop["refused"]) for crop in crops] == [(2, refusals(broken=2))] * 2


@pytest.mark.slow
def test_a_deviation_needs_to_know_the_references(base, good, tmp_path):
    reset_accelerate()
    data = make_mvtec(tmp_path / "nut", {"hole": 1})
    train_defectfill.main(train_defectfill.parse_args(options(base, data, tmp_path / "lora")))
    reset_accelerate()
    argv = ["--lora", tmp_path / "lora", "--image", good, "--mask_source", "random", "--output_dir", tmp_path / "out"]
    with pytest.raises(InputError, match="DF417 .* no colour statistics for 'hole' .*retrain with two or more"):
        generate(*argv, *FAST, "--max_deviation", 2)
    generate(*argv, *FAST)
    assert read_lines(tmp_path / "out/manifest.jsonl")[0]["windows"][0]["deviations"] == [None, None]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--min_change", "-1"], "--min_change -1.0"),
        (["--max_deviation", "0"], "--max_deviation 0.0"),
        (["--max_deviation", "nan"], "--max_deviation nan"),
        (["--max_attempts", "0"], "--max_attempts 0"),
    ],
)
def test_gates_that_cannot_work_are_refused(trained, good, tmp_path, flags, words, capsys):
    argv = ["--lora", trained, "--image", good, "--mask_source", "random", "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit):
        generate(*argv, *flags)
    assert words in capsys.readouterr().err


# Processes


@pytest.mark.slow
def test_two_machines_make_the_same_bytes_as_one_process(trained, good, tmp_path):
    argv = ["--lora", trained, "--image", good, "--mask_source", "random", "--num_images", 5, *FAST, "--batch_size", 4]
    generate(*argv, "--output_dir", tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = ["--main_process_ip", "127.0.0.1", "--main_process_port", free.getsockname()[1]]
    machines = [("--num_machines", 2, "--machine_rank", rank, *place) for rank in range(2)]
    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(lambda m: launched(*argv, "--output_dir", tmp_path / "two", machine=m), machines))
    assert [done.returncode for done in ends] == [0, 0], ends
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert not list((tmp_path / "two").glob("manifest-part-*"))


def test_masks_come_from_what_is_given(capsys):
    """--mask means given masks and --reference_data those of the references; anything else must be said."""
    common = ["--lora", "x", "--image", "y", "--output_dir", "z"]

    def source(*argv) -> str:
        return g.parse_args([*common, *argv]).requests[0].mask_source

    assert source("--mask", "m") == "given" and source("--reference_data", "d") == "references"
    assert source("--reference_data", "d", "--mask_source", "held_out") == "held_out"
    for argv in ((), ("--mask", "m", "--reference_data", "d")):
        with pytest.raises(SystemExit):
            source(*argv)
        assert "choose the masks: --mask, --reference_data, or --mask_source" in capsys.readouterr().err
