"""The report of an evaluation, as JSON, Markdown and one HTML page: figures, verdicts, curves, what was missed."""

import dataclasses
import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image, ImageDraw
from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load_file

from defectfill_dataset import InputError, Problem, file_digest
from defectfill_dataset.errors import one_line
from defectfill_dataset.text import Schema, read_json

from ..markdown import markdown_table
from ..runs.cards import markdown_text
from ..runs.files import atomic_write, finite, write_json
from ..runs.manifest import SEAL, line_digest, write_lines
from ..runs.report import image_element
from .arms import CONTROLS, file_name
from .figures import (
    FigureOfParts,
    Region,
    false_finds,
    missed_defects,
    missed_of_parts,
    paired_bootstrap,
    part_figures,
    pixel_ap_of_parts,
    pixel_figures,
    verdict,
)
from .views import View


# figure -> (its name, whether more is better)
FIGURES = {
    "pixel_ap": ("pixel AP", True),
    "pixel_auroc": ("pixel AUROC", True),
    "pixel_f1_max": ("pixel F1-max", True),
    "pro": ("PRO", True),
    "image_auroc": ("image AUROC", True),
    "missed": ("missed at 1 % false alarms", False),
    "smallest_found": ("smallest found, px", False),
    "accuracy": ("accuracy", True),
    "macro_f1": ("macro F1", True),
}
COMPARED: dict[str, Callable[[np.ndarray, np.ndarray], FigureOfParts]] = {
    "pixel_ap": pixel_ap_of_parts,
    "missed": missed_of_parts,
}
SHOWN, CELL = 24, 128  # views of a sheet, and their side
Table = list[list[str]]


@dataclasses.dataclass(frozen=True)
class Run:
    """The detectors of one arm, bank and seed."""

    setting: str
    arm: str
    bank: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}/{file_name(self.arm)}-b{self.bank}-s{self.seed}"

    def file(self, folder: Path) -> Path:
        """Its figures, written last."""
        return folder / f"{self.name}.json"


Figure = Annotated[float, Field(allow_inf_nan=False)] | None


class RunFile(Schema):
    """The figures of a run, and what seals them; runs of earlier versions have no digests."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Figure]
    threshold: Annotated[float, Field(allow_inf_nan=False)]
    maps_sha256: str | None = None
    line_sha256: str | None = None


AGAIN = "its detectors are trained again"


def read_maps(run: Run, folder: Path) -> np.ndarray:
    """(N, R, R) fp32 scores of a run."""
    return load_file(folder / f"{run.name}.safetensors")["maps"].astype(np.float32)


def read_run(run: Run, folder: Path, tested: Sequence[View]) -> dict:
    """The figures of a run whose files lie in a folder.

    Raises:
        InputError: they, or its scores of the N views, are not what was written (DF330).
    """
    figures = read_json(run.file(folder), RunFile, "DF330", AGAIN)
    try:
        maps = read_maps(run, folder)
        whole = maps.shape == (len(tested), *tested[0].mask.shape) and bool(np.isfinite(maps).all())
    except (OSError, SafetensorError, KeyError, ValueError):
        whole = False
    if SEAL in figures:
        content = {key: value for key, value in figures.items() if key != SEAL}
        digest = file_digest(folder / f"{run.name}.safetensors")
        whole &= figures[SEAL] == line_digest(content) and figures.get("maps_sha256") == digest
    if not whole:
        raise InputError(Problem("DF330", run.file(folder), "it or its scores are not what was written", AGAIN))
    return figures


@dataclasses.dataclass
class Results:
    """What the runs of one setting gave.

    Args:
        tested: the N views that were tested on.
        figures: of each run.
        maps: what reads a run's (N, R, R) scores.
        of_parts: the compared figures of a run, as functions of the parts.
    """

    tested: Sequence[View]
    figures: dict[Run, dict]
    maps: Callable[[Run], np.ndarray]
    of_parts: dict[tuple[Run, str], FigureOfParts] = dataclasses.field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.figures))

    @property
    def controls(self) -> list[str]:
        """The arms that see real images alone."""
        return [arm for arm in self.arms if arm in CONTROLS]

    @property
    def generated(self) -> list[str]:
        """The arms that see generated images."""
        return [arm for arm in self.arms if arm not in CONTROLS]

    def of(self, arm: str) -> dict[tuple[int, int], Run]:
        """The arm's runs by (seed, bank)."""
        return {(run.seed, run.bank): run for run in self.figures if run.arm == arm}

    @property
    def parts(self) -> int:
        return len({view.group for view in self.tested})

    @property
    def masks(self) -> np.ndarray:
        return np.stack([view.mask for view in self.tested])

    def figure(self, run: Run, key: str) -> FigureOfParts:
        """A figure of `COMPARED`, of any of the parts with all of their views."""
        if (run, key) not in self.of_parts:
            self.of_parts[run, key] = by_group(COMPARED[key](self.maps(run), self.masks), self.tested)
        return self.of_parts[run, key]

    def of_type(self, label: int) -> "Results | None":
        """The same runs on the views that show this type alone, and the good ones; None if no view does."""
        rows = [i for i, view in enumerate(self.tested) if {*np.unique(view.labels).tolist()} <= {0, label}]
        found = Results([self.tested[i] for i in rows], {}, lambda run: self.maps(run)[rows])
        if not found.masks.any():
            return None
        for run in self.figures:
            maps = found.maps(run)
            found.figures[run] = finite(pixel_figures(maps, found.masks) | part_figures(maps, found.masks))
        return found

    def values(self, arm: str, key: str) -> list[float]:
        """A figure of each of the arm's runs that has it."""
        return [value for run in self.of(arm).values() if (value := self.figures[run].get(key)) is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def figure_table(results: Results) -> Table:
    """A row for each arm: mean and standard deviation of each figure over seeds and banks."""
    keys = [key for key in FIGURES if any(results.values(arm, key) for arm in results.arms)]
    rows = [["arm", "runs", *(FIGURES[key][0] for key in keys)]]
    for arm in results.arms:
        cells = []
        for key in keys:
            values = results.values(arm, key)
            digits = 1 if key == "smallest_found" else 3
            cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}" if values else "none")
        rows.append([arm, str(len(results.of(arm))), *cells])
    return rows


def by_group(figure: FigureOfParts, tested: Sequence[View]) -> FigureOfParts:
    """The figure of groups, each with all of its views."""
    _, group_of_view = np.unique([view.group for view in tested], return_inverse=True)
    return lambda times: figure(times[:, group_of_view])


def compare(results: Results, arm: str, control: str, key: str, resamples: int) -> dict:
    """How much better the arm is than the control, paired by seed; parts and seeds are resampled.

    Args:
        key: of `COMPARED`.

    Returns:
        difference (positive is better), low and high of its 95 % interval, verdict.
    """
    sign = 1 if FIGURES[key][1] else -1
    theirs = {seed: run for (seed, _), run in results.of(control).items()}
    pairs = [(run, theirs[seed]) for (seed, _), run in results.of(arm).items() if seed in theirs]

    def signed(run: Run) -> FigureOfParts:
        figure = results.figure(run, key)
        return lambda times: sign * figure(times)

    b, a = ([signed(pair[side]) for pair in pairs] for side in (0, 1))
    difference, low, high = paired_bootstrap(a, b, results.parts, resamples)
    return {"difference": difference, "low": low, "high": high, "verdict": verdict(low, high)}


Comparisons = dict[tuple[str, str, str], dict]  # of arm, control and figure


def compare_all(results: Results, resamples: int) -> Comparisons:
    """Every arm of generated images against every control, in every figure of `COMPARED`."""
    return {
        (arm, control, key): compare(results, arm, control, key, resamples)
        for arm in results.generated
        for control in results.controls
        for key in COMPARED
    }


def comparison_table(comparisons: Comparisons) -> Table:
    """A row for each arm and control: its gain in each compared figure, and the verdict."""
    rows = [["arm", "against", *(f"better in {FIGURES[key][0]} by [95 %]" for key in COMPARED)]]
    for arm, control in dict.fromkeys((arm, control) for arm, control, _ in comparisons):
        found = [comparisons[arm, control, key] for key in COMPARED]
        rows.append(
            [arm, control]
            + [f"{c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]: {c['verdict']}" for c in found]
        )
    return rows


PLAIN = re.compile(r"[\w %±+.,:-]*(\[[\d.,% +-]+\][\w :]*)?")  # what Markdown shows as it is


def escaped(rows: Table) -> Table:
    """The rows, for Markdown."""
    return [[cell if PLAIN.fullmatch(cell) else markdown_text(cell) for cell in row] for row in rows]


def html_table(rows: Table) -> str:
    head, *body = ["".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows]
    return f"<table><tr>{head.replace('<td>', '<th>')}" + "".join(f"<tr>{row}" for row in body) + "</table>"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def curves(by_setting: dict[str, Results], key: str) -> Image.Image | None:
    """A figure of each arm against the number of references and of generated images; None without such a series."""
    from matplotlib.figure import Figure

    def axis(setting: str, letter: str) -> str:
        return next(part[1:] for part in setting.split("-") if part.startswith(letter))

    series = {
        "reference images of a type": [s for s in by_setting if axis(s, "n") == "all"],
        "generated images": [s for s in by_setting if axis(s, "k") == axis(list(by_setting)[-1], "k")],
    }
    series = {what: settings for what, settings in series.items() if len(settings) > 1}
    if not series:
        return None
    figure = Figure(figsize=(6 * len(series), 4))
    for place, (what, settings) in enumerate(series.items(), 1):
        plot = figure.add_subplot(1, len(series), place)
        letter = "k" if what.startswith("reference") else "n"
        settings = sorted(settings, key=lambda s: float(axis(s, letter).replace("all", "inf")))
        names = [axis(s, letter) for s in settings]
        for arm in by_setting[settings[0]].arms:
            means = [np.mean(by_setting[s].values(arm, key)) for s in settings]
            spreads = [np.std(by_setting[s].values(arm, key)) for s in settings]
            plot.errorbar(names, means, spreads, marker="o", capsize=3, label=arm)
        plot.set_xlabel(what)
        plot.set_ylabel(FIGURES[key][0])
    plot.legend(fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, bbox_inches="tight")
    return Image.open(stream).convert("RGB")


def sheet(views: Sequence[View], regions: Sequence[Region]) -> Image.Image | None:
    """The first views with such a region, its box in red; None if there is none."""
    shown = regions[:SHOWN]
    if not shown:
        return None
    columns = min(len(shown), 8)
    canvas = Image.new("RGB", (columns * (CELL + 4), -(-len(shown) // columns) * (CELL + 4)), "white")
    for i, region in enumerate(shown):
        view = views[region.part]
        cell = Image.fromarray(view.image).resize((CELL, CELL))
        left, top, right, bottom = (round(x * CELL / len(view.image)) for x in region.box)
        ImageDraw.Draw(cell).rectangle((left - 2, top - 2, right + 1, bottom + 1), outline="red")
        canvas.paste(cell, (i % columns * (CELL + 4), i // columns * (CELL + 4)))
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# Misses


def write_misses(file: Path, results: Results, arm: str) -> int:
    """Writes the defects that most runs of an arm miss, a line of JSON each; returns their number.

    A defect that lies in several views, or is cut by one, has the line of the view that shows most of it.

    A line has the image's name, the defect's box in the image's pixels, its area there, and the share of runs.
    """
    masks, counts = results.masks, dict[Region, int]()
    runs = list(results.of(arm).values())
    for run in runs:
        for region in missed_defects(results.maps(run), masks, results.figures[run]["threshold"]):
            counts[region] = counts.get(region, 0) + 1
    lines = list[dict]()
    for region, count in sorted(counts.items(), key=lambda item: (-item[0].area, item[0])):
        if 2 * count > len(runs):
            view = results.tested[region.part]
            left, top, right, bottom = view.box
            scale = np.array([right - left, bottom - top]) / len(view.image)
            box = (np.array(region.box).reshape(2, 2) * scale + (left, top)).round().astype(int).ravel().tolist()
            area = round(float(region.area * scale.prod()))
            line = {"image": view.source, "box": box, "area": area, "missed_by": count / len(runs)}
            if not any(line["image"] == other["image"] and overlap(box, other["box"]) for other in lines):
                lines.append(line)
    write_lines(file, sorted(lines, key=lambda line: (line["image"], line["box"])))
    return len(lines)


def overlap(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two boxes share a pixel."""
    return all(max(one[i], other[i]) < min(one[i + 2], other[i + 2]) for i in (0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# The report

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>DefectFill: does it help? {title}</title>
<style>body {{ font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }} tr {{ border-bottom: 1px solid #ccc }}
td, th {{ padding: .2em .6em; text-align: left }} img {{ max-width: 100% }}</style>
<h1>{title}</h1>
{body}
"""


def read_results(folder: Path, runs: Sequence[Run], tested: Sequence[View]) -> dict[str, Results]:
    """The results of each setting, whose runs lie in a folder."""
    found: dict[str, Results] = {}
    for run in runs:
        results = found.setdefault(run.setting, Results(tested, {}, lambda run: read_maps(run, folder)))
        results.figures[run] = read_run(run, folder, tested)
    return found


def as_record(results: Results, comparisons: Comparisons) -> dict:
    """What report.json says of these results."""
    return {
        "figures": {arm: {key: results.values(arm, key) for key in FIGURES} for arm in results.arms},
        "comparisons": [dict(zip(("arm", "control", "figure"), key)) | c for key, c in comparisons.items()],
    }


def write_report(
    output_dir: Path,
    title: str,
    runs: Sequence[Run],
    tested: Sequence[View],
    notes: Sequence[str],
    defects: Sequence[str] = (),
    resamples: int = 2000,
) -> list[str]:
    """Writes report.json, report.md, report.html and the misses of each setting; returns the verdicts as text.

    Args:
        runs: whose files are in `output_dir / "detect"`.
        tested: the views that they were tested on.
        notes: what a reader must know.
        defects: the types in the order of the views' labels; several have tables of their own, too.
    """
    by_setting = read_results(output_dir / "detect", runs, tested)
    groups = len({view.group for view in tested})
    marked = sum(view.mask.any() for view in tested)
    about = [f"{marked} test views with defects and {len(tested) - marked} good ones, of {groups} parts.", *notes]
    parts: list[tuple[str, Table | Image.Image | None]] = []
    record: dict = {"title": title, "notes": about, "settings": {}}
    verdicts = []
    for setting, results in by_setting.items():
        comparisons = compare_all(results, resamples)
        parts += [
            (f"Figures, {setting}", figure_table(results)),
            (f"Verdicts, {setting}", comparison_table(comparisons)),
        ]
        record["settings"][setting] = as_record(results, comparisons) | {"types": {}}
        verdicts += [
            f"{setting}: {arm} against {control}, {FIGURES[key][0]}: {c['verdict']} "
            f"({c['difference']:+.3f}, 95 % from {c['low']:+.3f} to {c['high']:+.3f})"
            for (arm, control, key), c in comparisons.items()
        ]
        for label, defect in enumerate(defects if len(defects) > 1 else (), start=1):
            if of_type := results.of_type(label):
                views = sum(view.mask.any() for view in of_type.tested)
                parts.append((f"{defect}: figures on its {views} views, {setting}", figure_table(of_type)))
                comparisons = {}
                if of_type.parts > 1:  # else there is no interval
                    comparisons = compare_all(of_type, resamples)
                    parts.append((f"{defect}: verdicts, {setting}", comparison_table(comparisons)))
                record["settings"][setting]["types"][defect] = as_record(of_type, comparisons)
        for arm in ("real repeated", *results.generated[:1]):
            if run := results.of(arm).get((0, 0)):
                maps, threshold = results.maps(run), results.figures[run]["threshold"]
                missed = missed_defects(maps, results.masks, threshold)
                found = false_finds(maps, results.masks, threshold)
                parts.append((f"Missed by {arm}, {setting}: {len(missed)}", sheet(tested, missed)))
                parts.append((f"False finds of {arm}, {setting}: {len(found)}", sheet(tested, found)))
        if results.generated:
            record["settings"][setting]["misses"] = write_misses(
                output_dir / f"misses-{setting}.jsonl", results, results.generated[0]
            )
    parts += [(f"Curves: {FIGURES[key][0]}", curves(by_setting, key)) for key in COMPARED]
    write_json(output_dir / "report.json", record)
    with atomic_write(output_dir / "report.md") as temporary:
        temporary.write_text("".join(as_markdown(title, about, parts)), encoding="utf-8")
    with atomic_write(output_dir / "report.html") as temporary:
        page = PAGE.format(title=html.escape(title), body="\n".join(as_html(about, parts)))
        temporary.write_text(page, encoding="utf-8")
    return verdicts


def results_for_card(report: dict, setting: str, arm: str) -> dict[str, tuple[str, float]]:
    """What report.json says of an arm, as a model card's results: each compared figure, and its gain on repetition."""
    figures, found = report["settings"][setting]["figures"][arm], {}
    for key in COMPARED:
        name = f"{FIGURES[key][0]} of a segmenter trained on real and generated defects"
        found[key] = (name, float(np.mean(figures[key])))
    for compared in report["settings"][setting]["comparisons"]:
        if compared["arm"] == arm and compared["control"] == "real repeated":
            name = f"{FIGURES[compared['figure']][0]}: better than on as many repeated real defects by"
            found[f"{compared['figure']}_gain"] = (name, compared["difference"])
    return found


def as_markdown(title: str, about: Sequence[str], parts: Sequence[tuple]) -> Iterator[str]:
    """The tables; pictures are in the page alone."""
    yield f"# {markdown_text(one_line(title))}\n\n" + "".join(f"- {markdown_text(one_line(n))}\n" for n in about)
    for head, content in parts:
        if isinstance(content, list):
            yield f"\n## {markdown_text(head)}\n\n{markdown_table(escaped(content))}"


def as_html(about: Sequence[str], parts: Sequence[tuple]) -> Iterator[str]:
    yield "<ul>" + "".join(f"<li>{html.escape(note)}" for note in about) + "</ul>"
    for head, content in parts:
        if content is not None:
            yield f"<h2>{html.escape(head)}</h2>" + (
                html_table(content) if isinstance(content, list) else image_element(content, "PNG")
            )
