"""What a person looks a run over with: contact sheets, and a page of counts, scores and pictures."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


CELL = 160  # pixels a side of a contact sheet's pictures
SHOWN = 12  # contact rows of each defect type
BINS = 24

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>DefectFill: {title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em }}
table {{ border-collapse: collapse }} td, th {{ padding: .2em 1em .2em 0; text-align: left }}
img {{ display: block; max-width: 100% }} .all {{ fill: #bbb }} .kept {{ fill: #c22 }}
</style>
<h1>{title}</h1>
<table><tr><th>object<th>defect<th>planned<th>made<th>not painted{rows}</table>
{problems}{sections}
"""


def thumbnail(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)


def contact_row(
    good: Image.Image, mask: Image.Image, pictures: list[Image.Image], scores: list, chosen: int
) -> Image.Image:
    """One row of the contact sheet, of thumbnails: good | mask | each candidate with its score, the kept one red."""
    cells = [good, mask, *pictures]
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


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures one below the other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def histogram(all_scores: Sequence[float], kept: Sequence[float]) -> str:
    """An SVG of two histograms over one range: of all candidates, and of those kept."""
    low, high = min(all_scores), max(all_scores)
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    bars = []
    for name, scores in (("all", all_scores), ("kept", kept)):
        counts = np.histogram(scores, edges)[0]
        for i, height in enumerate(counts / max(1, np.histogram(all_scores, edges)[0].max()) * 100):
            bars.append(f'<rect class="{name}" x="{i * 16}" y="{100 - height:.1f}" width="15" height="{height:.1f}"/>')
    axis = f'<text x="0" y="116">{low:.4g}</text><text x="{BINS * 16}" y="116" text-anchor="end">{high:.4g}</text>'
    return f'<svg width="{BINS * 16}" height="120" font-size="12">{"".join(bars)}{axis}</svg>'


def embedded(picture: Path) -> str:
    stream = io.BytesIO()
    with Image.open(picture) as image:
        image.convert("RGB").save(stream, format="JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def section(name: str, lines: list[dict], folder: Path) -> str:
    """One defect type: its scores, where there are any, and its first contact rows."""
    windows = [window for line in lines for window in line["windows"]]
    scores = [score for window in windows for score in window["scores"] if score is not None]
    kept = [window["scores"][window["chosen"]] for window in windows]
    figure = histogram(scores, [score for score in kept if score is not None]) if scores else ""
    legend = "<p>Scores: grey all candidates, red those kept.</p>" if scores else ""
    pictures = "".join(embedded(folder / "contact" / f"{line['name']}.png") for line in lines[:SHOWN])
    return f"<h2>{html.escape(name)}</h2>{legend}{figure}{pictures}"


def write_page(file: Path, plan: Iterable[dict], lines: list[dict], problems: Iterable[str]) -> None:
    """Writes the page of a run.

    Args:
        plan, lines: of the plan and of the manifest, beside whose folder's `contact/` the page is written.
        problems: why pictures could not be painted.
    """
    kinds: dict[tuple, list[int]] = {}
    for place, of in enumerate((plan, lines)):
        for line in of:
            kinds.setdefault((line["object"] or "", line["defect"] or "defect"), [0, 0])[place] += 1
    rows = "".join(
        f"<tr><td>{html.escape(thing)}<td>{html.escape(defect)}<td>{planned}<td>{made}<td>{planned - made}"
        for (thing, defect), (planned, made) in kinds.items()
    )
    sections = "".join(
        section(f"{kind[0]} {kind[1]}", mine, file.parent)
        for kind in kinds
        if (mine := [line for line in lines if (line["object"] or "", line["defect"] or "defect") == kind])
    )
    told = "".join(f"<li>{html.escape(problem)}" for problem in problems)
    title = html.escape(file.resolve().parent.name)
    list_of_problems = f"<h2>Not painted</h2><ul>{told}</ul>" if told else ""
    file.write_text(PAGE.format(title=title, rows=rows, problems=list_of_problems, sections=sections))
