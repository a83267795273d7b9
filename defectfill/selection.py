"""Low-Fidelity Selection, and selection by likeness: measures of candidates, the quality filter, which one is kept.

Shapes: N candidates of one crop, S side of the square the model works on. Images are in [0, 1] here; masks are 1
inside the defect.

Source: Song et al., DefectFill, CVPR 2025, arXiv 2503.13985, section 3.4.
"""

import hashlib
import math
import pickle
import statistics
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from defectfill_dataset import InputError, Problem, file_digest

from .base_files import write_entry
from .colour_stats import colour_distances
from .likeness import Likeness


# ---------------------------------------------------------------------------------------------------------------------
# Scorers

# What `--selection` may be; those with likeness need references.
SELECTIONS = ("lpips", "ssim", "rmse", "none", "likeness", "lpips+likeness", "ssim+likeness", "rmse+likeness")

# (N, 3, S, S) candidates, (3, S, S) source image, (1, S, S) mask  ->  N distances
Scorer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], list[float]]

# torchvision's files; their names end with the first digits of their sha256.
LPIPS_FILES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
LPIPS_URL = "https://download.pytorch.org/models/"


def backbone_seal(tensors: dict[str, torch.Tensor], source: str) -> str:
    """What ties tensors to the sha256 of the file that they come from."""
    return hashlib.sha256(source.encode() + save(tensors)).hexdigest()


def read_backbone(file: Path) -> dict[str, torch.Tensor]:
    """The `features` of a network of torchvision by their names, from safetensors beside torchvision's own `file`.

    If these are missing, damaged or of another file, `file` is read, downloaded if absent, and they are written.

    Raises:
        ValueError: the sha256 of `file` does not begin as its name says.
        pickle.UnpicklingError: to load `file` could run code.
    """
    digest, kept = file.stem.rpartition("-")[2], file.with_suffix(".safetensors")
    if kept.is_file():
        with suppress(OSError, SafetensorError), safe_open(kept, "pt") as opened:
            tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}
            source = metadata.get("source_sha256", "")
            if source.startswith(digest) and metadata.get("sha256") == backbone_seal(tensors, source):
                return tensors
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(LPIPS_URL + file.name, str(file), digest)
    source = file_digest(file)
    if not source.startswith(digest):
        raise ValueError(f"its sha256 begins with {source[:8]}, not with {digest}: it is another file or damaged")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    tensors = {name: tensor for name, tensor in weights.items() if name.startswith("features.")}
    write_entry(kept, save(tensors, {"source_sha256": source, "sha256": backbone_seal(tensors, source)}))
    return tensors


def load_lpips(net: str, file: Path) -> torch.nn.Module:
    """LPIPS on the network in torchvision's `file`; torchvision and lpips themselves load no weights."""
    import lpips  # not at the top: training does without it

    tensors = read_backbone(file)
    with init_empty_weights(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")  # its own use of `pretrained=`
        model = lpips.LPIPS(pretrained=False, pnet_rand=True, net=net, verbose=False)
    # lpips cuts the network in slices, whose layers keep their numbers: slice2.3.weight is features.3.weight.
    names = {name: f"features.{name.partition('.')[2]}" for name in model.net.state_dict()}
    model.net.load_state_dict({name: tensors[feature] for name, feature in names.items()}, assign=True)
    linear = Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth"  # of the installed package
    model.load_state_dict(torch.load(linear, map_location="cpu", weights_only=True), strict=False, assign=True)
    return model.eval().requires_grad_(False)


# What no file, and any other in its place, may raise.
NO_BACKBONE = (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, pickle.PickleError)


def lpips_scorer(net: str, device: torch.device) -> Scorer:
    """LPIPS of `image * mask` over the whole frame: 0 outside the mask on both sides, so only the inside counts.

    Source: section 3.4; Zhang et al., LPIPS, CVPR 2018.

    Raises:
        InputError: the backbone's weights cannot be loaded (DF430).
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_FILES[net]
    try:
        model = load_lpips(net, file).to(device)
    except NO_BACKBONE as error:
        what = (
            f"the {net} backbone cannot be loaded ({error}). Put torchvision's {LPIPS_FILES[net]} at {file}, or "
            "choose another measure: --selection ssim, rmse or none"
        )
        raise InputError(Problem("DF430", "--selection lpips", what)) from error

    @torch.no_grad()
    def score(candidates: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> list[float]:
        candidates, source = ((x.to(device) * 2 - 1) * mask.to(device) for x in (candidates, source[None]))
        return model(candidates, source).flatten().tolist()  # the source's features are taken once, for all

    return score


def ssim_score(candidates: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """1 - SSIM, averaged inside the mask.

    Source: Wang et al., SSIM, IEEE Transactions on Image Processing 13 (2004); a 7 x 7 window, sample covariances and
    mirrored borders, as in scikit-image.
    """
    side = candidates.shape[-1]
    places = torch.arange(-3, side + 3, device=candidates.device)
    mirrored = torch.where(places < 0, -1 - places, torch.where(places < side, places, 2 * side - 1 - places))

    def means(images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images[..., mirrored, :][..., mirrored], 7, stride=1)

    x, y = candidates.double(), source[None].double()
    mean_x, mean_y, of_sample = means(x), means(y), 49 / 48
    var_x, var_y = (of_sample * (means(z * z) - mean * mean) for z, mean in ((x, mean_x), (y, mean_y)))
    covariance = of_sample * (means(x * y) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    inside = mask > 0.5
    ssim = torch.where(inside, ssim.mean(dim=1, keepdim=True), 0)
    return (1 - ssim.sum(dim=(1, 2, 3)) / inside.sum()).tolist()


def rmse_score(candidates: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Root mean squared difference inside the mask, in [0, 1]."""
    squared = (candidates - source).square().mean(dim=1, keepdim=True) * mask
    return (squared.sum(dim=(1, 2, 3)) / mask.sum()).sqrt().tolist()


def make_scorer(selection: str, net: str, device: torch.device) -> Scorer | None:
    """The scorer that `--selection` names; None for `none`, which keeps the first candidate, and for `likeness`."""
    name = selection.removesuffix("+likeness")
    if name == "lpips":
        return lpips_scorer(net, device)
    return {"ssim": ssim_score, "rmse": rmse_score, "none": None, "likeness": None}[name]


# ---------------------------------------------------------------------------------------------------------------------
# Measures


class Measures(NamedTuple):
    """What is measured on the N candidates of one crop."""

    scores: list[float]  # distance to the source image inside the mask; not finite: a broken candidate
    scored: bool  # False without a scorer: all sound candidates score 0
    changes: list[float]  # RMS change inside the mask, over the VAE's own reconstruction error there
    colour_distances: list[float | None]  # of `colour_distances`; None where the references are not known
    reference_distances: list[float] | None = None  # of `Likeness`, if it was asked for


def measure(
    candidates: torch.Tensor,
    source: torch.Tensor,
    reconstruction: torch.Tensor,
    mask: torch.Tensor,
    scorer: Scorer | None,
    colours: dict | None,
    likeness: Likeness | None = None,
) -> Measures:
    """The measures of (N, 3, S, S) candidates.

    Args:
        source: (3, S, S), the crop that was inpainted.
        reconstruction: (3, S, S), the same crop through the VAE alone.
        mask: (1, S, S).
        colours: the statistics of the training defects' colours, if they are known.
    """
    pasted = torch.where(mask > 0.5, candidates, source)  # whichever way they are blended in later
    scores = scorer(pasted, source, mask) if scorer else [0.0] * len(candidates)
    pixels = candidates.flatten(1)
    sound = (pixels.isfinite().all(dim=1) & pixels.any(dim=1)).tolist()  # half precision may overflow, or go black
    distances = likeness.distances(pasted * 2 - 1, mask) if likeness else None
    if distances:
        sound = [ok and math.isfinite(distance) for ok, distance in zip(sound, distances)]
    *changes, floor = rmse_score(torch.cat([pasted, reconstruction[None]]), source, mask)
    return Measures(
        scores=[score if ok else math.nan for score, ok in zip(scores, sound)],
        scored=scorer is not None,
        changes=[change / max(floor, 1e-6) for change in changes],
        colour_distances=colour_distances(pasted, mask, colours) if colours else [None] * len(candidates),
        reference_distances=distances,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Filter and choice

REJECTIONS = ("broken", "no defect", "artefact")


class QualityFilter(NamedTuple):
    """Which candidates may not be kept.

    Args:
        min_change: of `Measures.changes`; a candidate that changes less shows no defect.
        max_colour_distance: of `Measures.colour_distances`; a candidate further away is an artefact. None: any
            distance is fine.
    """

    min_change: float
    max_colour_distance: float | None

    def rejections(self, measures: Measures) -> list[str | None]:
        """Why each candidate is rejected; None for one that is accepted."""
        return [
            self.rejection(*of_one) for of_one in zip(measures.scores, measures.changes, measures.colour_distances)
        ]

    def rejection(self, score: float, change: float, colour_distance: float | None) -> str | None:
        """Which of `REJECTIONS` a candidate's measures meet, if any."""
        if not math.isfinite(score):
            return "broken"
        if change < self.min_change:
            return "no defect"
        too_far = self.max_colour_distance is not None and colour_distance > self.max_colour_distance
        return "artefact" if too_far else None


def select(scores: Sequence[float]) -> int:
    """Low-Fidelity Selection: the candidate least like the source image inside the mask; never one without a number.

    Raises:
        FloatingPointError: no score is a number.
    """
    finite = [i for i, score in enumerate(scores) if math.isfinite(score)]
    if not finite:
        raise FloatingPointError("no candidate has a finite score")
    return max(finite, key=lambda i: scores[i])


def select_accepted(scores: Sequence[float], rejections: Sequence[str | None]) -> int | None:
    """Low-Fidelity Selection among the candidates that were not rejected; None if all were."""
    if all(rejections):
        return None
    return select([math.nan if rejection else score for score, rejection in zip(scores, rejections)])


LEAST_CHANGE = 0.5  # of the median candidate's


def select_by_likeness(measures: Measures, rejections: Sequence[str | None]) -> int | None:
    """The candidate nearest to the references, of those that were not rejected and changed enough; None if all were.

    Enough is `LEAST_CHANGE` of the median change, so that normal texture cannot win; with a scorer it is the median
    score, the better half by Low-Fidelity Selection.
    """
    accepted = [i for i, rejection in enumerate(rejections) if not rejection]
    if not accepted:
        return None
    amounts, share = (measures.scores, 1) if measures.scored else (measures.changes, LEAST_CHANGE)
    least = share * statistics.median(amounts[i] for i in accepted)
    distances = measures.reference_distances
    return min((i for i in accepted if amounts[i] >= least), key=lambda i: distances[i])


def choose_candidate(measures: Measures, rejections: Sequence[str | None]) -> int | None:
    """The candidate that is kept: by likeness if it was measured, else the least like the source; None if all were
    rejected."""
    if measures.reference_distances is None:
        return select_accepted(measures.scores, rejections)
    return select_by_likeness(measures, rejections)
