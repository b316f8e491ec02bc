"""A model whose heads' attention is local in frames, local in places, or global, so that their patterns are known."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel

from tools.make_tiny_model import make_pipeline

HEAD_DIM = 64
NORM = 3.0  # the weight of the norms of queries and keys: scores are at most 8 * 3 ** 2
# What is rotated by a head of 64 numbers: pairs, of which the first turn the fastest, for frames, heights and widths.
TIME, HEIGHT, WIDTH = np.split(np.arange(HEAD_DIM // 2), [8, 20])
# Pairs whose products tell tokens apart by their frames, by their places, or not at all.
PAIRS = {
    "frames": TIME[:2],
    "positions": np.concatenate([HEIGHT[:3], WIDTH[:3]]),
    "dense": np.stack([TIME[-1], HEIGHT[-1], WIDTH[-1]]),
}


def bias_of(kind: str) -> np.ndarray:
    """Return the queries and keys of a head before their norm, which leaves them as they are up to a factor.

    All tokens have the same, float32 [HEAD_DIM]; then only the rotary embedding tells one from another.
    """
    pairs = np.zeros((HEAD_DIM // 2, 2), np.float32)
    pairs[PAIRS[kind]] = 1, -1
    return pairs.reshape(-1)


def make_model(folder: Path, layers: Sequence[Sequence[str]]) -> None:
    """Write a pipeline whose heads have these kinds, keys of PAIRS, in each layer; all else is random."""
    make_pipeline(
        folder,
        num_attention_heads=len(layers[0]),
        attention_head_dim=HEAD_DIM,
        num_layers=len(layers),
        max_text_seq_length=64,
        vae_channels=(4, 4, 4),
        vae_groups=4,
    )
    path = folder / "transformer"
    transformer = CogVideoXTransformer3DModel.from_pretrained(path)
    with torch.no_grad():
        for block, kinds in zip(transformer.transformer_blocks, layers, strict=True):
            bias = torch.from_numpy(np.concatenate([bias_of(kind) for kind in kinds]))
            for projection, norm in (
                (block.attn1.to_q, block.attn1.norm_q),
                (block.attn1.to_k, block.attn1.norm_k),
            ):
                projection.weight.zero_()
                projection.bias.copy_(bias)
                norm.weight.fill_(NORM)
    transformer.save_pretrained(path)
