"""Synthesis of masks: shapes, the object they are placed on, and their placement."""
