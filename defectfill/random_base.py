"""Base models of random weights: a tokenizer of given words, and a pipeline in the sizes of Stable Diffusion 2."""

import collections
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .sampling import assemble_pipeline


def make_tokenizer(words: Iterable[str], model_max_length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer that keeps each of `words` whole and spells every other word in bytes.

    Byte pairs are merged in an order that depends on the words alone (the tokenizers library breaks ties at random).
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in spelled):
        counts = collections.Counter(pair for word in spelled for pair in zip(word, word[1:]))
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        spelled = [merge(word, merges[-1]) for word in spelled]
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *dict.fromkeys("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)


def merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """The word with every occurrence of the pair, from the left, made one symbol."""
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def random_sd2_pipeline(device: torch.device, dtype: torch.dtype) -> StableDiffusionInpaintPipeline:
    """Random weights of Stable Diffusion 2 inpainting's size, made on `device`, in seconds on a GPU."""
    text = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
    with device:  # one model after the other, so that only one at a time is in fp32
        text_encoder = CLIPTextModel(CLIPTextConfig(**text, hidden_act="gelu")).to(dtype)
        unet = UNet2DConditionModel(
            sample_size=64, in_channels=9, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20), use_linear_projection=True,
        ).to(dtype)  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).to(dtype)  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    return assemble_pipeline(unet, text_encoder, vae, scheduler, make_tokenizer("a photo of with sks".split()))
