"""Measure time and quality of the stages beside the diffusers pipeline; compare predictions with measurements."""
