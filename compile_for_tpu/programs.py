"""Define the kinds of programs that can be compiled: options, tracing without weights, labels of their reports."""

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cogvideox.cli import options
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.types import file_path, model_or_config, number
from cogvideox.defaults import COMPUTE_DTYPES, DECODERS
from cogvideox.errors import UserError
from cogvideox.files import checkpoint, published, sparse_map
from cogvideox.files.names import CONFIGS
from cogvideox.files.tensors import compute_dtype
from cogvideox.run import plans, sparse_maps
from compile_for_tpu.prediction import Programs
from compile_for_tpu.sparse_work import sparse_work
from compile_for_tpu.topologies import compiling_for

if TYPE_CHECKING:
    from cogvideox.models.transformer.plan import DenoisingPlan

BUILT_IN_MODEL = str(CONFIGS / "CogVideoX1.5-5B")  # the configs of zai-org's model

# Options that are not in a report's name as key=value: its other labels have them, or they change no program.
NOT_IN_NAME = {"what", "topology", "output", "publish", "save", "model_id", "num_inference_steps"}
NOT_IN_NAME |= {"height", "width", "frames", "guidance_scale", "decoder", "tokens", "preset", "fps", "pattern"}
NOT_IN_NAME |= {"dense_steps"}


class Kind(NamedTuple):
    """A kind of programs that can be compiled.

    Attributes:
        help: what it is, for the help of the command line.
        add_options: adds its options to a parser.
        trace: takes the options and the devices of a slice, returns the `Programs`; raises UserError.
        labels: takes the options, returns the labels that the report's name begins with.
    """

    help: str
    add_options: Callable[[ArgumentParser], None]
    trace: Callable[[argparse.Namespace, list], Programs]
    labels: Callable[[argparse.Namespace], list[str]]


def labels(arguments: argparse.Namespace, defaults: argparse.Namespace) -> list[str]:
    """Return the labels that distinguish a report from others of the same kind and slice.

    The size comes first, then "guided" or the decoder, then the model if it is not the built-in one, then key=value for
    each option that is not the default.
    """
    found = KINDS[arguments.what].labels(arguments)
    model = getattr(arguments, "model_id", None)
    if model and checkpoint.resolve_model_id(model) != checkpoint.resolve_model_id(defaults.model_id):
        found.append(f"model={model_name(model)}")
    for name, value in vars(arguments).items():
        if name not in NOT_IN_NAME and value != getattr(defaults, name):
            found.append(f"{name}={label(value)}")
    return found


def label(value: object) -> str:
    """Return an option's value as a part of a file's name."""
    if isinstance(value, Path):
        return value.stem
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("*", "x").replace(":", "")


def model_name(model_id: str) -> str:
    """Return the last part of a model's folder or of its name on the hub."""
    return checkpoint.resolve_model_id(model_id).rstrip("/").rsplit("/", 1)[-1]


# --- Stage 2 -----------------------------------------------------------------------------------------------------


def add_stage2_options(parser: ArgumentParser) -> None:
    """Add the options of the denoising step."""
    _add_model_options(parser)
    options.add_preset_option(parser)
    inside, group = parser.group("looking inside"), parser.group("sampling")
    inside.add_argument("--dump_stats", action="store_true", help="the step as it is with stage 2's --dump_stats")
    group.add_argument("--skipped_step", action="store_true", help="the step that skips the blocks, of a step cache")
    group.add_argument(
        "--unguided_step", action="store_true", help="the step without guidance, of a run with --guidance_interval"
    )
    options.add_denoising_options(parser, made_up_maps=True)


def dtype_of(arguments: argparse.Namespace) -> str:
    """Return the dtype in which a stage computes on the slice, with weights in that of --dtype."""
    platform = "cpu" if getattr(arguments, "topology", None) == "cpu" else "tpu"
    return compute_dtype({arguments.dtype: 1}, arguments.dtype, platform)[0]


def trace_stage2(arguments: argparse.Namespace, devices: list) -> Programs:
    """Trace the denoising step."""
    from cogvideox.models.shared import tap
    from cogvideox.models.transformer.attention import is_tiled
    from cogvideox.models.transformer.plan import StepKind
    from cogvideox.models.transformer.step import abstract_arguments, make_step

    platform = "cpu" if arguments.topology == "cpu" else "tpu"
    videos = arguments.videos_at_once or 1
    plan = plans.denoising_plan(arguments, arguments.model_id, devices, platform, videos, dtype=dtype_of(arguments))
    if arguments.skipped_step and not plan.step_cache:
        raise UserError("--skipped_step belongs to --cache_schedule or --cache_threshold")
    if arguments.unguided_step and not plan.guidance_interval:
        raise UserError("--unguided_step belongs to --guidance_interval")
    kind = StepKind(arguments.skipped_step, plan.guided and not arguments.unguided_step)
    with compiling_for(plan.parallelism.mesh):
        wanted = tap.Wanted(statistics=["*"]) if arguments.dump_stats else None
        step = make_step(plan, wanted, kind)
        traced = step.trace(*abstract_arguments(plan))
    config = plan.transformer
    samples = plan.batch * (2 if kind.guided else 1)
    heads = config["num_attention_heads"]
    scores = samples * heads / len(devices) * plan.tokens**2
    calls = plan.parallelism.head_groups(heads) if is_tiled(plan.attention) else 1
    work = (
        sparse_work(plan, max(samples // plan.mesh.shape["dp"], 1))
        if plan.sparse and is_tiled(plan.attention)
        else None
    )
    if work:
        scores = calls * sum(work.scores.values())
    density = {"density": f"{sparse_maps.density(plan):.4f}"} if plan.sparse else {}
    return Programs(
        traced=[traced],
        times=[1],
        devices=plan.devices,
        scores_per_kernel=work.scores if work else scores / calls,
        trips=work.trips if work else {},
        lengths=work.lengths if work else {},
        attention_flops=0 if kind.short else 4 * config["attention_head_dim"] * scores * config["num_layers"],
        options=_size(arguments) | {"guided": kind.guided} | plan.program_options | density,
        model=model_name(arguments.model_id),
        name="denoising step",
        executable_options=plan.program_options,
        advice=_stage2_advice(plan),
    )


def _stage2_advice(plan: "DenoisingPlan") -> str:
    if not plan.attention.is_kernel:
        return "--attention splash, which keeps no scores in memory"
    if plan.parallelism.layout != "fsdp" and plan.parallelism.mesh.size > 1:
        return "--layout fsdp, or a slice of more chips"
    return "a slice of more chips, --guidance_scale 1 or a smaller size"


def _stage2_labels(arguments: argparse.Namespace) -> list[str]:
    return [_size_label(arguments)] + ["guided"] * (arguments.guidance_scale > 1.0)


# --- Stage 3 -----------------------------------------------------------------------------------------------------


def add_stage3_options(parser: ArgumentParser) -> None:
    """Add the options of the decoder."""
    _add_model_options(parser)
    parser.group("speed and memory").add_argument(
        "--decoder", default="torchax", choices=DECODERS, help="which of the two decoders"
    )
    options.add_size_options(parser)
    options.add_decoding_options(parser)


def trace_stage3(arguments: argparse.Namespace, devices: list) -> Programs:
    """Trace the decoder's two programs, one for the first chunk of latent frames and one for each later chunk."""
    size = {name: getattr(arguments, name) for name in ("height", "width", "frames")}
    plan = plans.decoding_plan(
        arguments, arguments.model_id, arguments.decoder, size, devices, dtype=dtype_of(arguments)
    )
    decoder = plan.make_decoder()
    with compiling_for(plan.split.mesh):
        traced = plan.programs(decoder, plan.abstract_weights(decoder))
    return Programs(
        traced=traced,
        times=plan.runs,
        devices=plan.devices,
        options=_size(arguments) | {"decoder": plan.decoder, "split": plan.split},
        model=model_name(arguments.model_id),
        name=f"{plan.decoder} decoder",
        executable_options=plan.program_options,
        advice="a slice of more chips, or a smaller --height or --width",
    )


def _stage3_labels(arguments: argparse.Namespace) -> list[str]:
    return [_size_label(arguments)] + [arguments.decoder] * (arguments.decoder != "torchax")


# --- Stage 1, with a video ---------------------------------------------------------------------------------------


def add_encoder_options(parser: ArgumentParser) -> None:
    """Add the options of the encoder."""
    add_model_option(parser)
    _add_dtype_option(parser, "dtype of the weights")
    options.add_size_options(parser)


def trace_encoder(arguments: argparse.Namespace, devices: list) -> Programs:
    """Trace the encoder's two programs, one for the first chunk of frames and one for each later chunk."""
    from cogvideox.models.shared.sizes import check_frames, check_sides, latent_size
    from cogvideox.models.vae import chunks
    from cogvideox.models.vae.encoder import FRAMES_PER_CHUNK, chunk_programs
    from cogvideox.models.vae.spatial_split import choose_split
    from cogvideox.models.vae.vae_torchax import make_encoder

    vae = checkpoint.read_config(arguments.model_id, "vae")
    size = arguments.frames, arguments.height, arguments.width
    with plans.plan_errors():
        check_sides(vae, checkpoint.read_config(arguments.model_id, "transformer"), *size[1:])
        check_frames(vae, arguments.frames)
    split, encoder = choose_split(devices, *latent_size(vae, *size)[1:]), make_encoder(vae)
    with compiling_for(split.mesh):
        weights = chunks.abstract_weights(encoder.weight_shapes, encoder.convert_weights, dtype_of(arguments), split)
        traced = chunk_programs(encoder, weights, (*size, 3), split)
    return Programs(
        traced=traced,
        times=[1, len(chunks.sizes(arguments.frames, FRAMES_PER_CHUNK)) - 1][: len(traced)],
        devices=split.mesh.devices.flatten().tolist(),
        options=_size(arguments) | {"split": split},
        model=model_name(arguments.model_id),
        name="encoder",
        advice="a slice of more chips, or a smaller --height or --width",
    )


# --- The attention kernel alone ----------------------------------------------------------------------------------


def add_kernel_options(parser: ArgumentParser) -> None:
    """Add the options of the attention kernel."""
    positive, group = number(int, 1), parser.group("video")
    options.add_attention_options(parser)
    group.add_argument("--tokens", type=positive, default=25826, help="length of the sequence")
    group.add_argument("--heads", type=positive, default=6, help="attention heads of one chip")
    group.add_argument("--head_dim", type=positive, default=64, help="width of a head")
    group.add_argument(
        "--pattern",
        type=_pattern,
        metavar="dense|frames:N|positions:N",
        help="block-sparse attention, all heads of one pattern: frames of whole tiles, with keys of so many frames "
        "before and after the query's, or of so many groups of places (default: dense, without such frames)",
    )
    group.add_argument("--token_frames", type=positive, default=11, help="frames of patches, for --pattern")
    group.add_argument("--text_tokens", type=positive, default=226, help="tokens that are text, for --pattern")
    _add_dtype_option(parser, "dtype of query, key and value")


def _pattern(text: str) -> str:
    """Return the text of a `Pattern`; an argparse type, which does not load jax."""
    if not re.fullmatch(sparse_map.PATTERN, text):
        raise argparse.ArgumentTypeError(f"{text} {sparse_map.NO_PATTERN}")
    return text


def trace_kernel(arguments: argparse.Namespace, devices: list) -> Programs:
    """Trace the attention of one chip."""
    import jax
    import jax.numpy as jnp

    from cogvideox.models.transformer.attention import Attention

    if arguments.pattern:
        return _trace_sparse_kernel(arguments, devices)
    with plans.plan_errors():
        function = Attention.choose(
            arguments.attention,
            "tpu",
            arguments.block_sizes,
            arguments.use_k_smooth,
            arguments.head_dim,
            dtype_of(arguments),
        )
    where = jax.sharding.SingleDeviceSharding(devices[0])
    shape = (1, arguments.heads, arguments.tokens, arguments.head_dim)
    array = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype_of(arguments)), sharding=where)
    with compiling_for(jax.sharding.Mesh(devices[:1], ("chips",))):
        traced = jax.jit(functools.partial(function, kv_length=arguments.tokens)).trace(array, array, array)
    scores = arguments.heads * arguments.tokens**2
    names = ("tokens", "heads", "head_dim", "dtype", "block_sizes")
    return Programs(
        traced=[traced],
        times=[1],
        devices=devices[:1],
        scores_per_kernel=scores,
        attention_flops=4 * arguments.head_dim * scores,
        options={"attention": function.name} | {name: getattr(arguments, name) for name in names},
        advice="fewer --tokens or --heads",
    )


def _trace_sparse_kernel(arguments: argparse.Namespace, devices: list) -> Programs:
    """Trace the attention of one chip whose heads have one pattern."""
    import jax
    import jax.numpy as jnp

    from cogvideox.models.transformer.sparse import attention, geometry, patterns
    from cogvideox.models.transformer.sparse.layout import LANES, AlignedLayout
    from cogvideox.models.transformer.sparse.table import HeadTable

    pattern, dtype = patterns.Pattern.parse(arguments.pattern), jnp.dtype(dtype_of(arguments))
    frame_tokens, rest = divmod(arguments.tokens - arguments.text_tokens, arguments.token_frames)
    if rest or frame_tokens < 1:
        frames = f"{arguments.token_frames} frames and {arguments.text_tokens} of text"
        raise UserError(f"--tokens {arguments.tokens} are not {frames}: see --token_frames and --text_tokens")
    layout = AlignedLayout(arguments.token_frames, frame_tokens, arguments.text_tokens)
    try:
        sizes = geometry.WindowSizes(*arguments.block_sizes) if arguments.block_sizes else None
        chosen = geometry.geometry_of(pattern.kind, layout, dtype.itemsize, arguments.head_dim, sizes)
        chosen.key_buffers(arguments.head_dim, dtype.itemsize)
    except (TypeError, ValueError) as error:
        raise UserError(f"--block_sizes or --tokens: {error}") from error
    array = jax.ShapeDtypeStruct(
        (layout.tiles, arguments.heads, arguments.head_dim, LANES),
        dtype,
        sharding=jax.sharding.SingleDeviceSharding(devices[0]),
    )
    function = functools.partial(
        attention.sparse_attention,
        table=HeadTable.of([pattern] * arguments.heads),
        layout=layout,
        sizes=sizes,
        interpret=False,
    )
    with compiling_for(jax.sharding.Mesh(devices[:1], ("chips",))):
        traced = jax.jit(function).trace(array, array, array)
    density = pattern.density(layout)
    scores = arguments.heads * arguments.tokens**2 * density
    names = ("tokens", "token_frames", "text_tokens", "heads", "head_dim", "dtype", "block_sizes")
    return Programs(
        traced=[traced],
        times=[1],
        devices=devices[:1],
        scores_per_kernel=scores,
        trips={attention.NAMES[pattern.kind]: chosen.mean_window(pattern.window)},
        attention_flops=4 * arguments.head_dim * scores,
        options={"pattern": pattern, "density": f"{density:.4f}"} | {name: getattr(arguments, name) for name in names},
        advice="fewer --tokens or --heads",
    )


def _kernel_labels(arguments: argparse.Namespace) -> list[str]:
    pattern = arguments.pattern or ""
    return [str(arguments.tokens)] + [pattern.replace(":", "")] * bool(pattern)


# --- Shared ------------------------------------------------------------------------------------------------------


def add_model_option(parser: ArgumentParser) -> None:
    """Add which model's configs are read."""
    parser.group("input and output").add_argument(
        "--model_id",
        type=model_or_config,
        default=BUILT_IN_MODEL,
        help=f"the model, of which only the configs are read: {', '.join(published.folders())}, a folder, or an id of "
        "the Hugging Face Hub (default: CogVideoX1.5-5B)",
    )


def _add_model_options(parser: ArgumentParser) -> None:
    add_model_option(parser)
    _add_dtype_option(parser, "dtype of the weights")
    parser.group("input and output").add_argument(
        "--save", type=file_path, help="also write the compiled programs to this file, for a stage's --executable"
    )


def _add_dtype_option(parser: ArgumentParser, help_: str) -> None:
    parser.group("speed and memory").add_argument("--dtype", default="bfloat16", choices=COMPUTE_DTYPES, help=help_)


def _size(arguments: argparse.Namespace) -> dict:
    return {name: getattr(arguments, name) for name in ("height", "width", "frames", "dtype")}


def _size_label(arguments: argparse.Namespace) -> str:
    return f"{arguments.height}x{arguments.width}x{arguments.frames}"


KINDS: dict[str, Kind] = {
    "stage2": Kind("the denoising step of stage 2", add_stage2_options, trace_stage2, _stage2_labels),
    "stage3": Kind("the decoder of stage 3", add_stage3_options, trace_stage3, _stage3_labels),
    "encoder": Kind("the encoder of stage 1's --video", add_encoder_options, trace_encoder, lambda a: [_size_label(a)]),
    "kernel": Kind("the attention kernel of one chip", add_kernel_options, trace_kernel, _kernel_labels),
}
