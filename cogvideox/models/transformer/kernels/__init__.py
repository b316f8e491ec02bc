"""The parts of a transformer block around attention as Pallas kernels for TPUs, each beside a matrix product.

Beside its products XLA goes over the whole array again for each norm, rotary embedding or residual, and it does not
write the attention kernel's layout from a product without copies. Here all that is done to a block in VMEM.

Between the projections to and from the heads arrays are tiles: 128 tokens of one head, [head_dim, 128], a token a
column, as custom_splash_attention.py takes them. A chip's tiles are [sp, tiles, batch, heads, head_dim, 128]. Before
attention the first axis counts the chips that will attend the heads, and after it the chips that they come from. So the
exchange between chips cuts and joins along the first axis of memory, and nothing is copied on either side of it. The
heads may be a group of those of each chip, and queries, keys and values of a group may lie in one array, along its axis
of batches.
"""

from cogvideox.models.transformer.kernels.common import LANES, Summed, Weight
from cogvideox.models.transformer.kernels.heads import QKNorm, Split, to_heads
from cogvideox.models.transformer.kernels.norm import Modulation, modulated_norm
from cogvideox.models.transformer.kernels.products import Gelu, Residual, dense, from_heads

__all__ = [
    "LANES",
    "Gelu",
    "Modulation",
    "QKNorm",
    "Residual",
    "Split",
    "Summed",
    "Weight",
    "dense",
    "from_heads",
    "modulated_norm",
    "to_heads",
]
