"""The VAE's encoder, in chunks of frames and split in space, against diffusers' encode in torch."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image

from cogvideox.models.vae.encoder import chunk_programs, encode
from cogvideox.models.vae.spatial_split import choose_split
from cogvideox.models.vae.vae_torchax import make_encoder
from tests.test_decoders import VAES, make_vae, products, real_vae


def check_encode(
    vae, frames: int, latent_size: tuple[int, int], chips=1, rows=None, strips=None, for_tpu=None, most=None
) -> None:
    """Compare mean and log-variance with diffusers', relative to their largest value."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = frames, *(factor * size for size in latent_size), 3
    video = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    pixels = VideoProcessor(vae_scale_factor=factor).preprocess_video([Image.fromarray(frame) for frame in video])
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    ours = make_encoder(vae.config)
    weights = {name: weight.numpy() for name, weight in vae.encoder.state_dict().items()}
    assert ours.weight_shapes == {name: weight.shape for name, weight in weights.items()}
    split = choose_split(jax.devices()[:chips], *latent_size, rows, strips, for_tpu)
    split = dataclasses.replace(split, most_elements=most)
    weights = jax.device_put(ours.convert_weights(weights), split.replicated)
    traced = chunk_programs(ours, weights, shape, split)
    assert most is None or max(max(products(program.jaxpr.jaxpr)) for program in traced) <= most
    programs = [program.lower().compile() for program in traced]
    told: list[int] = []
    for found, expected in zip(
        encode(programs, weights, video, split, told.append), (posterior.mean, posterior.logvar), strict=True
    ):
        assert found.shape == expected.shape and found.dtype == np.float32
        error = np.abs(found - expected.numpy()).max() / expected.abs().max()
        assert error <= 1e-4, f"{error:.1e}"
    assert sum(told) == frames


CASES = {  # VAE, frames, latent size, chips, rows of chips, strips
    "one device": ("three levels", 9, (3, 4), 1, 1, 1),
    "eight, uneven": ("three levels", 49, (5, 6), 8, 4, 1),
    "one image": ("three levels", 1, (4, 6), 4, 2, 1),
    "two chunks' rest, even": ("three levels", 13, (4, 6), 4, 2, 2),
    "one short chunk": ("three levels", 5, (5, 4), 1, 1, 3),
    "nine": ("no temporal compression", 9, (4, 5), 8, 2, 1),
    "others": ("mish, eightfold in time", 25, (3, 5), 8, 8, 1),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if n < 2 else pytest.mark.slow) for n, c in enumerate(CASES)]
)
def test_encode_matches_diffusers(case):
    sizes, *rest = CASES[case]
    check_encode(make_vae(VAES[sizes]), *rest)


@pytest.mark.slow
def test_real_widths():
    check_encode(real_vae(), 9, (3, 5), 2, 2)


@pytest.mark.slow
def test_forms_for_a_tpu():
    """The kernel in Pallas' interpreter, columns in pairs, two chips with strips that are not full."""
    vae = make_vae(dict(block_out_channels=(8, 128), latent_channels=4, layers_per_block=1, norm_num_groups=4))
    check_encode(vae, 17, (5, 8), 2, 2, 2, for_tpu=True)


def test_convolutions_in_parts():
    """As on a GPU, where they may not be too large; the strides of those that halve a frame are seen."""
    check_encode(make_vae(VAES["three levels"]), 5, (3, 4), most=9_000)
