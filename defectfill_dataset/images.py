"""Images: from files, to tensors, and back to 8-bit images."""

import functools
import io
import os
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from .errors import Problem


# What Pillow raises for files that it, or `load_image`, cannot make sense of.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
# What is read, by Pillow's names; for others Pillow may start programs, such as Ghostscript for PostScript.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # an MPO is opened as a JPEG
ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}

FULL_16_BITS = 65535
FULL_12_BITS = 4095
ORIENTATION = 0x0112  # EXIF
TIFF_OWN = {  # the tags of a TIFF file that are not EXIF: where its pixels are, how they are coded, which way up, ICC
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, ORIENTATION, 277, 278, 279, 282, 283, 284, 296, 317, 320, 322, 323),
    *(324, 325, 338, 339, 347, 530, 531, 532, 34675),
}


def open_image(file: Path | io.BytesIO) -> ImageFile.ImageFile:
    """An image file, opened but not decoded.

    Raises:
        OSError: no file that may be read, no image, several frames, or more pixels than Pillow thinks safe.
    """
    if isinstance(file, Path) and not file.is_file():  # a pipe would be waited for
        there = "not a regular file" if file.exists() else "missing"
        raise OSError(f"it is {'a broken link' if file.is_symlink() else there}; put a file there")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=FORMATS)
            frames = getattr(image, "n_frames", 1)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise OSError(f"it is too large; make it smaller: {error}") from error
        except (UnidentifiedImageError, TypeError, EOFError) as error:
            with file.open("rb") if isinstance(file, Path) else file as stream:
                stream.seek(0)
                start = stream.read(24)
            begins = f"it is not an image of a known format ({', '.join(FORMATS)}): it begins with {start!r}"
            told = begins if start else "it is empty"
            raise OSError(f"{told}; copy it again, or remove it") from error
    if frames > 1 and image.format != "MPO":  # the further frames of a phone's JPEG are previews
        raise OSError(f"it has {frames} frames or pages; save the one to use as a separate file")
    return image


def file_warnings(image: ImageFile.ImageFile, name: str) -> tuple[Problem, ...]:
    """Warnings about an opened, undecoded image file of this name that is unusual but readable."""
    by_name = Image.registered_extensions().get(Path(os.fsdecode(image.filename)).suffix.lower(), image.format)
    grey = "use the original if it has grey levels, which train better"
    how = "by its own colour profile" if cmyk_to_rgb(image) else "without a colour profile"
    checks = (
        (not ends(image), "DF104", f"does not end as {image.format} requires", "was it truncated, or data appended?"),
        (image.format not in (by_name, "MPO"), "DF105", f"is {image.format} by its content", "rename it"),
        (has_16_bits(image), "DF120", "has 16 bits per channel", "8 are kept"),
        (image.mode == "1", "DF122", "is pure black and white", grey),
        (image.mode in ("CMYK", "LAB", "YCbCr"), "DF125", f"is in {image.mode}, converted to RGB {how}", ""),
    )
    return tuple(Problem(code, name, what, fix) for there, code, what, fix in checks if there)


def ends(image: ImageFile.ImageFile) -> bool:
    """Whether the file ends as all of its format do."""
    end, stream = ENDS.get(image.format or "", b""), image.fp
    if not end or stream is None:
        return True
    place = stream.tell()
    stream.seek(-len(end), os.SEEK_END)
    tail = stream.read()
    stream.seek(place)
    return tail == end


def load_image(image: Image.Image) -> Image.Image:
    """An image file's pixels as 8-bit RGB, turned the way its EXIF tag says; 16-bit grey is scaled by its full range.

    CMYK is converted to sRGB by the image's own colour profile, if it has one that can be used.

    Raises:
        ValueError: a damaged file; or float or 32-bit pixels, 16 bits of which 12 or fewer are used, or transparent
            pixels: 8-bit RGB would show something else.
    """
    try:
        image.load()
    except UNREADABLE as error:
        raise ValueError(f"it is damaged; copy it again, or remove it: {error}") from error
    if image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(ImageOps.exif_transpose(image)))).convert("RGB")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has more than 16 bits per channel (mode {image.mode}); convert it to 8 bits")
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError("it has transparent pixels; flatten it onto a background")
    upright = ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
    if upright.mode == "RGB":  # no copy of large images without need
        return upright
    by_profile = cmyk_to_rgb(image)
    return by_profile.apply(upright) if by_profile else upright.convert("RGB")


def cmyk_to_rgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """How a CMYK image's own profile converts it to sRGB; None for other images, and without a usable profile."""
    profile = image.info.get("icc_profile") if image.mode == "CMYK" else None
    return _transform(profile) if profile else None


@functools.lru_cache(maxsize=4)  # the images of a dataset share one
def _transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "CMYK", "RGB")
    except (OSError, ImageCms.PyCMSError):
        return None


def upright_size(file: Path) -> tuple[int, int]:
    """(W, H) of an image file turned the way its EXIF tag says, from its header; Pillow turns TIFF by itself."""
    with open_image(file) as image:
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


def upright_exif(file: Path) -> bytes:
    """What an image file's EXIF data tell, with the orientation of pixels turned already; nothing if malformed."""
    with open_image(file) as image:
        exif = image.getexif()
        for tag in exif.keys() & TIFF_OWN if image.format == "TIFF" else ():
            del exif[tag]
        exif[ORIENTATION] = 1
        try:
            return exif.tobytes()
        except (struct.error, TypeError, ValueError, SyntaxError):
            return b""


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
    """The 8-bit image of a (3, H, W) tensor in [-1, 1]."""
    pixels = (image.detach().float().clamp(-1, 1).permute(1, 2, 0).cpu().numpy() + 1) * 127.5
    return Image.fromarray(pixels.round().astype(np.uint8))


def two_tones(image: Image.Image) -> tuple[int, int] | None:
    """The two grey tones of an RGB image that has no others, the darker first; else None."""
    colours = [np.unique(colour) for _, colour in image.getcolors(2) or []]
    if [len(colour) for colour in colours] != [1, 1]:
        return None
    dark, light = sorted(int(colour[0]) for colour in colours)
    return dark, light


def is_grey(image: Image.Image) -> bool:
    """Whether an RGB image has no colour."""
    red, green, blue = image.split()
    return red.tobytes() == green.tobytes() == blue.tobytes()


def heat_overlay(image: Image.Image, attention: torch.Tensor) -> Image.Image:
    """The image with an (h, w) map, stretched to [0, 1], laid over it: blue low, red high."""
    low, high = attention.min(), attention.max()
    heat = ((attention - low) / (high - low).clamp_min(1e-8))[None, None]
    red = F.interpolate(heat, (image.height, image.width), mode="bilinear")[0, 0].cpu().numpy()
    colour = np.stack([red, np.zeros_like(red), 1 - red], axis=-1) * 255
    return Image.fromarray((0.5 * np.asarray(image) + 0.5 * colour).astype(np.uint8))
