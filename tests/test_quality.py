"""KID, IC-LPIPS, nearest neighbours and crops against independent computations."""

import pickle

import lpips
import numpy as np
import pytest
import torch
from networks import make_network, make_squeezenet
from PIL import Image
from torchvision import models

from defectfill.evaluation import quality
from defectfill.likeness import describe_defects
from defectfill_dataset import InputError


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return quality.Features("squeezenet", make_squeezenet(tmp_path_factory.mktemp("net") / "net.safetensors"), CPU)


def images(number, side=64, seed=0):
    return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Networks


@torch.no_grad()
def test_pooled_is_the_mean_of_the_last_level(features):
    pictures = images(quality.IMAGES_AT_ONCE + 1)
    pooled = features.pooled(pictures)
    assert features.name == "SqueezeNet 1.0 (torchvision)" and pooled.shape == (len(pictures), 512)
    plain = features.net(pictures[-1:])[-1].mean(dim=(2, 3))
    assert torch.allclose(pooled[-1:], plain / plain.square().mean().sqrt(), atol=1e-6)


@torch.no_grad()
def test_distances_are_those_of_lpips_without_learned_weights(features, monkeypatch):
    """Also in blocks, of which the last is smaller."""
    a, b = images(5), images(3, seed=1)
    expected = torch.zeros(5, 3)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            for p, q in zip(features.net(x[None]), features.net(y[None])):
                difference = lpips.normalize_tensor(p) - lpips.normalize_tensor(q)
                expected[i, j] += difference.square().sum(dim=1).mean()
    assert expected.min() > 1e-3
    assert torch.allclose(features.distances(a, b), expected, atol=1e-5)
    monkeypatch.setattr(quality, "NUMBERS_AT_ONCE", 2 * 96 * 29 * 29 * 2)
    assert torch.allclose(features.distances(a, b), expected, atol=1e-5)
    assert features.distances(a, a).diagonal().abs().max() < 1e-5


def test_of_defects_describes_each_image_inside_its_own_mask(features):
    pictures, masks = images(3), torch.zeros(3, 1, 64, 64)
    for place, mask in enumerate(masks):
        mask[:, 8 : 24 + 8 * place, 16:40] = 1
    described = features.of_defects(pictures, masks)
    alone = [describe_defects(features.net, pictures[i : i + 1], masks[i : i + 1]) for i in range(3)]
    assert torch.allclose(described, torch.cat(alone), atol=1e-6)
    with pytest.raises(ValueError, match="empty"):
        features.of_defects(pictures, masks * torch.tensor([1, 0, 1])[:, None, None, None])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_inception_sees_what_torchvisions_does(tmp_path):
    counters = [n for n in models.inception_v3(weights=None).state_dict() if n.endswith("num_batches_tracked")]
    file = make_network("inception_v3", tmp_path / "net.safetensors", **dict.fromkeys(counters[::2]))
    features = quality.Features("inception", file, CPU)
    model = models.inception_v3(weights=None, init_weights=False, transform_input=True)
    quality.read_weights(model.eval(), "inception_v3", file, "--flag")
    seen = []
    model.avgpool.register_forward_hook(lambda _, args, out: seen.append(out.flatten(1)))
    pictures = images(1, side=299)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    model((pictures / 2 + 0.5 - mean) / std)
    assert features.name == "Inception v3 (torchvision)" and seen[0].shape == (1, 2048)
    assert (features.pooled(pictures) - seen[0]).norm() < 1e-4 * seen[0].norm() > 0
    assert [level.shape[1] for level in features.net(pictures)] == [64, 192, 288, 768, 2048]


@pytest.mark.parametrize("network", quality.NETWORKS)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_a_pickle_and_another_network_are_refused(network, tmp_path):
    (tmp_path / "net.pth").write_bytes(pickle.dumps({"features.0.weight": 1}))
    other = make_network("mobilenet_v3_small", tmp_path / "other.safetensors")
    for file, words in ((tmp_path / "net.pth", "not a whole safetensors file"), (other, "tensors are not those of")):
        with pytest.raises(InputError, match=f"DF347 --net {file}: .*{words}"):
            quality.Features(network, file, CPU, flag="--net")


# KID


def mmd(x, y):
    """The unbiased estimate, with sums written out."""
    d, m, n = x.shape[1], len(x), len(y)
    kernel = lambda a, b: (np.dot(a, b) / d + 1) ** 3
    within_x = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def test_kid_is_the_polynomial_mmd():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(12, 7)), rng.normal(0.5, 2, size=(12, 7))
    mean, std = quality.kid(torch.tensor(real), torch.tensor(fake), subset_size=12, subsets=3, seed=0)
    assert mean == pytest.approx(mmd(real, fake), abs=1e-9) and std == pytest.approx(0, abs=1e-9)
    as_float32 = quality.kid(torch.tensor(real).float(), torch.tensor(fake).float(), 12, 3, 0)
    assert as_float32[0] == pytest.approx(mean, abs=1e-6)


def test_kid_of_subsets_is_repeatable_and_leaves_torchs_generator_alone():
    real, fake = torch.rand(30, 5), torch.rand(25, 5)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = quality.kid(real, fake, 10, 4, seed=0)
    assert torch.rand(1) == expected
    assert first == quality.kid(real, fake, 10, 4, seed=0) != quality.kid(real, fake, 10, 4, seed=1)
    assert first[1] > 0


def test_kid_averages_over_subsets():
    """All 6 x 6 pairs of subsets come up in many draws; their mean is that of the whole sets."""
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(4, 3)), rng.normal(1, 1, size=(4, 3))
    pairs = [(i, j) for i in range(4) for j in range(i)]
    values = [mmd(real[[*p]], fake[[*q]]) for p in pairs for q in pairs]
    mean, std = quality.kid(torch.tensor(real), torch.tensor(fake), 2, 4000, 0)
    assert mean == pytest.approx(np.mean(values), abs=4 * np.std(values) / 4000**0.5)
    assert std == pytest.approx(np.std(values), rel=0.1)


def test_subsets_larger_than_the_sets_are_lowered_and_told(caplog):
    real, fake = torch.rand(9, 5), torch.rand(6, 5)
    assert quality.kid(real, fake, 50, 3, 0) == quality.kid(real, fake, 6, 3, 0)
    assert [record.message for record in caplog.records] == ["KID on subsets of 6 images, not 50: there are no more"]
    with pytest.raises(ValueError, match="1 generated"):
        quality.kid(real, fake[:1], 50, 3, 0)


# IC-LPIPS


def points(*values):
    return torch.tensor(values)[:, None, None, None] * torch.ones(1, 3, 2, 2)


def apart(a, b):
    return (a[:, None, 0, 0, 0] - b[None, :, 0, 0, 0]).abs()


def test_ic_lpips_by_hand():
    generated = points(1.0, 9.0, 2.0, 12.0, 4.0, 101.0)
    # around 0: 1, 2, 4, whose pairs differ by 1, 3 and 2; around 10: 9 and 12; around 100 only one; around 900 none
    found = quality.ic_lpips(points(0.0, 10.0, 100.0, 900.0), generated, apart)
    assert found == (pytest.approx((2 + 3) / 2), 2, 2)
    with pytest.raises(ValueError, match="IC-LPIPS is undefined"):
        quality.ic_lpips(points(0.0, 10.0), points(0.0, 9.0), apart)


def test_nearest_by_hand():
    others = torch.tensor([[3.0, 5.0], [0.0, 0.0]])
    assert quality.nearest(torch.tensor([[0.0, 1.0], [5.0, 5.0]]), others).tolist() == [1, 2]
    same = torch.rand(3, 2000) * 1000
    assert quality.nearest(same, same).tolist() == [0, 0, 0]  # a copy has distance 0, not one of rounding


def test_quality_figures_name_the_network_and_all_settings(features):
    references, held_out, generated = images(2), images(5, seed=1), images(6, seed=2)
    found = quality.quality_figures(features, references, held_out, generated, subset_size=50, subsets=4, seed=3)
    mean, std = quality.kid(features.pooled(held_out), features.pooled(generated), 5, 4, 3)
    value, clusters, left_out = quality.ic_lpips(references, generated, features.distances)
    assert found == {
        "network": "SqueezeNet 1.0 (torchvision)",
        "kid": mean,
        "kid_std": std,
        "kid_subset_size": 5,
        "kid_subsets": 4,
        "kid_seed": 3,
        "ic_lpips": value,
        "ic_lpips_clusters": clusters,
        "ic_lpips_left_out": left_out,
    }


# Crops


def crop(size, box, side=32):
    """The crop of a picture of places: red is the column, green the row."""
    width, height = size
    mask = np.zeros((height, width), bool)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = True
    rows, columns = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8))
    return quality.defect_crop(image, mask, side)


def test_a_crop_is_a_square_around_the_defect():
    pixels, mask = crop((100, 80), (40, 30, 48, 36), side=24)  # 8 wide: the crop is 24 wide, at 32, 21
    assert pixels.shape == (3, 24, 24) and mask.shape == (1, 24, 24)
    assert ((pixels[:2, 0, 0] + 1) * 127.5).tolist() == pytest.approx([32, 21], abs=1e-3)
    assert mask.sum() == 8 * 6 and mask[0, 9:15, 8:16].all()


def test_a_crop_stays_inside_the_image_and_has_the_side_asked_for():
    pixels, mask = crop((100, 80), (0, 0, 8, 6), side=48)
    assert pixels.shape == (3, 48, 48) and mask[0, :12, :16].all() and mask.sum() == 12 * 16
    _, whole = crop((40, 30), (5, 5, 25, 25), side=30)  # 60 would not fit
    assert whole.sum() == 20 * 20
    _, small = crop((100, 80), (50, 40, 51, 41), side=64)  # not 3 pixels, but 16
    assert small.sum() == 4 * 4
    _, long = crop((100, 20), (0, 5, 100, 7), side=20)
    assert 0 < long.mean() < 0.2


def test_a_crop_needs_a_mask_that_fits():
    image = Image.new("RGB", (4, 3))
    with pytest.raises(ValueError, match="empty"):
        quality.defect_crop(image, np.zeros((3, 4), bool), 8)
    with pytest.raises(ValueError, match="differ in size"):
        quality.defect_crop(image, np.ones((4, 3), bool), 8)
