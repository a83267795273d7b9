"""A pipeline as one file with the names of Stable Diffusion's first release, for programs that take no folder."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import save_file


# (in diffusers, in the single file), applied in turn to the layers inside a block.
RESNET = (
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
)  # fmt: skip
UNET_ENDS = (
    ("conv_in.", "input_blocks.0.0."), ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."),
    ("mid_block.resnets.0.", "middle_block.0."), ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
)  # fmt: skip
VAE = (
    (r"conv_norm_out", "norm_out"), (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"), (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"), (r"attn_1\.to_", "attn_1."), (r"conv_shortcut", "nin_shortcut"),
    (r"resnets\.(\d+)", r"block.\1"), (r"downsamplers\.0", "downsample"), (r"upsamplers\.0", "upsample"),
    (r"down_blocks\.", "down."),
)  # fmt: skip
OPEN_CLIP = (
    ("encoder.layers.", "transformer.resblocks."), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn.", "attn."), ("final_layer_norm", "ln_final"),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
)  # fmt: skip


def save_single_file(pipe: StableDiffusionInpaintPipeline, path: Path, open_clip: bool) -> None:
    """Writes the pipeline's weights, as they are, into one safetensors file.

    Args:
        open_clip: the text encoder by the names of version 2, else by those of version 1.
    """
    text = pipe.text_encoder.state_dict()
    parts = {
        "model.diffusion_model": single_file_unet(pipe.unet),
        "first_stage_model": single_file_vae(pipe.vae),
        **({"cond_stage_model.model": open_clip_names(text)} if open_clip else {}),
        **({} if open_clip else {"cond_stage_model.transformer.text_model": without_text_model(text)}),
    }
    tensors = {f"{prefix}.{name}": tensor for prefix, part in parts.items() for name, tensor in part.items()}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def single_file_unet(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The UNet's weights by the single file's names: its blocks are numbered through, each with one resnet."""
    layers = unet.config["layers_per_block"]
    tensors = {}
    for name, tensor in unet.state_dict().items():
        block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
        if block:
            side, i, kind, j, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
            place = i * (layers + 1) + j + (side == "down")
            if kind == "downsamplers":
                place, part, rest = (i + 1) * (layers + 1), 0, rest.replace("conv", "op")
            elif kind == "upsamplers":
                place = i * (layers + 1) + layers
                part = 2 if hasattr(unet.up_blocks[i], "attentions") else 1
            else:
                part = 0 if kind == "resnets" else 1
            rest = renamed(rest, RESNET) if kind == "resnets" else rest
            new = f"{'input' if side == 'down' else 'output'}_blocks.{place}.{part}.{rest}"
        else:
            new = renamed(name, UNET_ENDS)
            new = renamed(new, RESNET) if new.startswith(("middle_block.0", "middle_block.2")) else new
        tensors[new] = tensor
    return tensors


def single_file_vae(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The autoencoder's weights by the single file's names; its attention layers are convolutions there."""
    blocks = len(vae.config["block_out_channels"])
    tensors = {}
    for name, tensor in vae.state_dict().items():
        new = name
        for pattern, text in VAE:
            new = re.sub(pattern, text, new)
        new = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", new)
        is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", new)
        tensors[new] = tensor[..., None, None] if is_attention and tensor.dim() == 2 else tensor
    return tensors


def without_text_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text encoder's weights without the level `text_model.` of transformers before 5.6."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def open_clip_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text encoder's weights by OpenCLIP's names: query, key and value are one matrix there."""
    tensors = without_text_model(tensors)
    joined = {}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            of_layer = [tensors[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            joined[name.replace("q_proj.", "in_proj_")] = torch.cat(of_layer)
        elif "k_proj" not in name and "v_proj" not in name:
            joined[name] = tensor
    return {renamed(name, OPEN_CLIP): tensor for name, tensor in joined.items()}
