"""Machinery around the method, used by both scripts: base models, LoRA files, checkpoints, signals, publishing."""
