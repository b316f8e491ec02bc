"""Stage 2: denoise the latents with the CogVideoX 1.5 transformer, in JAX.

Reads stage 1's files from --input_dir; writes stage2_latents.safetensors and the video entries of
generation_config.json to --output_dir.
"""

import argparse
import shlex

import checkpoint
import utils
from console import ArgumentParser, Report, UserError, number, prepare_libraries, run


def parse_arguments():
    parser = ArgumentParser("Stage 2 of CogVideoX text to video: denoise the latents.")
    parser.add_argument("--input_dir", type=utils.path, default=utils.STAGE_OUTPUTS, help="stage 1's output folder")
    parser.add_argument("--output_dir", type=utils.path, help="where the files go (default: --input_dir)")
    parser.add_argument("--model_id", help="the model of stage 1, checked against it (default: what stage 1 used)")
    add_step_options(parser)
    parser.add_argument("--seed", type=number(int, 0, 2**64 - 1), default=utils.SEED, help="of the noise")
    parser.add_argument("--fps", type=number(int, 1), default=utils.FPS, help="frames per second, for stage 3")
    parser.add_argument(
        "--warmup_steps", type=number(int, 0), default=utils.WARMUP_STEPS, help="untimed steps before the first"
    )
    parser.add_argument("--executable", type=utils.path, help="use the step in this file instead of compiling")
    return parser.parse_args()


def add_step_options(parser) -> None:
    """The options that the compiled step depends on: size, steps, guidance, attention, sharding."""
    positive, yes_no = number(int, 1), argparse.BooleanOptionalAction
    parser.add_argument("--num_inference_steps", type=positive, default=utils.NUM_STEPS, help="denoising steps")
    parser.add_argument("--height", type=positive, default=utils.HEIGHT, help="of the video, in pixels")
    parser.add_argument("--width", type=positive, default=utils.WIDTH, help="of the video, in pixels")
    parser.add_argument("--frames", type=positive, default=utils.FRAMES, help="of the video, 4n + 1")
    parser.add_argument(
        "--guidance_scale",
        type=number(float, 0),
        default=utils.GUIDANCE_SCALE,
        help="classifier-free guidance; up to 1 there is none, and a step costs half",
    )
    parser.add_argument(
        "--attention",
        choices=utils.ATTENTION,
        help="attention implementation (default: splash_exp2 on a TPU, else xla)",
    )
    parser.add_argument(
        "--use_dp", action=yes_no, default=utils.USE_DP, help="split the two prompts of guidance over the chips"
    )
    parser.add_argument(
        "--sp_num",
        type=positive,
        help="chips that split the sequence; the others split heads (default: all that dp leaves)",
    )
    parser.add_argument(
        "--use_fsdp", action=yes_no, default=utils.USE_FSDP, help="keep each weight in even shares on all chips"
    )
    parser.add_argument(
        "--use_tp", dest="use_fsdp", action="store_false", help="the same as --no-use_fsdp: weights split by tp alone"
    )
    parser.add_argument("--mesh_order", help="axes of the mesh, neighbouring chips last (default: dp,sp,tp)")
    parser.add_argument(
        "--block_sizes", type=int, nargs="+", help="of the kernel, in the order of its BlockSizes (default: its choice)"
    )
    parser.add_argument(
        "--use_k_smooth", action=yes_no, help="take the mean of the keys out in attention (default: the kernel's)"
    )


def main() -> None:
    arguments = parse_arguments()
    output_dir = arguments.output_dir or arguments.input_dir
    text_config = utils.read_config(arguments.input_dir, {1: utils.TEXT_ENTRIES})
    embeddings_path = arguments.input_dir / utils.EMBEDDINGS
    shapes = utils.tensor_shapes(embeddings_path, 1, ("prompt_embeds", "negative_prompt_embeds"), text_config)
    utils.check_writable(output_dir / utils.LATENTS)
    model_id = checkpoint.same_model(arguments.model_id, text_config["model_id"])

    prepare_libraries()
    transformer_config = checkpoint.read_config(model_id, "transformer")
    vae_config = checkpoint.read_config(model_id, "vae")
    scheduler_config = checkpoint.read_config(model_id, "scheduler", "scheduler_config.json")
    check_sizes(arguments, transformer_config, vae_config, scheduler_config)
    check_embeddings(shapes, transformer_config, embeddings_path)
    guided = arguments.guidance_scale > 1.0
    config = {name: text_config[name] for name in utils.TEXT_ENTRIES} | {
        name: getattr(arguments, name) for name in utils.VIDEO_ENTRIES if name != "scheduler"
    }
    config["scheduler"] = scheduler_config["_class_name"]

    report = Report(f"Stage 2: transformer of {model_id}")
    with report.phase("load"):
        import jax
        import jax.numpy as jnp
        import torch
        from diffusers.utils.torch_utils import randn_tensor
        from safetensors.torch import load_file

        from executable import compile_or_load
        from models.scheduler import SCHEDULERS, AffineScheduler
        from models.transformer import load_parameters, make_denoise_step, rotary_embedding, stored_names

        parallelism = make_parallelism(arguments, transformer_config, jax.devices())
        platform = jax.devices()[0].platform
        read = checkpoint.tensor_reader(model_id, "transformer", stored_names(transformer_config))
        dtype = jnp.dtype(read("proj_out.weight").dtype)
        attention = make_attention(arguments, platform, transformer_config, dtype)
        by = "chosen" if arguments.attention else f"the default on a {platform}"
        blocks = attention.block_sizes or "the kernel's own choice"
        report.say(f"devices: {len(jax.devices())} x {jax.devices()[0].device_kind}")
        why = (
            "as --sp_num says" if arguments.sp_num else "sp has all chips that dp leaves, which moves the fewest bytes"
        )
        report.say(f"mesh: {dict(parallelism.mesh.shape)}, {why}; {parallelism.layout} layout of the parameters")
        report.say(f"attention: {attention.name}, {by}" + (f"; blocks: {blocks}" if attention.name != "xla" else ""))
        if guided:
            report.say(f"guidance scale {arguments.guidance_scale:g}: negative and positive prompt in one batch")
        else:
            alone = ", dp is 1" if arguments.use_dp and len(jax.devices()) > 1 else ""
            report.say(f"guidance scale {arguments.guidance_scale:g}: no guidance, the prompt alone{alone}")

        parameters = load_parameters(read, transformer_config, parallelism)
        report.say(f"loaded transformer: {sum(p.size for p in parameters.values()):,} parameters, {dtype}")

        embeddings = load_file(embeddings_path)
        scheduler = AffineScheduler(
            SCHEDULERS[config["scheduler"]].from_config(scheduler_config), arguments.num_inference_steps
        )
        report.say(f"scheduler: {config['scheduler']}, {arguments.num_inference_steps} steps")
        # The pipeline's own noise: drawn by torch, in its order and in the dtype of the embeddings.
        generator = torch.Generator().manual_seed(arguments.seed)
        prompt_embeds = embeddings["prompt_embeds"]
        surplus, latent_shape = latent_frames_and_shape(arguments, len(prompt_embeds), transformer_config, vae_config)
        noise = randn_tensor(latent_shape, generator=generator, dtype=prompt_embeds.dtype)
        if guided:
            prompt_embeds = torch.cat([embeddings["negative_prompt_embeds"], prompt_embeds])

    everywhere = parallelism.sharding()

    def to_device(tensor: torch.Tensor | None, dtype=dtype) -> jax.Array | None:
        if tensor is None:
            return None
        return jax.device_put(jnp.from_dlpack(tensor.contiguous()).astype(dtype).copy(), everywhere)

    def step_inputs(i: int, generator: torch.Generator) -> tuple:
        """What changes from step to step: timestep, coefficients, noise."""
        scalars = jnp.int32(scheduler.timesteps[i]), jnp.asarray(scheduler.coefficients[i])
        step_noise = scheduler.noise(i, latent_shape, noise.dtype, generator)
        return *jax.device_put(scalars, everywhere), to_device(step_noise)

    def start() -> tuple[jax.Array, jax.Array]:
        """The initial noise and an empty prediction; new buffers each time, for the step reuses them."""
        return to_device(noise), to_device(torch.zeros(latent_shape), jnp.float32)

    condition = to_device(prompt_embeds), jax.device_put(rotary_embedding(transformer_config, latent_shape), everywhere)
    scale = jax.device_put(jnp.float32(arguments.guidance_scale), everywhere)

    with report.phase("compile"):
        spare = torch.Generator()  # warm-up must not draw from the seed's noise
        denoise = make_denoise_step(transformer_config, parallelism, attention)
        traced = denoise.trace(parameters, *start(), *condition, *step_inputs(0, spare), scale)
        options = program_options(parallelism, attention)
        devices = parallelism.mesh.devices.flatten().tolist()
        (denoise,) = compile_or_load(arguments.executable, "denoising step", devices, [traced], options, report)

    with report.phase(f"warm-up ({arguments.warmup_steps} steps)"):
        state = start()
        for _ in range(arguments.warmup_steps):
            state = denoise(parameters, *state, *condition, *step_inputs(0, spare), scale)
        jax.block_until_ready(state)

    steps = arguments.num_inference_steps
    with report.phase("run") as run_phase, report.progress("denoising", "step", steps) as bar:
        state = start()
        inputs = step_inputs(0, generator)
        for i in range(steps):
            state = denoise(parameters, *state, *condition, *inputs, scale)
            if i + 1 < steps:
                inputs = step_inputs(i + 1, generator)  # on the host, while the device works
            jax.block_until_ready(state)
            bar.update()
    report.add("per step", f"{run_phase.seconds / steps:.3f} s")

    with report.phase("save"):
        from safetensors.flax import save_file

        latents = jnp.transpose(state[0][:, surplus:], (0, 2, 1, 3, 4))
        made_from = utils.made_from(config, [name for name in config if name != "fps"])
        with utils.replacing(output_dir / utils.LATENTS) as temporary:
            save_file({"latents": latents}, temporary, metadata=made_from)
        utils.write_config(output_dir, config)
    report.say(f"wrote {output_dir / utils.LATENTS} and {utils.CONFIG}")

    report.add_array("latents", latents)
    report.close(shlex.join(["python", "stage3_vae_decoder.py", "--input_dir", str(output_dir)]))


def make_parallelism(arguments, transformer: dict, devices: list):
    """The mesh and the layout of the parameters that the options ask for, on `devices`."""
    from models.sharding import MESH_AXES, Parallelism, make_mesh, mesh_sizes

    order = tuple(arguments.mesh_order.split(",")) if arguments.mesh_order else MESH_AXES
    if sorted(order) != sorted(MESH_AXES):
        raise UserError(f"--mesh_order {arguments.mesh_order} is not an order of {','.join(MESH_AXES)}")
    batch = 2 if arguments.guidance_scale > 1.0 else 1
    heads = transformer["num_attention_heads"]
    try:
        sizes = mesh_sizes(len(devices), heads, batch, arguments.use_dp, arguments.sp_num)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Parallelism(make_mesh(sizes, devices, order), "fsdp" if arguments.use_fsdp else "tp")


def make_attention(arguments, platform: str, transformer: dict, dtype):
    """The attention that the options ask for, on devices of `platform`, for arrays of `dtype`."""
    from models.attention import Attention

    head_dim = transformer["attention_head_dim"]
    try:
        return Attention.choose(
            arguments.attention, platform, arguments.block_sizes, arguments.use_k_smooth, head_dim, dtype
        )
    except ValueError as error:
        raise UserError(f"--block_sizes: {error}") from error


def program_options(parallelism, attention) -> dict:
    """What the denoising step depends on beside the shapes of its arguments."""
    return {
        "mesh": dict(parallelism.mesh.shape),
        "layout": parallelism.layout,
        "attention": attention.name,
        "blocks": attention.block_sizes or "default",
        "k_smooth": attention.k_smooth,
    }


def latent_frames_and_shape(arguments, batch: int, transformer: dict, vae: dict) -> tuple[int, tuple[int, ...]]:
    """Latent frames put in front to fill the temporal patch, and the latents' shape [B, T, C, H, W] with them."""
    frames, height, width = checkpoint.latent_size(vae, arguments.frames, arguments.height, arguments.width)
    surplus = -frames % transformer["patch_size_t"]
    return surplus, (batch, frames + surplus, transformer["in_channels"], height, width)


def check_sizes(arguments, transformer: dict, vae: dict, scheduler: dict) -> None:
    """Raise UserError for what this model cannot take: its kind, height, width, frames or number of steps."""
    kind = {"use_rotary_positional_embeddings": True, "activation_fn": "gelu-approximate", "ofs_embed_dim": None}
    if transformer.get("patch_size_t") is None or any(transformer.get(name) != kind[name] for name in kind):
        raise UserError(
            "this model is not a CogVideoX 1.5 for text to video (temporal patches, rotary embedding, no image input); "
            "correct --model_id"
        )
    from models.scheduler import SCHEDULERS

    if scheduler["_class_name"] not in SCHEDULERS:
        raise UserError(f"scheduler {scheduler['_class_name']} is not supported, only {' and '.join(SCHEDULERS)}")
    spatial = checkpoint.spatial_compression_ratio(vae)
    multiple = spatial * transformer["patch_size"]
    for name in ("height", "width"):
        size, most = getattr(arguments, name), transformer[f"sample_{name}"] * spatial
        if size % multiple or size > most:
            nearest = min(max(round(size / multiple), 1) * multiple, most // multiple * multiple)
            raise UserError(
                f"--{name} {size} does not fit this model: a multiple of {multiple} up to {most}, for example {nearest}"
            )
    ratio = vae["temporal_compression_ratio"]
    if (arguments.frames - 1) % ratio:
        below = arguments.frames - (arguments.frames - 1) % ratio
        raise UserError(f"--frames {arguments.frames} is not {ratio}n + 1; the nearest are {below} and {below + ratio}")
    if arguments.num_inference_steps > scheduler["num_train_timesteps"]:
        raise UserError(f"--num_inference_steps can be at most {scheduler['num_train_timesteps']} with this scheduler")


def check_embeddings(shapes: dict, transformer: dict, path) -> None:
    """Raise UserError unless the embeddings have the transformer's number of tokens and width."""
    expected = (transformer["max_text_seq_length"], transformer["text_embed_dim"])
    for name, shape in shapes.items():
        if len(shape) != 3 or shape[1:] != expected:
            raise UserError(
                f"{path}: {name} has shape {list(shape)}, the transformer takes [B, {expected[0]}, {expected[1]}]: "
                "it was made with another model; run stage 1 again"
            )


if __name__ == "__main__":
    run(main)
