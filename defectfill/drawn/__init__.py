"""Experiments on drawn parts: the parts, a small base model, and what the scripts that compare on them share."""
