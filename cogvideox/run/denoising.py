"""Run stage 2: weights and programs of the denoising steps, and the steps of one group of videos after the other."""

import argparse
import contextlib
import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cogvideox.cli.report import Report
from cogvideox.defaults import DRAFT
from cogvideox.files import checkpoint, numbers, videos
from cogvideox.files.lora import Lora
from cogvideox.files.names import CONFIG, IMAGE_TENSORS, PREVIEW, VIDEO_TENSORS
from cogvideox.run import sparse_maps, warm
from cogvideox.run.hosts import Hosts
from cogvideox.run.jobs import Group, Task
from cogvideox.run.plans import attention_wanted, dump_recorder, dump_wanted, plan_errors, skipped_steps
from cogvideox.signals import Interruption

if TYPE_CHECKING:
    import jax

    from cogvideox.models.transformer.denoising import Denoising
    from cogvideox.models.transformer.plan import DenoisingPlan, StepKind
    from cogvideox.models.transformer.step import State
    from cogvideox.run.profiling import Profile
    from cogvideox.run.recorder import NoRecorder, Recorder


def weight_reader(
    model_id: str, plan: "DenoisingPlan", loras: Sequence[Lora], variant: str | None, say: Callable[[str], None]
) -> checkpoint.Weights:
    """Return the weights of the transformer, before LoRAs; `say` is told of a variant that nobody has asked for.

    Raises:
        UserError: a file is missing or damaged, or a LoRA does not fit the transformer.
    """
    from cogvideox.models.transformer.parameters import stored_shapes

    shapes = stored_shapes(plan.transformer)
    for one in loras:
        one.check(shapes)
    return checkpoint.tensor_reader(model_id, "transformer", shapes, variant=variant, say=say)


def import_modules() -> None:
    """Import what loading and denoising need, so that no other part of the run waits for it."""
    for name in (
        "cogvideox.models.transformer.denoising",
        "cogvideox.run.recorder",
        "diffusers.models.embeddings",
        "diffusers.schedulers.scheduling_ddim_cogvideox",
        "diffusers.schedulers.scheduling_dpm_cogvideox",
        "diffusers.utils.torch_utils",
        "safetensors.torch",
    ):
        importlib.import_module(name)


def load_weights(
    read: Callable[[str], np.ndarray],
    plan: "DenoisingPlan",
    loras: Sequence[Lora],
    made_from: Mapping[str, str],
    report: Report,
) -> "Mapping[str, jax.Array]":
    """Load the weights onto the devices, with the LoRAs added.

    What they are `made_from` says whether those of a run before in this process are the same; see `warm.kept`.
    """
    from cogvideox.models.transformer.parameters import load_parameters

    changes, order = [one.add for one in loras], plan.head_order
    parameters = warm.kept(
        "transformer",
        (made_from, plan.transformer, plan.parallelism, plan.dtype, None if order is None else order.tolist()),
        lambda: load_parameters(read, plan.transformer, plan.parallelism, plan.dtype, changes, report.add_part, order),
    )
    report.say(f"loaded transformer: {sum(p.size for p in parameters.values()):,} parameters, {plan.dtype}")
    return parameters


class Steps(NamedTuple):
    """The steps of a run, and the programs that they are.

    Attributes:
        plan: see `DenoisingPlan`.
        skipped: the steps that leave out the blocks.
        kinds: the kind of each step.
        traced: the program of each kind.
    """

    plan: "DenoisingPlan"
    skipped: list[int]
    kinds: "list[StepKind]"
    traced: "Mapping[StepKind, jax.stages.Traced]"

    @property
    def programs(self) -> "list[jax.stages.Traced]":
        """The program of each step."""
        return [self.traced[kind] for kind in self.kinds]


def trace_steps(
    arguments: argparse.Namespace, plan: "DenoisingPlan", model_id: str, read: Callable[[str], np.ndarray]
) -> Steps:
    """Trace the programs of a run with the weights that `read` reads.

    Raises:
        UserError: the options do not fit the weights, or each other.
    """
    from cogvideox.models.transformer.step import abstract_arguments, make_step

    wanted = dump_wanted(arguments, plan)
    with plan_errors():
        skipped = skipped_steps(arguments, plan, model_id, read)
        kinds = plan.kinds(skipped)
        programs = [*dict.fromkeys(kinds)]
        traced = warm.kept(
            "steps",
            (plan, wanted, programs),
            lambda: {kind: make_step(plan, wanted, kind).trace(*abstract_arguments(plan)) for kind in programs},
        )
    return Steps(plan, skipped, kinds, traced)


def recorder(arguments: argparse.Namespace, task: Task, steps: Steps) -> "Recorder | NoRecorder":
    """Make what writes the files of --dump, which takes a single video."""
    made = task.made(arguments) | {"tokens": json.dumps(tokens_of(arguments, steps.plan))}
    return dump_recorder(arguments, "stage2", "step", made, steps.plan.parallelism.mesh, steps.programs)


def tokens_of(arguments: argparse.Namespace, plan: "DenoisingPlan") -> dict[str, object]:
    """Return what a dump says of the tokens: how many are text, the grid of the others, and of which it has weights."""
    attention = {} if arguments.dump is None else attention_wanted(arguments, plan)
    return {"text": plan.tokens - plan.video_tokens, "video": plan.token_grid} | attention


@dataclasses.dataclass(frozen=True)
class DenoisingRun:
    """A run of stage 2 whose weights are on the devices."""

    steps: Steps
    parameters: "Mapping[str, jax.Array]"
    arguments: argparse.Namespace
    hosts: Hosts
    report: Report

    def warm_up(self, first: "Denoising", compiled: "Sequence[Callable]", recorder: "Recorder | NoRecorder") -> None:
        """Run steps before the first one, untimed, as --warmup_steps says."""
        number = self.arguments.warmup_steps
        if number == 0:
            self.report.say("no warm-up: the seconds of the first step hold what the first run of a program costs")
        with self.report.phase(f"warm-up ({number} steps)"):
            programs = dict(zip(self.steps.traced, map(recorder.ignoring, compiled), strict=True))
            first.warm_up(number, programs)

    def make_all(
        self,
        groups: Sequence[Group],
        first: "Denoising",
        compiled: "Sequence[Callable]",
        recorder: "Recorder | NoRecorder",
        profile: "Profile",
    ) -> np.ndarray:
        """Run all groups, of which `first` is the first one's run, and return the latents of the last one."""
        profiled = profile.traced(compiled, self.steps.plan.steps - first.done)
        programs = dict(zip(self.steps.traced, map(recorder.recording, profiled), strict=True))
        latents, seconds, steps, online = self.make(groups[0], first, programs)
        for n, group in enumerate(groups[1:], 2):
            label = f", group {n} of {len(groups)}"
            latents, more_seconds, more_steps, more_online = self.make(group, self.start(group), programs, label)
            seconds, steps, online = seconds + more_seconds, steps + more_steps, online + more_online
        self.report.add("per step", f"{seconds / steps:.3f} s")
        if heads := len(groups) * self.steps.plan.attended_heads(self.steps.kinds):
            self.report.add("online kernel", online_summary(online[0], online[1], heads))
        if len(groups) > 1:
            self.report.add("run of all groups", f"{seconds:.2f} s")
        return latents

    def start(self, group: Group) -> "Denoising":
        """Return the run of a group before its first step, or before the one after those that are done."""
        import torch
        from safetensors.torch import load_file

        from cogvideox.models.transformer.denoising import Denoising, Posterior

        plan = self.steps.plan
        # The last group may have fewer videos; then its last one is made several times, and written once.
        filled = [task.video for task in group.tasks + group.tasks[-1:] * (plan.batch - len(group.tasks))]
        embeddings = [load_file(video.embeddings) for video in filled]
        positive, negative = (
            torch.cat([of_prompt[name] for of_prompt in embeddings])
            for name in ("prompt_embeds", "negative_prompt_embeds")
        )
        seeds = [video.config["seed"] for video in filled]

        def posterior(names: Sequence[str]) -> Posterior:
            return Posterior(*(torch.cat([of_prompt[name] for of_prompt in embeddings]) for name in names))

        denoising = Denoising(
            plan,
            self.parameters,
            positive,
            negative,
            seeds,
            self.steps.skipped,
            image=posterior(IMAGE_TENSORS) if plan.features.image else None,
            image_scaling=self.arguments.image_latent_scale,
            video=posterior(VIDEO_TENSORS) if plan.strength is not None else None,
        )
        if group.saved:
            denoising.resume(group.saved)
            self.report.say(f"going on after step {denoising.done} of {plan.steps}, from {group.state_file.path}")
        return denoising

    def make(
        self, group: Group, denoising: "Denoising", programs: "Mapping[StepKind, Callable]", label: str = ""
    ) -> tuple[np.ndarray, float, int, np.ndarray]:
        """Run the steps of a group and write its latents.

        Returns:
            The latents, [B, C, T, H, W], the seconds and the number of the steps, and `State.online_heads`.
        """
        done, report = denoising.done, self.report
        with Interruption.held_back(), contextlib.ExitStack() as claims:
            for task in group.tasks:
                claims.enter_context(self.hosts.claimed(task.video.folder, "stage2"))
            with report.phase(f"run{label}", in_table=not label) as phase:
                state = self.run_steps(group, denoising, programs)
            self.warn_unless_finite(state)
            with report.phase(f"save{label}", in_table=not label):
                latents = self.save(group, state)
        for task in group.tasks:
            report.say(f"wrote {task.video.latents} and {CONFIG}")
        return latents[: len(group.tasks)], phase.seconds, self.steps.plan.steps - done, np.asarray(state.online_heads)

    def run_steps(self, group: Group, denoising: "Denoising", programs: "Mapping[StepKind, Callable]") -> "State":
        """Run the steps that are not done; keep the state, and draw previews, as the options say."""
        steps, state_file, every = self.steps.plan.steps, group.state_file, self.arguments.preview_every
        with self.report.progress("denoising", "step", steps, denoising.done) as bar:
            for state in denoising.run(programs):
                bar.update()
                is_interrupted = Interruption.number is not None
                if every and bar.n % every == 0:
                    with self.report.aside("previews"):
                        self.draw_previews(group, state, bar.n)
                if bar.n < steps and state_file.is_due(bar.n, now=is_interrupted):
                    with self.report.aside("keeping the state"):
                        state_file.keep(denoising.saved(state), now=is_interrupted)
                if bar.n < steps:
                    Interruption.check(state_file.interruption_message(bar.n, steps))
        return state

    def warn_unless_finite(self, state: "State") -> None:
        """Warn if the latents were not finite after some step."""
        finite, steps = int(state.finite_steps), self.steps.plan.steps
        if finite < steps:
            self.report.warn(
                f"the latents are NaN or infinite from step {finite + 1} of {steps} on; stage 3 refuses them without "
                "--allow_nan. Weights, --guidance_scale or the dtype may be the cause; --dump_stats says where it "
                "begins"
            )

    def draw_previews(self, group: Group, state: "State", n: int) -> None:
        """Draw the noise-free latents that a step, the n-th, predicts for each video."""
        from cogvideox.files import latent_pictures

        plan = self.steps.plan
        predicted = np.asarray(state.pred_original_sample[:, plan.surplus_frames :]).swapaxes(1, 2)
        for task, latents in zip(group.tasks, predicted, strict=False):  # a group may be filled up
            title = f"step {n} of {plan.steps}, the video that it predicts: {task.config['prompt']}"
            if self.hosts.is_first:
                mapping = latent_pictures.fitted_map(task.config["model_id"])
                latent_pictures.preview(latents, task.video.folder / PREVIEW, mapping, title)

    def save(self, group: Group, state: "State") -> np.ndarray:
        """Write the latents of a group, without surplus frames, and return them, [B, C, T, H, W]."""
        import jax

        latents = np.asarray(jax.numpy.swapaxes(state.latents[:, self.steps.plan.surplus_frames :], 1, 2))
        if self.hosts.is_first:
            for i, task in enumerate(group.tasks):
                task.save(latents[i : i + 1], self.arguments)
            output_dir = self.arguments.output_dir or self.arguments.input_dir
            if self.arguments.only is None:  # the others of the folder may be under way elsewhere
                videos.record(output_dir, [task.video.entry("denoised") for task in group.tasks])
            group.state_file.remove()
        return latents


def online_summary(online: float, shares: float, heads: int) -> str:
    """Say how many of all prompts', blocks' and steps' heads took attention's slower kernel, and for how much of it."""
    if not online:
        return f"none of {heads:,} heads of all blocks and steps"
    return f"{online:,.0f} of {heads:,} heads of all blocks and steps, for {shares / heads:.2%} of all queries"


# --- What is said before the run ---------------------------------------------------------------------------------


def report_plan(
    steps: Steps,
    loras: Sequence[Lora],
    sparse_map: Path | None,
    arguments: argparse.Namespace,
    hosts: Hosts,
    report: Report,
) -> None:
    """Report the devices, the mesh, attention, guidance and scheduler of the plan, and which of them are defaults."""
    plan = steps.plan
    report.plan(plan, hosts.own(plan.devices))
    devices = plan.parallelism.mesh.devices
    report.say(f"devices: {devices.size} x {devices.flat[0].device_kind}")
    if devices.size > 1:
        mesh = dict(plan.parallelism.mesh.shape)
        reason = reason_of_mesh(plan, arguments)
        report.say(f"mesh: {mesh}, {reason}; {plan.parallelism.layout} layout of the parameters")
    by = "chosen" if arguments.attention else f"the default on a {plan.attention.platform}"
    blocks = plan.attention.block_sizes or "the kernel's own choice"
    report.say(f"attention: {plan.attention.name}, {by}" + (f"; blocks: {blocks}" if plan.attention.is_kernel else ""))
    if sparse_map:
        sparse_maps.report_map(plan, sparse_map, report)
    if plan.guided:
        kind = ", dynamic" if plan.use_dynamic_cfg else ""
        only = " in steps {} to {} alone".format(*plan.guidance_interval) if plan.guidance_interval else ""
        report.say(f"guidance scale {plan.guidance_scale:g}{kind}{only}: negative and positive prompt in one batch")
    else:
        dp = ", dp is 1" if arguments.use_dp and devices.size > 1 else ""
        report.say(f"guidance scale {plan.guidance_scale:g}: no guidance, the positive prompt alone{dp}")
    scheduler, spacing = (plan.scheduler.get(name) for name in ("_class_name", "timestep_spacing"))
    report.say(f"scheduler: {scheduler}, {spacing} timesteps, {plan.num_inference_steps} steps")
    if plan.strength is not None:
        report.say(
            f"strength {plan.strength:g}: the first {plan.dropped_steps} steps are dropped, and the others begin with "
            "the given video, noisy; steps are counted from the first that is run"
        )
    if all(getattr(arguments, name) == value for name, value in DRAFT.items()):
        report.say("these are the settings of a draft; --preset authors sets those of the model's authors")
    for one in loras:
        report.say(one.summary)
        if one.changes_nothing:
            report.warn(f"{one.files[0]} changes nothing: all products of its matrices are zero")
    if plan.step_cache:
        report_step_cache(steps, report)


def reason_of_mesh(plan: "DenoisingPlan", arguments: argparse.Namespace) -> str:
    """Say why the mesh is as it is, and how sp shares attention where its chips do not divide the heads."""
    parallelism = plan.parallelism
    if arguments.sp_num:
        reason = "as --sp_num says"
    elif parallelism.query_parts == 1:
        reason = "sp has all chips that dp leaves, which moves the fewest bytes"
    else:
        reason = "the fastest by prediction"
    if parallelism.query_parts == 1:
        return reason
    heads, group = plan.transformer["num_attention_heads"] // parallelism.tp, parallelism.head_parts
    how = f"groups of {group} exchange heads, and gather" if group > 1 else "they gather"
    return f"{reason}; heads: {heads} for {parallelism.sp} chips along sp, so {how} keys and values"


def report_step_cache(steps: Steps, report: Report) -> None:
    """Report which steps skip the blocks, and what the residual that they take over needs of a chip."""
    from cogvideox.models.transformer.step import residual_bytes

    skipped, number, size = steps.skipped, steps.plan.steps, residual_bytes(steps.plan) / 2**30
    which = f": {numbers.as_text(skipped)}" if skipped else ""
    report.say(
        f"step cache: {len(skipped)} of {number} steps skip the blocks{which}; it takes {size:.2f} GiB of a chip"
    )
    factor = number / (number - len(skipped))
    report.add("step cache", f"{len(skipped)} of {number} steps skipped, {factor:.2f} x fewer blocks to run")
