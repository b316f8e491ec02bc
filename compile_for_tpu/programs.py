"""What can be compiled: the options of each kind, how it is traced without weights, how its report is labelled."""

import argparse
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import checkpoint
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
import utils
from compile_for_tpu.prediction import Programs
from compile_for_tpu.topologies import compiling_for
from console import number

# The configs of zai-org/CogVideoX1.5-5B, without weights.
BUILT_IN_MODEL = Path(__file__).resolve().parent.parent / "configs" / "CogVideoX1.5-5B"

# Options that a report's name does not give as key=value: they are in its other labels, or change no program.
NOT_IN_NAME = {"what", "topology", "output", "save", "model_id", "num_inference_steps"}
NOT_IN_NAME |= {"height", "width", "frames", "guidance_scale", "decoder", "tokens"}


class Kind(NamedTuple):
    """Something that can be compiled.

    Attributes:
        help: what it is, for the command line.
        add_options: adds its options to a parser.
        trace: takes the options and the devices of a slice, returns the `Programs`; raises UserError.
        labels: takes the options, returns the labels that the report's name begins with.
    """

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    trace: Callable[[argparse.Namespace, list], Programs]
    labels: Callable[[argparse.Namespace], list[str]]


def labels(arguments: argparse.Namespace, defaults: argparse.Namespace) -> list[str]:
    """Return the labels that tell a report from others of the same kind and slice.

    The size comes first, then "guided" or the decoder, then the model if it is not the built-in one, then key=value for
    each option that is not the default.
    """
    found = KINDS[arguments.what].labels(arguments)
    model = getattr(arguments, "model_id", None)
    if model and checkpoint.resolve_model_id(model) != checkpoint.resolve_model_id(defaults.model_id):
        found.append(f"model={model_name(model)}")
    for name, value in vars(arguments).items():
        if name not in NOT_IN_NAME and value != getattr(defaults, name):
            found.append(f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return found


def model_name(model_id: str) -> str:
    """Return the last part of a model's folder or of its name on the hub."""
    return checkpoint.resolve_model_id(model_id).rstrip("/").rsplit("/", 1)[-1]


# --- Stage 2 -----------------------------------------------------------------------------------------------------


def add_stage2_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the denoising step."""
    _add_model_options(parser)
    stage2.add_step_options(parser)


def trace_stage2(arguments: argparse.Namespace, devices: list) -> Programs:
    """Trace the denoising step."""
    import jax.numpy as jnp

    from models.scheduler import CogVideoXDPMScheduler
    from models.transformer import abstract_step_arguments, make_denoise_step

    config, vae = (checkpoint.read_config(arguments.model_id, component) for component in ("transformer", "vae"))
    scheduler = checkpoint.read_config(arguments.model_id, "scheduler", "scheduler_config.json")
    stage2.check_sizes(arguments, config, vae, scheduler)
    parallelism = stage2.make_parallelism(arguments, config, devices)
    platform = "cpu" if arguments.topology == "cpu" else "tpu"
    attention = stage2.make_attention(arguments, platform, config, arguments.dtype)
    _, shape = stage2.latent_frames_and_shape(arguments, 1, config, vae)
    guided = arguments.guidance_scale > 1.0
    noisy = scheduler["_class_name"] == CogVideoXDPMScheduler.__name__
    step = make_denoise_step(config, parallelism, attention)
    values = abstract_step_arguments(config, parallelism, shape, guided, noisy, jnp.dtype(arguments.dtype))
    with compiling_for(parallelism.mesh):
        traced = step.trace(*values)

    _, frames, _, height, width = shape
    video = frames * height * width // (config["patch_size_t"] * config["patch_size"] ** 2)
    tokens = config["max_text_seq_length"] + video
    scores = (1 + guided) * config["num_attention_heads"] / len(devices) * tokens**2
    options = stage2.program_options(parallelism, attention)
    return Programs(
        traced=[traced],
        times=[1],
        devices=parallelism.mesh.devices.flatten().tolist(),
        scores_per_kernel=scores,
        attention_flops=4 * config["attention_head_dim"] * scores * config["num_layers"],
        options=_size(arguments) | {"guided": guided} | options,
        model=model_name(arguments.model_id),
        name="denoising step",
        executable_options=options,
        advice=_stage2_advice(arguments, attention.name, len(devices)),
    )


def _stage2_advice(arguments: argparse.Namespace, attention: str, chips: int) -> str:
    if attention == "xla":
        return "--attention splash, which keeps no scores in memory"
    if not arguments.use_fsdp and chips > 1:
        return "--use_fsdp, or a slice of more chips"
    return "a slice of more chips, --guidance_scale 1 or a smaller size"


def _stage2_labels(arguments: argparse.Namespace) -> list[str]:
    return [_size_label(arguments)] + ["guided"] * (arguments.guidance_scale > 1.0)


# --- Stage 3 -----------------------------------------------------------------------------------------------------


def add_stage3_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the decoder."""
    _add_model_options(parser)
    parser.add_argument("--decoder", default="torchax", choices=["torchax", "flax"], help="which decoder")
    for name, default in (("height", utils.HEIGHT), ("width", utils.WIDTH), ("frames", utils.FRAMES)):
        parser.add_argument(f"--{name}", type=number(int, 1), default=default, help="of the video")
    stage3.add_split_options(parser)


def trace_stage3(arguments: argparse.Namespace, devices: list) -> Programs:
    """Trace the decoder's two programs: for the first chunk of latent frames, and for any later one."""
    import jax
    import jax.numpy as jnp

    from models.decoder import chunk_programs, chunk_sizes

    vae = checkpoint.read_config(arguments.model_id, "vae")
    shape = stage3.latent_shape(vars(arguments), vae)
    split = stage3.make_split(arguments, devices, shape)
    decoder = importlib.import_module(f"models.vae_{arguments.decoder}").make_decoder(vae)

    def abstract(shape):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(arguments.dtype), sharding=split.replicated)

    weights = {name: abstract(shape) for name, shape in decoder.weight_shapes.items()}
    weights = jax.tree.map(lambda x: abstract(x.shape), jax.eval_shape(decoder.convert_weights, weights))
    with compiling_for(split.mesh):
        traced = chunk_programs(decoder, weights, shape, split)
    return Programs(
        traced=traced,
        times=[1, len(chunk_sizes(shape[2])) - 1][: len(traced)],
        devices=split.mesh.devices.flatten().tolist(),
        options=_size(arguments) | {"decoder": arguments.decoder, "split": split},
        model=model_name(arguments.model_id),
        name=f"{arguments.decoder} decoder",
        executable_options=stage3.program_options(split),
        advice="a slice of more chips, or a smaller --height or --width",
    )


def _stage3_labels(arguments: argparse.Namespace) -> list[str]:
    return [_size_label(arguments)] + [arguments.decoder] * (arguments.decoder != "torchax")


# --- The attention kernel alone ----------------------------------------------------------------------------------


def add_kernel_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the attention kernel."""
    positive = number(int, 1)
    kernels = [name for name in utils.ATTENTION if name != "xla"]
    parser.add_argument("--attention", default="splash_exp2", choices=kernels, help="which kernel")
    parser.add_argument("--tokens", type=positive, default=25826, help="length of the sequence")
    parser.add_argument("--heads", type=positive, default=6, help="attention heads of one chip")
    parser.add_argument("--head_dim", type=positive, default=64, help="width of a head")
    _add_dtype_option(parser, "of query, key, value")
    parser.add_argument("--block_sizes", type=int, nargs="+", help="of the kernel, in the order of its BlockSizes")
    parser.set_defaults(use_k_smooth=None)


def trace_kernel(arguments: argparse.Namespace, devices: list) -> Programs:
    """Trace the attention of one chip."""
    import jax
    import jax.numpy as jnp

    config = {"attention_head_dim": arguments.head_dim}
    function = stage2.make_attention(arguments, "tpu", config, arguments.dtype)
    where = jax.sharding.SingleDeviceSharding(devices[0])
    shape = (1, arguments.heads, arguments.tokens, arguments.head_dim)
    array = jax.ShapeDtypeStruct(shape, jnp.dtype(arguments.dtype), sharding=where)
    with compiling_for(jax.sharding.Mesh(devices[:1], ("chips",))):
        traced = jax.jit(functools.partial(function, kv_length=arguments.tokens)).trace(array, array, array)
    scores = arguments.heads * arguments.tokens**2
    names = ("attention", "tokens", "heads", "head_dim", "dtype", "block_sizes")
    return Programs(
        traced=[traced],
        times=[1],
        devices=devices[:1],
        scores_per_kernel=scores,
        attention_flops=4 * arguments.head_dim * scores,
        options={name: getattr(arguments, name) for name in names},
        advice="fewer --tokens or --heads",
    )


def _kernel_labels(arguments: argparse.Namespace) -> list[str]:
    return [str(arguments.tokens)]


# --- What the kinds share ----------------------------------------------------------------------------------------


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_id", default=str(BUILT_IN_MODEL), help="a model; only its configs are read")
    _add_dtype_option(parser, "of the weights")
    parser.add_argument("--save", type=utils.path, help="write the compiled programs, for a stage's --executable")


def _add_dtype_option(parser: argparse.ArgumentParser, help_: str) -> None:
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help=help_)


def _size(arguments: argparse.Namespace) -> dict:
    return {name: getattr(arguments, name) for name in ("height", "width", "frames", "dtype")}


def _size_label(arguments: argparse.Namespace) -> str:
    return f"{arguments.height}x{arguments.width}x{arguments.frames}"


KINDS: dict[str, Kind] = {
    "stage2": Kind("the denoising step of stage 2", add_stage2_options, trace_stage2, _stage2_labels),
    "stage3": Kind("the decoder of stage 3", add_stage3_options, trace_stage3, _stage3_labels),
    "kernel": Kind("the attention kernel of one chip", add_kernel_options, trace_kernel, _kernel_labels),
}
