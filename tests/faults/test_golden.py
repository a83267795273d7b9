"""What the version of commit 1db046f wrote, of a run of the toy model with rank 1: it is still read and resumed.

`golden/` is as that version left it, with /old/base in place of the base's path.
"""

import shutil
from pathlib import Path

import torch
from drawn import write_image
from toy_model import toy_pipeline

import train_defectfill as t
from defectfill.lora import LORA_FILE, add_lora, load_lora, lora_parameters, read_lora
from defectfill.runs.checkpoint import BEFORE, check_identity, find_checkpoint, load, restore
from defectfill.runs.manifest import ManifestLine, PlanLine, read_lines, write_table
from defectfill.runs.plan import check_plan
from defectfill.runs.record import LossLog
from defectfill.runs.report import write_report
from defectfill_dataset.splits import SplitFile
from defectfill_dataset.text import Schema, read_json


GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "training/checkpoint-3"


def test_a_lora_is_loaded():
    lora = read_lora(CHECKPOINT / LORA_FILE)
    assert lora.record["prompts"] == {"hole": "A nut with sks"} and lora.record["resolution"] == 32
    assert lora.record["appearance"]["hole"]["strangest"] > 0 and lora.record["zoom"]["context"] == 3
    assert {x.item() for name, x in lora.tensors.items() if name.endswith(".alpha")} == {2}
    load_lora(toy_pipeline(), lora)


def test_a_checkpoint_is_resumed():
    pipe = toy_pipeline()
    add_lora(pipe.unet, pipe.text_encoder, 1, 2, 0.0)
    parameters = lora_parameters(pipe.unet, pipe.text_encoder)
    groups = [
        {"params": [p for name, p in parameters.items() if name.startswith(x)]} for x in ("lora_unet", "lora_te")
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert find_checkpoint(CHECKPOINT.parent, "latest") == CHECKPOINT
    saved = load(CHECKPOINT)
    state = restore(saved, parameters, optimizer, scheduler, None)
    argv = "--train_data_dir x --output_dir x --resolution 32 --rank 1 --lora_alpha 2 --lr_warmup_steps 2"
    options = vars(t.parse_args([*argv.split(), "--train_batch_size", "2"]))
    today = state["identity"] | {name: options[name] for name in t.IDENTITY if name != "gradient_accumulation_steps"}
    check_identity(BEFORE | state["identity"], today)
    assert today.keys() > state["identity"].keys() | {"torch_compile"}
    assert state["step"] == 3 and len(optimizer.state) == len(parameters)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 4e-5]


def test_losses_and_split_are_read(tmp_path):
    shutil.copy(GOLDEN / "training/losses.jsonl", tmp_path)
    log = LossLog(tmp_path / "losses.jsonl", 2)
    assert [line["step"] for line in log.lines] == [1, 2] and log.summary()["last_tenth"]["loss"] > 0
    assert read_json(GOLDEN / "training/split.json", SplitFile)["train"] == ["test/hole/000.png", "test/hole/001.png"]


def test_a_generation_run_is_read(tmp_path):
    plan = read_lines(GOLDEN / "generation/plan.jsonl", PlanLine)
    check_plan(plan, plan)
    check_identity(settings := read_json(GOLDEN / "generation/settings.json", Schema), settings)
    lines = read_lines(GOLDEN / "generation/manifest.jsonl", ManifestLine)
    assert [line["name"] for line in lines] == [line["name"] for line in plan] == ["000", "001", "002"]
    for line in lines:
        write_image(tmp_path / f"contact/{line['name']}.png")
    write_table(tmp_path / "manifest.parquet", lines)
    speed = {"device": "cpu", "processes": 1, "images": 0, "seconds_per_image": None}
    write_report(tmp_path / "summary.html", plan, lines, [], speed)
    assert "<td>3" in (tmp_path / "summary.html").read_text()
