"""Make a small inpainting pipeline of the same classes as Stable Diffusion 2 inpainting, without a download.

    python scripts/make_tiny_base.py --output_dir tiny-base

Its weights are random: it shows that everything runs and loads, not what a picture should look like.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


WORDS = """a an the photo picture close up of on with and in good sks part metal nut brushed plate woven cloth
grained wood hazelnut bottle cable capsule carpet grid leather pill screw tile toothbrush transistor zipper magnetic
hole crack cut print scratch stain dent blowhole broken large small contamination bent color faulty imprint thread
fold glue poke rough oil gray stroke flip missing wire defect damaged""".split()


def make_tokenizer(words: Iterable[str], model_max_length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer that keeps each of `words` whole and spells every other word in bytes."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # more than there are merges to learn
        min_frequency=1,
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(sorted(set(words)), trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = [*sorted(alphabet), *(f"{c}</w>" for c in sorted(alphabet))]
    tokens += [t for t in sorted(model["vocab"], key=model["vocab"].get) if t not in set(tokens)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)


def build_pipeline(
    vae_channels: Sequence[int] = (32, 64, 64),
    unet_channels: Sequence[int] = (64, 128),
    layers_per_block: int = 1,
    text_width: int = 64,
    text_layers: int = 2,
    model_max_length: int = 77,
    resolution: int = 128,
    words: Iterable[str] = WORDS,
) -> StableDiffusionInpaintPipeline:
    """A pipeline of random weights; latents are smaller than images by 2 ** (len(vae_channels) - 1)."""
    tokenizer = make_tokenizer(words, model_max_length)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=text_width,
            intermediate_size=2 * text_width,
            num_hidden_layers=text_layers,
            num_attention_heads=4,
            max_position_embeddings=model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    levels = len(unet_channels)
    unet = UNet2DConditionModel(
        sample_size=resolution // 2 ** (len(vae_channels) - 1),
        in_channels=9,
        out_channels=4,
        block_out_channels=tuple(unet_channels),
        layers_per_block=layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=text_width,
        attention_head_dim=tuple(channels // 16 for channels in unet_channels),  # the number of heads, as in SD 2
        norm_num_groups=8,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=tuple(vae_channels),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=resolution,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    return StableDiffusionInpaintPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--resolution", type=int, default=128, metavar="PX", help="Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Default: %(default)s.")
    args = parser.parse_args()
    set_seed(args.seed)
    build_pipeline(resolution=args.resolution).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
