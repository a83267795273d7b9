#!/usr/bin/env bash
# From nothing to a contact sheet of generated defects, on a CPU and without a download of models or images.
#     bash scripts/demo.sh [output folder, default demo]
# VENV names another environment to use or make (default .venv).
# On so small a base, crops around the defects and LoRA on all layers give better defects than the commands' defaults.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-demo}"
venv="${VENV:-.venv}"
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt -e .
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE ACCELERATE_USE_CPU=true

[ -e "$out/data/board" ] || "$venv/bin/python" scripts/make_demo_data.py --output_dir "$out/data" --parts board \
    --types mouse_bite --good 6 --good_masks mouse_bite
launch() { # --multi_gpu is accelerate's word for several processes, on CPUs too
    "$venv/bin/accelerate" launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "$@"
}
launch train_defectfill.py --pretrained_model_name_or_path scripts/tiny_base --train_data_dir "$out/data/board" \
    --defect mouse_bite --output_dir "$out/lora" --resolution 128 --zoom on --max_train_steps 240 --lr_warmup_steps 10 \
    --train_batch_size 2 --learning_rate 2e-3 --text_encoder_lr 2e-3 --lr_scheduler cosine --lora_targets all --rank 32 \
    --lora_alpha 32 --lora_dropout 0 --timestep_bias_strategy later --timestep_bias_multiplier 3 --cache_latents 8 \
    --validation_steps 0 --checkpointing_steps 40 --resume_from_checkpoint latest
launch generate_defectfill.py --lora "$out/lora" --image "$out/data/board/train/good" \
    --mask "$out/data/board/good_masks/mouse_bite" --reference_data "$out/data/board" --output_dir "$out/generated" \
    --num_candidates 4 --num_inference_steps 20 --guidance_scale 4 --selection ssim+likeness
"$venv/bin/python" - "$out" <<'END'
import json, sys
record = json.load(open(f"{sys.argv[1]}/lora/run_record.json"))
before, after = record["before"], record["after"]
print(f"loss {before['loss']:.4f} -> {after['loss']:.4f}, "
      f"attention map's IoU with the mask {before['attention_iou']:.2f} -> {after['attention_iou']:.2f}")
END
echo "Look at $out/generated/contact_sheet.png"
