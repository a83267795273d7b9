"""The equations, the attention maps and the step, against hand-made numbers and the stock pipeline."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from toy_model import GRID, RESOLUTION, Prediction, make_batch, make_models, toy_pipeline

import train_defectfill as t
from defectfill.lora import LORA_TARGETS, lora_parameters
from defectfill_dataset import build_prompts, tokenize_prompts


def losses_and_gradients(models: t.Models, batch: dict, options: t.LossOptions) -> tuple[dict, dict]:
    losses = t.training_losses(models, batch, t.sample_noise(models, batch), options)
    losses["loss"].backward()
    models.store.pop()
    parameters = lora_parameters(models.unet, models.text_encoder)
    gradients = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return losses, gradients


ONLY_ATTENTION = t.LossOptions(lambda_def=0, lambda_obj=0, lambda_attn=1)


class Spy:
    """Stands before a module's forward and keeps what it was called with."""

    def __init__(self, module: torch.nn.Module):
        self.calls = []
        module.register_forward_pre_hook(lambda _, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True)


# Equations


def test_equations_5_to_9_by_hand():
    noise, pred = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[0.0, 0.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]]])
    assert t.defect_loss(noise, pred, mask) == pytest.approx(1 / 2)  # (1^2 + 0) / 2
    assert t.adjusted_mask(mask, 0.3).tolist() == [[[[1.0, pytest.approx(0.3)]]]]
    assert t.object_loss(noise, pred, mask, 0.3) == pytest.approx((1 + 0.09 * 4) / 2)  # alpha^2 on the background
    assert t.attention_loss(torch.tensor([[[0.5, 0.1]]]), mask) == pytest.approx((0.25 + 0.01) / 2)
    total = t.total_loss(torch.tensor(1.0), torch.tensor(10.0), torch.tensor(100.0), t.LossOptions())
    assert total == pytest.approx(0.5 + 2 + 5)


def test_mask_reduction_makes_small_and_large_defects_weigh_the_same():
    noise, pred = torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, 0, 0] = 1
    mask[1, :, 2:] = 1
    each = [t.defect_loss(noise[i : i + 1], pred[i : i + 1], mask[i : i + 1], "mask") for i in range(2)]
    assert each[0] == each[1] == t.defect_loss(noise, pred, mask, "mask") == 1
    assert t.object_loss(noise, pred, mask, 0.3, "mask") == pytest.approx(1)
    assert t.defect_loss(noise, pred, mask) == pytest.approx((1 + 48) / 128)


def test_object_loss_does_not_depend_on_the_random_mask():
    """M' built from M_rand."""
    models, batch = make_models(lora=False), make_batch()
    models.unet.forward = lambda x, *_, **__: Prediction(torch.zeros_like(x[:, :4]))
    models.store.pop = lambda: {"layer": torch.rand(2, 16)}
    draws = t.sample_noise(models, batch)
    first = t.training_losses(models, batch, draws, t.LossOptions())["l_obj"]
    second = t.training_losses(models, batch | {"random_mask": 1 - batch["random_mask"]}, draws, t.LossOptions())[
        "l_obj"
    ]
    by_hand = ((batch["mask"] + 0.3 * (1 - batch["mask"])) * draws.noise).square().mean()
    assert first == second == pytest.approx(by_hand.item())


# What the UNet and the VAE are given


def test_unet_gets_what_the_stock_pipeline_gives_it():
    """Channel order [latents, masked, mask]."""
    models, batch = make_models(lora=False), make_batch(1)
    pipe = toy_pipeline()
    pipe.unet, pipe.vae, pipe.text_encoder = models.unet, models.vae, models.text_encoder
    with torch.no_grad():  # a posterior without spread, of which the stock pipeline takes a sample and we the mode
        models.vae.quant_conv.weight[4:], models.vae.quant_conv.bias[4:] = 0, -30
    factor = pipe.vae_scale_factor
    seen = Spy(models.unet)
    pipe(
        "A nut with hole scratch",
        image=batch["pixel_values"] / 2 + 0.5,
        mask_image=t.upsample_mask(batch["mask"], factor),
        num_inference_steps=1,
        guidance_scale=1,
        height=RESOLUTION,
        width=RESOLUTION,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    t.training_losses(models, batch | {"random_mask": batch["mask"]}, t.sample_noise(models, batch), t.LossOptions())
    (stock, ours), (stock_text, our_text) = [call[0][0] for call in seen.calls], [call[1] for call in seen.calls]
    assert torch.equal(ours[:1, 4:5], batch["mask"]) and torch.equal(stock[:, 4:5], batch["mask"])
    assert torch.allclose(ours[:1, 5:], stock[:, 5:], atol=1e-5) and not torch.allclose(ours[:1, :4], stock[:, :4])
    assert torch.allclose(our_text["encoder_hidden_states"][1], stock_text["encoder_hidden_states"][0], atol=1e-6)


def test_both_passes_share_noise_timestep_and_noised_latent_and_see_the_clean_masked_image():
    """Masked latents from noisy ones, noise added to pixels, a draw of its own for each pass."""
    models, batch = make_models(lora=False), make_batch()
    unet, encoder, text = Spy(models.unet), Spy(models.vae.encoder), Spy(models.text_encoder)
    draws = t.sample_noise(models, batch)
    t.training_losses(models, batch, draws, t.LossOptions())
    assert len(unet.calls) == len(encoder.calls) == len(text.calls) == 1
    clean, m, r = batch["pixel_values"], *(t.upsample_mask(batch[k], 4) for k in ("mask", "random_mask"))
    images = encoder.calls[0][0][0]
    assert torch.equal(images, torch.cat([clean, clean * (1 - m), clean * (1 - r)]))
    (model_input, timesteps), _ = unet.calls[0]
    assert torch.equal(timesteps, draws.timesteps.repeat(2))
    assert torch.equal(model_input[:2, :4], model_input[2:, :4])
    latents = models.vae.encode(images).latent_dist
    scale = models.vae.config.scaling_factor
    x_0 = (latents.mean[:2] + latents.std[:2] * draws.posterior) * scale
    assert torch.allclose(model_input[:2, :4], models.noise_scheduler.add_noise(x_0, draws.noise, draws.timesteps))
    assert torch.equal(model_input[:, 4:5], torch.cat([batch["mask"], batch["random_mask"]]))
    assert torch.allclose(model_input[:, 5:], latents.mean[2:] * scale)
    assert text.calls[0][0][0].shape == (2, 77)  # four prompts in the batch, two distinct


def test_each_row_gets_the_embedding_of_its_own_prompt():
    models, rows = make_models(), torch.tensor([1, 0, 1])
    expected = models.text_encoder(models.tokens.input_ids[rows])[0]
    assert torch.allclose(t.encode_prompts(models.text_encoder, models.tokens, rows), expected, atol=1e-6)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)


@pytest.mark.parametrize("attention_pass", ["object", "defect"])
def test_in_a_batch_of_several_types_each_row_has_its_own_prompt_and_phrase(attention_pass):
    """Phrase weights of the other pass, or of the first sample; embeddings in sorted order."""
    tokenizer, types = toy_pipeline().tokenizer, ("deep scratch", "hole", "deep scratch")
    pairs = build_prompts(["hole", "deep scratch"], "metal nut", "{defect}")
    tokens = tokenize_prompts(tokenizer, pairs.values())
    prompts = [pairs[x].defect for x in types] + [pairs[x].object for x in types]
    rows = torch.tensor([tokens.index[prompt] for prompt in prompts])
    models = make_models()._replace(tokens=tokens)
    batch = make_batch(3) | {"defect_prompt": rows[:3], "object_prompt": rows[3:]}
    unet = Spy(models.unet)
    options = t.LossOptions(attention_pass=attention_pass)
    found = t.training_losses(models, batch, t.sample_noise(models, batch), options)["attention_map"]
    args, kwargs = unet.calls[0]
    ids = tokenizer([prompt.text for prompt in prompts], padding="max_length", return_tensors="pt").input_ids
    assert torch.allclose(kwargs["encoder_hidden_states"], models.text_encoder(ids)[0], atol=1e-6)
    for i, type_ in enumerate(types):
        row = i + 3 * (attention_pass == "object")
        of_phrase = torch.isin(ids[row], torch.tensor(tokenizer(type_, add_special_tokens=False).input_ids)).float()
        models.store.record(slice(row, row + 1), of_phrase[None] / of_phrase.sum())
        models.unet(*args, **kwargs)
        assert torch.allclose(found[i], t.attention_map(models.store.pop(), (GRID, GRID))[0], atol=1e-6)


def test_draws_depend_on_each_samples_seed_alone():
    models = make_models(lora=False)
    batch = make_batch(3)
    draws = t.sample_noise(models, batch)
    alone = t.sample_noise(models, {k: v[2:] for k, v in batch.items()})
    assert torch.equal(draws.noise[2], alone.noise[0]) and draws.timesteps[2] == alone.timesteps[0]
    assert not torch.equal(draws.noise[0], draws.noise[1])


def test_no_value_of_the_device_is_read_in_a_step(monkeypatch):
    """On a GPU each such reading waits for all work queued there; the meta device has no values to read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta tensors have none
    models, meta = make_models(), torch.device("meta")
    for module in (models.unet, models.text_encoder, models.vae.enable_slicing() or models.vae):
        module.to(meta)
    batch = t.on_device(make_batch(), meta)
    losses = t.training_losses(models, batch, t.sample_noise(models, batch), t.LossOptions())
    losses["loss"].backward()
    assert losses["loss"].is_meta and batch["mask"].is_meta and batch["seed"].tolist() == [0, 1]


def test_v_prediction_bases_are_trained_on_velocity():
    models, batch = make_models(lora=False), make_batch()
    draws = t.sample_noise(models, batch)
    models.noise_scheduler.register_to_config(prediction_type="v_prediction")
    latents = t.encode_images(models.vae, batch["pixel_values"], [batch["mask"]])
    x_0, _ = latents.sample(draws.posterior, models.vae.config.scaling_factor)
    velocity = models.noise_scheduler.get_velocity(x_0, draws.noise, draws.timesteps)
    models.unet.forward = lambda x, *_, **__: Prediction(torch.cat([velocity, velocity]))
    models.store.pop = lambda: {"layer": torch.rand(2, 16)}
    losses = t.training_losses(models, batch, draws, t.LossOptions())
    assert losses["l_def"] == losses["l_obj"] == 0


# Attention maps


def test_recording_processor_equals_the_stock_one():
    models = make_models()
    stock = toy_pipeline().unet
    t.add_lora(stock, toy_pipeline().text_encoder, rank=4, alpha=8, dropout=0.0)
    stock.load_state_dict(models.unet.state_dict())
    x, step, text = torch.randn(2, 9, GRID, GRID), torch.tensor([5, 900]), torch.randn(2, 77, 32)
    expected = stock(x, step, text).sample
    assert torch.equal(models.unet(x, step, text).sample, expected)
    models.store.record(slice(1, 2), torch.full((1, 77), 1 / 77))
    assert torch.equal(models.unet(x, step, text).sample, expected)
    maps = models.store.pop()
    assert len(maps) == 4 and all("up_blocks" in name and "attn2" in name for name in maps)
    assert all(torch.allclose(m, torch.full_like(m, 1 / 77)) for m in maps.values())  # probabilities sum to 1


def test_map_is_the_softmax_of_the_phrases_tokens_averaged_over_heads():
    models, x, text = make_models(), torch.randn(1, 16, 32), torch.randn(1, 77, 32)
    attn = dict(models.unet.named_modules())["up_blocks.1.attentions.0.transformer_blocks.0.attn2"]
    weights = torch.zeros(1, 77)
    weights[0, 4:6] = 0.5  # two sub-tokens
    models.store.record(slice(0, 1), weights)
    attn(x, encoder_hidden_states=text)
    (recorded,) = models.store.pop().values()
    q, k = attn.head_to_batch_dim(attn.to_q(x)), attn.head_to_batch_dim(attn.to_k(text))
    reference = attn.get_attention_scores(q, k).unflatten(0, (1, attn.heads)).mean(dim=1)[..., 4:6].mean(dim=-1)
    assert attn.heads == 2 and torch.allclose(recorded, reference, atol=1e-6)


def test_maps_of_different_samples_are_not_mixed():
    """A mean over batch and heads together."""
    models, batch = make_models(), make_batch()
    draws = t.sample_noise(models, batch)
    first = t.training_losses(models, batch, draws, t.LossOptions())["attention_map"]
    other = batch | {"pixel_values": torch.cat([batch["pixel_values"][:1], -batch["pixel_values"][1:]])}
    second = t.training_losses(models, other, draws, t.LossOptions())["attention_map"]
    assert torch.allclose(first[0], second[0], atol=1e-6)
    assert not torch.allclose(first[1], second[1], atol=1e-6)


def test_layers_of_different_sizes_are_resized_before_their_mean():
    """Maps stacked without resizing."""
    small, large = torch.zeros(1, 4), torch.zeros(1, 16)
    small[0, 0], large[0, 0] = 1, 1
    both = t.attention_map({"a": small, "b": large}, (8, 8))
    alone = [t.attention_map({"x": m}, (8, 8)) for m in (small, large)]
    assert both.shape == (1, 8, 8)
    assert torch.allclose(both, (alone[0] + alone[1]) / 2)
    reference = F.interpolate(small.view(1, 1, 2, 2), (8, 8), mode="bilinear")[:, 0]
    assert torch.allclose(alone[0], reference)
    models = make_models()
    models.store.record(slice(0, 2), torch.zeros(2, 77))
    models.unet(torch.randn(2, 9, GRID, GRID), 5, torch.randn(2, 77, 32))
    assert sorted({m.shape[1] for m in models.store.pop().values()}) == [16, 64]  # the toy UNet has two sizes


def test_minmax_stretches_each_sample_by_itself():
    maps = {"a": torch.rand(2, 64) * torch.tensor([[1.0], [100.0]])}
    stretched = t.attention_map(maps, (8, 8), "minmax")
    assert stretched.amin(dim=(1, 2)).tolist() == [0, 0]
    assert stretched.amax(dim=(1, 2)).tolist() == pytest.approx([1, 1])
    assert torch.equal(stretched.flatten(1).argmax(dim=1), maps["a"].argmax(dim=1))  # not upside down
    assert torch.equal(t.attention_map({"a": torch.ones(1, 4)}, (2, 2), "minmax"), torch.zeros(1, 2, 2))


@pytest.mark.parametrize("attention_pass", ["object", "defect"])
def test_the_chosen_pass_feeds_the_attention_map(attention_pass):
    models, batch = make_models(), make_batch()
    draws = t.sample_noise(models, batch)
    options = t.LossOptions(attention_pass=attention_pass)
    first = t.training_losses(models, batch, draws, options)["attention_map"]
    changed = t.training_losses(models, batch | {"random_mask": 1 - batch["random_mask"]}, draws, options)[
        "attention_map"
    ]
    assert torch.allclose(first, changed, atol=1e-6) == (attention_pass == "defect")


def test_attention_loss_alone_trains_decoder_cross_attention_and_text_encoder():
    """Detached maps; text encoder under no_grad."""
    _, gradients = losses_and_gradients(make_models(), make_batch(), ONLY_ATTENTION)
    decoder = [g for n, g in gradients.items() if "up_blocks" in n and "attn2_to_k" in n]
    queries = [g for n, g in gradients.items() if "up_blocks" in n and "attn2_to_q" in n]
    text = [g for n, g in gradients.items() if n.startswith("lora_te") and "layers_0" in n]
    assert len(decoder) == len(queries) == 8 and text
    assert all(g is not None and g.abs().sum() > 0 for g in [*decoder, *queries, *text])


@pytest.mark.parametrize("options", [t.LossOptions(), ONLY_ATTENTION], ids=["all", "attention"])
def test_gradients_are_the_same_with_and_without_gradient_checkpointing(options):
    models, batch = make_models(), make_batch()
    models.unet.train(), models.text_encoder.train()
    _, plain = losses_and_gradients(models, batch, options)
    models.unet.enable_gradient_checkpointing()
    models.text_encoder.activation_checkpointing_enable()
    runs = Spy(dict(models.unet.named_modules())["up_blocks.1.attentions.1.transformer_blocks.0.attn2"])
    _, checkpointed = losses_and_gradients(models, batch, options)
    assert len(runs.calls) == 2  # the layer did run again
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient is None and checkpointed[name] is None or torch.equal(gradient, checkpointed[name]), name
    assert not models.store.maps


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_every_lora_tensor_gets_a_gradient_from_the_whole_loss(targets):
    _, gradients = losses_and_gradients(make_models(targets=targets), make_batch(), t.LossOptions())
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients.values())


def test_attention_overlap():
    mask = torch.zeros(4, 4)
    mask[0] = 1
    assert t.attention_overlap(mask + 0.0, mask) == (1, 1)
    assert t.attention_overlap(torch.ones(4, 4).tril() + 0.01, mask)[1] < 0.3
    iou, share = t.attention_overlap(1 - mask, mask)
    assert (iou, share) == (0, 0)


# LoRA and precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_stay_fp32_under_autocast(dtype):
    models = make_models()
    weights = torch.full((2, 77), 1 / 77)
    models.store.record(slice(0, 2), weights)
    with torch.autocast("cpu", dtype):
        models.unet(torch.randn(2, 9, GRID, GRID), 5, torch.randn(2, 77, 32))
    maps = models.store.pop()
    assert all(m.dtype == torch.float32 and torch.allclose(m, weights[:, :1], atol=1e-7) for m in maps.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lora_weights_are_fp32_and_alone_trainable(dtype):
    pipe = toy_pipeline()
    unet, text_encoder = pipe.unet.to(dtype), pipe.text_encoder.to(dtype)
    t.add_lora(unet, text_encoder, rank=4, alpha=8, dropout=0.1)
    names = {name for model in (unet, text_encoder) for name, p in model.named_parameters() if p.requires_grad}
    assert names and all(".lora_" in name for name in names)
    assert all(p.dtype == torch.float32 for p in lora_parameters(unet, text_encoder).values())
    assert unet.conv_in.weight.dtype == dtype
    layers = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for name in names}
    assert layers == {"to_q", "to_k", "to_v", "0", "q_proj", "k_proj", "v_proj", "out_proj"}


def test_not_casting_activations_up_changes_no_bit_under_autocast():
    models, batch = make_models(), make_batch()
    draws = t.sample_noise(models, batch)
    results = []
    for cast in (False, True):
        for module in models.unet.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = cast
        with torch.autocast("cpu", torch.bfloat16):
            results.append(t.training_losses(models, batch, draws, t.LossOptions())["loss"])
    assert torch.equal(*results)


def test_adapters_scale_by_alpha_over_rank():
    models = make_models()
    module = dict(models.unet.named_modules())["up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"]
    assert module.scaling["default"] == 2
    assert math.isclose(module.r["default"], 4)


def layers_with_lora(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def test_each_choice_of_layers_is_what_it_says():
    """`all`: every linear layer and convolution of the blocks, as the "conv" LoRA of other trainers."""
    found = {}
    for targets in LORA_TARGETS:
        pipe = toy_pipeline()
        t.add_lora(pipe.unet, pipe.text_encoder, rank=4, alpha=8, dropout=0.0, targets=targets)
        found[targets] = [set(layers_with_lora(model)) for model in (pipe.unet, pipe.text_encoder)]
    plain = toy_pipeline()
    every, of_text = (
        {name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
        for model in (plain.unet, plain.text_encoder)
    )
    ends = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert found["all"][0] == every - ends
    assert {"down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"} < found["all"][0]
    assert found["attention+ff"][0] == {name for name in every if ".attn" in name or ".ff." in name}
    assert found["attention"][0] == {name for name in every if ".attn" in name}
    assert found["all"][1] == found["attention+ff"][1] == of_text - {name for name in of_text if "embed" in name}
    assert found["attention"][1] == {name for name in of_text if ".self_attn." in name}


def test_convolutions_of_another_rank_have_the_same_strength():
    pipe = toy_pipeline()
    t.add_lora(pipe.unet, pipe.text_encoder, rank=4, alpha=12, dropout=0.0, targets="all", conv_rank=2)
    layers = layers_with_lora(pipe.unet)
    ranks = {name: module.r["default"] for name, module in layers.items()}
    assert {rank for name, rank in ranks.items() if ".conv" in name} == {2}
    assert {rank for name, rank in ranks.items() if ".conv" not in name} == {4}
    assert {module.scaling["default"] for module in layers.values()} == {3}
