"""The report of a generation run for people: a contact sheet, and a page of counts, measures and images."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from defectfill_dataset import Problem


CELL = 160  # pixels a side of a contact sheet's thumbnails
SHOWN = 12  # contact rows of each defect type
BINS = 24

PAGE = """<!doctype html>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>DefectFill: {title}</title>
<style>
body {{ background: #fff; color: #111; font: 15px/1.5 sans-serif; margin: 2em auto;
    max-width: 1700px; padding: 0 1em }}
table {{ border-collapse: collapse }} tr {{ border-bottom: 1px solid #ccc }}
td, th {{ padding: .2em .35em; text-align: left }} td:nth-child(n+3), th:nth-child(n+3) {{ text-align: right }}
h1, h2, li {{ overflow-wrap: anywhere }} .wide {{ overflow-x: auto }}
figure {{ margin: .8em 0 }} figcaption {{ font-weight: bold }} img {{ display: block }}
svg {{ max-width: 100%; height: auto }} .all {{ fill: #bbb }} .kept {{ fill: #c22 }}
</style>
<h1>DefectFill: {title}</h1>
<div class="wide"><table><tr><th>object<th>defect{heads}{rows}</table></div>
<p>Retried: generated, but not from the first seeds. Rejected: candidates of the generated images.
{speed}
{problems}{sections}
"""

# The table's columns of numbers, of one defect type's lines of the plan and of the manifest.
COUNTS: dict[str, Callable[[list[dict], list[dict]], int]] = {
    "planned": lambda planned, made: len(planned),
    "made": lambda planned, made: len(made),
    "retried": lambda planned, made: sum(any(w.get("attempts", 1) > 1 for w in line["windows"]) for line in made),
    "not generated": lambda planned, made: len(planned) - len(made),
    "rejected: broken": lambda planned, made: count_rejected(made, "broken"),
    "rejected: no defect": lambda planned, made: count_rejected(made, "no defect"),
    "rejected: artefact": lambda planned, made: count_rejected(made, "artefact"),
}

# Histograms: a measure of every candidate, and what it is.
MEASURES = {
    "scores": "score: distance to the good image in the mask",
    "changes": "change: over the VAE's own error (--min_change)",
    "deviations": "colour distance: over the training defects' (--max_deviation)",
    "reference_distances": "feature distance to the nearest training defect (--selection likeness)",
}


def count_rejected(lines: list[dict], rejection: str) -> int:
    """How many candidates the quality filter rejected for this reason."""
    return sum(crop.get("refused", {}).get(rejection, 0) for line in lines for crop in line["windows"])


def thumbnail(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)


def contact_row(
    good: Image.Image, mask: Image.Image, candidates: list[Image.Image], scores: list, chosen: int
) -> Image.Image:
    """One row of the contact sheet, of thumbnails: good | mask | each candidate with its score, the kept one red."""
    cells = [good, mask, *candidates]
    labels = ["good", "mask", *(f"{s:.4f}" if s is not None else "" for s in scores)]
    row = Image.new("RGB", (len(cells) * (CELL + 4) + 4, CELL + 24), "white")
    draw = ImageDraw.Draw(row)
    for i, (cell, label) in enumerate(zip(cells, labels)):
        left = 4 + i * (CELL + 4)
        row.paste(cell, (left, 4))
        if i - 2 == chosen:
            draw.rectangle((left - 2, 2, left + CELL + 1, CELL + 5), outline="red", width=3)
            label += "  kept"
        draw.text((left, CELL + 7), label, fill="red" if i - 2 == chosen else "black", font=ImageFont.load_default(12))
    return row


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """The images one below the other."""
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


def histogram(what: str, values: Sequence[float], kept: Sequence[float]) -> str:
    """An SVG of two histograms over one range: of all candidates, and of those kept."""
    low, high = min(values), max(values)
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    counts = {name: np.histogram(of_name, edges)[0] for name, of_name in (("all", values), ("kept", kept))}
    most, width = counts["all"].max(), BINS * 16
    bars = [
        f'<rect class="{name}" x="{i * 16}" y="{100 - height:.1f}" width="15" height="{height:.1f}"/>'
        for name, of_name in counts.items()
        for i, height in enumerate(of_name / most * 100)
    ]
    axes = f"""<path d="M0 0V100H{width}" fill="none" stroke="#111"/>
<text x="0" y="115">{edges[0]:.3g}</text><text x="{width}" y="115" text-anchor="end">{edges[-1]:.3g}</text>
<text x="{width / 2}" y="132" text-anchor="middle">{what}</text>
<text x="-6" y="10" text-anchor="end">{most}</text><text x="-6" y="100" text-anchor="end">0</text>
<text transform="rotate(-90)" x="-50" y="-12" text-anchor="middle">candidates</text>"""
    size = f'width="{width + 48}" height="146" viewBox="-40 -8 {width + 48} 146"'
    return f'<svg {size} font-size="12">{"".join(bars)}{axes}</svg>'


def embedded(file: Path) -> str:
    """`image_element` of a PNG file, as JPEG."""
    with Image.open(file, formats=("PNG",)) as image:
        return image_element(image.convert("RGB"), "JPEG", quality=85)


def image_element(image: Image.Image, form: str, **saving) -> str:
    """The image as an HTML element that needs no file beside it, coded as PNG or JPEG."""
    stream = io.BytesIO()
    image.save(stream, format=form, **saving)
    return f'<img src="data:image/{form.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}">'


def seam_line(lines: list[dict]) -> str:
    """A paragraph of one defect type's seam strength, beside that of its good images and its references."""
    of_images, of_good, of_references = (
        [line[key] for line in lines if line.get(key) is not None]
        for key in ("seam_step", "good_seam_step", "reference_seam_step")
    )
    if not of_images:
        return ""
    references = f"{np.mean(of_references):.1f}" if of_references else "not known"
    return (
        f"<p>Grey step across the mask's outline, of 255 levels, mean: generated images: {np.mean(of_images):.1f}, "
        f"references: {references}, the good images at the same places: {np.mean(of_good):.1f}.</p>"
    )


def section(name: str, lines: list[dict], folder: Path) -> str:
    """One defect type: histograms of its measures, and its first contact rows."""
    crops = [crop for line in lines for crop in line["windows"]]
    histograms = ""
    for key, what in MEASURES.items():
        values = [x for crop in crops for x in crop.get(key) or () if x is not None]
        kept = [crop[key][crop["chosen"]] for crop in crops if crop.get(key)]
        if values:
            histograms += histogram(what, values, [x for x in kept if x is not None])
    legend = "<p>Grey: all candidates of the last attempt; red: those kept.</p>" if histograms else ""
    rows = "".join(
        f"<figure><figcaption>{html.escape(line['name'])}</figcaption>"
        f"{embedded(folder / 'contact' / (line['name'] + '.png'))}</figure>"
        for line in lines[:SHOWN]
    )
    number = f"<p>The first {len(lines[:SHOWN])} of {len(lines)} images:</p>"
    return f'<h2>{html.escape(name)}</h2>{seam_line(lines)}{legend}{histograms}{number}<div class="wide">{rows}</div>'


def group_by_type(lines: Iterable[dict]) -> dict[tuple[str, str], list[dict]]:
    """Lines of the plan or the manifest by object and defect type."""
    kinds: dict[tuple[str, str], list[dict]] = {}
    for line in lines:
        kinds.setdefault((line.get("object") or "", line.get("defect") or "defect"), []).append(line)
    return kinds


def speed_line(speed: dict) -> str:
    """A paragraph of the last start's speed, as `speed.json` holds it."""
    if not speed["images"] or speed["seconds_per_image"] is None:
        return ""
    peak = speed.get("peak_memory_bytes")
    memory = f", peak memory {peak / 2**30:.1f} GiB" if peak else ""
    return (
        f"<p>The last start generated {speed['images']} images on {html.escape(speed['device'])}, processes: "
        f"{speed['processes']}: {speed['seconds_per_image']:.3g} s per image, not counting model loading{memory}."
    )


def write_report(
    file: Path, plan: Iterable[dict], lines: list[dict], problems: Iterable[Problem], speed: dict
) -> None:
    """Writes the page `file`, beside the folder `contact/`.

    Args:
        plan, lines: of the plan and of the manifest.
        problems: why images could not be made.
        speed: the content of `speed.json`.
    """
    planned, made = group_by_type(plan), group_by_type(lines)
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(word)}" for word in kind)
        + "".join(f"<td>{count(planned[kind], made.get(kind, []))}" for count in COUNTS.values())
        for kind in planned
    )
    sections = "".join(section(" ".join(kind), made[kind], file.parent) for kind in planned if kind in made)
    problem_list = "".join(f"<li>{html.escape(str(problem))}" for problem in problems)
    content = {
        "title": html.escape(file.resolve().parent.name),
        "heads": "".join(f"<th>{head}" for head in COUNTS),
        "rows": rows,
        "speed": speed_line(speed),
        "problems": f"<h2>Not generated</h2><ul>{problem_list}</ul>" if problem_list else "",
        "sections": sections,
    }
    file.write_text(PAGE.format(**content), encoding="utf-8")
