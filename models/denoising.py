"""A denoising run: the plan of it, one step as a jitted function, and the loop over the steps.

Nothing here knows of files or command lines. Arrays are on the devices; only noise is drawn by torch on the host, so
that a seed gives the noise that the diffusers pipeline gives.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import torch
from diffusers.utils.torch_utils import randn_tensor

from models import tap
from models.attention import Attention
from models.plan_error import PlanError
from models.scheduler import SAMPLERS, AffineScheduler
from models.sharding import LAYOUTS, MESH_AXES, Parallelism, make_mesh, mesh_sizes
from models.sizes import check_frames, check_multiple, latent_size, spatial_compression_ratio
from models.transformer import abstract_parameters, rotary_embedding, transformer

# --- The plan ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides a denoising run, beside weights, prompt and seed.

    Attributes:
        transformer, vae, scheduler: the model's configs, as in its `config.json` files.
        height, width, frames: of the video, in pixels and frames.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance; up to 1 there is none.
        batch: videos at a time.
        dtype: of weights, latents and embeddings.
        parallelism: the mesh of devices, and the layout of the parameters on it.
        attention: the implementation, with its options.
    """

    transformer: Mapping
    vae: Mapping
    scheduler: Mapping
    height: int
    width: int
    frames: int
    num_inference_steps: int
    guidance_scale: float
    batch: int
    dtype: jnp.dtype
    parallelism: Parallelism
    attention: Attention

    @property
    def guided(self) -> bool:
        """Whether a step predicts for the negative prompt too."""
        return self.guidance_scale > 1.0

    @property
    def adds_noise(self) -> bool:
        """Whether the scheduler adds noise at each step."""
        return SAMPLERS[self.scheduler["_class_name"]].adds_noise

    @property
    def surplus_frames(self) -> int:
        """Latent frames put in front to fill the temporal patch, cut off again at the end."""
        return -latent_size(self.vae, self.frames, self.height, self.width)[0] % self.transformer["patch_size_t"]

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """[batch, frames, channels, height, width] of the latents, the surplus frames counted."""
        frames, height, width = latent_size(self.vae, self.frames, self.height, self.width)
        return self.batch, frames + self.surplus_frames, self.transformer["in_channels"], height, width

    @property
    def video_tokens(self) -> int:
        """Tokens of one sample that stand for patches of the video."""
        _, frames, _, height, width = self.latent_shape
        patch = self.transformer["patch_size"]
        return frames // self.transformer["patch_size_t"] * (height // patch) * (width // patch)

    @property
    def tokens(self) -> int:
        """Tokens of one sample, text and video together."""
        return self.transformer["max_text_seq_length"] + self.video_tokens

    def with_dtype(self, dtype: jax.typing.DTypeLike) -> "Plan":
        """The same plan for weights of another dtype; raises PlanError if they do not fit the other options."""
        plan = dataclasses.replace(self, dtype=jnp.dtype(dtype))
        check_plan(plan)
        return plan

    @property
    def program_options(self) -> dict:
        """What the compiled step depends on, beside the configs and the shapes of its arguments."""
        return {
            "mesh": dict(self.parallelism.mesh.shape),
            "layout": self.parallelism.layout,
            "attention": self.attention.name,
            "blocks": self.attention.block_sizes or "default",
            "k_smooth": self.attention.k_smooth,
        }


def make_plan(
    *,
    transformer: Mapping,
    vae: Mapping,
    scheduler: Mapping,
    devices: Sequence[jax.Device],
    platform: str,
    height: int,
    width: int,
    frames: int,
    num_inference_steps: int,
    guidance_scale: float,
    batch: int = 1,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    attention: str | None = None,
    block_sizes: Sequence[int] | None = None,
    use_k_smooth: bool | None = None,
    use_dp: bool = True,
    sp_num: int | None = None,
    mesh_order: Sequence[str] = MESH_AXES,
    layout: str = "tp",
) -> Plan:
    """The plan that the options ask for, on `devices` of `platform` ("tpu", "cpu" or "gpu"); see `Plan`.

    Args:
        attention, block_sizes, use_k_smooth: see `Attention.choose`.
        use_dp, sp_num: see `mesh_sizes`.
        mesh_order: order of the mesh's axes; along the last one devices are neighbours.
        layout: of the parameters, a key of LAYOUTS.

    Raises:
        PlanError: the model, the devices and the options do not fit together.
    """
    check_configs(transformer, scheduler)
    if sorted(mesh_order) != sorted(MESH_AXES):
        raise PlanError("mesh_order", f"{','.join(mesh_order)} is not an order of {','.join(MESH_AXES)}")
    if layout not in LAYOUTS:
        raise PlanError("layout", f"{layout} is unknown; there are {', '.join(LAYOUTS)}")
    sizes = mesh_sizes(
        len(devices), transformer["num_attention_heads"], 2 if guidance_scale > 1.0 else 1, use_dp, sp_num
    )
    plan = Plan(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        height=height,
        width=width,
        frames=frames,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch=batch,
        dtype=jnp.dtype(dtype),
        parallelism=Parallelism(make_mesh(sizes, devices, mesh_order), layout),
        attention=Attention.choose(
            attention, platform, block_sizes, use_k_smooth, transformer["attention_head_dim"], dtype
        ),
    )
    check_plan(plan)
    return plan


def check_configs(transformer: Mapping, scheduler: Mapping) -> None:
    """Raise PlanError unless the model is a CogVideoX 1.5 for text to video with a scheduler that we can run."""
    kind = {"use_rotary_positional_embeddings": True, "activation_fn": "gelu-approximate", "ofs_embed_dim": None}
    if transformer.get("patch_size_t") is None or any(transformer.get(name) != kind[name] for name in kind):
        raise PlanError(
            None,
            "this model is not a CogVideoX 1.5 for text to video (temporal patches, rotary embedding, no image input); "
            "correct --model_id",
        )
    if scheduler["_class_name"] not in SAMPLERS:
        raise PlanError(None, f"scheduler {scheduler['_class_name']} is not supported, only {' and '.join(SAMPLERS)}")


def check_plan(plan: Plan) -> None:
    """Raise PlanError for sizes or a number of steps that the model or the kernel cannot take; says which they can."""
    spatial = spatial_compression_ratio(plan.vae)
    multiple = spatial * plan.transformer["patch_size"]
    for name in ("height", "width"):
        check_multiple(name, getattr(plan, name), multiple, plan.transformer[f"sample_{name}"] * spatial)
    check_frames(plan.vae, plan.frames)
    most = plan.scheduler["num_train_timesteps"]
    if plan.num_inference_steps > most:
        raise PlanError("num_inference_steps", f"can be at most {most} with this scheduler")
    plan.attention.check(plan.transformer["attention_head_dim"], plan.dtype)


# --- A step ------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a step hands to the next one; a step reuses the memory of the state that it is given.

    Attributes:
        latents: [batch, frames, channels, height, width], the model's dtype.
        pred_original_sample: what the step took the noise-free latents to be, float32 of the same shape; zeros before
            the first step.
    """

    latents: jax.Array
    pred_original_sample: jax.Array


class Condition(NamedTuple):
    """What stays the same in all steps.

    Attributes:
        prompt_embeds: [batch, text tokens, text width], or, for classifier-free guidance, [2 * batch, ...] with the
            negative prompts first.
        rotary: see `rotary_embedding`.
    """

    prompt_embeds: jax.Array
    rotary: tuple[jax.Array, jax.Array]


class StepInputs(NamedTuple):
    """What changes from step to step.

    Attributes:
        timestep: int32 scalar.
        coefficients: float32 [2, 3]; see `AffineScheduler`.
        noise: like the latents; None with a scheduler that adds none.
        guidance_scale: float32 scalar; read only with guidance.
    """

    timestep: jax.Array
    coefficients: jax.Array
    noise: jax.Array | None
    guidance_scale: jax.Array


class StepArguments(NamedTuple):
    """The arguments of a step, in its order."""

    parameters: Mapping[str, jax.Array]
    state: State
    condition: Condition
    inputs: StepInputs


def make_step(plan: Plan, tapped: Sequence[str] = ()) -> Callable:
    """A jitted denoising step, `step(parameters, state, condition, inputs)`, which returns the next `State`.

    The state's memory is donated. With `tapped`, patterns of names, it returns also what models/tap.py collects.

    Source: the loop body of `CogVideoXPipeline.__call__`.
    """

    def step(parameters: Mapping[str, jax.Array], state: State, condition: Condition, inputs: StepInputs) -> State:
        latents = state.latents
        # float32 weights mean float32 products, which a TPU's default is not.
        with jax.default_matmul_precision("highest" if latents.dtype == jnp.float32 else "default"):
            model_output = transformer(
                parameters,
                jnp.tile(latents, (2 if plan.guided else 1, 1, 1, 1, 1)),
                condition.prompt_embeds,
                inputs.timestep,
                condition.rotary,
                config=plan.transformer,
                parallelism=plan.parallelism,
                attention=plan.attention,
            )
        if plan.guided:
            negative, positive = jnp.split(model_output, 2)
            model_output = negative + inputs.guidance_scale * (positive - negative)

        arrays = latents.astype(jnp.float32), model_output, state.pred_original_sample
        prev_sample, pred_original_sample = (
            sum(c * a for c, a in zip(row, arrays, strict=True)) for row in inputs.coefficients
        )
        if inputs.noise is not None:
            prev_sample = prev_sample + inputs.noise
        return State(prev_sample.astype(latents.dtype), pred_original_sample)

    replicated = plan.parallelism.sharding()
    if tapped:
        return jax.jit(tap.collecting(step, tapped), donate_argnums=1)
    return jax.jit(step, donate_argnums=1, out_shardings=replicated)


def abstract_arguments(plan: Plan) -> StepArguments:
    """The arguments of a step as shapes, for compiling without weights."""

    def array(shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=plan.parallelism.sharding())

    config = plan.transformer
    latents = array(plan.latent_shape, plan.dtype)
    text = plan.batch * (2 if plan.guided else 1), config["max_text_seq_length"], config["text_embed_dim"]
    rotary = array((plan.video_tokens, config["attention_head_dim"] // 2))
    return StepArguments(
        abstract_parameters(config, plan.dtype, plan.parallelism),
        State(latents, array(plan.latent_shape)),
        Condition(array(text, plan.dtype), (rotary, rotary)),
        StepInputs(array((), jnp.int32), array((2, 3)), latents if plan.adds_noise else None, array(())),
    )


# --- The loop ----------------------------------------------------------------------------------------------------


class Denoising:
    """A run of `plan` from one prompt and one seed, before its loop.

    Args:
        plan: see `Plan`.
        parameters: see models/transformer.py.
        prompt_embeds, negative_prompt_embeds: [batch, text tokens, text width], torch.
        seed: of the noise, drawn as `CogVideoXPipeline` draws it, in the dtype of the embeddings.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Mapping[str, jax.Array],
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor,
        seed: int,
    ):
        self.plan = plan
        self.parameters = parameters
        self._replicated = plan.parallelism.sharding()
        self._generator = torch.Generator().manual_seed(seed)
        self._noise = randn_tensor(plan.latent_shape, generator=self._generator, dtype=prompt_embeds.dtype)
        sampler = SAMPLERS[plan.scheduler["_class_name"]].scheduler
        self._scheduler = AffineScheduler(sampler.from_config(dict(plan.scheduler)), plan.num_inference_steps)
        if plan.guided:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        rotary = rotary_embedding(plan.transformer, plan.latent_shape)
        self.condition = Condition(self._to_device(prompt_embeds, plan.dtype), jax.device_put(rotary, self._replicated))

    def arguments(self) -> StepArguments:
        """Those of the first step."""
        return StepArguments(self.parameters, self._start(), self.condition, self._inputs(0, torch.Generator()))

    def warm_up(self, step: Callable, steps: int) -> None:
        """Run the first step `steps` times on its own result; draws nothing from the seed's noise."""
        for _ in self._loop(step, [0] * steps, torch.Generator()):
            pass

    def run(self, step: Callable) -> Iterator[State]:
        """Yield the state after each step. The next step reuses its memory: keep no state but the last one."""
        yield from self._loop(step, range(self.plan.num_inference_steps), self._generator)

    def _loop(self, step: Callable, indices: Sequence[int], generator: torch.Generator) -> Iterator[State]:
        state = self._start()
        inputs = self._inputs(indices[0], generator) if indices else None
        for n in range(len(indices)):
            state = step(self.parameters, state, self.condition, inputs)
            if n + 1 < len(indices):
                inputs = self._inputs(indices[n + 1], generator)  # on the host, while the device works
            jax.block_until_ready(state)
            yield state

    def _start(self) -> State:
        """The initial noise and an empty prediction; new buffers each time, for a step reuses them."""
        empty = torch.zeros(self.plan.latent_shape)
        return State(self._to_device(self._noise, self.plan.dtype), self._to_device(empty, jnp.float32))

    def _inputs(self, i: int, generator: torch.Generator) -> StepInputs:
        scheduler, plan = self._scheduler, self.plan
        noise = scheduler.noise(i, plan.latent_shape, self._noise.dtype, generator)
        scalars = (
            jnp.int32(scheduler.timesteps[i]),
            jnp.asarray(scheduler.coefficients[i]),
            jnp.float32(plan.guidance_scale),
        )
        timestep, coefficients, guidance_scale = jax.device_put(scalars, self._replicated)
        noise = None if noise is None else self._to_device(noise, plan.dtype)
        return StepInputs(timestep, coefficients, noise, guidance_scale)

    def _to_device(self, tensor: torch.Tensor, dtype: jax.typing.DTypeLike) -> jax.Array:
        return jax.device_put(jnp.from_dlpack(tensor.contiguous()).astype(dtype).copy(), self._replicated)
