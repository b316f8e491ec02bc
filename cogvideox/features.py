"""Read from a transformer's config which features a CogVideoX has; nothing else asks which model it is."""

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Features(NamedTuple):
    """What a CogVideoX transformer has, beside its sizes.

    Attributes:
        patch_frames: latent frames of a patch; None for the flat patches of the first generation, of one frame each.
        rotary: whether queries and keys are rotated by their place.
        positions: what is added to the embedded tokens, beside or in place of the rotation; None for nothing.
        image: whether it takes the latents of an image beside the noisy ones, side by side in channels.
        ofs: whether a second embedding, of a constant, is added to that of the time.
    """

    patch_frames: int | None
    rotary: bool
    positions: Literal["sine-cosine", "learned"] | None
    image: bool
    ofs: bool

    @property
    def frames_per_patch(self) -> int:
        """Latent frames of a patch, flat or not."""
        return self.patch_frames or 1


def features_of(config: Mapping) -> Features:
    """Return the features that `transformer/config.json` says; entries that are not there have diffusers' defaults.

    Raises:
        ValueError: no CogVideoX has these features together; diffusers' pipelines could not run it either.
    """
    frames, ofs = config.get("patch_size_t"), config.get("ofs_embed_dim")
    rotary = bool(config.get("use_rotary_positional_embeddings"))
    learned = bool(config.get("use_learned_positional_embeddings"))
    inputs, outputs = config.get("in_channels", 16), config.get("out_channels", 16)
    if inputs not in (outputs, 2 * outputs):
        raise ValueError(f"in_channels is {inputs}, neither out_channels, {outputs}, nor, with an image, twice as many")
    if learned and not rotary:
        raise ValueError("there are learned positions, but no rotary embedding")
    if frames is not None and (learned or not rotary):
        raise ValueError("patch_size_t needs a rotary embedding and no other positions")
    if ofs and inputs == outputs:
        raise ValueError("ofs_embed_dim belongs to a model that takes an image")
    if ofs and ofs != config.get("time_embed_dim", 512):
        raise ValueError(f"ofs_embed_dim {ofs} is not time_embed_dim, to whose embedding that of ofs is added")
    positions: Literal["sine-cosine", "learned"] | None = None
    if not rotary:
        positions = "sine-cosine"
    elif learned:
        positions = "learned"
    return Features(frames, rotary, positions, image=inputs != outputs, ofs=bool(ofs))
