"""Images between files, tensors and pictures for people."""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


# What Pillow raises for files that it, or `load_image`, cannot make sense of.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


FULL_16_BITS = 65535
FULL_12_BITS = 4095
ORIENTATION = 0x0112  # EXIF


def load_image(image: Image.Image) -> Image.Image:
    """An image file's pixels as 8-bit RGB, turned the way its EXIF tag says; 16-bit grey is scaled by its full range.

    Raises:
        ValueError: float or 32-bit pixels, 16 bits of which 12 or fewer are used, or transparent pixels: 8-bit RGB
            would show something else.
        OSError: damaged or cut off.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(ImageOps.exif_transpose(image)))).convert("RGB")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has more than 16 bits a channel (mode {image.mode}); convert it to 8 bits")
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError("it has transparent pixels; flatten it onto a background")
    image.load()
    upright = ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
    return upright if upright.mode == "RGB" else upright.convert("RGB")  # no copy of large images without need


def upright_size(file: Path) -> tuple[int, int]:
    """(W, H) of an image file turned the way its EXIF tag says, from its header."""
    with Image.open(file) as image:
        turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


def has_16_bits(image: Image.Image) -> bool:
    """Whether the file of an image just opened, not yet decoded, holds 16 bits a channel."""
    return any(re.search(r"\b(I|L|LA|RGB|RGBA);16", str(tile.args)) for tile in getattr(image, "tile", ()))


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """(H, W) 16-bit values scaled by the full 16-bit range, as 8-bit values."""
    peak = int(pixels.max())
    if peak <= FULL_12_BITS:
        raise ValueError(
            f"its brightest value is {peak} of {FULL_16_BITS}: 12 bits or fewer in a 16-bit file would come out "
            "black; scale it to the full range, or convert it to 8 bits"
        )
    return np.rint(pixels / (FULL_16_BITS / 255)).astype(np.uint8)


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
