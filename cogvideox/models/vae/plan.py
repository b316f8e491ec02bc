"""The plan of a decode: everything that decides it, except weights and latents."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cogvideox.defaults import DECODERS
from cogvideox.errors import PlanError
from cogvideox.models.shared import tap
from cogvideox.models.shared.plan import Plan
from cogvideox.models.shared.sizes import check_frames, check_multiple, latent_size, spatial_compression_ratio
from cogvideox.models.vae import chunks
from cogvideox.models.vae.decoder import Decoder, chunk_programs, chunk_sizes
from cogvideox.models.vae.spatial_split import Split, choose_split
from cogvideox.models.vae.vae_layers import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingPlan(Plan):
    """Everything that decides a decode, except weights and latents.

    Attributes:
        vae, height, width, frames, batch, dtype: see `Plan`; videos are decoded one at a time.
        decoder: which decoder, one of DECODERS.
        split: of a frame over the devices.
    """

    decoder: str
    split: Split

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """[1, channels, frames, height, width] of the latents."""
        return self.batch, self.vae["latent_channels"], *self.latent_size

    @property
    def mesh(self) -> Mesh:
        """The mesh of devices, as many as the split has parts."""
        return self.split.mesh

    @property
    def runs(self) -> list[int]:
        """How often each of `programs` runs."""
        chunks = len(chunk_sizes(self.latent_shape[2]))
        return [1] if chunks == 1 else [1, chunks - 1]

    @property
    def program_options(self) -> dict:
        """Everything that the compiled programs depend on, except the config and the shapes of their arguments."""
        return {"mesh": dict(self.mesh.shape), "strips": self.split.strips}

    def make_decoder(self) -> Decoder:
        """Make the decoder, without weights."""
        return importlib.import_module(f"cogvideox.models.vae.vae_{self.decoder}").make_decoder(self.vae)

    def programs(self, decoder: Decoder, weights: Any, wanted: tap.Wanted | None = None) -> list[jax.stages.Traced]:
        """Trace the programs; see `chunk_programs`."""
        return chunk_programs(decoder, weights, self.latent_shape, self.split, wanted=wanted)

    def abstract_weights(self, decoder: Decoder) -> Any:
        """Return the decoder's weights as shapes on the devices, to compile without the weights."""
        return chunks.abstract_weights(decoder.weight_shapes, decoder.convert_weights, self.dtype, self.split)

    def on_devices(self, weights: Any) -> Any:
        """Return the shapes of a tree of weights on the devices, each of which has all of them, in the plan's dtype."""
        return chunks.on_devices(weights, self.dtype, self.split)


def check_activation(vae: Mapping) -> None:
    """Raise PlanError unless the layers have the activation that the VAE's config names."""
    if vae["act_fn"] not in ACTIVATIONS:
        raise PlanError(None, f"the VAE's act_fn {vae['act_fn']} is unknown; there are {', '.join(ACTIVATIONS)}")


def make_decoding_plan(
    *,
    vae: Mapping,
    decoder: str,
    devices: Sequence[jax.Device],
    dtype: jax.typing.DTypeLike,
    height: int,
    width: int,
    frames: int,
    chip_rows: int | None = None,
    strips: int | None = None,
) -> DecodingPlan:
    """Make the plan that the options ask for.

    Args:
        vae, decoder, dtype, height, width, frames: see `DecodingPlan`.
        devices: that share each frame.
        chip_rows, strips: see `choose_split`.

    Raises:
        PlanError: the model, the devices and the options do not fit together.
    """
    if decoder not in DECODERS:
        raise PlanError("decoder", f"{decoder} is unknown; there are {', '.join(DECODERS)}")
    check_activation(vae)
    for name, size in (("height", height), ("width", width)):
        check_multiple(name, size, spatial_compression_ratio(vae))
    check_frames(vae, frames)
    _, latent_height, latent_width = latent_size(vae, frames, height, width)
    try:
        split = choose_split(devices, latent_height, latent_width, chip_rows, strips)
    except ValueError as error:
        raise PlanError("chip_rows", str(error)) from error
    return DecodingPlan(
        vae=vae,
        decoder=decoder,
        height=height,
        width=width,
        frames=frames,
        dtype=jnp.dtype(dtype),
        split=split,
    )
