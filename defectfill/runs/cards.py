"""Model and dataset cards: the README.md of a LoRA and of a dataset."""

import hashlib
import re
from collections import Counter
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from defectfill_dataset import InputError, Problem, file_digest
from defectfill_dataset.errors import one_line
from defectfill_dataset.text import MOST_YAML_BYTES, read_text

from ..markdown import markdown_table
from .files import atomic_write, visible_files


CARD = """---
{{ card_data }}
---

# DefectFill LoRA: {{ text(object_words) }}

A LoRA of {{ code(base_name) }} (UNet and text encoder).
It inpaints defects into images of a good {{ text(object_words) }}, inside a mask.
Trained with [DefectFill](https://arxiv.org/abs/2503.13985) on {{ images }} image and mask pairs.

| defect | prompt |
|---|---|
{% for defect, prompt in prompts.items() -%}
| {{ text(defect) }} | {{ code(prompt) }} |
{% endfor %}
## Use

```python
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
from diffusers.utils import load_image

pipe = StableDiffusionInpaintPipeline.from_pretrained(
    {{ python(base_name) }},{% if revision %} revision={{ python(revision) }},{% endif %} dtype=torch.float16
).to("cuda")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights({{ python(repo_id) }})
image = pipe(
    {{ python(prompts.values() | first) }},
    image=load_image("good.png"),
    mask_image=load_image("mask.png"),  # white where the defect goes
    height={{ resolution }},
    width={{ resolution }},
{%- if zoom %}
    padding_mask_crop=32,  # about the mask's longer side in pixels
{%- endif %}
    num_inference_steps=50,
).images[0]
```

{% if zoom -%}
It was trained on square crops {{ "%g" | format(zoom.context) }} times the size of the defect in their middle, and
works best on such crops: with `padding_mask_crop`, diffusers cuts one out and pastes it back.
{% else -%}
The pipeline also changes pixels outside the mask a little; paste the result into the input with the mask to keep them.
{% endif %}
ComfyUI, AUTOMATIC1111, Forge, SD.Next, InvokeAI and other programs that read kohya's LoRA files load it too, with
strength 1 for UNet and text encoder, on an inpainting checkpoint of the base.

## Training

{{ steps }} steps of batch {{ batch_size }} at {{ resolution }} px; rank {{ rank }}
{%- if conv_rank %} ({{ conv_rank }} for convolutions){% endif %}, alpha {{ alpha }}, layers: {{ text(lora_targets) }}.
Seed {{ seed }}.

Mean squared error of the predicted x_0 inside the masks, by timestep (999 is noise alone), with the prompts above.
A guess of the mean would have an error as large as the variance.

{{ x0_errors }}
The training images' licence applies to what is derived from them (MVTec AD is CC BY-NC-SA 4.0: no commercial use).
"""

DATASET_CARD = """---
{{ card_data }}
---

# Defect images with masks: {{ text(objects | join(", ")) }}

- Source: {{ source }}
- Licence: {{ code(license) if license else "not stated; ask before you pass it on" }}

| object | defect | train | test | good |
|---|---|---|---|---|
{% for (object, defect), found in rows.items() -%}
| {{ text(object) }} | {{ text(defect) }} | {{ found.train }} | {{ found.test }} | {{ found.good }} |
{% endfor %}
`train` holds the defects to learn from, `test` those held out, `good` images without a defect.
The split: {{ split }}.

Each row has `image`, `mask`, `object`, `defect` and `source_file` (the image's name at its source).
A mask is a PNG of its image's size, upright: 255 inside the defect, 0 outside; good images have none.
{{ treatment }}.

```python
from datasets import load_dataset

data = load_dataset({{ python(repo_id) }})
{%- if own_good %}
good = load_dataset({{ python(repo_id) }}, "good")  # images without a mask are a configuration of their own
{%- endif %}
```
"""

SPLITS_IN_WORDS = {
    "auto": "the source's own where it has one, else the first third of each defect type, by name, is `train`",
    "first_third": "the first third of each defect type, by name, is `train`",
    "all": "all defects are `train`",
    "by_good_image": "by a hash of the good image; all variants of one good image are in the same split",
}


def markdown_text(text: str) -> str:
    """The text on one line, as Markdown shows it, in a table too: no HTML, link, code or cell of its own."""

    def plain(found: re.Match) -> str:
        return f"\\{found[1]}" if found[1] else f"&#{ord(found[0])};"

    return re.sub(r"([`*_\[\]()~!#$:.@{}])|[&<>|\\]", plain, one_line(" ".join(text.split())))


def markdown_code(text: str) -> str:
    """The text as code in a line or a table of Markdown; as `markdown_text` where no such code can hold it."""
    plain = text.isprintable() and text.strip() == text != "" and not re.search(r"[`|\\]", text)
    return f"`{text}`" if plain else markdown_text(text)


def python_string(text: str) -> str:
    """The text as a literal of Python, on one line."""
    return '"' + one_line(text.replace("\\", r"\\").replace('"', r"\"")) + '"'


IN_CARDS = {"text": markdown_text, "code": markdown_code, "python": python_string}


def x0_errors(measures: dict) -> str:
    """A table of Markdown from the measures `before`, `after` and `held_out` of a run's record."""
    rows = [["images", *(f"t = {t}" for t in measures["before"]["x0_error"]["defect"]), "variance"]]
    for name, when in (("training, before", "before"), ("training, after", "after"), ("held out", "held_out")):
        if found := measures[when]:
            errors = found["x0_error"]
            rows.append([name, *(f"{error:.3f}" for error in (*errors["defect"].values(), errors["variance"]))])
    return markdown_table(rows)


def write_model_card(
    folder: Path, record: dict, measures: dict, images: int, batch_size: int, repo_id: str | None
) -> None:
    """Writes README.md: what the LoRA is, its prompts, how to use it without this project, how well it learnt."""
    local = record["revision"] is None  # the Hub refuses a card whose base is a path
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["lora", "stable-diffusion-inpainting", "defect-generation", "defectfill"],
        **({} if local else {"base_model": record["base"], "base_model_relation": "adapter"}),
    )
    of_record = "revision steps resolution zoom rank conv_rank alpha lora_targets seed".split()
    card = ModelCard.from_template(
        data,
        template_str=CARD,
        **IN_CARDS,
        object_words=record["object"],
        base_name="path/to/the/base" if local else record["base"],
        repo_id=repo_id or "path/to/this/folder",
        images=images,
        batch_size=batch_size,
        prompts=record["defect_prompts"],
        x0_errors=x0_errors(measures),
        **{key: record[key] for key in of_record},
    )
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(str(card), encoding="utf-8")


def read_model_card(folder: Path) -> ModelCard:
    """The card of a LoRA's folder.

    Raises:
        InputError: there is none, or its head cannot be read (DF385).
    """
    file = folder / "README.md"
    text = read_text(file, "DF385", "give the output folder of a training", MOST_YAML_BYTES)
    try:
        return ModelCard(text)
    except Exception as error:  # of YAML, and of what the Hub's client makes of it
        what = f"its head cannot be read: {' '.join(str(error).split())}"
        raise InputError(Problem("DF385", file, what, "train again, or leave out --lora")) from error


def add_results(folder: Path, dataset: str, results: dict[str, tuple[str, float]]) -> None:
    """Puts figures into the model-index of a LoRA's card, in place of those of the same dataset.

    Args:
        results: metric type -> its name and value.
    """
    card = read_model_card(folder)
    others = [result for result in card.data.eval_results or [] if result.dataset_name != dataset]
    card.data.model_name = card.data.model_name or "DefectFill LoRA"
    card.data.eval_results = others + [
        EvalResult("image-segmentation", "defect images", dataset, kind, round(value, 4), metric_name=name)
        for kind, (name, value) in results.items()
    ]
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(str(card), encoding="utf-8")


def write_dataset_card(
    folder: Path,
    counts: Counter,
    file_format: str,
    split: str,
    license: str | None,
    source: str | None,
    images: Counter,
    repo_id: str | None,
) -> None:
    """Writes README.md: what the dataset is, where it is from, its licence, and how to load it.

    Args:
        counts: number of images of each (object, defect, split).
        file_format: "parquet" or "imagefolder".
        split: a rule of `split_rows`, or a split file.
        images: number of images of each treatment, as `image_bytes` names them.
    """
    paths = {
        name: f"data/{name}-*" if file_format == "parquet" else f"{name}/**"
        for name in ("train", "test", "good")
        if any(name == of for _, _, of in counts)
    }
    own_good = file_format == "imagefolder" and "good" in paths  # `datasets` takes no column of masks that has none
    configs = {"default": [name for name in paths if not (own_good and name == "good")]}
    configs |= {"good": ["good"]} if own_good else {}
    digest = _content_digest(folder)  # the cache of `datasets` knows a local folder by its name and its card alone
    data = DatasetCardData(
        license=license,
        task_categories=["image-segmentation"],
        tags=["anomaly-detection", "defect-detection", "defectfill"],
        size_categories=size_category(counts.total()),
        configs=[
            {
                "config_name": config,
                "description": f"sha256 {digest}",
                "data_files": [{"split": name, "path": paths[name]} for name in names],
            }
            for config, names in configs.items()
        ],
    )
    rows = {
        kind: {name: counts[(*kind, name)] or "" for name in ("train", "test", "good")}
        for kind in sorted({(name, defect) for name, defect, _ in counts})
    }
    card = DatasetCard.from_template(
        data,
        template_str=DATASET_CARD,
        **IN_CARDS,
        objects=sorted({name for name, _ in rows}),
        rows=rows,
        source=_source_in_words(source),
        license=license,
        split=SPLITS_IN_WORDS.get(split, "a split file's"),
        treatment=treatment_in_words(images),
        own_good=own_good,
        repo_id=repo_id or "path/to/this/folder",
    )
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(str(card), encoding="utf-8")


def treatment_in_words(images: Counter) -> str:
    """What was done so that published images hold their pixels and nothing else."""
    done = {
        "kept": "the source's files, byte for byte",
        "trimmed": "without what their files held beside the coded pixels (metadata, colour profile, further images)",
        "rewritten": "written anew as upright PNG of the same pixels",
    }
    found = "; ".join(f"{images[how]} {words}" for how, words in done.items() if images[how])
    return f"Of {images.total()} images, {found}"


def _content_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name, file in visible_files(folder).items():
        digest.update(f"{name} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def _source_in_words(source: str | None) -> str:
    is_link = source and re.fullmatch(r"https?://[^\s<>]+", source)
    return f"<{source}>" if is_link else markdown_text(source or "not stated")


def size_category(number: int) -> str:
    """The Hub's name for a number of images, such as 1K<n<10K."""
    steps = [1, 1_000, 10_000, 100_000, 1_000_000]
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "n>1M"]
    return [name for step, name in zip(steps, names) if step <= number][-1]
