"""The layers of CogVideoX's VAE on frames split in space, for decoders and encoder; spatial_split.py has the layout.

Each layer is exact: convolutions see the edges of neighbouring parts, and group norms the whole chunk. A norm is not
computed in its own place but deferred to the next convolution: when that writes its padded input, it applies the norm
and the activation, and adds the edges and the cache. Apart from the convolutions themselves, this is the only pass over
the activations.

Sources: diffusers/models/autoencoders/autoencoder_kl_cogvideox.py, diffusers/models/upsampling.py and
diffusers/models/downsampling.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import source_info_util
from jax.sharding import PartitionSpec

from cogvideox.models.shared import tap
from cogvideox.models.vae import conv_blocks, conv_kernel
from cogvideox.models.vae.conv_input import conv_input, modulated, plain_conv_input, repeated
from cogvideox.models.vae.spatial_split import Split

# Activations by the config's act_fn. The padding of a convolution is zero after them, so each must map zero to zero.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
NORM_EPSILON = 1e-6
LANES = 128  # channels that lie side by side in a TPU's registers
COLUMNS = 8  # see _convolve_columns
DIMENSIONS = ("DHWNC", "DHWIO", "DHWNC")


@dataclasses.dataclass(frozen=True)
class Deferred:
    """The array activation(values * scale + offset), which the next convolution computes.

    Attributes:
        values: [frames, height, width, strips, channels].
        frames: to which they are repeated, as by `repeated`; None for as many as there are.
        scale, offset: float32, of the latents' size in frames, height and width: each element applies to all the frames
            and pixels that were made of its latent. A single frame applies to all frames. None for 1 and 0.
        activation: None for none.
        moments: mean and mean square of each group of a norm, float32 [2, groups], which all chips have alike.
    """

    values: jax.Array
    scale: jax.Array | None = None
    offset: jax.Array | None = None
    activation: Callable[[jax.Array], jax.Array] | None = None
    moments: jax.Array | None = None
    frames: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.frames or len(self.values), *self.values.shape[1:]

    def with_activation(self, activation: Callable[[jax.Array], jax.Array]) -> "Deferred":
        """Return the same with an activation."""
        return dataclasses.replace(self, activation=activation, moments=None)

    def compute(self) -> jax.Array:
        """Compute the array, [frames, height, width, strips, channels]."""
        return _lengthened(modulated(self.values, self.scale, self.offset, self.activation), self.shape[0])


class Convolved:
    """The result of a convolution that is computed when it is first needed: until then, a kernel can add to it.

    Attributes:
        shape: of the result, [frames, height, width, strips, channels].
        results: the result, and what the kernel returns beside it; values of fewer frames are still to be repeated.
    """

    def __init__(self, shape: tuple[int, ...], compute: "Callable[[Addend | None], conv_kernel.Results]"):
        self.shape = shape
        self._compute = compute
        self._scope = source_info_util.current_name_stack()  # jax has no public way to return to a named scope
        self._added: Addend | None = None
        self._results: conv_kernel.Results | None = None

    @classmethod
    def of(cls, x: jax.Array) -> "Convolved":
        """Take a result that XLA computes."""
        found = cls(x.shape, lambda added: conv_kernel.Results(x, None, None))
        found.results  # noqa: B018, so that nothing is added later
        return found

    def __add__(self, other: "Addend") -> "Convolved | jax.Array":
        """Add a residual, or the shortcut's result; this object is the sum then, unless it was computed before."""
        if self._results or self._added is not None or other is self:
            return array(self) + array(other)
        self._added = other
        return self

    @property
    def results(self) -> conv_kernel.Results:
        """See above."""
        if self._results is None:
            with source_info_util.set_name_stack(self._scope):
                self._results = self._compute(self._added)
        return self._results


@dataclasses.dataclass(frozen=True)
class NextCache:
    """The next cache of a convolution that may not be computed yet."""

    convolved: Convolved


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """A pointwise convolution of x, which a kernel can add to its own result; see `shortcut`."""

    x: jax.Array
    weight: jax.Array
    bias: jax.Array
    frames: int
    split: Split

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.frames, *self.x.shape[1:-1], len(self.bias)

    def compute(self) -> jax.Array:
        """Compute the result."""
        convolve = functools.partial(pointwise_conv, weight=self.weight, bias=self.bias)
        # The barrier makes XLA fuse the addition after it, and the sums of the next norm, with the larger convolution.
        x = _lengthened(self.x, self.frames)
        return jax.lax.optimization_barrier(_in_parts(convolve, x, (1, 1), self.split.most_elements))


Addend = jax.Array | Convolved | Shortcut


def array(x: jax.Array | Deferred | Convolved | Shortcut) -> jax.Array:
    """Compute what is not computed yet: [frames, height, width, strips, channels]."""
    if isinstance(x, Convolved):
        return _lengthened(x.results.values, x.shape[0])
    return x.compute() if isinstance(x, (Deferred, Shortcut)) else x


def _stored(x: jax.Array | Convolved) -> jax.Array:
    """Compute what is not computed yet, perhaps with frames that are still to be repeated."""
    return x.results.values if isinstance(x, Convolved) else x


def _lengthened(x: jax.Array, frames: int) -> jax.Array:
    """Repeat frames of x [frames, height, width, ...]."""
    return x if len(x) == frames else repeated(x, frames, *x.shape[1:3])


def computed(x: jax.Array | Convolved, cache: Any) -> tuple[jax.Array, Any]:
    """Return the result of the last layer as an array, and the next cache of all layers as a tree of arrays."""
    return array(x), jax.tree.map(
        lambda leaf: leaf.convolved.results.cache if isinstance(leaf, NextCache) else leaf, cache
    )


def tap_output(name: str, output: "jax.Array | Deferred | Convolved | Shortcut | tuple", split: Split) -> None:
    """Tap the output of the decoder's module `name`, or the first of its outputs; see models/tap.py."""
    x = output[0] if isinstance(output, tuple) else output

    shape = x.shape
    bounds: tap.Bounds = {}
    if not split.is_even:
        scale = shape[1] // split.strip_height
        bounds = {-2: ((0, split.height * scale),), -1: ((0, split.width * scale),)}

    def image() -> jax.Array:
        return split.image(array(x))

    if isinstance(x, Deferred) and x.moments is not None:
        tap.tap(f"decoder.{name}.norm_layer.moments", x.moments, PartitionSpec(None, None))
    tap.tap(f"decoder.{name}", image, split.pixels.spec, bounds)


def spatial_norm(
    x: jax.Array | Convolved,
    latents: jax.Array,
    norm: tuple[jax.Array, jax.Array],
    conv_y: tuple[jax.Array, jax.Array],
    conv_b: tuple[jax.Array, jax.Array],
    groups: int,
    split: Split,
) -> Deferred:
    """Apply `CogVideoXSpatialNorm3D`: a group norm, scaled and shifted by pointwise convolutions of the latents.

    Args:
        x: [frames, height, width, strips, channels].
        latents: [latent frames, strip height, strip width, strips, latent channels].
        norm: scale and bias of the group norm, [channels].
        conv_y, conv_b: weight [latent channels, channels] and bias [channels].
        groups: of the group norm.
        split: of the frame.
    """
    factor, shift, moments = _norm_factors(x, norm, groups, NORM_EPSILON, split)
    # Pointwise convolutions commute with the repetition of the latents over frames and pixels: convolve before it.
    scale, offset = pointwise_conv(latents, *conv_y, jnp.float32), pointwise_conv(latents, *conv_b, jnp.float32)
    scale, offset = scale * factor, scale * shift + offset
    return _deferred(x, scale, offset, moments, split)


def group_norm(
    x: jax.Array | Convolved, norm: tuple[jax.Array, jax.Array], groups: int, epsilon: float, split: Split
) -> Deferred:
    """Apply a group norm over all frames and pixels of a chunk.

    Args:
        x: [frames, height, width, strips, channels].
        norm: scale and bias, [channels].
        groups: of channels.
        epsilon: what is added to the variance.
        split: of the frame.
    """
    factor, shift, moments = _norm_factors(x, norm, groups, epsilon, split)
    shape = (1, split.strip_height, split.strip_width, *x.shape[3:])
    scale, offset = (jnp.broadcast_to(value, shape) for value in (factor, shift))
    return _deferred(x, scale, offset, moments, split)


def pointwise_conv(
    x: jax.Array, weight: jax.Array, bias: jax.Array, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """Apply a 1 x 1 x 1 convolution with weight [channels, out channels] and bias [out channels].

    The result has `dtype`, by default that of x.
    """
    y = jnp.einsum("thwnc,cd->thwnd", x, weight, precision=precision(x), preferred_element_type=dtype or x.dtype)
    return y + bias.astype(y.dtype)


def shortcut(x: jax.Array | Convolved, weight: jax.Array, bias: jax.Array, split: Split) -> jax.Array | Shortcut:
    """Apply `conv_shortcut` of `CogVideoXResnetBlock3D`, a pointwise convolution; on a TPU, its kernel does it."""
    result = Shortcut(_stored(x), weight, bias, x.shape[0], split)
    return result if split.for_tpu else result.compute()


def causal_conv(
    x: jax.Array | Deferred | Convolved, weight: jax.Array, bias: jax.Array, cache: Any, split: Split
) -> tuple[jax.Array | Convolved, Any]:
    """Apply `CogVideoXCausalConv3d`, which sees this frame and the two before it.

    Args:
        x: [frames, height, width, strips, channels]; an array that is not deferred is zero beyond the frame's edge.
        weight: [3, 3, 3, channels, out channels].
        bias: [out channels].
        cache: the last two frames of the chunk before, as this function returned them; None for the first chunk, which
            repeats its first frame.
        split: of the frame.

    Returns:
        [frames, height, width, strips, out channels] and the next cache. On a TPU both may not be computed yet: see
        `computed`.
    """
    history, channels, out_channels = weight.shape[0] - 1, *weight.shape[3:]
    x = x if isinstance(x, Deferred) else Deferred(array(x))
    of_kernel = isinstance(cache, conv_kernel.Cache)
    shape = _kernel_shape(x, weight, split, cached=cache is not None)
    if shape and (cache is None or of_kernel):
        convolved = Convolved((*x.shape[:-1], out_channels), _in_kernel(shape, x, weight, bias, cache, split))
        return convolved, NextCache(convolved)
    few_outputs = split.for_tpu and COLUMNS * out_channels <= LANES and x.values.shape[2] % COLUMNS == 0
    packed = split.for_tpu and not few_outputs and channels == LANES
    # The kernel may have had room in VMEM for the first chunk alone; a program returns its caches as it takes them.
    cache = cache.padded() if of_kernel else cache
    padded, cache = _padded_input(x, split, cache=cache, history=history, frames=x.frames, packed=packed)
    cache = conv_kernel.Cache.of(cache) if of_kernel else cache
    if few_outputs:
        return _result(_convolve_columns(padded, weight, bias), split), cache
    convolve = functools.partial(_convolve, weight=_pack_columns(weight) if packed else weight, bias=bias)
    return _result(_in_parts(convolve, padded, weight.shape[:2], split.most_elements), split), cache


def upsample(
    x: jax.Array | Convolved, weight: jax.Array, bias: jax.Array, compress_time: bool, split: Split
) -> jax.Array | Convolved:
    """Apply `CogVideoXUpsample3D`: double height and width, and with `compress_time` the frames, and convolve.

    The first of an odd number of frames stays single, because the encoder did not compress it. The weight is
    [3, 3, channels, channels], the bias [channels].
    """
    x = array(x)
    frames = len(x)
    if compress_time and frames > 1:
        frames = 2 * frames - frames % 2
    enlarged = _zero_outside(x, split)
    if shape := _kernel_shape(enlarged, weight[None], split, factor=2):
        height, width = (2 * size for size in x.shape[1:3])
        compute = _in_kernel(shape, enlarged, weight[None], bias, None, split, frames)
        return Convolved((frames, height, width, *x.shape[3:]), compute)
    padded, _ = _padded_input(enlarged, split, frames=frames, factor=2)
    convolve = functools.partial(_convolve, weight=weight[None], bias=bias)
    return _result(_in_parts(convolve, padded, (1, len(weight)), split.most_elements), split)


def downsample(
    x: jax.Array | Convolved, weight: jax.Array, bias: jax.Array, compress_time: bool, split: Split
) -> jax.Array | Convolved:
    """Apply `CogVideoXDownsample3D`: halve height and width with a convolution.

    Before that, with `compress_time`, each two frames become their mean; the first of an odd number stays. The weight
    is [3, 3, channels, channels], the bias [channels].
    """
    x = array(x)
    if compress_time and len(x) > 1:
        single = len(x) % 2
        pairs = x[single:].astype(jnp.float32).reshape(-1, 2, *x.shape[1:])
        x = jnp.concatenate([x[:single], pairs.mean(1).astype(x.dtype)])
    padded, _ = _padded_input(_zero_outside(x, split), split)
    padded = padded[:, 1:, 1:]  # the padding is on the right and below alone
    strides = (1, 2, 2)
    convolve = functools.partial(_convolve, weight=weight[None], bias=bias, strides=strides)
    return _result(_in_parts(convolve, padded, (1, len(weight)), split.most_elements, strides), split)


def precision(x: jax.Array) -> jax.lax.Precision:
    """Return the precision of products that x's dtype deserves; by default a TPU multiplies float32 in bfloat16."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _norm_factors(
    x: jax.Array | Convolved, norm: tuple[jax.Array, jax.Array], groups: int, epsilon: float, split: Split
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return factor and shift [channels] that make x * factor + shift a group norm of x, and its `Deferred.moments`."""
    channels = x.shape[-1]
    count = x.shape[0] * split.height * split.width * (x.shape[1] // split.strip_height) ** 2 * (channels // groups)
    if isinstance(x, Convolved) and x.results.sums is not None:
        sums = x.results.sums.sum((0, 1, 3))
    else:
        values = array(x).astype(jnp.float32)
        if not split.is_even:
            values = jnp.where(split.inside(x.shape), values, 0.0)
        sums = jnp.stack([values.sum((0, 1, 2, 3)), (values * values).sum((0, 1, 2, 3))])
    moments = split.sum(sums.reshape(2, groups, -1).sum(-1)) / count
    mean, square = moments
    factor = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + epsilon)
    weight, bias = (parameter.astype(jnp.float32) for parameter in norm)
    factor = weight * jnp.repeat(factor, channels // groups)
    shift = bias - jnp.repeat(mean, channels // groups) * factor
    return factor, shift, moments


def _deferred(
    x: jax.Array | Convolved, scale: jax.Array, offset: jax.Array, moments: jax.Array, split: Split
) -> Deferred:
    """Return a deferred norm of x that is zero beyond the frame's edge."""
    if not split.is_even:
        scale, offset = (jnp.where(split.inside(value.shape), value, 0.0) for value in (scale, offset))
    return Deferred(_stored(x), scale, offset, moments=moments, frames=x.shape[0])


def _zero_outside(x: jax.Array, split: Split) -> Deferred:
    """Set x to zero beyond the frame's edge."""
    if split.is_even:
        return Deferred(x)
    shape = (len(x), split.strip_height, split.strip_width, *x.shape[3:])
    inside = split.inside(shape).astype(jnp.float32)
    return Deferred(x, jnp.broadcast_to(inside, shape), jnp.zeros(shape, jnp.float32))


def _result(x: jax.Array, split: Split) -> jax.Array | Convolved:
    """Return the result of XLA's convolution as that of the kernel where there is one."""
    return Convolved.of(x) if split.for_tpu else x


def _kernel_shape(
    x: Deferred, weight: jax.Array, split: Split, cached: bool = False, factor: int = 1
) -> conv_blocks.Shape | None:
    """Return the shape of a convolution for its TPU kernel, or None if that cannot compute it."""
    frames, height, width, strips, channels = x.shape
    if not split.for_tpu or strips != conv_blocks.STRIPS:
        return None
    shape = conv_blocks.Shape(
        frames=frames,
        height=height,
        width=width,
        channels=channels,
        out_channels=weight.shape[-1],
        history=len(weight) - 1,
        cached=cached,
        factor=factor,
        itemsize=x.values.dtype.itemsize,
        each=1 if x.scale is None else width // x.scale.shape[2],
    )
    return conv_blocks.fitting(shape)


def _in_kernel(
    shape: conv_blocks.Shape,
    x: Deferred,
    weight: jax.Array,
    bias: jax.Array,
    cache: Any,
    split: Split,
    frames: int | None = None,
) -> Callable[[Addend | None], conv_kernel.Results]:
    """Return what computes a convolution with the TPU kernel, and adds a residual to it; `frames` are those to make."""

    def compute(added: Addend | None) -> conv_kernel.Results:
        fitted, total, by, residual = shape, bias, None, None
        if isinstance(added, Shortcut):
            with_shortcut = dataclasses.replace(shape, shortcut=added.x.shape[-1], blocks=1)
            if found := conv_blocks.fitting(with_shortcut):
                fitted, total, by = found, bias + added.bias, (added.x, added.weight)
        if added is not None and by is None:
            residual = array(added) if isinstance(added, Shortcut) else _stored(added)
        inside = split.width * (shape.width // split.strip_width) - jax.lax.axis_index("columns") * shape.width
        results = conv_kernel.convolve(
            fitted,
            x.values,
            x.scale,
            x.offset,
            conv_kernel.Edges(*_edges(x, split)),
            cache,
            conv_blocks.packed_weight(weight, fitted),
            total,
            residual,
            by,
            None if split.is_even else jnp.reshape(inside, 1).astype(jnp.int32),
            activation=x.activation,
            interpret=split.platform != "tpu",
        )
        sums = results.sums
        if not split.is_even:
            sums = jnp.where(split.inside((1, *x.shape[1:]))[0, :, :1], sums, 0.0)
        return results._replace(sums=_lengthened(sums, frames or len(sums)))

    return compute


def _edges(x: Deferred, split: Split) -> tuple[jax.Array, jax.Array]:
    """Fetch the rows and the columns around a chip's part of x, activated; see `Split.neighbours`."""
    whole, first, last = slice(None), slice(1), slice(-1, None)

    def edge(rows=whole, columns=whole, strips=whole):
        index = whole, rows, columns, strips
        scale, offset = (value if value is None else value[index] for value in (x.scale, x.offset))
        return modulated(x.values[index], scale, offset, x.activation)

    return split.neighbours(
        edge(rows=first, strips=first), edge(rows=last, strips=last), edge(columns=first), edge(columns=last)
    )


def _padded_input(
    x: Deferred,
    split: Split,
    cache: jax.Array | None = None,
    history: int = 0,
    frames: int | None = None,
    factor: int = 1,
    packed: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Compute x, padded with the edges of neighbouring parts and with the cache; arguments as in `conv_input`."""
    rows, columns = _edges(x, split)
    if factor > 1:
        between = jnp.repeat(rows[:, :, 1:-1], factor, axis=2)
        rows = jnp.concatenate([rows[:, :, :1], between, rows[:, :, -1:]], axis=2)
        columns = jnp.repeat(columns, factor, axis=1)
    function: Callable = plain_conv_input
    if split.for_tpu:
        function = functools.partial(conv_input, packed=packed, interpret=split.platform != "tpu")
    return function(
        x.values,
        x.scale,
        x.offset,
        rows,
        columns,
        cache,
        activation=x.activation,
        history=history,
        frames=frames or len(x.values),
        factor=factor,
    )


def _convolve(
    padded: jax.Array, weight: jax.Array, bias: jax.Array, strides: tuple[int, int, int] = (1, 1, 1)
) -> jax.Array:
    """Convolve a padded input, with `strides` along frames, rows and columns."""
    y = jax.lax.conv_general_dilated(
        padded, weight, strides, "VALID", dimension_numbers=DIMENSIONS, precision=precision(padded)
    )
    return y + bias


def _in_parts(
    convolve: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    window: tuple[int, ...],
    most: int | None,
    strides: tuple[int, ...] = (1, 1),
) -> jax.Array:
    """Return convolve(x), computed in parts: none takes or makes more than `most` elements, None for any number.

    Args:
        convolve: a convolution without padding.
        x: [frames, height, width, strips, channels].
        window: the convolution's size in frames and rows.
        most: at least as many as one row of one frame needs.
        strides: the convolution's along frames and rows.
    """
    if most is None:
        return convolve(x)
    result = jax.eval_shape(convolve, x)
    axis = 0 if result.shape[0] > 1 else 1
    size = result.shape[axis]
    if max(x.size, result.size) <= most or size == 1:
        return convolve(x)
    parts = (0, size // 2), (size // 2, size)
    inputs = [
        jax.lax.slice_in_dim(x, start * strides[axis], (stop - 1) * strides[axis] + window[axis], axis=axis)
        for start, stop in parts
    ]
    return jnp.concatenate([_in_parts(convolve, part, window, most, strides) for part in inputs], axis)


def _pack_columns(weight: jax.Array) -> jax.Array:
    """Make the weights for pairs of columns: [..., 3, channels, out] to [..., 2, 2 * channels, out].

    With 128 channels a product fills half of the 256 rows of a TPU's MXU, and all of them with two columns at a time.
    """
    first, second, third = jnp.moveaxis(weight, 2, 0)
    pairs = (first, second), (jnp.zeros_like(third), third)
    return jnp.stack([jnp.concatenate(pair, axis=2) for pair in pairs], axis=2)


def _convolve_columns(padded: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """Do `_convolve` for few output channels: a window computes COLUMNS columns, as so many times the channels.

    A TPU takes as long for three output channels as for 128.
    """
    size, out_channels = weight.shape[2], weight.shape[4]
    window = sum(
        jnp.pad(
            weight, ((0, 0), (0, 0), (i, COLUMNS - 1 - i), (0, 0), (i * out_channels, (COLUMNS - 1 - i) * out_channels))
        )
        for i in range(COLUMNS)
    )
    assert isinstance(window, jax.Array) and window.shape[2] == COLUMNS + size - 1
    y = _convolve(padded, window, jnp.tile(bias, COLUMNS), strides=(1, 1, COLUMNS))
    y = jax.lax.optimization_barrier(y)
    frames, height, width, strips, _ = y.shape
    y = jnp.moveaxis(y.reshape(frames, height, width, strips, COLUMNS, out_channels), 4, 3)
    return y.reshape(frames, height, width * COLUMNS, strips, out_channels)
