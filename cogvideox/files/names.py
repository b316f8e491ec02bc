"""The names of the files of a run, and the folders of the project."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder with the scripts
CONFIGS = ROOT / "configs"  # of published models, without their weights

STAGE_OUTPUTS = Path("stage_outputs")  # the folder where they are, unless an option names another one
CONFIG = "generation_config.json"
EMBEDDINGS = "stage1_embeddings.safetensors"
IMAGE_TENSORS = ("image_mean", "image_logvar")  # among the embeddings, of the latents of an image
VIDEO_TENSORS = ("video_mean", "video_logvar")  # of those of a video to change
GIVEN_TENSORS = {"image": IMAGE_TENSORS, "video": VIDEO_TENSORS}
LATENTS = "stage2_latents.safetensors"
PREVIEW = "stage2_preview.png"
STATE = "stage2_state.safetensors"  # of an unfinished run
TIMINGS = "timings.json"
INDEX = "videos.jsonl"  # of several videos
SHEET = "videos.png"  # of several videos
VIDEO = "output_video.mp4"
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi")  # containers for H.264
