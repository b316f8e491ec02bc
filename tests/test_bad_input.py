"""What is wrong from outside: one line on stderr that names it, exit status 2, no traceback, and no file touched."""

import argparse
import errno
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import socket
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import hypothesis
import imageio.v3
import jax
import numpy as np
import pytest
import torch
from hypothesis import strategies
from safetensors import safe_open
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import stage1_text_encoder
from cogvideox.cli import types
from cogvideox.errors import UserError
from cogvideox.files import checkpoint, prompts, schemas, stage_files
from cogvideox.files.names import GIVEN_TENSORS, VIDEO
from cogvideox.files.tensors import DTYPES, is_finite
from cogvideox.files.video_file import check_ffmpeg, video_writer
from cogvideox.run import accelerator, compilation
from tests.helpers import (
    CONFIG,
    DEVICES,
    EMBEDDINGS,
    LATENTS,
    SIZE,
    STAGE1,
    STAGE2,
    STAGE3,
    STAGE3_FLAX,
    contents,
    edit_config,
    edit_latents,
    poison,
    run_command,
    stage_command,
    stage_environment,
)
from tests.in_process import limited_files, run_here

# --- Ways to spoil a folder that has a model and the outputs of a run ----------------------------------------------

OUT, MODEL = Path("outputs"), Path("model")  # in the working directory of a case
TEXT_ENCODER, TRANSFORMER, VAE = (
    MODEL / name
    for name in (
        "text_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    )
)
INDEX = TRANSFORMER.with_name("diffusion_pytorch_model.safetensors.index.json")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
SPIECE = MODEL / "tokenizer" / "spiece.model"
DEEP = b"[" * 100_000
PICKLE = b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."  # it would leave a file if someone unpickled it


def nothing() -> None:
    """Spoil nothing: what is wrong stands in the options."""


def content(path: Path | str, data: bytes) -> Callable[[], object]:
    """Replace what a file holds."""
    return lambda: Path(path).write_bytes(data)


def cut(path: Path | str, size: int = -100) -> Callable[[], object]:
    """Cut the end of a file off."""
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:size])


def gone(path: Path | str) -> Callable[[], object]:
    return lambda: Path(path).unlink()


def entries(**changed: object) -> Callable[[], object]:
    """Change entries of generation_config.json; ... takes one away."""
    return lambda: edit_json(OUT / CONFIG, changed)


def of_model(component: str, **changed: object) -> Callable[[], object]:
    """Change entries of a component's config."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    return lambda: edit_json(MODEL / component / name, changed)


def edit_json(path: Path, changed: dict) -> None:
    edited = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in edited.items() if value is not ...}))


def tensors(path: Path, change: Callable[[dict], object], made_from: str | None = "kept") -> Callable[[], object]:
    """Change the tensors of a file, a dict of torch tensors, and what it says that it was made from; None: nothing."""

    def spoil() -> None:
        with safe_open(path, "pt") as file:
            found, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        change(found)
        if made_from != "kept":
            metadata = None if made_from is None else {"made_from": made_from}
        save_torch(found, path, metadata)

    return spoil


def edited(path: Path, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
    """Replace the tensor `name` of a file by function(tensor)."""
    return tensors(path, lambda found: found.update({name: function(found[name]).contiguous()}))


def latents(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
    return edited(OUT / LATENTS, "latents", function)


def embeds(function: Callable[[torch.Tensor], torch.Tensor], name: str = "prompt_embeds") -> Callable[[], object]:
    return edited(OUT / EMBEDDINGS, name, function)


def made_from(path: Path, text: str) -> Callable[[], object]:
    return tensors(path, lambda found: None, text)


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Put one value somewhere into a tensor."""
    return lambda tensor: tensor.flatten().index_fill(0, torch.tensor([3]), value).reshape(tensor.shape)


def pipe(path: Path | str) -> Callable[[], object]:
    return lambda: os.mkfifo(path)


def link(path: Path | str, target: Path | str) -> Callable[[], object]:
    return lambda: Path(path).symlink_to(Path(target).absolute())


def a_socket(path: Path | str) -> Callable[[], object]:
    return lambda: socket.socket(socket.AF_UNIX).bind(str(path))


def all_of(*spoils: Callable[[], object]) -> Callable[[], object]:
    return lambda: [spoil() for spoil in spoils]


def a_png(width: int, height: int) -> bytes:
    """Return the beginning of a PNG file, of any size, up to its pixels."""
    header = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + bytes((8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + header + zlib.crc32(header).to_bytes(4) + b"\0\0\0\x09IDATabc"


def given_latents(name: str, *shape: int) -> Callable[[], object]:
    """Give the embeddings the latents of an image or of a video."""
    return tensors(OUT / EMBEDDINGS, lambda t: t.update({part: torch.ones(shape) for part in GIVEN_TENSORS[name]}))


def a_map(**changed: object) -> Callable[[], object]:
    """Write m.json, a map of sparse attention for the model and the size of a case, with other values of entries."""
    found = {"height": 32, "width": 48, "frames": 9, "weights": "0" * 64, "found": {}}
    found |= {"patterns": [["dense", "frames:1", "positions:2", "dense"]] * 2}
    return content("m.json", json.dumps(found | changed).encode())


image_latents = functools.partial(given_latents, "image")
video_latents = functools.partial(given_latents, "video")


def to_long(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.long()


BLOCK = "transformer_blocks.0.attn1.to_q.weight"
KIND = "not a CogVideoX"  # what is said of every wrong config of a model
AGAIN1, AGAIN2, MODEL_AGAIN = "run stage 1 again", "run stage 2 again", "get the model again"

SPARSE, FITTED = ["--sparse_attention", "m.json"], "python -m tools.fit_sparse_attention"
OF_IMAGES = of_model("transformer", in_channels=32)  # as a model for image to video has it
IMAGE, PROMPT_FILE, CLIP = ["--image", "a.png"], ["--prompt_file", "p"], ["--video", "a.mp4"]
NEW = ["--output_dir", "new"]  # where no video of stage 3 is

# what: (arguments, what is spoilt, words of the message)
STAGE1_CASES = {
    "no prompt": (["--prompt"], nothing, ["--prompt"]),
    "unknown option": (["--prompt", "x", "--sed", "1"], nothing, ["--sed"]),
    "abbreviated option": (["--promp", "x"], nothing, ["--promp"]),
    "prompt not UTF-8": (["--prompt", "a \udcff"], nothing, ["--prompt", "UTF-8"]),
    "negative prompt not UTF-8": (["--prompt", "x", "--negative_prompt", "\udc80"], nothing, ["--negative_prompt"]),
    "prompt begins with a dash": (["--prompt", "-x"], nothing, ["--prompt: expected", "written --prompt=-VALUE"]),
    "long prompt not UTF-8": (["--prompt", "a" * 500 + "\udcff"], nothing, [r"aaa ... aaa", r"a\udcff' is not UTF-8"]),
    "model not UTF-8": (["--prompt", "x", "--model_id", "\udcff"], nothing, ["--model_id", "UTF-8"]),
    "empty output": (["--prompt", "x", "--output_dir", ""], nothing, ["--output_dir", "empty"]),
    "output below a file": (["--prompt", "x", "--output_dir", f"outputs/{CONFIG}"], nothing, ["cannot write"]),
    "line feed in the output": (["--prompt", "x", "--output_dir", f"outputs/{CONFIG}/a\nb"], nothing, [r"a\nb"]),
    "output of a long name": (["--prompt", "x", "--output_dir", "x" * 5000], nothing, ["cannot write", "too long"]),
    "unknown model": (["--prompt", "x", "--model_id", "no/thing"], nothing, ["no/thing", "network"]),
    "model of a long name": (["--prompt", "x", "--model_id", "x" * 5000], nothing, ["--model_id"]),
    "model with a line feed": (["--prompt", "x", "--model_id", "no\nthing"], nothing, ["--model_id", r"no\nthing"]),
    "model without a name": (["--prompt", "x", "--model_id", ""], nothing, ["--model_id"]),
    "no model there": (["--prompt", "x", "--model_id", "outputs"], nothing, ["transformer/config.json"]),
    "embeddings are a pipe": ([], lambda: (gone(OUT / EMBEDDINGS)(), pipe(OUT / EMBEDDINGS)()), ["a pipe", EMBEDDINGS]),
    "log is a folder": (["--log_json", "outputs"], nothing, ["--log_json outputs", "directory"]),
    "log is a pipe": (["--log_json", "p"], pipe("p"), ["--log_json p", "no log"]),
    "log is the model's": (["--log_json", TRANSFORMER], nothing, ["--log_json", "no log"]),
    "width of the text": ([], of_model("transformer", text_embed_dim=32), ["shared.weight", "64], not [218, 32]"]),
    "no room for text": ([], of_model("transformer", max_text_seq_length=0), ["max_text_seq_length", KIND]),
    "no config": ([], gone(MODEL / "text_encoder/config.json"), ["text_encoder/config.json"]),
    "config is a list": ([], content(MODEL / "text_encoder/config.json", b"[]"), ["text_encoder/config.json", KIND]),
    "config is nested": ([], content(MODEL / "text_encoder/config.json", DEEP), ["text_encoder/config.json", KIND]),
    "no width": ([], of_model("text_encoder", d_model=...), ["d_model", KIND]),
    "heads are a string": ([], of_model("text_encoder", num_heads="4"), ["num_heads", "'4'", KIND]),
    "layers without end": ([], of_model("text_encoder", num_layers=10**9), ["num_layers", KIND]),
    "no vocabulary": ([], of_model("text_encoder", vocab_size=0), ["vocab_size", KIND]),
    "another vocabulary": ([], of_model("text_encoder", vocab_size=300), ["text_encoder", "shared.weight"]),
    "other heads": ([], of_model("text_encoder", num_heads=8), ["text_encoder"]),
    "unknown activation": ([], of_model("text_encoder", dense_act_fn="magic"), ["cannot load", "model/text_encoder"]),
    "more layers": ([], of_model("text_encoder", num_layers=3), ["text_encoder", "missing", "encoder.block.2"]),
    "fewer layers": ([], of_model("text_encoder", num_layers=1), ["text_encoder", "unexpected", "encoder.block.1"]),
    "tensor missing": (
        [],
        tensors(TEXT_ENCODER, lambda t: t.pop("encoder.block.0.layer.0.SelfAttention.k.weight")),
        ["text_encoder", "missing", "encoder.block.0.layer.0.SelfAttention.k.weight"],
    ),
    "embedding missing": ([], tensors(TEXT_ENCODER, lambda t: t.pop("shared.weight")), ["shared.weight", "missing"]),
    "tensor unexpected": (
        [],
        tensors(TEXT_ENCODER, lambda t: t.update(surplus=torch.zeros(2))),
        ["text_encoder", "unexpected", "surplus"],
    ),
    "tensor of another shape": (
        [],
        edited(TEXT_ENCODER, "encoder.final_layer_norm.weight", lambda x: x[1:]),
        ["text_encoder"],
    ),
    "integer weights": (
        [],
        edited(TEXT_ENCODER, "encoder.final_layer_norm.weight", to_long),
        ["encoder.final_layer_norm.weight", "I64"],
    ),
    "NaN weights": (
        [],
        edited(TEXT_ENCODER, "encoder.block.0.layer.0.SelfAttention.k.weight", with_value(np.nan)),
        ["text encoder", "NaN", MODEL_AGAIN],
    ),
    "weights cut": ([], cut(TEXT_ENCODER), [TEXT_ENCODER, "complete", MODEL_AGAIN]),
    "weights empty": ([], content(TEXT_ENCODER, b""), [TEXT_ENCODER, "complete", MODEL_AGAIN]),
    "weights are a pickle": ([], content(TEXT_ENCODER, PICKLE), [TEXT_ENCODER, "complete", MODEL_AGAIN]),
    "only a pickle": (
        [],
        lambda: TEXT_ENCODER.write_bytes(PICKLE) and TEXT_ENCODER.rename(TEXT_ENCODER.with_name("pytorch_model.bin")),
        ["text_encoder", "pickle", "python -c", "model/text_encoder/model.safetensors"],
    ),
    "weights are an LFS pointer": ([], content(TEXT_ENCODER, POINTER), [TEXT_ENCODER, "model/text_encoder lfs pull"]),
    "vocabulary is an LFS pointer": ([], content(SPIECE, POINTER), [SPIECE, "model/tokenizer lfs pull"]),
    "more tokens than rows": (
        [],
        lambda: (
            edited(TEXT_ENCODER, "shared.weight", lambda x: x[:-9])(),
            edit_json(MODEL / "text_encoder/config.json", {"vocab_size": 209}),
        ),
        ["tokenizer has 21", "embedding of 209", MODEL_AGAIN],
    ),
    "no such variant": (["--variant", "fp16"], nothing, ["model/text_encoder", "model.fp16.safetensors", "drop"]),
    "no vocabulary file": ([], gone(SPIECE), ["tokenizer"]),
    "vocabulary empty": ([], content(SPIECE, b""), ["tokenizer"]),
    "vocabulary cut": ([], cut(SPIECE, 2000), ["tokenizer"]),
    "vocabulary is garbage": ([], content(SPIECE, os.urandom(500)), ["tokenizer"]),
    "tokenizer config is a list": ([], content(MODEL / "tokenizer/tokenizer_config.json", b"[]"), ["tokenizer"]),
    "tokenizer config is nested": ([], content(MODEL / "tokenizer/tokenizer_config.json", DEEP), ["tokenizer"]),
    # images
    "image for a model of text": (IMAGE, nothing, ["--image", "a.png", "text alone", "I2V"]),
    "no image": ([], OF_IMAGES, ["videos of an image", "--image"]),
    "size without an image": (["--height", 32], nothing, ["--height", "--image", "stage 2"]),
    "image missing": (IMAGE, OF_IMAGES, ["--image", "a.png does not exist"]),
    "image is a folder": (["--image", OUT], OF_IMAGES, ["outputs does not exist, or is no file"]),
    "image is a pipe": (IMAGE, all_of(OF_IMAGES, pipe("a.png")), ["a.png does not exist, or is no file"]),
    "image is empty": (IMAGE, all_of(OF_IMAGES, content("a.png", b"")), ["a.png is no picture", "PNG"]),
    "image is text": (IMAGE, all_of(OF_IMAGES, content("a.png", DEEP)), ["a.png is no picture"]),
    "image is a video": (["--image", OUT / VIDEO], OF_IMAGES, [f"{VIDEO} is no picture"]),
    "image is an LFS pointer": (IMAGE, all_of(OF_IMAGES, content("a.png", POINTER)), ["a.png", "lfs pull"]),
    "image is cut": (IMAGE, all_of(OF_IMAGES, content("a.png", a_png(9, 9))), ["a.png is damaged: "]),
    "image of 20,000 x 20,000": (
        IMAGE,
        all_of(OF_IMAGES, content("a.png", a_png(20_000, 20_000))),
        ["a.png has more than 178,956,970 pixels"],
    ),
    "image is the embeddings": (["--image", OUT / EMBEDDINGS], OF_IMAGES, ["would replace", EMBEDDINGS]),
    "image height": ([*IMAGE, "--height", 40], OF_IMAGES, ["--height 40", "multiple of 16", "example 32"]),
    # videos to change
    "video for a model of images": (["--video", OUT / VIDEO, *NEW], OF_IMAGES, ["--video", "text to video"]),
    "video is replaced": (["--video", OUT / VIDEO], nothing, ["where stage 3 will write", "--output_dir"]),
    "strength alone": (["--strength", "0.5"], nothing, ["--strength of stage 1 belongs to --video"]),
    "image of the web": (["--image", "https://x.org/a.png"], OF_IMAGES, ["download it first"]),
    "video missing": (CLIP, nothing, ["--video a.mp4 does not exist, or is no file"]),
    "video is empty": (CLIP, content("a.mp4", b""), ["--video a.mp4 is no video that ffmpeg can read"]),
    "video is text": (CLIP, content("a.mp4", DEEP), ["--video a.mp4 is no video that ffmpeg can read"]),
    "video is cut": (
        ["--video", OUT / VIDEO, *NEW],
        cut(OUT / VIDEO, 500),
        [f"{VIDEO} is no video that ffmpeg can read"],
    ),
    "video too short": (
        ["--video", OUT / VIDEO, *NEW, "--frames", 13],
        nothing,
        ["has 9 frames, and 13 are wanted", "add --frames 9"],
    ),
    "frames of a video": (
        ["--video", OUT / VIDEO, *NEW, "--frames", 8],
        nothing,
        ["--frames 8 is not 4n + 1", "5 and 9"],
    ),
    "width of a video": (["--video", OUT / VIDEO, *NEW, "--width", 40], nothing, ["--width 40", "multiple of 16"]),
    "strength without a video": (["--strength", 0.5], nothing, ["--strength", "--video"]),
    "frames without a video": (["--frames", 9], nothing, ["--frames", "--video"]),
    "strength above 1": ([*CLIP, "--strength", 1.1], nothing, ["--strength", "from 0.001 to 1"]),
    "video is the embeddings": (["--video", OUT / EMBEDDINGS], nothing, ["would replace", EMBEDDINGS]),
    # prompt files
    "JSON with a comma too many": (PROMPT_FILE, content("p", b'\n{"prompt": "a",}'), ["p, line 2: ", "JSON", "object"]),
    "JSON and text": (PROMPT_FILE, content("p", b'{"prompt": "a"}\n\na fox'), ["p, line 3: ", "JSON", "object"]),
    "array": (PROMPT_FILE, content("p", b'[{"prompt": "a"}]'), ["p is a JSON array", "one on each line"]),
    "text and JSON": (PROMPT_FILE, content("p", b'a fox\n{"prompt": "a"}'), ["p, line 2: this is JSON", "one way"]),
    "unknown key": (PROMPT_FILE, content("p", b'{"prompt": "a", "sed": 1}'), ["p, line 1: sed: ", "not 1"]),
    "no prompt in a line": (PROMPT_FILE, content("p", b'{"image": "a"}'), ["p, line 1: prompt is missing"]),
    "prompt is null": (PROMPT_FILE, content("p", b'{"prompt": null}'), ["p, line 1: prompt: ", "None"]),
    "prompt of half a letter": (PROMPT_FILE, content("p", b'{"prompt": "\\ud800"}'), ["p, line 1: ", "JSON"]),
    "seed is a text": (PROMPT_FILE, content("p", b'{"prompt": "a", "seed": "1"}'), ["p, line 1: seed: ", "'1'"]),
    "seed of 65 bits": (PROMPT_FILE, content("p", b'{"prompt": "a", "seed": %d}' % 2**64), ["p, line 1: seed: "]),
    "image of a line is no name": (PROMPT_FILE, content("p", b'{"prompt": "a", "image": "a\\u0000"}'), ["image: "]),
    "image of a line is empty": (PROMPT_FILE, content("p", b'{"prompt": "a", "image": ""}'), ["p, line 1: image: "]),
    "image of a line for a model of text": (
        [*PROMPT_FILE, "--output_dir", "d"],
        content("p", b'{"prompt": "a"}\n{"prompt": "a", "image": "a.png"}'),
        ["p, line 2, ", "a.png: ", "text alone"],
    ),
    "image of a line missing": (
        [*PROMPT_FILE, "--output_dir", "d"],
        all_of(OF_IMAGES, content("p", b'{"prompt": "a", "image": "a\\n.png"}')),
        ["p, line 1, ", r"a\n.png does not exist"],
    ),
    "line without an image": (
        [*PROMPT_FILE, "--output_dir", "d"],
        all_of(OF_IMAGES, content("p", b"a fox")),
        ["p, line 1, ", "videos of an image", "JSON"],
    ),
}

STAGE2_CASES = {
    "no input folder": (["--input_dir", "nowhere"], nothing, ["nowhere", "run stage 1 first"]),
    "input is a file": (["--input_dir", f"outputs/{CONFIG}"], nothing, [CONFIG, "run stage 1 first"]),
    "other model": (["--model_id", "nobody/nothing"], nothing, ["nobody/nothing", "stage 1"]),
    "output is a link to itself": (["--output_dir", "x"], link("x", "x"), ["cannot write x: Too many levels of"]),
    "output below a file": (["--output_dir", "x/y"], content("x", b""), ["cannot write x/y: Not a directory"]),
    "output is not UTF-8": (["--output_dir", "\udcff"], nothing, ["--output_dir", r"'\udcff' is not UTF-8"]),
    "LoRA is not UTF-8": (["--lora", "\udcff:1"], nothing, ["--lora", "is not UTF-8"]),
    "output of nobody": (["--output_dir", "~nosuchuser/x"], nothing, ["--output_dir", "home directory"]),
    "height": (["--height", 100], nothing, ["--height 100", "multiple of 16", "96"]),
    "height of a billion": (["--height", 16 * 10**9], nothing, ["--height", "16000000000"]),
    "frames": (["--frames", 80], nothing, ["80", "4n + 1", "77", "81"]),
    "frames in the billions": (["--frames", 4 * 10**9 + 1], nothing, ["--frames", "10000"]),
    "frames are no number": (["--frames", "inf"], nothing, ["--frames", "inf"]),
    "no steps": (["--num_inference_steps", 0], nothing, ["--num_inference_steps"]),
    "too many steps": (["--num_inference_steps", 1001], nothing, ["--num_inference_steps", "1000"]),
    "warm-up without end": (["--warmup_steps", 10**9], nothing, ["--warmup_steps"]),
    "negative seed": (["--seed", -1], nothing, ["--seed"]),
    "seed of 65 bits": (["--seed", 2**64], nothing, ["--seed"]),
    "fps is no number": (["--fps", "nan"], nothing, ["--fps"]),
    "negative fps": (["--fps", -8], nothing, ["--fps"]),
    "fps of 10^12": (["--fps", 10**12], nothing, ["--fps", "1000"]),
    "guidance is no number": (["--guidance_scale", "nan"], nothing, ["--guidance_scale"]),
    "guidance is infinite in float32": (["--guidance_scale", "1e39"], nothing, ["--guidance_scale"]),
    "guidance of 1e308": (["--guidance_scale", "1e308"], nothing, ["--guidance_scale"]),
    "unknown attention": (["--attention", "magic"], nothing, ["--attention", "magic", "xla"]),
    "unknown layout": (["--layout", "magic"], nothing, ["--layout", "magic", "fsdp"]),
    "mesh order": (["--mesh_order", "dp,dp"], nothing, ["--mesh_order", "dp,sp,tp"]),
    "previews never": (["--preview_every", 0], nothing, ["--preview_every"]),
    "dump options alone": (["--dump_stats"], nothing, ["--dump_stats", "--dump"]),
    "dump in a file": (["--dump", f"outputs/{CONFIG}"], nothing, [f"outputs/{CONFIG}/stage2_tensors"]),
    "dump of steps that are not": (["--dump", "d", "--dump_steps", "7"], nothing, ["--dump_steps"]),
    "dump of nothing": (["--dump", "d", "--dump_names", "magic"], nothing, ["--dump_names", "magic"]),
    "executable missing": (["--executable", "nowhere"], nothing, ["--executable", "nowhere"]),
    "executable is garbage": (["--executable", VAE], nothing, ["--executable", "compile_for_tpu"]),
    "LoRA missing": (["--lora", "nowhere:0.5"], nothing, ["/nowhere does not exist", "--lora"]),
    "LoRA of no scale": (["--lora", "a:nan"], nothing, ["--lora", "nan"]),
    "LoRA without matrices": (["--lora", VAE], nothing, ["model.safetensors", "lora_A", "--lora"]),
    # sparse attention
    "dense steps alone": (["--dense_steps", 0.5], nothing, ["--dense_steps belongs to --sparse_attention"]),
    "dense steps of 2": ([*SPARSE, "--dense_steps", 2], a_map(), ["--dense_steps", "from 0 to 1"]),
    "map missing": (SPARSE, nothing, ["--sparse_attention m.json does not exist", FITTED]),
    "map of no file": (["--sparse_attention", OUT], nothing, ["outputs/sparse_attention.json does not exist"]),
    "map made up": (["--sparse_attention", "0.5*frames:1"], nothing, ["--sparse_attention 0.5*frames:1 does not"]),
    "no map of the model": (["--sparse_attention", "auto"], nothing, ["auto: the model 'model' has no", FITTED]),
    "map with splash": ([*SPARSE, "--attention", "splash"], a_map(), ["--attention splash", "splash_exp2 or xla"]),
    "map with blocks": ([*SPARSE, "--block_sizes", 128], a_map(), ["--block_sizes", "--sparse_attention"]),
    "map is no JSON": (SPARSE, content("m.json", b"{"), ["m.json: ", "JSON", FITTED]),
    "map is nested": (SPARSE, content("m.json", DEEP), ["m.json: ", "JSON", FITTED]),
    "map is a pickle": (SPARSE, content("m.json", PICKLE), ["m.json: ", "JSON", FITTED]),
    "map is a config": (["--sparse_attention", INDEX.with_name("config.json")], nothing, ["is missing", FITTED]),
    "map is replaced": (["--sparse_attention", OUT / CONFIG], nothing, ["would replace", CONFIG]),
    "map of magic": (SPARSE, a_map(patterns=[["dense"], ["magic"]]), ["m.json: layer 1, head 0: 'magic'"]),
    "map of layers": (SPARSE, a_map(patterns=[["dense"] * 4] * 3), ["has 3 layers, and the model 2", FITTED]),
    "map of heads": (SPARSE, a_map(patterns=[["dense"] * 3] * 2), ["3 heads in layer 0, and the model 4", FITTED]),
    "map of another height": (SPARSE, a_map(height=64), ["m.json was found for height 64", "--height 32", FITTED]),
    "map of another length": (SPARSE, a_map(frames=17), ["m.json was found for frames 17", "--frames 9", FITTED]),
    "map of other weights": (SPARSE, a_map(), ["m.json was found with other weights", "00000000", FITTED]),
    # generation_config.json
    "no JSON": ([], content(OUT / CONFIG, b"{"), [CONFIG, "JSON", AGAIN1]),
    "JSON, but a list": ([], content(OUT / CONFIG, b"[]"), [CONFIG, AGAIN1]),
    "JSON, but empty": ([], content(OUT / CONFIG, b""), [CONFIG, "JSON", AGAIN1]),
    "JSON, but nested": ([], content(OUT / CONFIG, DEEP), [CONFIG, "JSON", AGAIN1]),
    "JSON, but nested in an entry": ([], content(OUT / CONFIG, b'{"prompt": ' + DEEP), [CONFIG, "JSON", AGAIN1]),
    "JSON, but not UTF-8": ([], content(OUT / CONFIG, b'{"prompt": "\xff"}'), [CONFIG, "JSON", AGAIN1]),
    "config is a folder": ([], lambda: (gone(OUT / CONFIG)(), (OUT / CONFIG).mkdir()), [CONFIG, "no file"]),
    "config is a pipe": ([], lambda: (gone(OUT / CONFIG)(), pipe(OUT / CONFIG)()), [CONFIG, "no file"]),
    "no model_id": ([], entries(model_id=...), [CONFIG, "model_id", AGAIN1]),
    "model_id is a number": ([], entries(model_id=5), [CONFIG, "model_id", "5", AGAIN1]),
    "model_id is empty": ([], entries(model_id=""), [CONFIG, "model_id", AGAIN1]),
    "model_id has a line feed": ([], entries(model_id="a\nb"), [EMBEDDINGS, "model_id", r"a\nb", AGAIN1]),
    "prompt is null": ([], entries(prompt=None), [CONFIG, "prompt", AGAIN1]),
    "prompt is a list": ([], entries(prompt=["a dog"]), [CONFIG, "prompt", AGAIN1]),
    "other prompt": ([], entries(prompt="a dog"), [EMBEDDINGS, "a dog", AGAIN1]),
    "other prompt, long": ([], entries(prompt="a" * 500), [EMBEDDINGS, "'aaa", "a ... a", "aaa'", AGAIN1]),
    "other prompt of lines": ([], entries(prompt="a\ndog"), [EMBEDDINGS, r"a\ndog", AGAIN1]),
    # embeddings
    "no embeddings": ([], gone(OUT / EMBEDDINGS), [EMBEDDINGS, "does not exist", "stage 1"]),
    "embeddings truncated": ([], cut(OUT / EMBEDDINGS), [EMBEDDINGS, "complete", AGAIN1]),
    "embeddings empty": ([], content(OUT / EMBEDDINGS, b""), [EMBEDDINGS, "complete", AGAIN1]),
    "embeddings are a pickle": ([], content(OUT / EMBEDDINGS, PICKLE), [EMBEDDINGS, "complete", AGAIN1]),
    "latents for embeddings": ([], lambda: shutil.copy(OUT / LATENTS, OUT / EMBEDDINGS), ["prompt_embeds", AGAIN1]),
    "one of two embeddings": (
        [],
        tensors(OUT / EMBEDDINGS, lambda t: t.pop("negative_prompt_embeds")),
        ["negative_prompt_embeds", "missing", AGAIN1],
    ),
    "NaN embeddings": ([], embeds(with_value(np.nan)), ["prompt_embeds", "NaN", AGAIN1]),
    "infinite embeddings": (
        [],
        embeds(with_value(np.inf), "negative_prompt_embeds"),
        ["negative_prompt_embeds", "NaN"],
    ),
    "integer embeddings": ([], embeds(to_long), ["prompt_embeds", "I64", AGAIN1]),
    "embeddings of 8 bits": ([], embeds(lambda x: x.to(torch.float8_e4m3fn)), ["prompt_embeds", "F8", AGAIN1]),
    "fewer tokens": ([], embeds(lambda x: x[:, 1:]), ["prompt_embeds", "[1, 225, 64]", AGAIN1]),
    "narrower": ([], embeds(lambda x: x[..., 1:]), ["prompt_embeds", "[1, 226, 63]", AGAIN1]),
    "two axes": ([], embeds(lambda x: x[0]), ["prompt_embeds", "[226, 64]", AGAIN1]),
    "no axes": ([], embeds(lambda x: x[0, 0, 0]), ["prompt_embeds", "[]", AGAIN1]),
    "two prompts in a file": (
        [],
        embeds(lambda x: torch.cat([x, x])),
        ["prompt_embeds", "[2, 226, 64]", "takes [1", AGAIN1],
    ),
    "batch is empty": ([], embeds(lambda x: x[:0]), ["prompt_embeds", "[0, 226, 64]", AGAIN1]),
    "no image for a model of images": ([], OF_IMAGES, [EMBEDDINGS, "has no image", "--image"]),
    "image for a model of text": ([], image_latents(1, 16, 1, 4, 6), [EMBEDDINGS, "has an image", "text alone"]),
    "half an image": ([], tensors(OUT / EMBEDDINGS, lambda t: t.update(image_mean=torch.ones(1))), ["image_logvar"]),
    "image of another size": (
        [],
        all_of(OF_IMAGES, image_latents(1, 16, 1, 4, 8)),
        [EMBEDDINGS, "image of 32 x 64 pixels, for a video of 32 x 48", "drop --height"],
    ),
    "image of other channels": (
        [],
        all_of(OF_IMAGES, image_latents(1, 8, 1, 4, 6)),
        ["image_mean", "[1, 16, 1, 4, 6]"],
    ),
    "video and no strength": ([], video_latents(1, 16, 3, 4, 6), [EMBEDDINGS, "has a video", "no strength", "--video"]),
    "strength and no video": ([], entries(strength=0.5), [EMBEDDINGS, "has no video", "--video"]),
    "strength of nothing": ([], entries(strength=0), [CONFIG, "strength", "greater than 0"]),
    "strength of no step": (
        [],
        all_of(entries(strength=0.4), video_latents(1, 16, 3, 4, 6)),
        ["--num_inference_steps 2 leaves no step at strength 0.4; at least 3 does"],
    ),
    "video of another length": (
        [],
        all_of(entries(strength=0.5), video_latents(1, 16, 5, 4, 6)),
        [EMBEDDINGS, "video of 17 frames of 32 x 48 pixels, for a video of 9 frames of 32 x 48", "and --frames"],
    ),
    "video for a model of images": (
        [],
        all_of(OF_IMAGES, entries(strength=0.5), image_latents(1, 16, 1, 4, 6)),
        ["videos of an image", "--video of stage 1"],
    ),
    "image without axes": ([], all_of(OF_IMAGES, image_latents(6)), ["image_mean", "[6]", "[1, 16, 1, 4, 6]", AGAIN1]),
    "made_from is no JSON": ([], made_from(OUT / EMBEDDINGS, "{"), [EMBEDDINGS, "made_from", "JSON"]),
    "made_from is a list": ([], made_from(OUT / EMBEDDINGS, "[1]"), [EMBEDDINGS, "made_from", "JSON"]),
    "made_from is nested": ([], made_from(OUT / EMBEDDINGS, "[" * 10**5), [EMBEDDINGS, "made_from", "JSON"]),
    "latents are a pipe": ([], lambda: (gone(OUT / LATENTS)(), pipe(OUT / LATENTS)()), [LATENTS, "a pipe"]),
    "latents are the embeddings": (
        [],
        lambda: (gone(OUT / LATENTS)(), link(OUT / LATENTS, OUT / EMBEDDINGS)()),
        [LATENTS, "would replace", EMBEDDINGS],
    ),
    # the model
    "transformer: list": ([], content(MODEL / "transformer/config.json", b"[]"), ["transformer/config.json", KIND]),
    "transformer: no JSON": ([], content(MODEL / "transformer/config.json", b"\0"), ["transformer/config.json", KIND]),
    "transformer: nested": ([], content(MODEL / "transformer/config.json", DEEP), ["transformer/config.json", KIND]),
    "transformer: gone": ([], gone(MODEL / "transformer/config.json"), ["transformer/config.json", "--model_id"]),
    "transformer: flat patches": (
        [],
        of_model("transformer", patch_size_t=...),
        ["4 tensors", "patch_embed.proj"],
    ),
    "transformer: no layers": ([], of_model("transformer", num_layers=...), ["transformer_blocks.10", "missing"]),
    "transformer: 0 layers": ([], of_model("transformer", num_layers=0), ["num_layers", KIND]),
    "transformer: layers in words": ([], of_model("transformer", num_layers="two"), ["num_layers", "'two'", KIND]),
    "transformer: layers are true": ([], of_model("transformer", num_layers=True), ["num_layers", KIND]),
    "transformer: half a layer": ([], of_model("transformer", num_layers=1.5), ["num_layers", "1.5", KIND]),
    "transformer: 10^12 heads": (
        [],
        of_model("transformer", num_attention_heads=10**12),
        ["num_attention_heads", KIND],
    ),
    "transformer: no heads": ([], of_model("transformer", num_attention_heads=None), ["num_attention_heads", KIND]),
    "transformer: odd heads": ([], of_model("transformer", attention_head_dim=33), ["attention_head_dim", "33", KIND]),
    "transformer: patch of 0": ([], of_model("transformer", patch_size=0), ["patch_size", KIND]),
    "transformer: from an image": ([], of_model("transformer", ofs_embed_dim=512), ["ofs_embed_dim", KIND]),
    "transformer: learned": (
        [],
        of_model("transformer", use_learned_positional_embeddings=True),
        ["other positions", KIND],
    ),
    "transformer: no rotary": ([], of_model("transformer", use_rotary_positional_embeddings=False), ["rotary", KIND]),
    "transformer: activation": ([], of_model("transformer", activation_fn="gelu"), ["activation_fn", "'gelu'", KIND]),
    "transformer: epsilon": ([], of_model("transformer", norm_eps=0), ["norm_eps", KIND]),
    "transformer: epsilon is NaN": ([], of_model("transformer", norm_eps=float("nan")), ["norm_eps", KIND]),
    "transformer: no size": ([], of_model("transformer", sample_height=0), ["sample_height", KIND]),
    "transformer: channels": ([], of_model("transformer", out_channels=5), ["out_channels", KIND]),
    "transformer: no text": ([], of_model("transformer", max_text_seq_length=0), ["max_text_seq_length", KIND]),
    "transformer: more layers": ([], of_model("transformer", num_layers=3), ["transformer_blocks.2", "missing"]),
    "transformer: fewer layers": ([], of_model("transformer", num_layers=1), ["transformer_blocks.1", "unexpected"]),
    "transformer: other heads": (
        [],
        of_model("transformer", num_attention_heads=8, attention_head_dim=16),
        ["norm_k", "[32], not [16]"],
    ),
    "transformer: time": ([], of_model("transformer", time_embed_dim=48), ["norm_out", "[256, 64], not [256, 48]"]),
    "weights gone": ([], gone(TRANSFORMER), ["model/transformer has no diffusion_pytorch_model", MODEL_AGAIN]),
    "weights are an LFS pointer": ([], content(TRANSFORMER, POINTER), [TRANSFORMER, "git -C model/transformer lfs"]),
    "variants": (
        [],
        lambda: (
            [shutil.copy(TRANSFORMER, TRANSFORMER.with_suffix(f".{x}.safetensors")) for x in ("a", "b")]
            and TRANSFORMER.unlink()
        ),
        ["model/transformer", "a, b", "--variant"],
    ),
    "index is no JSON": ([], content(INDEX, b"{"), [INDEX, "JSON", MODEL_AGAIN]),
    "index of no file": ([], content(INDEX, b'{"weight_map": {}}'), [INDEX, "weight_map", MODEL_AGAIN]),
    "index of other folders": (
        [],
        content(INDEX, b'{"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}'),
        [INDEX, "weight_map.a", MODEL_AGAIN],
    ),
    "shard missing": (
        [],
        content(INDEX, b'{"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}'),
        ["transformer/diffusion_pytorch_model-00002-of-00002.safetensors does not exist", MODEL_AGAIN],
    ),
    "weights cut": ([], cut(TRANSFORMER), [TRANSFORMER, "complete", MODEL_AGAIN]),
    "weights empty": ([], content(TRANSFORMER, b""), [TRANSFORMER, "complete", MODEL_AGAIN]),
    "weights are a pickle": ([], content(TRANSFORMER, PICKLE), [TRANSFORMER, "complete", MODEL_AGAIN]),
    "weights of a nested header": (
        [],
        content(TRANSFORMER, len(DEEP).to_bytes(8, "little") + DEEP),
        [TRANSFORMER, "complete"],
    ),
    "weight missing": ([], tensors(TRANSFORMER, lambda t: t.pop(BLOCK)), [BLOCK, "missing", MODEL_AGAIN]),
    "weight of another shape": ([], edited(TRANSFORMER, BLOCK, lambda x: x[:, 1:]), [BLOCK, "[128, 127]"]),
    "weight of integers": ([], edited(TRANSFORMER, BLOCK, to_long), [BLOCK, "I64", MODEL_AGAIN]),
    "NaN weight": ([], edited(TRANSFORMER, BLOCK, with_value(np.nan)), [BLOCK, "NaN", MODEL_AGAIN]),
    "infinite weight": ([], edited(TRANSFORMER, BLOCK, with_value(-np.inf)), [BLOCK, "NaN", MODEL_AGAIN]),
    "scheduler: list": ([], content(MODEL / "scheduler/scheduler_config.json", b"[]"), ["scheduler_config.json", KIND]),
    "scheduler: no class": ([], of_model("scheduler", _class_name=...), ["_class_name", KIND]),
    "scheduler: another": ([], of_model("scheduler", _class_name="DDIMScheduler"), ["DDIMScheduler", "supported"]),
    "scheduler: no steps": ([], of_model("scheduler", num_train_timesteps=0), ["num_train_timesteps", KIND]),
    "scheduler: 10^12 steps": ([], of_model("scheduler", num_train_timesteps=10**12), ["num_train_timesteps", KIND]),
    "scheduler: steps in words": ([], of_model("scheduler", num_train_timesteps="9"), ["num_train_timesteps", KIND]),
    "scheduler: beta": ([], of_model("scheduler", beta_end=2.5), ["beta_end", "2.5", KIND]),
    "scheduler: beta is a list": ([], of_model("scheduler", beta_start=[0.1]), ["beta_start", KIND]),
    "scheduler: beta is NaN": ([], of_model("scheduler", trained_betas=[0.1, float("nan")]), ["trained_betas.1", KIND]),
    "scheduler: schedule": ([], of_model("scheduler", beta_schedule="magic"), ["beta_schedule", "'magic'", KIND]),
    "scheduler: prediction": ([], of_model("scheduler", prediction_type="magic"), ["prediction_type", KIND]),
    "scheduler: spacing": ([], of_model("scheduler", timestep_spacing="magic"), ["timestep_spacing", KIND]),
    "scheduler: scale": ([], of_model("scheduler", snr_shift_scale=0), ["snr_shift_scale", KIND]),
}

STAGE3_CASES = {
    "fps zero": (["--fps", 0], nothing, ["--fps"]),
    "fps of 10^12": (["--fps", 10**12], nothing, ["--fps"]),
    "no strips": (["--strips", 0], nothing, ["--strips"]),
    "strips of 10^9": (["--strips", 10**9], nothing, ["--strips"]),
    "rows of chips": (["--chip_rows", 3], nothing, ["--chip_rows 3", "[1, 2, 4, 8]"]),
    "video below a file": (["--output_video", "x/v.mp4"], content("x", b""), ["cannot write x/v.mp4: Not a"]),
    "video in /proc": (["--output_video", "/proc/v.mp4"], nothing, ["cannot write /proc/v.mp4: No such file"]),
    "other model": (["--model_id", "nobody/nothing"], nothing, ["nobody/nothing", "stage 1 again", "--force"]),
    "no video's name": (["--output_video", "outputs/video.txt"], nothing, ["video.txt", ".mp4"]),
    "video is a folder": (["--output_video", "x.mp4"], lambda: Path("x.mp4").mkdir(), ["x.mp4", "directory"]),
    "video is a pipe": (["--output_video", "x.mp4"], pipe("x.mp4"), ["x.mp4", "a pipe"]),
    "video is a socket": (["--output_video", "x.mp4"], a_socket("x.mp4"), ["x.mp4", "a pipe or a device"]),
    "frames are a device": (["--output_frames", "x"], link("x", "/dev/null"), ["x", "device"]),
    "frames are a pipe, linked": (["--output_frames", "x"], lambda: (pipe("p")(), link("x", "p")()), ["x", "a pipe"]),
    "frames are the latents": (["--output_frames", OUT / LATENTS], nothing, ["would replace", LATENTS]),
    "frames are the latents, linked": (["--output_frames", "x"], link("x", OUT / LATENTS), ["_frames", LATENTS]),
    "frames are the latents, dotted": (["--output_frames", f"model/../outputs/{LATENTS}"], nothing, [LATENTS]),
    "frames are the config": (["--output_frames", OUT / CONFIG], nothing, ["--output_frames", "would replace", CONFIG]),
    "frames are the timings": (["--output_frames", OUT / "timings.json"], nothing, ["--output_frames", "timings"]),
    "frames are the video": (["--output_frames", OUT / VIDEO], nothing, ["--output_frames", VIDEO]),
    "frames are the picture": (
        ["--output_frames", "x"],
        all_of(entries(image="x"), content("x", b"")),
        ["--output_frames x would replace x"],
    ),
    "frames are the model": (["--output_frames", VAE], nothing, ["--output_frames", "would replace", VAE]),
    "video is the latents, linked": (["--output_video", "x.mp4"], link("x.mp4", OUT / LATENTS), [LATENTS]),
    "log is the latents": (["--log_json", OUT / LATENTS], nothing, ["--log_json", "no log"]),
    "log is the frames": (["--log_json", "x", "--output_frames", "x"], nothing, ["--output_frames x", "would replace"]),
    # generation_config.json
    "stage 2 not run": ([], entries(frames=...), [CONFIG, "frames", AGAIN2]),
    "frames of another type": ([], entries(frames="9"), [CONFIG, "frames", "integer", "'9'", AGAIN2]),
    "frames are true": ([], entries(frames=True), [CONFIG, "frames", AGAIN2]),
    "frames are null": ([], entries(frames=None), [CONFIG, "frames", AGAIN2]),
    "half a frame": ([], entries(frames=9.5), [CONFIG, "frames", AGAIN2]),
    "no frames": ([], entries(frames=0), [CONFIG, "frames", AGAIN2]),
    "frames in the billions": ([], entries(frames=4 * 10**9 + 1), [CONFIG, "frames", AGAIN2]),
    "negative height": ([], entries(height=-32), [CONFIG, "height", AGAIN2]),
    "width of 10^10": ([], entries(width=10**10), [CONFIG, "width", AGAIN2]),
    "no fps in the config": ([], entries(fps=0), [CONFIG, "fps", AGAIN2]),
    "fps of 10^12 in the config": ([], entries(fps=10**12), [CONFIG, "fps", AGAIN2]),
    "no steps in the config": ([], entries(num_inference_steps=0), [CONFIG, "num_inference_steps", AGAIN2]),
    "guidance in the config": ([], entries(guidance_scale=1e308), [CONFIG, "guidance_scale", AGAIN2]),
    "guidance is NaN": ([], entries(guidance_scale=float("nan")), [CONFIG, "guidance_scale", AGAIN2]),
    "guidance in words": ([], entries(guidance_scale="6"), [CONFIG, "guidance_scale", AGAIN2]),
    "seed of 65 bits": ([], entries(seed=2**64), [CONFIG, "seed", AGAIN2]),
    "scheduler is a number": ([], entries(scheduler=7), [CONFIG, "scheduler", AGAIN2]),
    "LoRA is a text": ([], entries(lora="a"), [CONFIG, "lora", AGAIN2]),
    "other LoRA": ([], entries(lora=["/a:1.0"]), [LATENTS, "lora", AGAIN2]),
    "dense steps in words": ([], entries(dense_steps="0.5"), [CONFIG, "dense_steps", AGAIN2]),
    "other seed": ([], entries(seed=1), [LATENTS, "seed", AGAIN2]),
    # latents
    "latents missing": ([], gone(OUT / LATENTS), [LATENTS, "does not exist", "stage 2"]),
    "latents are a socket": ([], lambda: (gone(OUT / LATENTS)(), a_socket(OUT / LATENTS)()), [LATENTS, "no file"]),
    "latents truncated": ([], cut(OUT / LATENTS), [LATENTS, "complete", AGAIN2]),
    "latents are a pickle": ([], content(OUT / LATENTS, PICKLE), [LATENTS, "complete", AGAIN2]),
    "latents of a short header": ([], content(OUT / LATENTS, b"\x01"), [LATENTS, "complete", AGAIN2]),
    "embeddings for latents": ([], lambda: shutil.copy(OUT / EMBEDDINGS, OUT / LATENTS), ["latents", "missing"]),
    "other channels": ([], latents(lambda x: x[:, :3]), ["[1, 3, 3, 4, 6]", "[1, 16,", AGAIN2]),
    "fewer frames": ([], latents(lambda x: x[:, :, :2]), ["[1, 16, 2,", AGAIN2]),
    "two videos": ([], latents(lambda x: torch.cat([x, x])), ["[2, 16, 3, 4, 6]", AGAIN2]),
    "latents without elements": ([], latents(lambda x: x[:0]), ["latents", "[0, 16, 3, 4, 6]", AGAIN2]),
    "latents without axes": ([], latents(lambda x: x[0, 0, 0, 0, 0]), ["latents", "[]", AGAIN2]),
    "integer latents": ([], latents(to_long), ["latents", "I64", AGAIN2]),
    "latents of bytes": ([], latents(lambda x: x.to(torch.uint8)), ["latents", "U8", AGAIN2]),
    "NaN": ([], lambda: edit_latents(OUT, poison), ["3 of 1,152", "frames 0, 2 of", "--allow_nan"]),
    "made_from is no JSON": ([], made_from(OUT / LATENTS, "x"), [LATENTS, "made_from", "JSON"]),
    "made_from is a number": ([], made_from(OUT / LATENTS, "1"), [LATENTS, "made_from", "JSON"]),
    # the model
    "vae: list": ([], content(MODEL / "vae/config.json", b"[1]"), ["vae/config.json", KIND]),
    "vae: scale of 0": ([], of_model("vae", scaling_factor=0), ["scaling_factor", KIND]),
    "vae: negative scale": ([], of_model("vae", scaling_factor=-0.7), ["scaling_factor", "-0.7", KIND]),
    "vae: scale in words": ([], of_model("vae", scaling_factor="0.7"), ["scaling_factor", KIND]),
    "vae: scale of 1e308": ([], of_model("vae", scaling_factor=1e308), ["scaling_factor", KIND]),
    "vae: ratio of 0": ([], of_model("vae", temporal_compression_ratio=0), ["temporal_compression_ratio", KIND]),
    "vae: ratio of 3": ([], of_model("vae", temporal_compression_ratio=3), ["temporal_compression_ratio", KIND]),
    "vae: no levels": ([], of_model("vae", block_out_channels=[]), ["block_out_channels", KIND]),
    "vae: levels in words": ([], of_model("vae", block_out_channels="16"), ["block_out_channels", KIND]),
    "vae: a level of 0": ([], of_model("vae", block_out_channels=[16, 0, 32, 32]), ["block_out_channels.1", KIND]),
    "vae: fewer levels": ([], of_model("vae", block_out_channels=[16, 32, 32]), ["block_out_channels", KIND]),
    "vae: no groups": ([], of_model("vae", norm_num_groups=0), ["norm_num_groups", KIND]),
    "vae: groups": ([], of_model("vae", norm_num_groups=7), ["norm_num_groups", "7", KIND]),
    "vae: blocks": ([], of_model("vae", up_block_types=["UpBlock2D"] * 4), ["up_block_types.0", "'UpBlock2D'", KIND]),
    "vae: activation": ([], of_model("vae", act_fn="magic"), ["act_fn", "magic", "silu"]),
    "vae: colours": ([], of_model("vae", out_channels=4), ["out_channels", KIND]),
    "vae: channels": ([], of_model("vae", latent_channels=8), [LATENTS, "[1, 8, 3, 4, 6]"]),
    "vae: post_quant_conv": ([], of_model("vae", use_post_quant_conv=True), ["use_post_quant_conv", KIND]),
    "vae: more layers": ([], of_model("vae", layers_per_block=2), ["model/vae", "resnets.2", "missing", MODEL_AGAIN]),
    "vae: weights cut": ([], cut(VAE), [VAE, "complete", MODEL_AGAIN]),
    "vae: weight missing": ([], tensors(VAE, lambda t: t.pop("decoder.conv_in.conv.bias")), ["decoder.conv_in"]),
    "vae: weight unexpected": (
        [],
        tensors(VAE, lambda t: t.update({"decoder.surplus": torch.zeros(2)})),
        ["decoder.surplus", "unexpected"],
    ),
    "vae: weight of integers": ([], edited(VAE, "decoder.conv_in.conv.bias", to_long), ["decoder.conv_in", "I64"]),
    "vae: NaN weight": ([], edited(VAE, "decoder.conv_in.conv.bias", with_value(np.nan)), ["decoder.conv_in", "NaN"]),
}  # fmt: skip

CASES = [
    pytest.param(script, *case, id=f"stage {script[5]}: {what}")
    for script, cases in ((STAGE1, STAGE1_CASES), (STAGE2, STAGE2_CASES), (STAGE3, STAGE3_CASES))
    for what, case in cases.items()
]
assert len(CASES) >= 120


@pytest.fixture(scope="session")
def pristine(finished_run, random_model, tmp_path_factory) -> Path:
    """Copy a model and the outputs made with it into one folder, as files that belong together."""
    folder = tmp_path_factory.mktemp("pristine")
    shutil.copytree(random_model, folder / MODEL)
    shutil.copytree(finished_run, folder / OUT)
    edit_config(folder / OUT, model_id=str(MODEL))
    for name in (EMBEDDINGS, LATENTS):
        with safe_open(folder / OUT / name, "pt") as file:
            said = json.loads(file.metadata()["made_from"]) | {"model_id": str(MODEL)}
        save_torch(load_torch(folder / OUT / name), folder / OUT / name, {"made_from": json.dumps(said)})
    return folder


@pytest.fixture
def folder(pristine, tmp_path, monkeypatch) -> Path:
    """Copy `pristine` for a test to spoil, and make the copy the working directory."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_on_files(folder, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Run a stage on the files of `folder`, with further options; return exit status, stdout and stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(script: str, *arguments: object) -> tuple[int, str, str]:
        given = {"--prompt", "--prompt_file"}.intersection(arguments)
        defaults = {
            STAGE1: ["--model_id", MODEL, "--output_dir", OUT, *(() if given else ("--prompt", "x"))],
            STAGE2: ["--input_dir", OUT, *SIZE],
        }.get(script, ["--input_dir", OUT])
        process = run_here(script, *defaults, *arguments, folder=folder, devices=DEVICES)
        return process.returncode, process.stdout, process.stderr

    return run


@pytest.mark.parametrize(("script", "arguments", "spoil", "words"), CASES)
def test_one_line_and_exit_2(script, arguments, spoil, words, folder, run_on_files):
    spoil()
    untouched = contents(folder)
    status, out, error = run_on_files(script, *arguments)
    assert status == 2 and len(error.splitlines()) == 1 and error.startswith(script), (status, out, error)
    assert len(error) < 1500 and all(str(word) in error for word in words), error
    assert "Traceback" not in out
    after = contents(folder)
    assert {name for name in after.keys() | untouched if after.get(name) != untouched.get(name)} <= {"x", "d"}


def test_what_is_not_spoilt_runs(folder, run_on_files):
    """Otherwise the cases above would show nothing."""
    for script in (STAGE1, STAGE2, STAGE3):
        status, out, error = run_on_files(script)
        assert status == 0 and "WARNING" not in out, out + error


def test_what_diffusers_and_transformers_accept_is_accepted(folder, run_on_files):
    """Another name of the embedding, spare rows of it, entries that have defaults, a BOM, strays, a lone variant."""
    status, out, _ = run_on_files(STAGE1, "--prompt", "a red circle")
    expected = contents(OUT)[EMBEDDINGS], load_torch(OUT / EMBEDDINGS)
    assert status == 0 and "tokens" not in out

    def spare_rows(found: dict) -> None:
        found["encoder.embed_tokens.weight"] = torch.cat([found.pop("shared.weight"), torch.ones(5, 64)])

    tensors(TEXT_ENCODER, spare_rows)()
    edit_json(MODEL / "text_encoder/config.json", {"vocab_size": 223})
    edit_json(MODEL / "transformer/config.json", dict.fromkeys(("patch_size", "norm_eps", "attention_bias"), ...))
    edit_json(MODEL / "vae/config.json", dict.fromkeys(("out_channels", "act_fn", "up_block_types"), ...))
    for path in MODEL.glob("*/config.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    for path in (TEXT_ENCODER, TRANSFORMER, VAE):
        for stray in (f"._{path.name}", f"{path.stem}_old.safetensors", f"{path.stem}-00001-of-00002.safetensors"):
            path.with_name(stray).write_bytes(PICKLE)
    TRANSFORMER.rename(TRANSFORMER.with_suffix(".fp16.safetensors"))
    status, out, error = run_on_files(STAGE1, "--prompt", "a red circle")
    assert status == 0 and "model/tokenizer has 218 tokens, but" in out, out + error
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in load_torch(OUT / EMBEDDINGS).items())
    status, out, error = run_on_files(STAGE2)
    assert status == 0 and "transformer has its weights as the variant fp16 alone" in out, out + error
    status, out, error = run_on_files(STAGE3)
    assert status == 0, out + error


def test_finished_videos_of_other_weights_are_made_again(folder, run_on_files):
    """As after another training under the same name; embeddings of another text encoder are refused."""
    options = ["--num_videos_per_prompt", 2, "--output_dir", OUT / "videos"]
    assert run_on_files(STAGE1)[0] == 0
    for made, finished in ((2, 0), (0, 2)):
        status, out, error = run_on_files(STAGE2, *options)
        assert status == 0 and out.count("wrote") == made, out + error
        assert out.count("already finished: 2 of 2") == bool(finished), out
    edited(TRANSFORMER, BLOCK, lambda tensor: tensor * 2)()
    status, out, error = run_on_files(STAGE2, *options)
    assert status == 0 and out.count("wrote") == 2 and "already finished" not in out, out + error
    edited(TEXT_ENCODER, "shared.weight", lambda tensor: tensor * 2)()
    status, _, error = run_on_files(STAGE2, *options)
    assert status == 2 and "made with other weights than the text_encoder of" in error and "--force" in error, error


def in_dtypes(most: torch.dtype, other: torch.dtype, names: str) -> None:
    """Convert the weights of all components to `most`, and those that match a pattern to another dtype."""
    for path in (TEXT_ENCODER, TRANSFORMER, VAE):
        convert = lambda found: found.update(  # noqa: E731
            {name: tensor.to(other if re.search(names, name) else most) for name, tensor in found.items()}
        )
        tensors(path, convert)()


@pytest.mark.parametrize(
    ("most", "other", "names", "options", "computed", "reason"),
    [
        (
            torch.bfloat16,
            torch.float32,
            r"norm_[qk]|blocks\.0\.attn1|conv_in",
            [],
            torch.bfloat16,
            "that of most weights",
        ),
        (torch.bfloat16, torch.float32, r"proj_out|conv_out|layer_norm", [], torch.bfloat16, "that of most weights"),
        (torch.float32, torch.float16, r"blocks\.0|conv_in|k\.weight", [], torch.float32, "that of most weights"),
        (torch.float16, torch.float16, "", [], torch.float32, "for a cpu cannot multiply float16"),
        (torch.float32, torch.float32, "", ["--dtype", "bfloat16"], torch.bfloat16, "as --dtype says"),
    ],
)
def test_dtypes_as_they_come(most, other, names, options, computed, reason, folder, run_on_files):
    """One dtype for all, which a line says; latents are those of weights that had been converted before."""
    in_dtypes(most, other, names)
    status, out, error = run_on_files(STAGE1, *options)
    assert status == 0, out + error
    status, out, error = run_on_files(STAGE2, *options)
    line = f"dtype: {str(computed).removeprefix('torch.')}, {reason}; converted while loading: "
    assert status == 0 and line in out, out + error
    latents = load_torch(OUT / LATENTS)["latents"]
    assert latents.dtype == computed
    status, out, error = run_on_files(STAGE3, *options)
    assert status == 0 and line in out, out + error

    tensors(TRANSFORMER, lambda found: found.update({n: t.to(computed) for n, t in found.items()}))()
    status, out, error = run_on_files(STAGE2)
    assert status == 0 and "converted" not in out, out + error
    assert torch.equal(load_torch(OUT / LATENTS)["latents"], latents)


def test_the_command_that_converts_pickles(folder, run_on_files):
    """Run as it is told, for weights in two pickles, with a tensor under two names, as torch saves a T5."""
    weights = load_torch(TEXT_ENCODER)
    TEXT_ENCODER.unlink()
    shared = {name: weights.pop("shared.weight") for name in ("encoder.embed_tokens.weight",)}
    torch.save(shared | {"shared.weight": shared["encoder.embed_tokens.weight"]}, TEXT_ENCODER.with_name("a.bin"))
    torch.save(weights, TEXT_ENCODER.with_name("b.bin"))
    _, _, error = run_on_files(STAGE1)
    (code,) = re.findall(r'python -c "(.*)"', error)
    exec(code)
    assert run_on_files(STAGE1)[0] == 0


def test_a_model_that_has_moved(folder, run_on_files):
    """Stage 3 decodes with it where it is now, and says so."""
    MODEL.rename("moved")
    _, _, error = run_on_files(STAGE3, "--model_id", "moved")
    assert "was made with model 'model', not 'moved'" in error and "go on with --force" in error, error
    status, out, error = run_on_files(STAGE3, "--model_id", "moved", "--force")
    assert status == 0 and out.count("WARNING") == 1, out + error


def test_no_temporary_folder(folder, run_on_files, monkeypatch):
    """Without one torch cannot be imported."""

    def gettempdir() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(accelerator, "tempfile", argparse.Namespace(gettempdir=gettempdir))
    for script in (STAGE1, STAGE2, STAGE3):
        status, _, error = run_on_files(script)
        assert status == 2 and "No usable temporary directory" in error and "TMPDIR" in error, error


def test_no_home(folder, run_on_files, monkeypatch):
    """As for a user whom the system does not know; the model is not where the home would be."""

    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "expanduser", expanduser)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert compilation.default_folder() is None
    with pytest.raises(UserError, match=r"'no/model' is neither .*home directory"):
        checkpoint.model_folder("no/model", [])


def test_a_missing_ffmpeg_is_named_at_the_start(folder, run_on_files, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "nowhere/ffmpeg")
    status, out, error = run_on_files(STAGE3)
    assert (status, out) == (2, "") and "ffmpeg" in error and len(error.splitlines()) == 1, out + error


ENCODERS = "Encoders:\n ------\n V....D mpeg4   MPEG-4 part 2\n"


def test_an_ffmpeg_without_h264_is_named_at_the_start(tmp_path, monkeypatch):
    """With its own reason; a script stands in for it."""
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text(
        f"#!/bin/sh\ncase $2 in -encoders) echo '{ENCODERS}';; *) echo 'Unknown encoder' >&2; exit 8; esac\n"
    )
    ffmpeg.chmod(0o755)
    check_ffmpeg()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    with pytest.raises(UserError, match=r"cannot encode H\.264: Unknown encoder; install"):
        check_ffmpeg()


def test_debug_keeps_the_traceback(folder, run_on_files):
    content(OUT / CONFIG, b"[]")()
    status, _, error = run_on_files(STAGE2, "--debug")
    lines = error.splitlines()
    assert status == 2 and "Traceback" in lines[0] and lines[-1].startswith(f"{STAGE2}: error: outputs/{CONFIG}"), error


@pytest.mark.parametrize(("script", "file"), [(STAGE2, EMBEDDINGS), (STAGE3, LATENTS)])
def test_a_file_that_does_not_say_what_it_was_made_from(script, file, folder, run_on_files):
    """As those of the original project: it is taken, and a line says so."""
    tensors(OUT / file, lambda found: None, None)()
    status, out, error = run_on_files(script)
    assert status == 0 and f"WARNING: outputs/{file} does not say what it was made from" in out, out + error


def test_latents_that_cease_to_be_finite(folder, run_on_files):
    """The weights are such that the first step gives huge latents, and the second overflows on them."""
    edited(TRANSFORMER, "proj_out.bias", lambda bias: torch.full_like(bias, 1e38))()
    options = ["--num_inference_steps", 4, "--dump", "d", "--dump_names", "prev_sample"]
    status, out, error = run_on_files(STAGE2, *options)
    with safe_open("d/stage2_tensors.safetensors", "np") as file:
        finite = [np.isfinite(file.get_tensor(f"step_{i:03}/prev_sample")).all() for i in range(4)]
    assert finite == [True, False, False, False]
    assert status == 0 and "WARNING: the latents are NaN or infinite from step 2 of 4 on" in out, out + error
    status, _, error = run_on_files(STAGE3)
    assert status == 2 and "--allow_nan" in error, error


LINES = "a \u2028b\r\n\nc\x0bd\x85e\x1cf\r# g\n"


def test_lines_of_a_prompt_file(tmp_path):
    """Line feeds, carriage returns and both end a line, as editors count them; a sign for a comment is none."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + LINES.encode())
    found = prompts.read_prompts(file, tmp_path, None)
    assert [prompt.text for prompt in found] == ["a \u2028b", "c\x0bd\x85e\x1cf", "# g"]
    assert [prompt.folder.name for prompt in found] == ["prompt_0001", "prompt_0002", "prompt_0003"]


def test_a_prompt_file_of_json(tmp_path):
    """What begins with an object is JSON lines; what a line says wins over the option, and braces alone are a text."""
    file = tmp_path / "in" / "prompts"
    file.parent.mkdir()
    file.write_bytes(b'\xef\xbb\xbf\n{"prompt": " \\"a\\"\\n", "image": "../b.png"}\r\n{"seed": 0, "prompt": ""}')
    found = prompts.read_prompts(file, tmp_path, Path("/c.png"))
    assert [(one.text, one.image, one.seed) for one in found] == [
        (' "a"\n', tmp_path / "in" / "../b.png", None),
        ("", Path("/c.png"), 0),
    ]
    assert found[0].source == f"{file}, line 2,"
    file.write_text("{red|blue} fox")
    assert [one.text for one in prompts.read_prompts(file, tmp_path, None)] == ["{red|blue} fox"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a red circle", ""], []),
        (["a red circle \N{DOG FACE}"], []),
        (["a red circle", "\u4e00\u53ea\u72d7 \u5728\u8dd1", ""], ["p2: 100% of the tokens"]),
        (["\N{DOG FACE}", "\N{DOG FACE} \N{DOG FACE}", "red"], ["p1: 100%", "worst of 2 such"]),
    ],
)
def test_prompts_of_unknown_tokens(texts, words, random_model):
    from transformers import T5Tokenizer

    tokenizer, warnings = T5Tokenizer.from_pretrained(random_model / "tokenizer"), []
    found = [prompts.Prompt(text, Path(), f"p{i}") for i, text in enumerate(texts, 1)]
    stage1_text_encoder.warn_of_unknown(tokenizer, found, argparse.Namespace(warn=warnings.append))
    assert len(warnings) == bool(words) and all(word in warnings[0] for word in words), warnings


def test_a_lost_text_is_quoted_without_its_middle(random_model, folder, run_on_files):
    status, out, _ = run_on_files(STAGE1, "--prompt", "red " * 2000)
    (warning,) = (line for line in out.splitlines() if "this is cut off" in line)
    assert status == 0 and "red ... red" in warning.replace("d  ", "d ").replace("  r", " r") and len(warning) < 300, (
        out
    )


@pytest.mark.parametrize(("text", "fps"), [("8", 8), ("7.5", 7.5), ("23.976", 23.976)])
def test_a_frame_rate_may_be_a_fraction(text, fps, tmp_path):
    """Whole ones stay whole numbers in the config."""
    given = types.frame_rate(text)
    stage_files.write_config(tmp_path, ENTRIES | {"fps": given})
    read = stage_files.read_config(tmp_path, schemas.VideoConfig)["fps"]
    assert read == given == fps and type(read) is type(given) is type(fps)
    with video_writer(str(tmp_path / VIDEO), read) as append:
        for _ in range(3):
            append(np.zeros((16, 16, 3), np.uint8))
    assert math.isclose(imageio.v3.immeta(tmp_path / VIDEO)["fps"], fps, rel_tol=1e-3)


def test_code_of_a_model_is_not_run(folder, run_on_files):
    for part in ("tokenizer/tokenizer_config.json", "text_encoder/config.json", "vae/config.json"):
        names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "code.Code")
        edit_json(MODEL / part, {"auto_map": names})
        (MODEL / part).with_name("code.py").write_text("open('pwned', 'w')")
    for script in (STAGE1, STAGE2, STAGE3):
        status, out, error = run_on_files(script)
        assert status == 0, out + error
    assert not list(folder.rglob("pwned"))


def pickled() -> dict[str, str]:
    """Return what a file of an earlier version, which was one pickle, said of PICKLE."""
    return {"payload": hashlib.sha256(PICKLE).hexdigest()}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: data[:-1], "cut or damaged"),
        (lambda data: data.split(b"\n")[0] + b"\n" + PICKLE, "cut or damaged"),
        (lambda data: data.split(b"\n")[0], "cut or damaged"),
        (lambda data: b"", "compile_for_tpu"),
        (lambda data: b"[1]\n", "compile_for_tpu"),
        (lambda data: b"[]\n", "not written by"),
        (lambda data: b'"payload"\n', "not written by"),
        (lambda data: json.dumps({"program": "a step", **pickled()}).encode() + b"\n" + PICKLE, "make it again"),
        (lambda data: DEEP, "compile_for_tpu"),
        (lambda data: PICKLE, "compile_for_tpu"),
        (lambda data: b"\xff" * 100, "compile_for_tpu"),
    ],
)
def test_executables(spoil, words, tmp_path, monkeypatch):
    """Of a file that is whole, and made for what is wanted, nothing is unpickled but the programs, by jax."""
    from cogvideox.run import executable

    monkeypatch.chdir(tmp_path)
    path, devices = Path("saved"), jax.devices()[:1]
    traced = [jax.jit(lambda x: x + 1).trace(1.0)]
    executable.save(str(path), [program.lower().compile() for program in traced], {"program": "a step"})
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=words):
        executable.load(path, {"program": "a step"}, devices, traced)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "words"),
    [
        (STAGE1, [], {}, ["--prompt"]),
        (STAGE2, SIZE, {"JAX_PLATFORMS": "tpu"}, ["tpu", "JAX_PLATFORMS=cpu"]),
        (STAGE3, [], {"JAX_PLATFORMS": "cuda"}, ["cuda", "JAX_PLATFORMS=cpu"]),
        (STAGE3_FLAX, ["--output_video", "a\nb.mp4"], {"JAX_PLATFORMS": "magic"}, ["magic"]),
        (STAGE2, ["--input_dir", b"\xff\n"], {"PYTHONIOENCODING": "ascii"}, [r"'\udcff\n' is not UTF-8"]),
    ],
)
def test_as_a_program(script, arguments, environment, words, folder):
    """A person's own command: what the libraries print themselves is not there, and nothing heavy was loaded."""
    where = [] if script == STAGE1 or "--input_dir" in arguments else ["--input_dir", OUT]
    command = [*stage_command(script, *where), *(x if isinstance(x, bytes) else str(x) for x in arguments)]
    process = run_command(command, env=environment)
    assert process.returncode == 2 and process.stdout == "", process
    assert len(process.stderr.splitlines()) == 1 and process.stderr.startswith(script), process.stderr
    assert all(word in process.stderr for word in words), process.stderr


@pytest.mark.slow
def test_full_stdout_and_an_ascii_terminal(folder):
    stage1 = stage_command(STAGE1, "--prompt", "ein Bär, " * 200, "--model_id", MODEL, "--output_dir", OUT)
    with os.fdopen(os.open("/dev/full", os.O_WRONLY), "w") as full:  # which makes no file where the device is missing
        process = subprocess.run(
            stage1, check=False, stdout=full, stderr=subprocess.PIPE, text=True, env=stage_environment()
        )
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "No space left" in process.stderr, process
    process = run_command(stage1, env={"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and r"\xab" in process.stdout and "is longer than" in process.stdout, process


# --- Any bytes -----------------------------------------------------------------------------------------------------


def read_or_refused(read: Callable[[], dict], name: str) -> dict | None:
    """Return what is read, or None if there is a UserError that names the file."""
    try:
        return read()
    except UserError as error:
        return None if name in str(error) else pytest.fail(str(error))


any_bytes = hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
ENTRIES = {
    **{"model_id": "m", "prompt": "p", "negative_prompt": "", "height": 32, "width": 48, "frames": 9, "fps": 8},
    **{"num_inference_steps": 2, "guidance_scale": 6.0, "seed": 1, "scheduler": "CogVideoXDDIMScheduler"},
}
JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=5,
)


def spoilt(valid: bytes) -> strategies.SearchStrategy[bytes]:
    """Draw `valid` with some bytes in its middle replaced by others."""
    places = strategies.integers(0, len(valid))
    return strategies.builds(
        lambda start, end, new: valid[: min(start, end)] + new + valid[max(start, end) :],
        *(places, places, strategies.binary(max_size=8)),
    )


CONFIGS = strategies.one_of(
    strategies.binary(),
    spoilt(json.dumps(ENTRIES).encode()),
    strategies.builds(lambda new: json.dumps(new).encode(), JSON),
    strategies.builds(
        lambda name, value: json.dumps(ENTRIES | {name: value}).encode(), strategies.sampled_from([*ENTRIES]), JSON
    ),
)


@any_bytes
@hypothesis.given(data=CONFIGS)
def test_any_bytes_for_a_config(data, tmp_path_factory):
    """The entries have their types and bounds, or there is a UserError."""
    folder = tmp_path_factory.getbasetemp()
    (folder / CONFIG).write_bytes(data)
    config = read_or_refused(lambda: stage_files.read_config(folder, schemas.VideoConfig), CONFIG)
    if config is None:
        return
    assert config.keys() >= ENTRIES.keys()
    for name, value in ENTRIES.items():
        kinds = (int, float) if name == "fps" else type(value)
        assert isinstance(config[name], kinds) and not isinstance(config[name], bool), (name, config[name])
    assert all(0 < config[name] <= 16_384 for name in ("height", "width", "frames", "fps", "num_inference_steps"))
    assert 0 <= config["guidance_scale"] <= 1000 and 0 <= config["seed"] < 2**64


def saved(array: np.ndarray | torch.Tensor, metadata: dict | None = None) -> bytes:
    from safetensors.torch import save

    return save({"latents": torch.as_tensor(array)}, metadata)


HEADERS = strategies.fixed_dictionaries(
    {
        "dtype": strategies.sampled_from(["F32", "BF16", "I8", "F64", "X", "F8_E4M3"]),
        "shape": strategies.lists(strategies.integers(-1, 4) | strategies.just(2**62), max_size=3),
        "data_offsets": strategies.lists(strategies.integers(-1, 40), min_size=1, max_size=3),
    }
)
FILES = strategies.one_of(
    strategies.binary(),
    spoilt(saved(torch.arange(6.0), {"made_from": '{"seed": 1}'})),
    strategies.builds(lambda text: saved(torch.ones(2), {"made_from": text}), strategies.text()),
    strategies.builds(
        lambda header, data: (lambda text: len(text).to_bytes(8, "little") + text + data)(
            json.dumps({"latents": header}).encode()
        ),
        *(HEADERS, strategies.binary(max_size=40)),
    ),
)


@any_bytes
@hypothesis.given(data=FILES)
def test_any_bytes_for_tensors(data, tmp_path_factory):
    """The tensor has elements and finite values, as safetensors itself reads them, or there is a UserError."""
    path = tmp_path_factory.getbasetemp() / LATENTS
    path.write_bytes(data)
    shapes = read_or_refused(lambda: stage_files.tensor_shapes(path, 2, ["latents"], ENTRIES), LATENTS)
    if shapes is None:
        return
    tensor = load_torch(path)["latents"]
    assert shapes == {"latents": tuple(tensor.shape)} and tensor.numel() and tensor.ndim
    assert tensor.is_floating_point() and tensor.isfinite().all()


@any_bytes
@hypothesis.given(bits=strategies.binary(min_size=8, max_size=64), dtype=strategies.sampled_from(list(DTYPES.values())))
def test_finite_is_what_numpy_calls_finite(bits, dtype):
    array = np.frombuffer(bits[: len(bits) // 8 * 8], dtype)
    assert is_finite(array) == all(map(math.isfinite, array.tolist())), array


# --- Devices, disks and signals ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--guidance_scale", 1, "--sp_num", 1], ["--sp_num 1", "divide 4 attention heads", "[2, 4, 8] work"]),
        (["--sp_num", 3], ["--sp_num 3", "[1, 2, 4]"]),
        (["--mesh_order", "tp,sp"], ["--mesh_order", "dp,sp,tp"]),
        (["--attention", "splash", "--block_sizes", 100, 128, 128], ["--block_sizes", "block_q=100", "128 works"]),
    ],
)
def test_mesh_or_blocks_that_do_not_fit(options, words, outputs, run_stage):
    process = run_stage(STAGE2, "--input_dir", outputs, *SIZE, *options, status=2, virtual_devices=True)
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert all(word in process.stderr for word in words), process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", [STAGE1, STAGE2, STAGE3])
def test_full_disk(script, outputs, random_model, tmp_path):
    """A file size limit stands in for a full disk: one line, and the old files stay."""
    untouched = contents(outputs)
    arguments = {
        STAGE1: ["--prompt", "x", "--model_id", random_model, "--output_dir", outputs],
        STAGE2: ["--input_dir", outputs, *SIZE],
        STAGE3: ["--input_dir", outputs],
    }[script]
    with limited_files(1000):
        process = run_here(script, *arguments, folder=tmp_path)
    assert process.returncode == 2, process.stderr
    assert "cannot write" in process.stderr.splitlines()[-1] and "Traceback" not in process.stderr, process.stderr
    assert contents(outputs) == untouched
