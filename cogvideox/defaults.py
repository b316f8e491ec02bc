"""Defaults and bounds of the command-line options."""

# Beyond these, options and configs are mistakes; they are refused before memory is taken for them.
MOST_PIXELS = 16_384  # of a height or a width, the most that H.264 has
MOST_FRAMES = 10_000
MOST_FPS = 1_000
MOST_GUIDANCE = 1_000.0
MOST_LORA_SCALE = 1_000.0
MOST_SEED = 2**64 - 1  # that torch takes

# Defaults of the command-line options.
MODEL_NAME = "zai-org/CogVideoX1.5-5B"
WIDTH = 1360
HEIGHT = 768
FRAMES = 81
FPS = 8
NUM_STEPS = 10
GUIDANCE_SCALE = 6.0
SEED = 42
WARMUP_STEPS = 2
USE_DYNAMIC_CFG = False
DENSE_STEPS = 0.25  # share of the steps that are dense in spite of --sparse_attention
USE_DP = True
LAYOUT = "tp"

# What --preset may be: a draft, with the settings of the original project, or as the model's authors run it; see
# `generation_defaults.by_default`.
PRESETS = ("draft", "authors")
DRAFT: dict[str, object] = {
    "num_inference_steps": NUM_STEPS,
    "guidance_scale": GUIDANCE_SCALE,
    "scheduler": None,  # the one that the model names
    "use_dynamic_cfg": USE_DYNAMIC_CFG,
    "fps": FPS,
}
SOME_QUERIES = 8  # tokens whose attention weights a dump has if none are named
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")  # what --dtype may be
ATTENTIONS = ("splash_exp2", "splash", "xla")  # what --attention may be: the names in its table of implementations
DECODERS = ("torchax", "flax")  # what --decoder may be: of each there is a module models/vae/vae_<name>.py
STRENGTH = 0.8  # of CogVideoXVideoToVideoPipeline
IMAGE_LATENT_SCALES = ("diffusers", "sat")  # what --image_latent_scale may be
