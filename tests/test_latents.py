"""The latent cache: the same step as without it, no VAE call once it is full, variants that differ."""

import pytest
import torch
from folders import make_mvtec
from toy_model import RESOLUTION, make_models, toy_pipeline

import train_defectfill as t
from defectfill.latents import LatentCache, to_device
from defectfill_dataset import TrainingSamples, build_prompts, load_defect_pairs, tokenize_prompts
from defectfill_dataset.samples import BOXES_PER_VARIANT


CPU = torch.device("cpu")


@pytest.fixture
def make_samples(tmp_path):
    dataset = load_defect_pairs(make_mvtec(tmp_path / "nut"), split="all")["train"]
    prompts = build_prompts(["hole"], "nut", "{defect} scratch")

    def make(variants: int) -> TrainingSamples:
        tokens = tokenize_prompts(t.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"), prompts.values())
        options = dict(resolution=RESOLUTION, vae_scale_factor=4, seed=0, max_scale=1.5, variants=variants)
        return TrainingSamples(dataset, prompts, tokens, **options)

    toy_pipeline().tokenizer.save_pretrained(tmp_path / "tokenizer")
    return make


def collated(samples: TrainingSamples, step: int, size: int = 3) -> dict:
    return torch.utils.data.default_collate([samples[step, i, size] for i in range(size)])


def uncached(samples: TrainingSamples, batch: dict) -> dict:
    """The same crops and masks as pixels."""
    rows = [samples.variant(i, k) for i, k in zip(batch["index"].tolist(), batch["variant"].tolist())]
    pixels, masks, boxes = zip(*rows)
    random_masks = torch.stack([of_row[j] for of_row, j in zip(boxes, batch["boxes"].tolist())])
    return batch | {"pixel_values": torch.stack(pixels), "mask": torch.stack(masks), "random_mask": random_masks}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_from_the_cache_is_the_step_without_it(make_samples, dtype):
    """Bit for bit, in the VAE's precision."""
    models, samples = make_models(), make_samples(3)
    models.vae.to(dtype).enable_slicing()
    cache = LatentCache(samples, models.vae, CPU)
    for step in range(4):
        batch = collated(samples, step)
        assert "pixel_values" not in batch
        plain, cached = uncached(samples, batch), cache.load(batch)
        sample = t.sample_noise(models, plain)
        assert all(torch.equal(a, b) for a, b in zip(sample[:3], t.sample_noise(models, cached)))
        losses = [t.training_losses(models, b, sample, t.LossOptions()) for b in (plain, cached)]
        assert all(torch.equal(losses[0][k], losses[1][k]) for k in losses[0])
        assert torch.equal(cached["random_mask"], plain["random_mask"])


def test_an_entry_does_not_depend_on_when_it_was_filled(make_samples):
    models, samples = make_models(), make_samples(2)
    models.vae.enable_slicing()
    first, second = (LatentCache(samples, models.vae, CPU) for _ in range(2))
    for step in range(8):
        first.load(collated(samples, step))
    late, early = first.load(collated(samples, 7)), second.load(collated(samples, 7))
    assert torch.equal(late["latents"].mean, early["latents"].mean)
    assert torch.equal(late["latents"].masked[1], early["latents"].masked[1])


def test_a_full_cache_calls_no_vae_and_touches_no_pixel_and_sends_the_vae_away(make_samples, monkeypatch):
    models, samples = make_models(), make_samples(2)
    encode, variant, moves, calls = models.vae.encode, samples.variant, [], []
    monkeypatch.setattr(models.vae, "encode", lambda x: calls.append(len(x)) or encode(x))
    monkeypatch.setattr(models.vae, "to", moves.append)
    monkeypatch.setattr(samples, "variant", lambda *key: calls.append(key) or variant(*key))
    cache, step = LatentCache(samples, models.vae, CPU), 0
    while len(cache.entries) < 4 * 2:
        assert not moves
        cache.load(collated(samples, step := step + 1))
    assert moves == ["cpu"] and calls[1::2] == [2 + BOXES_PER_VARIANT] * 8 and len(set(calls[::2])) == 8
    assert cache.nbytes == 8 * (4 * (3 + BOXES_PER_VARIANT) + 1 + BOXES_PER_VARIANT) * 8 * 8 * 4
    monkeypatch.setattr(samples, "resize_and_crop", None)
    for further in range(10):
        cache.load(collated(samples, step + further))
    assert len(calls) == 16 and len(moves) == 1


def test_variants_and_their_boxes_differ_and_all_are_drawn(make_samples):
    samples = make_samples(3)
    pixels, _, boxes = zip(*(samples.variant(0, k) for k in range(3)))
    assert all(torch.equal(a, b) for a, b in zip(samples.variant(0, 1), make_samples(3).variant(0, 1)))
    assert not torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[1], pixels[2])
    assert not torch.equal(samples.variant(1, 0)[2], boxes[0])  # nor are those of two images alike
    assert len({tuple(mask.flatten().tolist()) for of_variant in boxes for mask in of_variant}) == 3 * 4
    items = [samples[step, 0, 1] for step in range(200)]
    assert {(item["index"], item["variant"]) for item in items} == {(i, k) for i in range(4) for k in range(3)}
    assert {item["boxes"] for item in items} == set(range(BOXES_PER_VARIANT))


def test_order_and_seeds_of_the_draws_stay_those_without_a_cache(make_samples):
    cached, fresh = make_samples(3), make_samples(0)
    for step in range(6):
        a, b = cached[step, 1, 2], fresh[step, 1, 2]
        assert all(a[k] == b[k] for k in ("index", "seed", "defect_prompt", "object_prompt"))


def test_a_run_encodes_each_variant_once(train, monkeypatch):
    encode, calls = t.AutoencoderKL.encode, []
    monkeypatch.setattr(t.AutoencoderKL, "encode", lambda self, x: calls.append(len(x)) or encode(self, x))
    train("--cache_latents", "1", "--max_train_steps", "6")
    of_variants = [2 + BOXES_PER_VARIANT] * 2
    assert calls == [3] * 2 + of_variants + [3] * 4  # references before; then references and held-out defects after


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the VAE changes the device on a GPU only")
def test_the_vae_comes_back_for_validation_and_the_end(train, monkeypatch):
    losses, seen = t.training_losses, []

    def training_losses(models, batch, *rest):
        seen.append((torch.is_grad_enabled(), models.vae.device.type))
        return losses(models, batch, *rest)

    monkeypatch.setattr(t, "training_losses", training_losses)
    train("--cache_latents", "1", "--max_train_steps", "6", "--validation_steps", "5",
          "--validation_inference_steps", "1")  # fmt: skip
    assert set(seen) == {(False, "cuda"), (True, "cpu")}


def test_tensors_reach_the_device():
    assert to_device(torch.ones(2), CPU).tolist() == [1, 1]
