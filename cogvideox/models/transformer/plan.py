"""The plan of a denoising run: everything that decides it, except weights, prompt and seed."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cogvideox.errors import PlanError
from cogvideox.features import Features, features_of
from cogvideox.models.shared.layouts import LAYOUTS
from cogvideox.models.shared.plan import Plan
from cogvideox.models.shared.sharding import MESH_AXES, Parallelism, possible_parallelisms
from cogvideox.models.shared.sizes import check_frames, check_sides
from cogvideox.models.transformer.attention import Attention, is_tiled
from cogvideox.models.transformer.embeddings import token_grid
from cogvideox.models.transformer.parameters import sample_grid
from cogvideox.models.transformer.scheduler import SAMPLERS, Sampler
from cogvideox.models.transformer.seconds import step_seconds
from cogvideox.models.transformer.sparse.geometry import geometry_of
from cogvideox.models.transformer.sparse.heads import HeadPatterns, SparseAttention
from cogvideox.models.transformer.sparse.layout import AlignedLayout
from cogvideox.models.transformer.token_order import TokenOrder, token_order
from cogvideox.models.transformer.transformer import hidden_states_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisingPlan(Plan):
    """Everything that decides a denoising run, except weights, prompt and seed.

    Attributes:
        vae, height, width, frames, batch, dtype: see `Plan`.
        transformer, scheduler: the model's other configs, checked.
        num_inference_steps: denoising steps of the scheduler; `steps` is how many of them are run.
        guidance_scale: of classifier-free guidance; there is no guidance if it is at most 1.
        use_dynamic_cfg: whether it changes from step to step; see `guidance_at`.
        parallelism: the mesh of devices, how they share attention, and the layout of the parameters.
        attention: the implementation, with its options.
        step_cache: whether full steps keep what the blocks add, for steps that leave them out.
        guidance_interval: the first and the last step with guidance, counted from 0; None for all steps.
        strength: the share of the scheduler's steps that a given video goes through, above 0 and at most 1; None to
            begin with noise alone.
        sparse: the patterns of the heads, for block-sparse attention; None for dense attention.
    """

    transformer: Mapping
    scheduler: Mapping
    num_inference_steps: int
    guidance_scale: float
    use_dynamic_cfg: bool
    parallelism: Parallelism
    attention: Attention
    step_cache: bool
    guidance_interval: tuple[int, int] | None
    strength: float | None = None
    sparse: SparseAttention | None = None

    @property
    def dropped_steps(self) -> int:
        """Steps of the scheduler that come before the first one of the run: its latents begin with a given video.

        Source: `CogVideoXVideoToVideoPipeline.get_timesteps`.
        """
        return 0 if self.strength is None else self.num_inference_steps - int(self.num_inference_steps * self.strength)

    @property
    def steps(self) -> int:
        """Steps of the run, which are counted from 0 wherever steps are named."""
        return self.num_inference_steps - self.dropped_steps

    @property
    def guided(self) -> bool:
        """Whether steps predict for the negative prompt too: all, or those of `guidance_interval`."""
        return self.guidance_scale > 1.0

    def kinds(self, skipped: Collection[int] = ()) -> "list[StepKind]":
        """Return the kind of each step, of which `skipped` leave out the blocks."""
        first, last = self.guidance_interval or (0, self.steps)
        return [StepKind(short=i in skipped, guided=self.guided and first <= i <= last) for i in range(self.steps)]

    @property
    def dense_steps(self) -> int:
        """Steps of the run, from the first one on, in which all heads attend everything."""
        if self.sparse is None:
            return self.steps
        return max(math.ceil(self.sparse.dense_steps * self.num_inference_steps) - self.dropped_steps, 0)

    def patterns(self, step: int) -> HeadPatterns | None:
        """Return the patterns of the heads in a step, numpy arrays, in the order in which chips have them.

        Returns None with dense attention.
        """
        if self.sparse is None or not isinstance(self.order, AlignedLayout):
            return None
        heads, parts = self.transformer["num_attention_heads"], self.parallelism
        placed = self.sparse.placed(self.order, parts.tp * parts.head_parts, parts.head_groups(heads))
        return placed.dense() if step < self.dense_steps else placed

    @property
    def head_order(self) -> np.ndarray | None:
        """Which head of the model the parameters have at each place, int32 [layers, heads]; None for its order."""
        placed = self.patterns(0)
        if placed is None or (placed.order == np.arange(placed.order.shape[1])).all():
            return None
        return placed.order

    def attended_heads(self, kinds: "Collection[StepKind]") -> int:
        """Return of how many heads `State.online_heads` tells after steps of these kinds; 0 if it tells nothing."""
        if not self.attention.has_online_kernel:
            return 0
        samples = sum(self.batch * (2 if kind.guided else 1) for kind in kinds if not kind.short)
        heads = self.transformer["num_attention_heads"] * self.parallelism.query_parts
        return samples * self.transformer["num_layers"] * heads

    def guidance_at(self, timestep: int) -> float:
        """Return the guidance scale of a step; source: `use_dynamic_cfg` of `CogVideoXPipeline.__call__`."""
        if not self.use_dynamic_cfg:
            return self.guidance_scale
        steps = self.steps  # without the dropped ones, as in CogVideoXVideoToVideoPipeline
        return 1 + self.guidance_scale * (1 - math.cos(math.pi * ((steps - timestep) / steps) ** 5.0)) / 2

    @property
    def always_full(self) -> set[int]:
        """The steps that must not leave out the blocks: the first, the last, and the first one with guidance."""
        first_guided, _ = self.guidance_interval or (0, 0)
        return {0, self.steps - 1, first_guided}

    @property
    def prompts(self) -> int:
        """Prompts for each video: with guidance the negative and the positive one."""
        return 2 if self.guided else 1

    @property
    def sampler(self) -> Sampler:
        """How the scheduler is called, and whether it adds noise."""
        return SAMPLERS[self.scheduler["_class_name"]]

    @property
    def mesh(self) -> Mesh:
        """The mesh of devices, with the axes dp, sp and tp."""
        return self.parallelism.mesh

    @property
    def features(self) -> Features:
        """What the transformer has, beside its sizes."""
        return features_of(self.transformer)

    @property
    def positions(self) -> Literal["stored", "computed"] | None:
        """Where what is added to the embedded tokens comes from; learned positions are stored for one size alone."""
        if not self.features.positions:
            return None
        is_stored = self.features.positions == "learned" and self.token_grid == sample_grid(self.transformer)
        return "stored" if is_stored else "computed"

    @property
    def surplus_frames(self) -> int:
        """Latent frames that are put in front to fill the temporal patch, and cut off again at the end."""
        return -self.latent_size[0] % self.features.frames_per_patch

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """[batch, frames, channels, height, width] of the latents, surplus frames included."""
        frames, height, width = self.latent_size
        return self.batch, frames + self.surplus_frames, self.transformer["out_channels"], height, width

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """Patches of the video along its frames, its height and its width, each of which is a token."""
        return token_grid(self.transformer, self.latent_shape)

    @property
    def video_tokens(self) -> int:
        """Tokens of one sample that stand for patches of the video."""
        return math.prod(self.token_grid)

    @property
    def tokens(self) -> int:
        """Tokens of one sample, text and video together."""
        return self.transformer["max_text_seq_length"] + self.video_tokens

    @property
    def order(self) -> TokenOrder:
        """The order of a sample's tokens in the hidden states."""
        return token_order(self.token_grid, self.transformer["max_text_seq_length"], bool(self.attention.kinds))

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of a full step, guided if the plan is, up to a factor."""
        samples, parallelism = self.batch * self.prompts, self.parallelism
        return step_seconds(samples, self.order, self.transformer, parallelism, self.attention, self.dtype)

    def with_dtype(self, dtype: jax.typing.DTypeLike) -> Self:
        """See `Plan.with_dtype`; the attention kernel must be able to take arrays of the dtype."""
        self.attention.check(self.transformer["attention_head_dim"], dtype)
        plan = super().with_dtype(dtype)
        check_sparse(plan)
        return plan

    @property
    def program_options(self) -> dict:
        """Everything that the compiled step depends on, except the configs and the shapes of its arguments."""
        always = {
            "mesh": dict(self.mesh.shape),
            "layout": self.parallelism.layout,
            "attention": self.attention.name,
            "blocks": self.attention.block_sizes or "default",
            "k_smooth": self.attention.k_smooth,
        }
        parts = self.parallelism.query_parts
        some = {
            "step_cache": self.step_cache,
            "query_parts": parts if parts > 1 else None,
            "patterns": ",".join(self.attention.kinds),
        }
        return always | {name: value for name, value in some.items() if value}


class StepKind(NamedTuple):
    """What kind of step a program computes.

    Attributes:
        short: whether it leaves out the blocks, and adds the residual of the last full step instead.
        guided: whether it predicts for the negative prompts too, or for the positive ones alone.
    """

    short: bool
    guided: bool


def make_denoising_plan(
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
    strength: float | None = None,
    sparse: SparseAttention | None = None,
) -> DenoisingPlan:
    """Make the plan that the options ask for, on `devices` of `platform` ("tpu", "cpu" or "gpu"); see `DenoisingPlan`.

    Args:
        attention, block_sizes, use_k_smooth: see `Attention.choose`.
        use_dp, sp_num, mesh_order, layout: see `possible_parallelisms`, of which the fastest by prediction is taken.
        step_cache, guidance_interval, strength, sparse: see `DenoisingPlan`.

    Raises:
        PlanError: the model, the devices and the options do not fit together.
    """
    # dp splits what all steps have: those without guidance have the positive prompts alone.
    sequences = batch * (2 if guidance_scale > 1.0 and guidance_interval is None else 1)
    heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    possible = possible_parallelisms(devices, heads, sequences, use_dp, sp_num, mesh_order, layout)
    chosen = Attention.choose(attention, platform, block_sizes, use_k_smooth, head_dim, dtype)
    plan = DenoisingPlan(
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
        parallelism=possible[0],
        attention=dataclasses.replace(chosen, kinds=sparse.kinds) if sparse else chosen,
        step_cache=step_cache,
        guidance_interval=guidance_interval,
        strength=strength,
        sparse=sparse,
    )
    check_plan(plan)
    plans = [dataclasses.replace(plan, parallelism=parallelism) for parallelism in possible]
    return min(plans, key=lambda plan: plan.step_seconds)


def check_plan(plan: DenoisingPlan) -> None:
    """Raise PlanError, naming values that work, if the scheduler, the sizes or the number of steps cannot be run."""
    check_sides(plan.vae, plan.transformer, plan.height, plan.width)
    check_frames(plan.vae, plan.frames)
    check_layout(plan)
    if plan.scheduler["_class_name"] not in SAMPLERS:
        name = plan.scheduler["_class_name"]
        raise PlanError(None, f"scheduler {name} is not supported, only {' and '.join(SAMPLERS)}")
    maximum = plan.scheduler["num_train_timesteps"]
    if plan.num_inference_steps > maximum:
        raise PlanError("num_inference_steps", f"can be at most {maximum} with this scheduler")
    if plan.strength is not None and plan.features.image:
        raise PlanError(
            None, "the model makes videos of an image; a given video (--video of stage 1) is for the others"
        )
    if plan.steps == 0:
        strength = plan.strength or 1.0
        least = math.ceil(1 / strength)
        message = f"{plan.num_inference_steps} leaves no step at strength {strength:g}; at least {least} does"
        raise PlanError("num_inference_steps", message)
    check_guidance(plan)
    check_sparse(plan)


def check_layout(plan: DenoisingPlan) -> None:
    """Raise PlanError if the layout does not let the chips have equal shares of the weights."""
    layout, mesh = plan.parallelism.layout, plan.mesh
    chips = math.prod(mesh.shape[axis] for axis in LAYOUTS[layout]["heads"])
    if (width := plan.transformer["num_attention_heads"] * plan.transformer["attention_head_dim"]) % chips:
        raise PlanError("layout", f"{layout} does not work: {chips} chips cannot share weights of width {width} evenly")


def check_sparse(plan: DenoisingPlan) -> None:
    """Raise PlanError if the kernel cannot take the patterns of the heads at this size."""
    if plan.sparse is None or not plan.attention.is_kernel:
        return
    order, head_dim = plan.order, plan.transformer["attention_head_dim"]
    assert isinstance(order, AlignedLayout)
    if not is_tiled(plan.attention):
        raise PlanError("sparse_attention", f"does not work with {plan.attention.name} on this TPU, only with xla")
    try:
        for kind in plan.attention.kinds:
            geometry_of(kind, order, plan.dtype.itemsize, head_dim).key_buffers(head_dim, plan.dtype.itemsize)
    except ValueError as error:
        raise PlanError("sparse_attention", f"does not fit: {error}") from error
    shape = hidden_states_shape(1, order, plan.transformer, plan.parallelism, plan.attention)
    if order.text_tokens > shape[1] // plan.parallelism.query_parts:
        raise PlanError(
            "sparse_attention", "needs a larger video: its chips would have fewer queries than the text has"
        )


def check_guidance(plan: DenoisingPlan) -> None:
    """Raise PlanError if the settings of guidance contradict each other, or the interval is none of the steps."""
    scale, there_is_none = "guidance_scale", f"and with guidance_scale {plan.guidance_scale:g} there is none"
    if plan.use_dynamic_cfg and not plan.guided:
        raise PlanError("use_dynamic_cfg", f"changes the guidance, {there_is_none}", scale)
    if plan.guidance_interval and not plan.guided:
        message = f"is an interval with guidance, {there_is_none}; use one of the two"
        raise PlanError("guidance_interval", message, scale)
    first, last = plan.guidance_interval or (0, 0)
    if not first <= last < plan.steps:
        raise PlanError("guidance_interval", f"{first},{last} is no interval of the steps 0 to {plan.steps - 1}")
