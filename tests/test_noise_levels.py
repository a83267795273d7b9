"""How often each noise level is drawn, how much it counts, and the error of x_0 there."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from toy_model import Prediction, make_batch, make_models

import train_defectfill as t
from defectfill.noise_levels import NoiseOptions, error_weights, predicted_x_0, timestep_weights
from defectfill.runs import logs


EVERY = torch.arange(1000)


def make_scheduler(prediction_type: str = "epsilon", **changes) -> DDPMScheduler:
    """Stable Diffusion's."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type, **changes
    )


def test_min_snr_weights_are_those_of_diffusers_text_to_image_script():
    for prediction_type, denominator in (("epsilon", 0), ("v_prediction", 1)):
        scheduler = make_scheduler(prediction_type)
        snr = compute_snr(scheduler, EVERY)
        theirs = torch.stack([snr, 5 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / (snr + denominator)
        assert torch.allclose(error_weights(scheduler, EVERY, 5, 0).flatten(), theirs)


def test_the_weights_of_high_noise_have_mean_1_and_grow_as_the_power_says():
    scheduler = make_scheduler()
    weights = error_weights(scheduler, EVERY, None, 0.5).flatten()
    assert weights.mean().item() == pytest.approx(1)
    ratio = (scheduler.alphas_cumprod[0] / scheduler.alphas_cumprod[999]).sqrt()
    assert weights[999] / weights[0] == pytest.approx(ratio.item(), rel=1e-4)
    assert error_weights(scheduler, EVERY, None, 0) is None


@pytest.mark.parametrize("options", [(5, 0), (None, 1)])
def test_a_last_timestep_of_pure_noise_keeps_weights_finite(options):
    for prediction_type in ("epsilon", "v_prediction"):
        scheduler = make_scheduler(prediction_type, rescale_betas_zero_snr=True)
        assert error_weights(scheduler, EVERY, *options).isfinite().all()


@pytest.mark.parametrize(
    "strategy, favoured",
    [
        ("none", range(0)), ("earlier", range(0, 100)), ("later", range(900, 1000)), ("range", range(200, 300)),
    ],
)  # fmt: skip
def test_favoured_timesteps(strategy, favoured):
    options = NoiseOptions(0, strategy, 3, 200, 300, 0.1)
    assert torch.equal(timestep_weights(options, 1000), 1 + 2 * torch.isin(EVERY, torch.tensor(favoured)).float())


def test_timesteps_are_drawn_by_their_weights_and_from_each_samples_seed():
    models, batch = make_models(lora=False), make_batch(2)
    batch["seed"] = torch.arange(400)
    options = NoiseOptions(timestep_bias_strategy="later", timestep_bias_multiplier=9)
    drawn, again = (t.sample_noise(models, batch, options) for _ in range(2))
    assert torch.equal(drawn.timesteps, again.timesteps)
    assert 0.68 < (drawn.timesteps >= 750).float().mean() < 0.82  # 9 / (9 + 3)
    plain = t.sample_noise(models, batch)
    assert torch.equal(drawn.noise, plain.noise) and torch.equal(drawn.posterior, plain.posterior)


def test_timesteps_are_drawn_from_all_noise_levels():
    batch = make_batch(2) | {"seed": torch.arange(400)}
    drawn = t.sample_noise(make_models(lora=False), batch).timesteps
    assert 0 <= drawn.min() < 50 and 950 <= drawn.max() < 1000
    assert 80 < (drawn >= 750).sum() < 120 and 80 < (drawn < 250).sum() < 120


def test_offset_noise_shifts_each_channel_and_nothing_else():
    models, batch = make_models(lora=False), make_batch(2)
    plain, shifted = (t.sample_noise(models, batch, NoiseOptions(noise_offset=x)) for x in (0, 0.1))
    shift = shifted.noise - plain.noise
    assert torch.allclose(shift, shift[..., :1, :1].expand_as(shift), atol=1e-6)
    assert len(shift[..., 0, 0].unique()) == 2 * shift.shape[1] and 0 < shift.abs().max() < 0.5
    assert torch.equal(shifted.timesteps, plain.timesteps) and torch.equal(shifted.posterior, plain.posterior)


@pytest.mark.parametrize("reduction", ["mean", "mask"])
def test_weights_count_in_the_defect_and_object_loss_and_not_in_that_of_attention(reduction):
    models, batch = make_models(), make_batch(1)
    sample = t.sample_noise(models, batch)._replace(timesteps=torch.tensor([950]))
    plain = t.training_losses(models, batch, sample, t.LossOptions(loss_reduction=reduction))
    for options in (t.LossOptions(snr_gamma=0.001), t.LossOptions(high_noise_power=0.5)):
        weighted = t.training_losses(models, batch, sample, options._replace(loss_reduction=reduction))
        weight = error_weights(models.noise_scheduler, sample.timesteps, options.snr_gamma, options.high_noise_power)
        assert abs(weight.item() - 1) > 0.1
        for term in ("l_def", "l_obj"):
            assert torch.allclose(weighted[term], weight * plain[term])
        assert torch.equal(weighted["l_attn"], plain["l_attn"])


def test_figures_that_compare_runs_do_not_depend_on_their_weights():
    models = make_models()
    items = [{k: v[0] for k, v in make_batch(1).items()}]
    options = (t.LossOptions(), t.LossOptions(snr_gamma=0.001), t.LossOptions(high_noise_power=0.5))
    plain, *weighted = (t.measure(models, items, each, torch.device("cpu")) for each in options)
    assert weighted == [plain, plain]


def test_figures_that_compare_runs_are_of_fixed_noise_levels_and_noise():
    models, calls = make_models(), []
    models.unet.register_forward_pre_hook(lambda _, args: calls.append(args))
    items = [{k: v[0] for k, v in make_batch(1, seed).items()} for seed in (0, 1)]
    first, again = (t.measure(models, items, t.LossOptions(), torch.device("cpu")) for _ in range(2))
    assert first == again
    fixed = [[step] * 2 for step in (200, 400, 600, 800, *t.X0_TIMESTEPS)]  # a row for each pass
    assert [timesteps.tolist() for _, timesteps in calls] == fixed * 4


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x_0_follows_from_the_prediction(prediction_type):
    scheduler = make_scheduler(prediction_type)
    x_0, noise, timesteps = *torch.randn(2, 5, 4, 3, 3), torch.tensor(t.X0_TIMESTEPS)
    prediction = noise if prediction_type == "epsilon" else scheduler.get_velocity(x_0, noise, timesteps)
    found = predicted_x_0(scheduler, scheduler.add_noise(x_0, noise, timesteps), prediction, timesteps)
    assert torch.allclose(found, x_0, atol=1e-5)


def test_the_error_of_x_0_is_that_inside_the_mask_for_each_prompt():
    """A UNet that is right but for one known error, in the row of the object prompt and inside the mask only."""
    models, batch = make_models(lora=False), make_batch(1)
    sample = t.sample_noise(models, batch)
    right, mask = sample.noise, batch["mask"]
    outside = 7 * (1 - mask)
    models.unet.forward = lambda x, *_, **__: Prediction(torch.cat([right + outside, right + outside + 0.1 * mask]))
    batch["latents"] = latents = t.encode_images(models.vae, batch["pixel_values"], [mask])
    errors, x_0 = t.x0_errors(models, batch, sample)
    found = {k: dict(zip(t.X0_TIMESTEPS, row)) for k, row in zip(t.PASSES, errors.tolist())}
    assert all(error == pytest.approx(0, abs=1e-4) for error in found["defect"].values())
    for step, error in found["object"].items():
        alpha_bar = models.noise_scheduler.alphas_cumprod[step].item()
        assert error == pytest.approx(0.01 * (1 - alpha_bar) / alpha_bar, rel=0.02, abs=1e-4)
    whole, _ = latents.sample(sample.posterior, models.vae.config.scaling_factor)
    assert torch.equal(x_0, whole[0][:, mask[0, 0] > 0.5])


def test_the_log_tells_the_errors_by_timestep(caplog):
    errors = {"defect": {"999": 0.5, "400": 0.0625}, "object": {"999": 9.0, "400": 8.0}, "variance": 0.25}
    measures = {when: {"loss": 1, "attention_iou": 0, "x0_error": errors} for when in ("before", "after")}
    with caplog.at_level("INFO"):
        logs.log_measures(measures | {"held_out": {}, "validation": {}})
    told = "Error of x_0 inside the mask, training images, t = 999 400: defect 0.50 0.06, object 9.00 8.00 prompt"
    assert told in caplog.text and "held-out" not in caplog.text
