"""Everything about images, masks, prompts, splits and crops: what training and generation share.

Polarity and ranges, everywhere in the project:
    mask   1 (or True, or white) inside the defect, 0 outside
    image  in [-1, 1] as a tensor, RGB 8 bit as a PIL image

Shapes: H, W image pixels; h, w cells of the latent grid; L prompt tokens.
"""

from .builder import (
    DefectPairs,
    defect_types,
    file_digest,
    load_defect_pairs,
    load_prepared,
    other_types,
    select_defects,
    single_types,
)
from .checks import check_pairs, data_digest
from .crops import Box, CropRule, choose_crop_rule, crop_boxes, crop_mask
from .errors import InputError, Problem, RunError
from .images import heat_overlay, image_tensor, is_grey, load_image, open_image, tensor_image, two_tones, upright_exif
from .mask_values import MaskClasses, binarise
from .masks import boxes_mask, component_boxes, pool_mask, random_boxes, random_mask, upsample_mask
from .prompts import Prompt, PromptPair, TokenizedPrompts, build_prompts, to_words, tokenize_prompts
from .readers import LAYOUTS, find_objects
from .samples import TrainingSamples, make_crops, sampling_schedule
from .seeds import derive_seed
from .splits import held_out_rows, split_names, validation_split
from .synthesis.foreground import find_foreground
from .synthesis.locations import LikeReferences, choose_placement
from .synthesis.placement import (
    MaskSource,
    PlacedMask,
    PlacedShapes,
    held_out_source,
    load_mask_rows,
    load_masks,
    locate_references,
    masks_digest,
    procedural_shapes,
    random_source,
    reference_shapes,
    shapes_like,
)
from .synthesis.shapes import SHAPES, principal_axis
from .synthesis.surroundings import LikeSurroundings, read_patches


__all__ = [
    "Box",
    "LAYOUTS",
    "DefectPairs",
    "InputError",
    "LikeReferences",
    "LikeSurroundings",
    "MaskClasses",
    "MaskSource",
    "PlacedMask",
    "PlacedShapes",
    "Prompt",
    "Problem",
    "PromptPair",
    "RunError",
    "SHAPES",
    "TokenizedPrompts",
    "TrainingSamples",
    "CropRule",
    "binarise",
    "boxes_mask",
    "build_prompts",
    "check_pairs",
    "choose_placement",
    "choose_crop_rule",
    "upsample_mask",
    "crop_mask",
    "data_digest",
    "derive_seed",
    "file_digest",
    "find_foreground",
    "find_objects",
    "heat_overlay",
    "held_out_rows",
    "held_out_source",
    "image_tensor",
    "is_grey",
    "load_defect_pairs",
    "load_image",
    "load_mask_rows",
    "load_masks",
    "load_prepared",
    "locate_references",
    "make_crops",
    "masks_digest",
    "open_image",
    "other_types",
    "component_boxes",
    "principal_axis",
    "procedural_shapes",
    "random_boxes",
    "random_mask",
    "random_source",
    "read_patches",
    "reference_shapes",
    "sampling_schedule",
    "select_defects",
    "shapes_like",
    "defect_types",
    "single_types",
    "tensor_image",
    "pool_mask",
    "to_words",
    "tokenize_prompts",
    "two_tones",
    "upright_exif",
    "split_names",
    "validation_split",
    "crop_boxes",
]
