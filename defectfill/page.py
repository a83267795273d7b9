"""What a person looks a run over with: contact sheets, and a page of counts, scores and pictures."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


CELL = 160  # pixels a side of a contact sheet's pictures
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
<p>Retried: made, but with other seeds than the first. Refused: candidates of the pictures made.
{problems}{sections}
"""

# The table's columns of numbers: of one defect type's lines of the plan and of the manifest.
COUNTS: dict[str, Callable[[list[dict], list[dict]], int]] = {
    "planned": lambda planned, made: len(planned),
    "made": lambda planned, made: len(made),
    "retried": lambda planned, made: sum(any(w["attempts"] > 1 for w in line["windows"]) for line in made),
    "not painted": lambda planned, made: len(planned) - len(made),
    "refused: broken": lambda planned, made: refused(made, "broken"),
    "refused: no defect": lambda planned, made: refused(made, "no defect"),
    "refused: artefact": lambda planned, made: refused(made, "artefact"),
}

# Histograms: figures of every candidate, and what they are.
FIGURES = {
    "scores": "score: distance to the good image in the mask",
    "changes": "change: times the autoencoder's (--min_change)",
    "deviations": "deviation: times the references' (--max_deviation)",
}


def refused(lines: list[dict], why: str) -> int:
    """Candidates that a gate kept from being chosen."""
    return sum(window["refused"][why] for line in lines for window in line["windows"])


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


def embedded(picture: Path) -> str:
    stream = io.BytesIO()
    with Image.open(picture) as image:
        image.convert("RGB").save(stream, format="JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def section(name: str, lines: list[dict], folder: Path) -> str:
    """One defect type: its figures, where there are any, and its first contact rows."""
    windows = [window for line in lines for window in line["windows"]]
    figures = ""
    for key, what in FIGURES.items():
        values = [x for window in windows for x in window[key] if x is not None]
        kept = [window[key][window["chosen"]] for window in windows]
        if values:
            figures += histogram(what, values, [x for x in kept if x is not None])
    legend = "<p>Grey: all candidates of the last attempt; red: those kept.</p>" if figures else ""
    rows = "".join(
        f"<figure><figcaption>{html.escape(line['name'])}</figcaption>"
        f"{embedded(folder / 'contact' / (line['name'] + '.png'))}</figure>"
        for line in lines[:SHOWN]
    )
    number = f"<p>The first {len(lines[:SHOWN])} of {len(lines)} pictures:</p>"
    return f'<h2>{html.escape(name)}</h2>{legend}{figures}{number}<div class="wide">{rows}</div>'


def by_kind(lines: Iterable[dict]) -> dict[tuple[str, str], list[dict]]:
    """Lines of the plan or the manifest by their object and defect type."""
    kinds: dict[tuple[str, str], list[dict]] = {}
    for line in lines:
        kinds.setdefault((line["object"] or "", line["defect"] or "defect"), []).append(line)
    return kinds


def write_page(file: Path, plan: Iterable[dict], lines: list[dict], problems: Iterable[str]) -> None:
    """Writes the page of a run.

    Args:
        plan, lines: of the plan and of the manifest, beside whose folder's `contact/` the page is written.
        problems: why pictures could not be painted.
    """
    planned, made = by_kind(plan), by_kind(lines)
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(word)}" for word in kind)
        + "".join(f"<td>{count(planned[kind], made.get(kind, []))}" for count in COUNTS.values())
        for kind in planned
    )
    sections = "".join(section(" ".join(kind), made[kind], file.parent) for kind in planned if kind in made)
    told = "".join(f"<li>{html.escape(problem)}" for problem in problems)
    content = {
        "title": html.escape(file.resolve().parent.name),
        "heads": "".join(f"<th>{head}" for head in COUNTS),
        "rows": rows,
        "problems": f"<h2>Not painted</h2><ul>{told}</ul>" if told else "",
        "sections": sections,
    }
    file.write_text(PAGE.format(**content))
