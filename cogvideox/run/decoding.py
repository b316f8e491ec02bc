"""Load the weights of a VAE decoder."""

from typing import TYPE_CHECKING, Any

from cogvideox.files import checkpoint

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.models.decoder.decoder import Decoder


def weight_files(decoder: "Decoder", model_id: str) -> Any:
    """Return the decoder's weights as the tree that `decoder.decode_chunk` takes, mapped from files, not yet read."""
    shapes = {f"decoder.{name}": shape for name, shape in decoder.weight_shapes.items()}
    read = checkpoint.tensor_reader(model_id, "vae", shapes)
    return decoder.convert_weights({name: read(f"decoder.{name}") for name in decoder.weight_shapes})


def load_weights(files: Any, abstract: Any) -> Any:
    """Load the decoder's weights onto the devices.

    Args:
        files: from `weight_files`.
        abstract: a tree of the same structure with shapes, dtypes and shardings.
    """
    import jax

    from cogvideox.models.shared.loading import load_arrays

    stored, tree = jax.tree.flatten(files)

    def fill(i: int, index: tuple[slice, ...], part: "np.ndarray") -> None:
        part[...] = stored[i][index]

    return jax.tree.unflatten(tree, load_arrays(dict(enumerate(jax.tree.leaves(abstract))), fill).values())
