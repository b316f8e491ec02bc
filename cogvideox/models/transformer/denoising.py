"""The loop over the denoising steps."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox.models.shared.sharding import to_devices
from cogvideox.models.transformer.embeddings import rotary_embedding, sine_cosine_positions
from cogvideox.models.transformer.plan import DenoisingPlan, StepKind
from cogvideox.models.transformer.scheduler import AffineScheduler, make_scheduler
from cogvideox.models.transformer.step import (
    Condition,
    State,
    StepArguments,
    StepInputs,
    abstract_arguments,
    state_shardings,
)

if TYPE_CHECKING:
    import torch


ImageScaling = Literal["diffusers", "sat"]


class Posterior(NamedTuple):
    """What the VAE's encoder makes of the image or the video of each run of a batch: a normal distribution of latents.

    Attributes:
        mean, logvar: torch [batch, channels, frames, height, width], in latents.
    """

    mean: "torch.Tensor"
    logvar: "torch.Tensor"

    def sample(self, generators: "Sequence[torch.Generator]", dtype: "torch.dtype") -> "torch.Tensor":
        """Draw latents [batch, frames, channels, height, width] of `dtype`, each from its generator."""
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        noise = randn_tensor(tuple(self.mean.shape), generator=list(generators), dtype=self.mean.dtype)
        return (self.mean + torch.exp(0.5 * self.logvar) * noise).to(dtype).permute(0, 2, 1, 3, 4)


def image_latents_of(plan: DenoisingPlan, sample: "torch.Tensor", scaling: ImageScaling) -> "torch.Tensor":
    """Return the latents [batch, 1, channels, height, width] of each video's image in the shape of the video's latents.

    They are in the first frame, also if that is one of the surplus frames; the others are zeros.

    Source: `CogVideoXImageToVideoPipeline.prepare_latents`.
    """
    latents = sample.new_zeros(plan.latent_shape)
    latents[:, :1] = image_factor(plan.vae, scaling) * sample
    return latents


def video_latents_of(plan: DenoisingPlan, sample: "torch.Tensor") -> "torch.Tensor":
    """Scale the latents [batch, frames, channels, height, width] of given videos, and fill them up to whole patches.

    In the surplus frames in front, which diffusers' pipeline does not have (it refuses such a number of frames), is the
    first frame again: so the patch that it shares with them is one of a video that begins with a still.

    Source: `CogVideoXVideoToVideoPipeline.prepare_latents`.
    """
    frames = [max(i, 0) for i in range(-plan.surplus_frames, sample.shape[1])]
    return plan.vae["scaling_factor"] * sample[:, frames]


def image_factor(vae: Mapping, scaling: ImageScaling) -> float:
    """Return by what the latents of an image are multiplied.

    "diffusers" does what its pipeline does, by the VAE's config; "sat" leaves them as they are, as the authors' own
    code (SwissArmyTransformer) does.
    """
    if scaling == "sat":
        return 1.0
    return 1 / vae["scaling_factor"] if vae["invert_scale_latents"] else vae["scaling_factor"]


class Denoising:
    """A run of `plan`, which makes a batch of videos, before its loop.

    Args:
        plan: see `DenoisingPlan`.
        parameters: see `load_parameters`.
        prompt_embeds, negative_prompt_embeds: [batch, text tokens, text width], torch.
        seeds: of the noise of each video, which is drawn as in `CogVideoXPipeline`, in the dtype of the embeddings.
        skipped: the steps that leave out the blocks.
        image: of each video; None for a model that takes none.
        image_scaling: see `image_factor`.
        video: that each video begins with, for a plan with a strength; None to begin with noise alone.

    Attributes:
        done: how many steps are done.
    """

    def __init__(
        self,
        plan: DenoisingPlan,
        parameters: Mapping[str, jax.Array],
        prompt_embeds: "torch.Tensor",
        negative_prompt_embeds: "torch.Tensor",
        seeds: Sequence[int],
        skipped: Collection[int] = (),
        image: Posterior | None = None,
        image_scaling: ImageScaling = "diffusers",
        video: Posterior | None = None,
    ):
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        self.plan = plan
        self.parameters = parameters
        self.done = 0
        self._kinds = plan.kinds(skipped)
        self._resumed: State | None = None
        self._replicated = plan.parallelism.sharding()
        # Of a step that is dense, and of one that need not be.
        self._patterns = [to_devices(plan.patterns(i), self._replicated) for i in (0, plan.steps - 1)]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._scheduler = AffineScheduler(make_scheduler(plan.scheduler), plan.num_inference_steps, plan.dropped_steps)
        # What is given is drawn before the noise, as in diffusers' pipelines.
        dtype = prompt_embeds.dtype
        image_latents = image and image_latents_of(plan, image.sample(self._generators, dtype), image_scaling)
        video_latents = video and video_latents_of(plan, video.sample(self._generators, dtype))
        noise = randn_tensor(plan.latent_shape, generator=self._generators, dtype=dtype)
        self._initial = noise if video_latents is None else self._scheduler.noisy(video_latents, noise)
        if plan.guided:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        positions = None
        if plan.positions == "computed":
            positions = to_devices(sine_cosine_positions(plan.transformer, plan.latent_shape), self._replicated)
        self.condition = Condition(
            self._to_device(prompt_embeds, plan.dtype),
            to_devices(rotary_embedding(plan.transformer, plan.latent_shape), self._replicated),
            positions,
            None if image_latents is None else self._to_device(image_latents, plan.dtype),
        )

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
        for state in self._loop(programs, start, range(self.done, self.plan.steps), self._generators):
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
        """Return the initial latents and an empty estimate, in new buffers each time, because a step donates them."""
        empty = jax.tree.map(
            lambda array: jnp.zeros(array.shape, array.dtype, device=array.sharding),
            abstract_arguments(self.plan).state,
        )
        return empty._replace(latents=self._to_device(self._initial, self.plan.dtype))

    def _copied_generators(self) -> "list[torch.Generator]":
        """Return generators that draw what those of the run will draw."""
        return [generator.clone_state() for generator in self._generators]

    def _inputs(self, i: int, generators: "Sequence[torch.Generator]") -> StepInputs:
        """Return the inputs of step `i`; draws the noise of each video from its generator."""
        scheduler, plan = self._scheduler, self.plan
        noise = scheduler.noise(i, plan.latent_shape, self._initial.dtype, generators)
        scalars = (
            jnp.int32(scheduler.timesteps[i]),
            jnp.asarray(scheduler.coefficients[i]),
            jnp.float32(plan.guidance_at(int(scheduler.timesteps[i]))),
        )
        timestep, coefficients, guidance_scale = to_devices(scalars, self._replicated)
        noise_on_device = None if noise is None else self._to_device(noise, plan.dtype)
        patterns = self._patterns[0 if i < plan.dense_steps else 1]
        return StepInputs(timestep, coefficients, noise_on_device, guidance_scale, patterns)

    def _to_device(self, tensor: "torch.Tensor", dtype: jax.typing.DTypeLike) -> jax.Array:
        """Copy a tensor to all devices as an array of `dtype`."""
        return to_devices(jnp.from_dlpack(tensor.contiguous()).astype(dtype).copy(), self._replicated)
