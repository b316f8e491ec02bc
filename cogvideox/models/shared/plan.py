"""What the plans of both stages have in common."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cogvideox.models.shared.sizes import latent_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(abc.ABC):
    """Everything that decides what a stage computes, except weights and input.

    Attributes:
        vae: the config of the model's VAE, checked.
        height, width, frames: of the video, in pixels and frames.
        batch: videos at a time.
        dtype: of weights, latents and embeddings.
    """

    vae: Mapping
    height: int
    width: int
    frames: int
    batch: int = 1
    dtype: jnp.dtype

    def with_dtype(self, dtype: jax.typing.DTypeLike) -> Self:
        """Return the plan for weights of another dtype; raises PlanError if that does not fit the other options."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the latents of one video."""
        return latent_size(self.vae, self.frames, self.height, self.width)

    @property
    @abc.abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of the latents that the programs take."""

    @property
    @abc.abstractmethod
    def mesh(self) -> Mesh:
        """The mesh of devices."""

    @property
    def devices(self) -> list[jax.Device]:
        """The devices in the order of the mesh."""
        return self.mesh.devices.flatten().tolist()

    @property
    @abc.abstractmethod
    def program_options(self) -> dict:
        """Everything that the compiled programs depend on, except the configs and the shapes of their arguments."""
