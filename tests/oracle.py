"""Diffusers' pipeline in torch as the truth for the latents of stage 2, also where steps skip blocks or guidance."""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
from safetensors.torch import load_file

from tests.helpers import SIZE


class SkippableBlocks(torch.nn.Module):
    """All blocks of a transformer in torch; in some steps they add what they added the last time.

    From step `dense_steps` on the scores of each block are masked, if there are masks, bool [heads, tokens, tokens].
    """

    def __init__(
        self, blocks: torch.nn.ModuleList, skipped: Collection[int], masks: Sequence[np.ndarray] = (), dense_steps=0
    ):
        super().__init__()
        self.blocks, self.skipped, self.step = blocks, skipped, -1
        self.masks, self.dense_steps = masks, dense_steps

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *others: Any, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        """Run the blocks, or add what they added the last time."""
        self.step += 1
        before = hidden_states, encoder_hidden_states
        if self.step not in self.skipped:
            after = before
            for number, block in enumerate(self.blocks):
                with self.masked(number):
                    after = block(*after, *others, **options)
            self.residuals = [new - old for new, old in zip(after, before, strict=True)]
        return tuple(old + residual for old, residual in zip(before, self.residuals, strict=True))

    @contextlib.contextmanager
    def masked(self, block: int) -> Iterator[None]:
        """Mask the scores of a block, if this step has masks."""
        if not self.masks or self.step < self.dense_steps:
            yield
            return
        attend, mask = torch.nn.functional.scaled_dot_product_attention, torch.from_numpy(self.masks[block])

        def masked(*arguments: torch.Tensor, **options: Any) -> torch.Tensor:
            return attend(*arguments, **(options | {"attn_mask": mask[None]}))

        with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", masked):
            yield


class Pipeline(CogVideoXPipeline):
    """The pipeline with a guidance scale of 1, which leaves the positive prompt's prediction, outside `interval`."""

    interval: tuple[int, int] | None = None
    step = -1

    @property
    def guidance_scale(self) -> float:
        """The scale in this step."""
        if self.interval is None:
            return self._guidance_scale
        first, last = self.interval
        return self._guidance_scale if first <= self.step <= last else 1.0

    def count(self, *_: Any) -> None:
        """Count a step; a hook before the transformer runs."""
        self.step += 1


def latents(
    model: Path,
    embeddings: Path,
    steps: int,
    *,
    seed: int,
    guidance_scale: float = 6.0,
    dpm: bool = False,
    use_dynamic_cfg: bool = False,
    interval: tuple[int, int] | None = None,
    skipped: Collection[int] = (),
    masks: Sequence[np.ndarray] = (),
    dense_steps: int = 0,
) -> torch.Tensor:
    """Return the latents of a video of `SIZE`, float32 [1, C, T, H, W], surplus frames included.

    With `dpm` the scheduler is that of the model's authors; guidance is in the steps of `interval`, and the blocks are
    left out in those that are `skipped`. For `masks` and `dense_steps` see `SkippableBlocks`.
    """
    pipeline = Pipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.interval = interval
    pipeline.transformer.register_forward_pre_hook(pipeline.count)
    if dpm:
        pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    blocks = SkippableBlocks(pipeline.transformer.transformer_blocks, skipped, masks, dense_steps)
    pipeline.transformer.transformer_blocks = torch.nn.ModuleList([blocks])
    frames = pipeline(
        **load_file(embeddings),
        **{"height": SIZE[1], "width": SIZE[3], "num_frames": SIZE[5], "num_inference_steps": steps},
        guidance_scale=guidance_scale,
        use_dynamic_cfg=use_dynamic_cfg,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames
    assert pipeline.step == blocks.step == steps - 1
    return frames.permute(0, 2, 1, 3, 4)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference of two latents, relative to their scale, without surplus frames of the second."""
    theirs = theirs[:, :, theirs.shape[2] - ours.shape[2] :]
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
