"""The transformer's parameters, each declared once, and how they come from a checkpoint onto the chips.

Names are those of the diffusers module, but the blocks' parameters are stacked along a leading axis: in the place of
"transformer_blocks.0.ff.net.2.bias" and so on there is one "blocks.ff.net.2.bias". Weights are [out, in] as in torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cogvideox.features import features_of
from cogvideox.models.shared.loading import Told, ignore, load_arrays
from cogvideox.models.shared.sharding import Parallelism, layout_spec

# --- Declarations ------------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """The declaration of a parameter.

    Attributes:
        axes: what each of its axes stands for. That gives the sizes (`axis_sizes`), and the mesh axes that split them
            (LAYOUTS in models/shared/layouts.py).
        only_with: the line of CONDITIONS under which a model has such a parameter; None if every model has it.
        rotary: whether its rows are reordered, so that the rotary pairs of a head are its two halves.
        read_in_stack: whether the block of kernels reads it in the stack of all blocks, not in a copy of its layer.
    """

    axes: tuple[str, ...]
    only_with: str | None = None
    rotary: bool = False
    read_in_stack: bool = False


def _linear(
    name: str, outputs: str, inputs: str, bias_only_with: str | None = None, rotary: bool = False, kernel: bool = False
) -> dict[str, Parameter]:
    """Declare a linear layer; `kernel` says whether the block of kernels multiplies by its weight."""
    return {
        f"{name}.weight": Parameter((outputs, inputs), None, rotary, read_in_stack=kernel),
        f"{name}.bias": Parameter((outputs,), bias_only_with, rotary),
    }


def _norm(name: str, axis: str, only_with: str | None = None, rotary: bool = False) -> dict[str, Parameter]:
    """Declare a layer norm."""
    return {f"{name}.{kind}": Parameter((axis,), only_with, rotary) for kind in ("weight", "bias")}


# Under which a model has parameters that not every one has.
CONDITIONS: dict[str, Callable[[Mapping], bool]] = {
    "norm_elementwise_affine": lambda config: config["norm_elementwise_affine"],
    "attention_bias": lambda config: config["attention_bias"],
    # diffusers gives temporal patches a bias whatever the config says.
    "patch_bias": lambda config: config["patch_bias"] or features_of(config).patch_frames is not None,
    "learned positions": lambda config: features_of(config).positions == "learned",
    "ofs": lambda config: features_of(config).ofs,
}

# Source: the constructor of `CogVideoXBlock`.
BLOCK = {
    **_linear("norm1.linear", "modulation", "time"),
    **_norm("norm1.norm", "embed", only_with="norm_elementwise_affine"),
    **_linear("attn1.to_q", "heads", "embed", bias_only_with="attention_bias", rotary=True, kernel=True),
    **_linear("attn1.to_k", "heads", "embed", bias_only_with="attention_bias", rotary=True, kernel=True),
    **_linear("attn1.to_v", "heads", "embed", bias_only_with="attention_bias", kernel=True),
    **_norm("attn1.norm_q", "head_dim", rotary=True),
    **_norm("attn1.norm_k", "head_dim", rotary=True),
    **_linear("attn1.to_out.0", "embed", "heads", kernel=True),
    **_linear("norm2.linear", "modulation", "time"),
    **_norm("norm2.norm", "embed", only_with="norm_elementwise_affine"),
    **_linear("ff.net.0.proj", "mlp", "embed", kernel=True),
    **_linear("ff.net.2", "embed", "mlp", kernel=True),
}

# Source: the constructor of `CogVideoXTransformer3DModel`.
PARAMETERS = {
    **_linear("patch_embed.proj", "embed", "patch", bias_only_with="patch_bias"),
    **_linear("patch_embed.text_proj", "embed", "text"),
    "patch_embed.pos_embedding": Parameter(("sample", "positions", "embed"), only_with="learned positions"),
    **_linear("time_embedding.linear_1", "inner time", "frequencies"),
    **_linear("time_embedding.linear_2", "time", "inner time"),
    **{
        name: declared._replace(only_with="ofs")
        for layer in ("ofs_embedding.linear_1", "ofs_embedding.linear_2")
        for name, declared in _linear(layer, "time", "time").items()
    },
    **{f"blocks.{name}": declared._replace(axes=("layers", *declared.axes)) for name, declared in BLOCK.items()},
    **_norm("norm_final", "embed", only_with="norm_elementwise_affine"),
    **_linear("norm_out.linear", "last modulation", "time"),
    **_norm("norm_out.norm", "embed", only_with="norm_elementwise_affine"),
    **_linear("proj_out", "predicted patch", "embed"),
}


def axis_sizes(config: Mapping) -> dict[str, int]:
    """Return the size of each logical axis of the parameters."""
    embed = config["num_attention_heads"] * config["attention_head_dim"]
    patch = config["patch_size"] ** 2 * features_of(config).frames_per_patch
    return {
        "layers": config["num_layers"],
        "embed": embed,
        "heads": embed,  # all of them, one after the other
        "head_dim": config["attention_head_dim"],
        "mlp": 4 * embed,
        "modulation": 6 * embed,  # shift, scale and gate, for video and for text
        "last modulation": 2 * embed,  # shift and scale
        "frequencies": embed,
        "inner time": config["time_embed_dim"],
        "time": config["time_embed_dim"],
        "text": config["text_embed_dim"],
        "sample": 1,
        "positions": config["max_text_seq_length"] + math.prod(sample_grid(config)),
        "patch": config["in_channels"] * patch,
        "predicted patch": config["out_channels"] * patch,
    }


def sample_grid(config: Mapping) -> tuple[int, int, int]:
    """Return the patches along frames, height and width for which a model of flat patches has its own positions."""
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    return frames, config["sample_height"] // config["patch_size"], config["sample_width"] // config["patch_size"]


def declaration(name: str) -> Parameter:
    """Return the declaration of the parameter `name`; raises ValueError if there is none."""
    if name not in PARAMETERS:
        raise ValueError(f"no declaration of the parameter {name} in PARAMETERS")
    return PARAMETERS[name]


def parameter_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of a model by its name."""
    sizes = axis_sizes(config)
    return {
        name: tuple(sizes[axis] for axis in declared.axes)
        for name, declared in PARAMETERS.items()
        if declared.only_with is None or CONDITIONS[declared.only_with](config)
    }


def parameter_spec(name: str, layout: str) -> PartitionSpec:
    """Return the mesh axes of each axis of the parameter `name` in one of LAYOUTS."""
    return layout_spec(declaration(name).axes, layout)


def abstract_parameters(
    config: Mapping, dtype: jax.typing.DTypeLike, parallelism: Parallelism
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what `load_parameters` returns, as shapes, to compile without weights."""
    return {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(parallelism.mesh, parameter_spec(name, parallelism.layout))
        )
        for name, shape in parameter_shapes(config).items()
    }


# --- Loading -----------------------------------------------------------------------------------------------------


def checkpoint_names(name: str, config: Mapping) -> list[str]:
    """Return the checkpoint's names for a parameter: one for each layer if it is stacked."""
    if not name.startswith("blocks."):
        return [name]
    return [f"transformer_blocks.{i}.{name.removeprefix('blocks.')}" for i in range(config["num_layers"])]


def stored_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the checkpoint by its name there."""
    shapes = {
        stored: shape[1:] if name.startswith("blocks.") else shape
        for name, shape in parameter_shapes(config).items()
        for stored in checkpoint_names(name, config)
    }
    if features_of(config).patch_frames is None:  # the weight of a convolution, whose strides are the patches
        embed, _ = shapes["patch_embed.proj.weight"]
        shapes["patch_embed.proj.weight"] = (embed, config["in_channels"], *[config["patch_size"]] * 2)
    return shapes


def rotary_order(rows: int, config: Mapping) -> np.ndarray:
    """Return the order of a q or k weight's rows in which the rotary pairs of a head are its two halves.

    Scores do not change: q and k, their biases and norms are reordered alike.
    """
    return np.arange(rows).reshape(-1, config["attention_head_dim"] // 2, 2).swapaxes(1, 2).ravel()


def stored_index(
    name: str, shape: tuple[int, ...], index: tuple[slice, ...], heads: np.ndarray | None, config: Mapping
) -> tuple[slice | np.ndarray, ...]:
    """Return where a stored tensor has what a parameter, or one layer of it, has at `index`.

    Args:
        name: of the parameter.
        shape: of the stored tensor.
        index: a slice of each axis.
        heads: which head of the model is at each place, [heads]; None for the model's order.
        config: `transformer/config.json`.
    """
    declared = PARAMETERS[name]
    orders: dict[int, np.ndarray] = {0: rotary_order(shape[0], config)} if declared.rotary else {}
    axes = [axis for axis in declared.axes if axis != "layers"]
    if heads is not None and "heads" in axes:
        axis = axes.index("heads")
        orders[axis] = orders.get(axis, np.arange(shape[axis])).reshape(len(heads), -1)[heads].ravel()
    return tuple(orders[axis][part] if axis in orders else part for axis, part in enumerate(index))


def load_parameters(
    read: Callable[[str], np.ndarray],
    config: Mapping,
    parallelism: Parallelism,
    dtype: jax.typing.DTypeLike,
    changes: Sequence[Callable[[str, np.ndarray, tuple], None]] = (),
    told: Told = ignore,
    head_order: np.ndarray | None = None,
) -> dict[str, jax.Array]:
    """Load the parameters as sharded JAX arrays of one dtype.

    Args:
        read: `read(checkpoint name)` returns one stored tensor. It is called in several threads, and for each chip's
            part again, so it should not copy.
        config: `transformer/config.json`.
        parallelism: the mesh, and the layout of the parameters on it.
        dtype: to which tensors of other dtypes are converted.
        changes: functions `change(checkpoint name, part, index)`, called one after the other for each part of a
            stored tensor, which they change in place. The part is what the tensor has at `index`: for rows and columns
            a slice or an array of their numbers, for each other axis a slice.
        told: see `load_arrays`.
        head_order: which head of the model is at each place, int32 [layers, heads]; None for the model's order.
    """

    def fill(name: str, index: tuple[slice, ...], part: np.ndarray) -> None:
        stacked = name.startswith("blocks.")
        layers = np.arange(config["num_layers"])[index[0]] if stacked else [None]
        names, of_layer = checkpoint_names(name, config), index[1:] if stacked else index
        for array, layer in zip(part if stacked else [part], layers, strict=True):
            stored = names[layer or 0]
            weight = read(stored)
            weight = weight.reshape(len(weight), -1) if len(of_layer) == 2 else weight
            heads = None if layer is None or head_order is None else head_order[layer]
            rows, *columns = where = stored_index(name, weight.shape, of_layer, heads, config)
            if isinstance(rows, slice):
                array[...] = weight[rows, *columns]
            else:
                weight = weight[:, *columns].astype(array.dtype, copy=False)
                np.take(weight, rows, axis=0, out=array, mode="clip")
            for change in changes:
                change(stored, array, where)

    return load_arrays(abstract_parameters(config, dtype, parallelism), fill, told=told)
