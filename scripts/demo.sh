#!/usr/bin/env bash
# From nothing to a contact sheet of generated defects, on a CPU and without a download of models or images.
#     bash scripts/demo.sh [output folder, default demo]
# VENV names another environment to use or make (default .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-demo}"
venv="${VENV:-.venv}"
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check -r requirements.txt
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE

[ -e "$out/data" ] || "$venv/bin/python" scripts/make_demo_data.py --output_dir "$out/data" --parts nut --good 6
[ -e "$out/base" ] || "$venv/bin/python" scripts/make_tiny_base.py --output_dir "$out/base" --random_weights
"$venv/bin/accelerate" launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    train_defectfill.py --pretrained_model_name_or_path "$out/base" --train_data_dir "$out/data/nut" --defect hole \
    --output_dir "$out/lora" --resolution 128 --max_train_steps 30 --lr_warmup_steps 5 --train_batch_size 2 \
    --validation_steps 30 --num_validation_images 2 --validation_inference_steps 10 --checkpointing_steps 10 \
    --resume_from_checkpoint latest
"$venv/bin/python" generate_defectfill.py --lora "$out/lora" --image "$out/data/nut/train/good" --mask_source random \
    --output_dir "$out/generated" --num_candidates 4 --num_inference_steps 10 --selection ssim
echo "Look at $out/generated/contact_sheet.png"
