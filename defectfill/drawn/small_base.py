"""The shape of a small inpainting base of the classes of Stable Diffusion 2 inpainting, and the words it knows."""

import dataclasses
from collections.abc import Iterable, Sequence

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ..random_base import make_tokenizer
from ..sampling import assemble_pipeline
from .parts import PARTS


COLOURS = {"black": (14, 12, 12), "dark": (45, 40, 38), "gray": (125, 125, 125), "bright": (205, 202, 196),
           "white": (245, 243, 240), "pale": (205, 165, 115), "brown": (95, 55, 25), "red": (170, 40, 35),
           "orange": (205, 115, 45), "yellow": (215, 190, 70), "green": (60, 120, 60), "blue": (50, 80, 160),
           "purple": (110, 60, 130)}  # fmt: skip
GREYS = 5  # the first so many
SHAPES = ("spot", "line", "zigzag", "ring", "patch", "specks")
WORDS = f"""a an the photo picture close up of on with and in good sks part {" ".join([*COLOURS, *SHAPES, *PARTS])}
faint deep raised plain same rim open short mouse bite spur pin copper pcb
metal brushed woven grained wood magnetic hazelnut bottle cable capsule carpet grid leather pill screw tile toothbrush
transistor zipper hole crack cut print scratch stain dent tear blowhole break fray uneven broken large small
contamination bent color faulty imprint thread fold glue poke rough oil stroke flip missing wire defect""".split()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shape of a base; the defaults are those of the one that ships.

    Args:
        attention: for each UNet level, from the picture down, whether it has (self- and cross-) attention on the way
            down; on the way up every level but the lowest has.
        head: channels of an attention head.
        context: tokens that the text encoder reads.
        prediction_type: what the UNet predicts, "epsilon" or "v_prediction" (Stable Diffusion 2's own other one).
    """

    resolution: int = 128
    vae_channels: Sequence[int] = (16, 32, 64)
    unet_channels: Sequence[int] = (64, 96, 120)
    attention: Sequence[bool] = (False, True, True)
    head: int = 32
    text_width: int = 96
    text_layers: int = 2
    context: int = 24
    prediction_type: str = "epsilon"


def build_pipeline(sizes: Sizes, words: Iterable[str] = WORDS) -> StableDiffusionInpaintPipeline:
    """A pipeline of random weights; a latent cell is 2 ** (len(vae_channels) - 1) pixels a side."""
    tokenizer = make_tokenizer(words, sizes.context)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text_width,
            intermediate_size=2 * sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=4,
            max_position_embeddings=sizes.context,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    levels = len(sizes.unet_channels)
    up = [True] * (levels - 1) + [False]  # from the top level down
    unet = UNet2DConditionModel(
        sample_size=sizes.resolution // 2 ** (len(sizes.vae_channels) - 1),
        in_channels=9,
        out_channels=4,
        block_out_channels=tuple(sizes.unet_channels),
        layers_per_block=1,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in sizes.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(up)),
        cross_attention_dim=sizes.text_width,
        attention_head_dim=tuple(c // sizes.head for c in sizes.unet_channels),  # the number of heads, as in SD 2
        norm_num_groups=8,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=tuple(sizes.vae_channels),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(sizes.vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.vae_channels),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=sizes.resolution,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=sizes.prediction_type,
    )
    return assemble_pipeline(unet, text_encoder, vae, scheduler, tokenizer)
