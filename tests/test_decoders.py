"""Both decoders, chunk by chunk, against diffusers' decode in torch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from models import vae_flax, vae_torchax
from models.decoder import chunk_programs, chunk_sizes, decode

VAES = {
    "three levels": dict(block_out_channels=(8, 8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4),
    "no temporal compression": dict(
        block_out_channels=(8, 16),
        latent_channels=3,
        layers_per_block=2,
        norm_num_groups=2,
        temporal_compression_ratio=1,
    ),
    "mish, eightfold in time": dict(
        block_out_channels=(4, 4, 8, 8),
        latent_channels=5,
        layers_per_block=1,
        norm_num_groups=2,
        act_fn="mish",
        temporal_compression_ratio=8,
    ),
}


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("sizes", VAES.values(), ids=VAES)
@pytest.mark.parametrize("decoder", [vae_torchax, vae_flax], ids=["torchax", "flax"])
def test_decode_matches_diffusers(decoder, sizes, latent_frames):
    torch.manual_seed(0)
    levels = len(sizes["block_out_channels"])
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * levels, up_block_types=("CogVideoXUpBlock3D",) * levels, **sizes
    )
    latents = torch.randn(2, sizes["latent_channels"], latent_frames, 4, 6)
    with torch.no_grad():
        expected = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()

    ours = decoder.make_decoder(vae.config)
    weights = {name: jnp.asarray(weight.numpy()) for name, weight in vae.decoder.state_dict().items()}
    latents = jnp.asarray(latents.numpy())
    converted = ours.convert_weights(weights)
    programs = [traced.lower().compile() for traced in chunk_programs(ours, converted, latents)]
    pixels = np.concatenate(list(decode(programs, converted, latents)), axis=1)

    assert ours.weight_shapes == {name: weight.shape for name, weight in weights.items()}
    assert pixels.shape == expected.shape and pixels.dtype == np.float32
    error = np.abs(pixels - expected).max()
    assert error < 1e-5, f"pixels differ by {error:.1e}"


@pytest.mark.parametrize(("latent_frames", "sizes"), [(1, [1]), (2, [2]), (3, [3]), (5, [3, 2]), (16, [2] * 8)])
def test_chunk_sizes(latent_frames, sizes):
    assert chunk_sizes(latent_frames) == sizes
