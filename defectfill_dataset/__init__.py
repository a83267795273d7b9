"""Everything about images, masks, prompts, splits and crops: what training and generation share.

Polarity and ranges, everywhere in the project:
    mask   1 (or True, or white) inside the defect, 0 outside
    image  in [-1, 1] as a tensor, RGB 8 bit as a PIL image

Shapes: H, W image pixels; h, w cells of the latent grid; L prompt tokens.
"""

from .builder import (
    DefectPairs,
    data_digest,
    file_digest,
    load_defect_pairs,
    load_prepared,
    other_types,
    select_defects,
)
from .cases import Case, check_cases, find_cases, repeat_seed
from .checks import check_pairs
from .commands import HelpFormatter, Parser, exit_on_input_error
from .errors import InputError, Problem
from .foreground import find_foreground
from .images import heat_overlay, image_tensor, load_image, open_image, tensor_image, upright_exif
from .inputs import add_reading_flags
from .mask_values import MaskClasses, binarise
from .masks import boxes_mask, cover, piece_boxes, random_boxes, random_mask, to_grid
from .placement import (
    MaskSource,
    Placed,
    PlacedShapes,
    held_out_source,
    load_masks,
    masks_digest,
    procedural_shapes,
    random_source,
    reference_shapes,
)
from .prompts import Prompt, PromptPair, TokenizedPrompts, build_prompts, to_words, tokenize_prompts
from .readers import LAYOUTS, find_objects
from .seeds import derive_seed
from .shapes import SHAPES, principal_axis
from .splits import split_names
from .training import TrainingSamples, sampling_schedule
from .zoom import Box, Zoom, choose_zoom, cut, zoom_boxes


__all__ = [
    "Box",
    "Case",
    "LAYOUTS",
    "DefectPairs",
    "HelpFormatter",
    "InputError",
    "MaskClasses",
    "MaskSource",
    "Parser",
    "Placed",
    "PlacedShapes",
    "Prompt",
    "Problem",
    "PromptPair",
    "SHAPES",
    "TokenizedPrompts",
    "TrainingSamples",
    "Zoom",
    "add_reading_flags",
    "binarise",
    "boxes_mask",
    "build_prompts",
    "check_cases",
    "check_pairs",
    "choose_zoom",
    "cover",
    "cut",
    "data_digest",
    "derive_seed",
    "exit_on_input_error",
    "file_digest",
    "find_cases",
    "find_foreground",
    "find_objects",
    "heat_overlay",
    "held_out_source",
    "image_tensor",
    "load_defect_pairs",
    "load_image",
    "load_masks",
    "load_prepared",
    "masks_digest",
    "open_image",
    "other_types",
    "piece_boxes",
    "principal_axis",
    "procedural_shapes",
    "random_boxes",
    "random_mask",
    "random_source",
    "reference_shapes",
    "repeat_seed",
    "sampling_schedule",
    "select_defects",
    "tensor_image",
    "to_grid",
    "to_words",
    "tokenize_prompts",
    "upright_exif",
    "split_names",
    "zoom_boxes",
]
