"""The model card and the Hub: checked at the start of a run, pushed at its end, nothing but an allow-list."""

import threading
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

from defectfill_dataset import InputError

from .files import replacing
from .lora_file import LORA_FILE


PUBLISHED_FILES = [LORA_FILE, "README.md"]

CARD = """---
{{ card_data }}
---

# DefectFill LoRA: {{ object_words }}

A LoRA of `{{ base_name }}` (UNet and text encoder) that paints defects into photographs of a good {{ object_words }},
where a mask says.
Trained with [DefectFill](https://arxiv.org/abs/2503.13985) on {{ images }} image and mask pairs.

| defect | prompt |
|---|---|
{% for defect, prompt in prompts.items() -%}
| {{ defect }} | `{{ prompt }}` |
{% endfor %}
## Use

```python
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
from diffusers.utils import load_image

pipe = StableDiffusionInpaintPipeline.from_pretrained(
    "{{ base_name }}",{% if revision %} revision="{{ revision }}",{% endif %} dtype=torch.float16
).to("cuda")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights("{{ repo_id }}")
image = pipe(
    "{{ prompts.values() | first }}",
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
It was trained on windows {{ "%g" | format(zoom.context) }} times as large as the defect in their middle, and paints
best in such: `padding_mask_crop` makes diffusers cut one out and paste it back.
{% else -%}
The pipeline also changes pixels outside the mask a little; paste the result into the input with the mask to keep them.
{% endif %}
## Training

{{ steps }} steps of batch {{ batch_size }} at {{ resolution }} px; rank {{ rank }}, alpha {{ alpha }}.
Seed {{ seed }}.
The training images' licence applies to what is derived from them (MVTec AD is CC BY-NC-SA 4.0: no commercial use).
"""


def check_hub(repo_id: str | None, public: bool, default_name: str) -> str:
    """Makes sure, before training, that the run can be pushed; returns the repository's full id.

    The token comes from the environment or `hf auth login`. A missing repository is made, private unless `public`.

    Raises:
        InputError: no valid token (DF500), a repository that is public unasked or private (DF501), or no right to
            write (DF502).
    """
    api = HfApi()
    try:
        user = api.whoami()["name"]
    except Exception as error:  # whatever a Hub or a network can raise
        raise InputError(
            f"DF500 --push_to_hub: no valid token; run 'hf auth login' or set HF_TOKEN ({error})"
        ) from error
    repo_id = repo_id or default_name
    if "/" not in repo_id:
        repo_id = f"{user}/{repo_id}"
    try:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        api.auth_check(repo_id, write=True)
        is_public = not api.repo_info(repo_id).private
    except Exception as error:
        raise InputError(
            f"DF502 --hub_model_id {repo_id}: cannot be made or written with this token ({error})"
        ) from error
    if is_public != public:
        raise InputError(
            f"DF501 --hub_model_id {repo_id}: is public; add --hub_public to publish there, or name another"
            if is_public
            else f"DF501 --hub_model_id {repo_id}: is private; leave out --hub_public, or make it public on the Hub"
        )
    return repo_id


def write_model_card(folder: Path, record: dict, images: int, batch_size: int, repo_id: str | None) -> None:
    """Writes README.md: what the LoRA is, its prompts, how to use it without this project."""
    local = record["revision"] is None  # the Hub refuses a card whose base is a path
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["lora", "stable-diffusion-inpainting", "defect-generation", "defectfill"],
        **({} if local else {"base_model": record["base"], "base_model_relation": "adapter"}),
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD,
        object_words=record["object"],
        base_name="path/to/the/base" if local else record["base"],
        repo_id=repo_id or "path/to/this/folder",
        images=images,
        batch_size=batch_size,
        **{key: record[key] for key in "revision prompts steps resolution zoom rank alpha seed".split()},
    )
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(str(card))


def push(folder: Path, repo_id: str, timeout: float) -> None:
    """Uploads the LoRA and its card, nothing else; gives up after `timeout` seconds.

    Raises:
        RuntimeError: the upload failed; the files are safe where they are, and the message tells how to push them.
    """
    failure: list[Exception] = []

    def upload() -> None:
        try:
            HfApi().upload_folder(
                repo_id=repo_id, folder_path=folder, allow_patterns=PUBLISHED_FILES, commit_message="DefectFill LoRA"
            )
        except Exception as error:  # whatever it is, it is raised below
            failure.append(error)

    thread = threading.Thread(target=upload, daemon=True)  # a server that never answers must not hold the process
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        failure.append(TimeoutError(f"no answer within {timeout:.0f} s"))
    if failure:
        include = " ".join(f"--include {name}" for name in PUBLISHED_FILES)
        raise RuntimeError(
            f"Push to {repo_id} failed: {failure[0]}. The weights are safe in {folder}; push them with:\n"
            f"    hf upload {repo_id} {folder} . {include}"
        ) from failure[0]
