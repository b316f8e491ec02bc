"""The names of the files that pass between the stages."""

from pathlib import Path

STAGE_OUTPUTS = Path("stage_outputs")


# The files that pass between the stages, and the entries that each stage adds to the config.
CONFIG = "generation_config.json"
EMBEDDINGS = "stage1_embeddings.safetensors"
LATENTS = "stage2_latents.safetensors"
PREVIEW = "stage2_preview.png"
VIDEO = "output_video.mp4"
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi")  # containers for H.264
