"""A denoising run: its plan, one step as a jitted function, and the loop over the steps.

Nothing here depends on files or command lines. Arrays are on the devices; only the noise is drawn by torch on the host,
so that a seed gives the same noise as in the diffusers pipeline.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from models import tap
from models.attention import Attention, is_tiled
from models.plan_error import PlanError
from models.scheduler import SAMPLERS, AffineScheduler, Sampler, make_scheduler
from models.sharding import LAYOUTS, MESH_AXES, Parallelism, make_mesh, mesh_sizes, to_devices
from models.sizes import check_frames, check_multiple, latent_size, spatial_compression_ratio
from models.transformer import (
    HIDDEN_STATES,
    abstract_parameters,
    hidden_states_shape,
    rotary_embedding,
    time_embedding,
    transformer,
)

# Plan and step do without torch and diffusers, which take seconds to import; the run imports them.
if TYPE_CHECKING:
    import torch

# By platform. On a TPU the exchange of tokens for heads then goes on beside other work.
COMPILER_OPTIONS = {"tpu": {"xla_tpu_enable_async_all_to_all": True}}
WHOLE_LATENTS = PartitionSpec(*[None] * 5)  # every chip has all of them

# --- The plan ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides a denoising run, except weights, prompt and seed.

    Attributes:
        transformer, vae, scheduler: the model's configs, as reading.py checks them.
        height, width, frames: of the video, in pixels and frames.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance; there is no guidance if it is at most 1.
        use_dynamic_cfg: whether it changes from step to step; see `guidance_at`.
        batch: videos at a time.
        dtype: of weights, latents and embeddings.
        parallelism: the mesh of devices, and the layout of the parameters on it.
        attention: the implementation, with its options.
        step_cache: whether full steps keep what the blocks add, for steps that leave them out.
        guidance_interval: the first and the last step with guidance, counted from 0; None for all steps.
    """

    transformer: Mapping
    vae: Mapping
    scheduler: Mapping
    height: int
    width: int
    frames: int
    num_inference_steps: int
    guidance_scale: float
    use_dynamic_cfg: bool
    batch: int
    dtype: jnp.dtype
    parallelism: Parallelism
    attention: Attention
    step_cache: bool
    guidance_interval: tuple[int, int] | None

    @property
    def guided(self) -> bool:
        """Whether steps predict for the negative prompt too: all, or those of `guidance_interval`."""
        return self.guidance_scale > 1.0

    def kinds(self, skipped: Collection[int] = ()) -> "list[StepKind]":
        """Return the kind of each step, of which `skipped` leave out the blocks."""
        first, last = self.guidance_interval or (0, self.num_inference_steps)
        steps = range(self.num_inference_steps)
        return [StepKind(short=i in skipped, guided=self.guided and first <= i <= last) for i in steps]

    def guidance_at(self, timestep: int) -> float:
        """Return the guidance scale of a step; source: `use_dynamic_cfg` of `CogVideoXPipeline.__call__`."""
        if not self.use_dynamic_cfg:
            return self.guidance_scale
        steps = self.num_inference_steps
        return 1 + self.guidance_scale * (1 - math.cos(math.pi * ((steps - timestep) / steps) ** 5.0)) / 2

    @property
    def always_full(self) -> set[int]:
        """The steps that must not leave out the blocks: the first, the last, and the first one with guidance."""
        first_guided, _ = self.guidance_interval or (0, 0)
        return {0, self.num_inference_steps - 1, first_guided}

    @property
    def prompts(self) -> int:
        """Prompts for each video: with guidance the negative and the positive one."""
        return 2 if self.guided else 1

    @property
    def sampler(self) -> Sampler:
        """How the scheduler is called, and whether it adds noise."""
        return SAMPLERS[self.scheduler["_class_name"]]

    @property
    def devices(self) -> list[jax.Device]:
        """The devices in the order of the mesh."""
        return self.parallelism.mesh.devices.flatten().tolist()

    @property
    def surplus_frames(self) -> int:
        """Latent frames that are put in front to fill the temporal patch, and cut off again at the end."""
        return -latent_size(self.vae, self.frames, self.height, self.width)[0] % self.transformer["patch_size_t"]

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """[batch, frames, channels, height, width] of the latents, surplus frames included."""
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
        """Return the plan for weights of another dtype; raises PlanError if that does not fit the other options."""
        self.attention.check(self.transformer["attention_head_dim"], dtype)
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    @property
    def program_options(self) -> dict:
        """Everything that the compiled step depends on, except the configs and the shapes of its arguments."""
        return {
            "mesh": dict(self.parallelism.mesh.shape),
            "layout": self.parallelism.layout,
            "attention": self.attention.name,
            "blocks": self.attention.block_sizes or "default",
            "k_smooth": self.attention.k_smooth,
        } | ({"step_cache": True} if self.step_cache else {})


class StepKind(NamedTuple):
    """What kind of step a program computes.

    Attributes:
        short: whether it leaves out the blocks, and adds the residual of the last full step instead.
        guided: whether it predicts for the negative prompts too, or for the positive ones alone.
    """

    short: bool
    guided: bool


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
    use_dynamic_cfg: bool = False,
    batch: int = 1,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    attention: str | None = None,
    block_sizes: Sequence[int] | None = None,
    use_k_smooth: bool | None = None,
    use_dp: bool = True,
    sp_num: int | None = None,
    mesh_order: Sequence[str] = MESH_AXES,
    layout: str = "tp",
    step_cache: bool = False,
    guidance_interval: tuple[int, int] | None = None,
) -> Plan:
    """Make the plan that the options ask for, on `devices` of `platform` ("tpu", "cpu" or "gpu"); see `Plan`.

    Args:
        attention, block_sizes, use_k_smooth: see `Attention.choose`.
        use_dp, sp_num: see `mesh_sizes`.
        mesh_order: order of the mesh's axes; along the last one devices are neighbours.
        layout: of the parameters, a key of LAYOUTS.
        step_cache, guidance_interval: see `Plan`.

    Raises:
        PlanError: the model, the devices and the options do not fit together.
    """
    if sorted(mesh_order) != sorted(MESH_AXES):
        raise PlanError("mesh_order", f"{','.join(mesh_order)} is not an order of {','.join(MESH_AXES)}")
    if layout not in LAYOUTS:
        raise PlanError("layout", f"{layout} is unknown; there are {', '.join(LAYOUTS)}")
    # dp splits what all steps have: those without guidance have the positive prompts alone.
    sequences = batch * (2 if guidance_scale > 1.0 and guidance_interval is None else 1)
    sizes = mesh_sizes(len(devices), transformer["num_attention_heads"], sequences, use_dp, sp_num)
    plan = Plan(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        height=height,
        width=width,
        frames=frames,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        use_dynamic_cfg=use_dynamic_cfg,
        batch=batch,
        dtype=jnp.dtype(dtype),
        parallelism=Parallelism(make_mesh(sizes, devices, mesh_order), layout),
        attention=Attention.choose(
            attention, platform, block_sizes, use_k_smooth, transformer["attention_head_dim"], dtype
        ),
        step_cache=step_cache,
        guidance_interval=guidance_interval,
    )
    check_plan(plan)
    return plan


def check_plan(plan: Plan) -> None:
    """Raise PlanError, naming values that work, if the scheduler, the sizes or the number of steps cannot be run."""
    spatial = spatial_compression_ratio(plan.vae)
    multiple = spatial * plan.transformer["patch_size"]
    for name in ("height", "width"):
        check_multiple(name, getattr(plan, name), multiple, plan.transformer[f"sample_{name}"] * spatial)
    check_frames(plan.vae, plan.frames)
    if plan.use_dynamic_cfg and not plan.guided:
        raise PlanError(
            "use_dynamic_cfg",
            f"changes the guidance, and with --guidance_scale {plan.guidance_scale:g} there is none; "
            "add --no-use_dynamic_cfg",
        )
    first, last = plan.guidance_interval or (0, 0)
    if plan.guidance_interval and not plan.guided:
        raise PlanError(
            "guidance_interval",
            f"is an interval with guidance, and with --guidance_scale {plan.guidance_scale:g} "
            "there is none; use one of the two",
        )
    if not first <= last < plan.num_inference_steps:
        raise PlanError(
            "guidance_interval", f"{first},{last} is no interval of the steps 0 to {plan.num_inference_steps - 1}"
        )
    if plan.scheduler["_class_name"] not in SAMPLERS:
        name = plan.scheduler["_class_name"]
        raise PlanError(None, f"scheduler {name} is not supported, only {' and '.join(SAMPLERS)}")
    maximum = plan.scheduler["num_train_timesteps"]
    if plan.num_inference_steps > maximum:
        raise PlanError("num_inference_steps", f"can be at most {maximum} with this scheduler")


# --- A step ------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a step passes on to the next step. A step donates the state that it takes: its memory is used again.

    Attributes:
        latents: [batch, frames, channels, height, width], the model's dtype.
        pred_original_sample: the step's estimate of the noise-free latents, float32 of the same shape; zeros before the
            first step.
        finite_steps: int32 scalar, the steps whose latents were finite. What is not finite stays so in all later steps.
        residual: what the blocks have added in the last full step (`Prediction`); None without the step cache.
    """

    latents: jax.Array
    pred_original_sample: jax.Array
    finite_steps: jax.Array
    residual: jax.Array | None


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
        noise: shape and dtype of the latents; None with a scheduler that adds no noise.
        guidance_scale: float32 scalar; read only with guidance.
    """

    timestep: jax.Array
    coefficients: jax.Array
    noise: jax.Array | None
    guidance_scale: jax.Array


class StepArguments(NamedTuple):
    """The arguments of a step, in the order in which it takes them.

    Shapes (`jax.ShapeDtypeStruct`) can stand in the place of all arrays, to compile without data.
    """

    parameters: Mapping[str, Any]
    state: State
    condition: Condition
    inputs: StepInputs


def make_step(plan: Plan, wanted: tap.Wanted | None = None, kind: StepKind | None = None) -> jax.stages.Wrapped:
    """Make a jitted denoising step, `step(parameters, state, condition, inputs)`, which returns the next `State`.

    The kind is one of `Plan.kinds`, by default that of a full step, guided if the plan is.

    The step donates the state. If anything is `wanted`, it returns the state and what is `tap.Collected`; beside the
    transformer's modules there are "latents", from which the step starts, "noise_pred" after guidance,
    "pred_original_sample" and "prev_sample", all [batch, frames, channels, height, width].

    Source: the loop body of `CogVideoXPipeline.__call__`.
    """
    short, guided = kind or StepKind(short=False, guided=plan.guided)
    of_kind = slice(None if guided else -plan.batch, None)  # the samples: the negative prompts' are first

    def step(parameters: Mapping[str, jax.Array], state: State, condition: Condition, inputs: StepInputs) -> State:
        latents, residual = state.latents, state.residual
        tap.tap("latents", latents, WHOLE_LATENTS)
        # With float32 weights the products are float32 too; a TPU's default is bfloat16.
        with jax.default_matmul_precision("highest" if latents.dtype == jnp.float32 else "default"):
            prediction = transformer(
                parameters,
                jnp.tile(latents, (2 if guided else 1, 1, 1, 1, 1)),
                condition.prompt_embeds[of_kind],
                inputs.timestep,
                condition.rotary,
                config=plan.transformer,
                parallelism=plan.parallelism,
                attention=plan.attention,
                residual=residual[of_kind] if short and residual is not None else None,
            )
        model_output = prediction.output
        if guided:
            negative, positive = jnp.split(model_output, 2)
            model_output = negative + inputs.guidance_scale * (positive - negative)
        tap.tap("noise_pred", model_output, WHOLE_LATENTS)

        arrays = latents.astype(jnp.float32), model_output, state.pred_original_sample
        prev_sample, pred_original_sample = (
            sum(c * a for c, a in zip(row, arrays, strict=True)) for row in inputs.coefficients
        )
        if inputs.noise is not None:
            prev_sample = prev_sample + inputs.noise
        prev_sample = prev_sample.astype(latents.dtype)
        tap.tap("pred_original_sample", pred_original_sample, WHOLE_LATENTS)
        tap.tap("prev_sample", prev_sample, WHOLE_LATENTS)
        finite_steps = state.finite_steps + jnp.isfinite(prev_sample).all()
        if plan.step_cache and not short:
            # That of negative prompts, if it is missing, is not read before it is there: see `Plan.always_full`.
            residual = jnp.tile(prediction.residual, (plan.batch * plan.prompts // len(prediction.residual), 1, 1))
        return State(prev_sample, pred_original_sample, finite_steps, residual)

    shardings = state_shardings(plan)
    platform = plan.parallelism.mesh.devices.flat[0].platform
    jit = functools.partial(jax.jit, donate_argnums=1, compiler_options=COMPILER_OPTIONS.get(platform))
    if wanted:
        collecting = tap.collecting(step, wanted, plan.parallelism.mesh)
        return jit(collecting, out_shardings=(shardings, None))
    return jit(step, out_shardings=shardings)


def state_shardings(plan: Plan) -> Any:
    """Return a `State` of shardings: each chip has its share of the residual, and all of the others."""
    sharding: Any = plan.parallelism.sharding
    residual = sharding(*HIDDEN_STATES) if plan.step_cache else None
    return State(sharding(), sharding(), sharding(), residual)


def abstract_arguments(plan: Plan) -> StepArguments:
    """Return the arguments of a step as shapes, to compile without weights."""

    def array(shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=plan.parallelism.sharding())

    config = plan.transformer
    latents = array(plan.latent_shape, plan.dtype)
    text = plan.batch * plan.prompts, config["max_text_seq_length"], config["text_embed_dim"]
    rotary = array((plan.video_tokens, config["attention_head_dim"] // 2))
    residual: Any = None
    if plan.step_cache:
        prompts, tiled = plan.batch * plan.prompts, is_tiled(plan.attention)
        shape = hidden_states_shape(prompts, plan.tokens, config, plan.parallelism, tiled)
        residual = jax.ShapeDtypeStruct(shape, plan.dtype, sharding=state_shardings(plan).residual)
    return StepArguments(
        abstract_parameters(config, plan.dtype, plan.parallelism),
        State(latents, array(plan.latent_shape), array((), jnp.int32), residual),
        Condition(array(text, plan.dtype), (rotary, rotary)),
        StepInputs(array((), jnp.int32), array((2, 3)), latents if plan.sampler.adds_noise else None, array(())),
    )


def residual_bytes(plan: Plan) -> int:
    """Return the bytes of a chip's share of the residual that the step cache keeps."""
    residual: Any = abstract_arguments(plan).state.residual
    return math.prod(residual.sharding.shard_shape(residual.shape)) * residual.dtype.itemsize


def time_embeddings(plan: Plan, timesteps: np.ndarray, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return the time embedding of each timestep, float32 [steps, time_embed_dim].

    Args:
        plan: see `Plan`.
        timesteps: [steps].
        read: `read(name)` returns a tensor of the checkpoint.
    """
    names = [f"time_embedding.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    parameters = {name: jnp.asarray(read(name)) for name in names}
    embed = functools.partial(time_embedding, parameters=parameters, config=plan.transformer, dtype=plan.dtype)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(jax.vmap(embed))(jnp.asarray(timesteps)).astype(jnp.float32))


# --- The loop ----------------------------------------------------------------------------------------------------


class Denoising:
    """A run of `plan`, which makes a batch of videos, before its loop.

    Args:
        plan: see `Plan`.
        parameters: see models/transformer.py.
        prompt_embeds, negative_prompt_embeds: [batch, text tokens, text width], torch.
        seeds: of the noise of each video, which is drawn as in `CogVideoXPipeline`, in the dtype of the embeddings.
        skipped: the steps that leave out the blocks.

    Attributes:
        done: how many steps are done.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Mapping[str, jax.Array],
        prompt_embeds: "torch.Tensor",
        negative_prompt_embeds: "torch.Tensor",
        seeds: Sequence[int],
        skipped: Collection[int] = (),
    ):
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        self.plan = plan
        self.parameters = parameters
        self.done = 0
        self._kinds = plan.kinds(skipped)
        self._resumed: State | None = None
        self._replicated = plan.parallelism.sharding()
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._noise = randn_tensor(plan.latent_shape, generator=self._generators, dtype=prompt_embeds.dtype)
        self._scheduler = AffineScheduler(make_scheduler(plan.scheduler), plan.num_inference_steps)
        if plan.guided:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        rotary = rotary_embedding(plan.transformer, plan.latent_shape)
        self.condition = Condition(self._to_device(prompt_embeds, plan.dtype), to_devices(rotary, self._replicated))

    def arguments(self) -> StepArguments:
        """Return the arguments of the first step."""
        inputs = self._inputs(0, self._copied_generators())
        return StepArguments(self.parameters, self._start(), self.condition, inputs)

    def warm_up(self, steps: int, programs: Mapping[StepKind, Callable]) -> None:
        """Run the first step `steps` times, each time on the result before; draws nothing from the run's generators.

        Then the first step of each other kind runs once, if any did.
        """
        others = sorted({self._kinds.index(kind) for kind in self._kinds} - {0})
        indices = [0] * steps + others * bool(steps)
        for _ in self._loop(programs, self._start(), indices, self._copied_generators()):
            pass

    def run(self, programs: Mapping[StepKind, Callable]) -> Iterator[State]:
        """Yield the state after each step that is not done, with a program for each kind of them.

        The next step donates the state: only the last one may be kept.
        """
        start = self._start() if self._resumed is None else self._resumed
        for state in self._loop(programs, start, range(self.done, self.plan.num_inference_steps), self._generators):
            self.done += 1
            yield state

    def saved(self, state: State) -> dict[str, np.ndarray]:
        """Return all that a run of the same plan goes on from after `state`, the last one that `run` has yielded."""
        is_needed = self.done < len(self._kinds) and self._kinds[self.done].short
        needed = state if is_needed else state._replace(residual=None)  # it is large
        arrays: dict[str, np.ndarray] = {
            name: np.asarray(jax.device_get(array)) for name, array in needed._asdict().items() if array is not None
        }
        generators = np.stack([state.numpy() for state in self._generators_before_inputs])
        return arrays | {"generators": generators, "done": np.asarray(self.done, np.int32)}

    def resume(self, saved: Mapping[str, np.ndarray]) -> None:
        """Go on from what `saved` has returned."""
        import torch

        self.done = int(saved["done"])
        for generator, state in zip(self._generators, saved["generators"], strict=True):
            generator.set_state(torch.from_numpy(state))
        start, shardings = self._start()._asdict(), state_shardings(self.plan)._asdict()
        arrays = {name: jax.device_put(saved[name], shardings[name]) for name in start if name in saved}
        self._resumed = State(**(start | arrays))

    def _loop(
        self,
        programs: Mapping[StepKind, Callable],
        state: State,
        indices: Sequence[int],
        generators: "Sequence[torch.Generator]",
    ) -> Iterator[State]:
        """Run the steps `indices` from `state`, and yield the state after each."""
        inputs = self._inputs(indices[0], generators) if indices else None
        for n in range(len(indices)):
            state = programs[self._kinds[indices[n]]](self.parameters, state, self.condition, inputs)
            self._generators_before_inputs = [generator.get_state() for generator in generators]
            if n + 1 < len(indices):
                inputs = self._inputs(indices[n + 1], generators)  # on the host, while the device works
            jax.block_until_ready(state)
            yield state

    def _start(self) -> State:
        """Return the initial noise and an empty estimate, in new buffers each time, because a step donates them."""
        empty = jax.tree.map(
            lambda array: jnp.zeros(array.shape, array.dtype, device=array.sharding),
            abstract_arguments(self.plan).state,
        )
        return empty._replace(latents=self._to_device(self._noise, self.plan.dtype))

    def _copied_generators(self) -> "list[torch.Generator]":
        """Return generators that draw what those of the run will draw."""
        return [generator.clone_state() for generator in self._generators]

    def _inputs(self, i: int, generators: "Sequence[torch.Generator]") -> StepInputs:
        """Return the inputs of step `i`; draws the noise of each video from its generator."""
        scheduler, plan = self._scheduler, self.plan
        noise = scheduler.noise(i, plan.latent_shape, self._noise.dtype, generators)
        scalars = (
            jnp.int32(scheduler.timesteps[i]),
            jnp.asarray(scheduler.coefficients[i]),
            jnp.float32(plan.guidance_at(int(scheduler.timesteps[i]))),
        )
        timestep, coefficients, guidance_scale = to_devices(scalars, self._replicated)
        noise_on_device = None if noise is None else self._to_device(noise, plan.dtype)
        return StepInputs(timestep, coefficients, noise_on_device, guidance_scale)

    def _to_device(self, tensor: "torch.Tensor", dtype: jax.typing.DTypeLike) -> jax.Array:
        """Copy a tensor to all devices as an array of `dtype`."""
        return to_devices(jnp.from_dlpack(tensor.contiguous()).astype(dtype).copy(), self._replicated)
