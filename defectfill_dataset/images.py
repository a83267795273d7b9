"""Images between files, tensors and pictures for people."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


# What Pillow raises for files that it, or `load_image`, cannot make sense of.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def load_image(image: Image.Image) -> Image.Image:
    """An image file's pixels as 8-bit RGB, turned the way its EXIF tag says.

    Raises:
        ValueError: more than 8 bits a channel, or transparent pixels: RGB would show something else.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError("it has transparent pixels; flatten it onto a background")
    return ImageOps.exif_transpose(image).convert("RGB")


def image_tensor(image: Image.Image, size: int) -> torch.Tensor:
    """(3, size, size) in [-1, 1]: the whole image resampled to a square, as training and generation both see it."""
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1


def tensor_image(image: torch.Tensor) -> Image.Image:
    """The 8-bit picture of a (3, H, W) tensor in [-1, 1]."""
    pixels = (image.detach().float().clamp(-1, 1).permute(1, 2, 0).cpu().numpy() + 1) * 127.5
    return Image.fromarray(pixels.round().astype(np.uint8))


def heat_overlay(image: Image.Image, attention: torch.Tensor) -> Image.Image:
    """The image with an (h, w) map, stretched to [0, 1], laid over it: blue low, red high."""
    low, high = attention.min(), attention.max()
    heat = ((attention - low) / (high - low).clamp_min(1e-8))[None, None]
    red = F.interpolate(heat, (image.height, image.width), mode="bilinear")[0, 0].cpu().numpy()
    colour = np.stack([red, np.zeros_like(red), 1 - red], axis=-1) * 255
    return Image.fromarray((0.5 * np.asarray(image) + 0.5 * colour).astype(np.uint8))
