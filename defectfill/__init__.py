"""The method beside training's equations: base model, LoRA file, sampling, selection; `runs/` carries a run."""
