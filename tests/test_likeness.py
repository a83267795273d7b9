"""Selection by likeness to the references: features, distances, the choice, whole runs."""

import json
import pickle

import pytest
import torch
from drawn import write_image, write_mask
from folders import make_mvtec
from networks import make_squeezenet
from runs import FAST, content, generate, read_lines
from toy_model import RESOLUTION, toy_pipeline

import generate_defectfill as g
from defectfill import likeness
from defectfill.selection import Measures, choose_candidate
from defectfill_dataset import CropRule, InputError, image_tensor, load_defect_pairs, make_crops, pool_mask


@pytest.fixture
def net_file(tmp_path):
    return make_squeezenet(tmp_path / "net.safetensors")


@pytest.fixture
def nets(net_file):
    layers = likeness.read_squeezenet(net_file)
    return [
        likeness.vae_features(toy_pipeline().vae),
        likeness.squeezenet_features(layers, torch.device("cpu")),
    ]


# Features and distances


def test_the_vaes_levels_are_those_of_its_encoder():
    vae = toy_pipeline().vae
    seen = []
    hooks = [block.register_forward_hook(lambda _, args, out: seen.append(out)) for block in vae.encoder.down_blocks]
    images = torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1
    with torch.no_grad():
        vae.encode(images)
        for hook in hooks:
            hook.remove()
        levels = likeness.vae_features(vae)(images)
    assert len(levels) == len(seen) == 3 and all(torch.equal(a, b) for a, b in zip(levels, seen))


@torch.no_grad()
def test_squeezenet_sees_what_torchvision_gives_it_and_ends_with_its_last_layer(net_file):
    from torchvision.transforms.functional import normalize

    layers = likeness.read_squeezenet(net_file)
    assert all(parameter.dtype == torch.float32 for parameter in layers.parameters())
    images = torch.rand(2, 3, 64, 64)
    levels = likeness.squeezenet_features(layers, torch.device("cpu"))(images * 2 - 1)
    expected = layers(normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert [maps.shape[1] for maps in levels] == [96, 256, 512, 512]
    assert torch.allclose(levels[-1], expected, atol=1e-5)


def test_a_defect_is_described_inside_its_mask_alone_and_whatever_its_brightness():
    images, mask = torch.rand(1, 3, 16, 16) + 0.1, torch.zeros(1, 1, 16, 16)
    mask[..., 3:9, 4:12] = 1
    other = torch.where(mask > 0, images, torch.rand(1, 3, 16, 16))
    described = likeness.describe_defects(lambda x: [x], images, mask)
    assert described.shape == (1, 6) and torch.equal(described, likeness.describe_defects(lambda x: [x], other, mask))
    assert torch.allclose(described, likeness.describe_defects(lambda x: [3 * x], images, mask), atol=1e-5)
    assert not torch.allclose(described, likeness.describe_defects(lambda x: [x], images, 1 - mask), atol=1e-3)
    inside = torch.nn.functional.normalize(images, dim=1)[0, :, mask[0, 0] > 0]
    expected = torch.cat([inside.mean(dim=1), inside.std(dim=1, correction=0)])
    assert torch.allclose(described[0], expected, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1])
def test_the_distance_is_that_of_the_nearest_reference(nets, data, which):
    net, rows = nets[which], load_defect_pairs(data, split="all")["train"]
    crops = make_crops(rows, RESOLUTION, CropRule())
    measured = likeness.Likeness(net, crops, RESOLUTION, torch.device("cpu"))
    images = torch.stack([image_tensor(crop.image, RESOLUTION) for crop in crops])
    masks = torch.stack([pool_mask(crop.mask, RESOLUTION) for crop in crops])
    assert len(measured.references) == len(crops) == 4
    for image, mask in zip(images, masks):
        painted = torch.where(mask > 0, torch.rand(3, 1, 1) * 2 - 1, image)
        near, far, broken = measured.distances(torch.stack([image, painted, image * torch.nan]), mask)
        assert near == pytest.approx(0, abs=1e-5) and far > 0.01 and broken != broken
        alone = likeness.describe_defects(net, painted[None], mask[None])[0]
        apart = [torch.dist(alone, of_one).item() for of_one in measured.references]
        assert far == pytest.approx(min(apart), abs=1e-5)


# The choice


def measures(distances, changes, scores=None) -> Measures:
    return Measures(scores or [0.0] * len(changes), scores is not None, changes, [None] * len(changes), distances)


def test_the_nearest_is_kept_of_those_that_changed_enough():
    four = measures([0.1, 0.4, 0.3, 0.2], [1.0, 6.0, 5.0, 4.0])
    assert choose_candidate(four, [None] * 4) == 3  # the first shows nothing
    assert choose_candidate(four, [None, None, None, "artefact"]) == 2
    assert choose_candidate(four, ["no defect"] * 4) is None
    assert choose_candidate(measures([0.1, 0.4], [3.0, 5.0]), [None] * 2) == 0
    broken = measures([float("nan"), 0.4], [6.0, 6.0])
    assert choose_candidate(broken, ["broken", None]) == 1


def test_with_a_score_it_is_the_nearest_of_the_more_distant_half():
    four = measures([0.1, 0.4, 0.3, 0.2], [9.0] * 4, [0.2, 0.9, 0.8, 0.1])
    assert choose_candidate(four, [None] * 4) == 2
    assert choose_candidate(four._replace(reference_distances=None), [None] * 4) == 1


# Whole runs


def test_a_run_with_given_masks_keeps_the_nearest_and_tells_all_distances(trained, inputs, tmp_path, net_file):
    data = make_mvtec(tmp_path / "nut")
    argv = ["--lora", trained, *inputs, *FAST]
    generate(*argv, "--output_dir", tmp_path / "plain")
    likely = [*argv, "--selection", "likeness", "--reference_data", data]
    generate(*likely, "--output_dir", tmp_path / "vae")
    generate(*likely, "--likeness_net", net_file, "--output_dir", tmp_path / "net")
    generate(*likely, "--batch_size", 9, "--output_dir", tmp_path / "batched")
    lines = {run: read_lines(tmp_path / run / "manifest.jsonl") for run in ("plain", "vae", "net", "batched")}
    crops = {run: [line["windows"][0] for line in of_run] for run, of_run in lines.items()}
    assert not any("reference_distances" in crop for crop in crops["plain"])
    assert not any("references_sha256" in line for line in lines["plain"])
    for plain, vae, net, batched in zip(*crops.values()):
        assert vae["candidate_seeds"] == plain["candidate_seeds"] and vae["changes"] == plain["changes"]
        assert vae["scores"] == [None] * 3 and len(vae["reference_distances"]) == 3
        assert vae["reference_distances"] != net["reference_distances"]
        assert vae["reference_distances"] == pytest.approx(batched["reference_distances"], abs=1e-3)
        for crop in (vae, net):
            assert crop["chosen"] == choose_candidate(
                measures(crop["reference_distances"], crop["changes"]), [None] * 3
            )
    assert "to the nearest training defect" in (tmp_path / "vae/summary.html").read_text()
    settings = {run: json.loads((tmp_path / run / "settings.json").read_text()) for run in lines}
    assert "likeness_net" not in settings["plain"] and settings["vae"]["likeness_net"] == "vae"
    assert len(settings["net"]["likeness_net"]) == 64
    with pytest.raises(InputError, match="DF320 likeness_net"):
        generate(*likely, "--likeness_net", net_file, "--output_dir", tmp_path / "vae")
    with pytest.raises(InputError, match="DF347"):
        generate(*likely, "--likeness_net", tmp_path / "none", "--output_dir", tmp_path / "vae")
    for file in (data / "test/hole").iterdir():
        write_image(file, seed=9)
    with pytest.raises(InputError, match="DF320 references_sha256"):
        generate(*likely, "--output_dir", tmp_path / "vae")


@pytest.mark.slow
@pytest.mark.parametrize("score", ["rmse", "ssim", "lpips"])
def test_references_serve_masks_and_selection_and_the_better_half_is_by_the_score(
    trained, inputs, tmp_path, alex, score
):
    data = make_mvtec(tmp_path / "nut")
    argv = ["--lora", trained, "--image", tmp_path / "good", "--reference_data", data, *FAST, "--zoom", "on"]
    generate(*argv, "--selection", "likeness", "--output_dir", tmp_path / "out")
    generate(*argv, "--selection", f"{score}+likeness", "--output_dir", tmp_path / "both")
    for line in read_lines(tmp_path / "both/manifest.jsonl"):
        assert line["mask_source"] == "references"
        for crop in line["windows"]:
            better = sorted(crop["scores"])[1:]
            assert crop["scores"][crop["chosen"]] in better
    before = content(tmp_path / "out")
    generate(*argv, "--selection", "likeness", "--output_dir", tmp_path / "out")
    assert content(tmp_path / "out") == before
    (tmp_path / "split.json").write_text(
        json.dumps({"train": ["test/scratch/000.png"], "test": [f"test/hole/{i:03d}.png" for i in range(4)]})
    )
    write_image(data / "test/scratch/000.png", mask=write_mask(data / "ground_truth/scratch/000_mask.png"))
    more = ["--split", tmp_path / "split.json", "--mask_source", "random", "--selection", "likeness"]
    with pytest.raises(InputError, match="DF341 .*no reference of 'hole' with --split"):
        generate(*argv, *more, "--output_dir", tmp_path / "none")


# What is refused


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--mask m --selection likeness", "--selection likeness: give --reference_data, the dataset"),
        ("--mask_source random --selection ssim+likeness", "--selection ssim+likeness: give --reference_data"),
        ("--mask m --reference_data d", "choose the masks"),
        ("--mask_source random --reference_data d", "--reference_data: only with --mask_source references"),
        ("--mask m --likeness_net f", "--likeness_net: only with --selection likeness"),
        ("--mask m --split all", "--split: only with --mask_source references or held_out"),
    ],
)
def test_flags_that_contradict(capsys, flags, words):
    with pytest.raises(SystemExit):
        g.parse_args(["--lora", "x", "--image", "y", "--output_dir", "z", *flags.split()])
    assert words in capsys.readouterr().err


def test_data_of_likeness_may_stand_beside_any_masks():
    for masks in ("--mask m", "--mask_source random", "--mask_source procedural", ""):
        argv = f"--lora x --image y --output_dir z --selection likeness --reference_data d --split all {masks}"
        [request] = g.parse_args(argv.split()).requests
        assert request.mask_source == (masks.split()[-1] if "source" in masks else "given" if masks else "references")


def test_files_of_something_else_are_no_network(tmp_path):
    name = "features.0.weight"
    for changes, words in (
        ({name: torch.zeros(96, 3, 3, 3)}, rf"1 tensors .* {name} is \(96, 3, 3, 3\), not \(96, 3, 7, 7\)"),
        ({name: None}, f"{name} is None"),
        ({"extra": torch.zeros(1)}, "extra is"),
    ):
        with pytest.raises(InputError, match=f"DF347 .*net.safetensors.*{words}"):
            likeness.read_squeezenet(make_squeezenet(tmp_path / "net.safetensors", **changes))
    (tmp_path / "net.pth").write_bytes(pickle.dumps({"features.0.weight": 1}))
    for file in ("net.pth", "absent.safetensors", "."):
        with pytest.raises(InputError, match="DF347 .*not a whole safetensors file"):
            likeness.read_squeezenet(tmp_path / file)
