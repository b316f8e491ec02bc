"""Tell the versions of the libraries that results depend on."""

import importlib.metadata

# What --verbose, the log and the timings tell the versions of.
LIBRARIES = ("jax", "jaxlib", "libtpu", "torch", "torchax", "diffusers", "transformers", "flax", "safetensors")


def versions(*names: str) -> dict[str, str]:
    """Return the version of each library by name, or "not installed"; libtpu exists on few platforms."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
