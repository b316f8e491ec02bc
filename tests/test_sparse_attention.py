"""Block-sparse attention in Pallas' interpreter beside masked attention in float64, and its layout and patterns."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cogvideox.models.transformer.sparse import layout as layouts
from cogvideox.models.transformer.sparse.attention import sparse_attention
from cogvideox.models.transformer.sparse.geometry import MOST_SCORES, WindowSizes, geometry_of, predicted_cycles
from cogvideox.models.transformer.sparse.layout import LANES, AlignedLayout
from cogvideox.models.transformer.sparse.patterns import KINDS, Pattern, head_order, inverse
from cogvideox.models.transformer.sparse.search import candidates, choose, pattern_errors, sampled_tiles
from cogvideox.models.transformer.sparse.table import HeadTable
from cogvideox.models.transformer.sparse.xla import xla_attention
from custom_splash_attention import core, from_tiles, to_tiles

TOLERANCE = {"bfloat16": 5e-3, "float32": 1e-4}
HEAD_DIM = 64
FACTOR = HEAD_DIM**-0.5 / np.log(2)

# Frames, patches of a frame and text: 768 x 1360 x 81, portrait x 161, 480 x 720 x 49 of CogVideoX 1.0, 640 x 1280 x
# 61, 720 x 1280 x 81, one frame, small ones, and one of a prime number of tiles.
LAYOUTS = [(11, 48 * 85, 226), (21, 85 * 48, 226), (13, 30 * 45, 226), (8, 40 * 80, 226), (11, 45 * 80, 226)]
LAYOUTS += [(1, 48 * 85, 226), (3, 6, 40), (41, 1, 1), (1, 1, 300), (3, 61 * 128, 512)]
LAYOUTS = [AlignedLayout(*sizes) for sizes in LAYOUTS]


def patterns(*texts):
    return [Pattern.parse(text) for text in texts]


def attention(query, key, value, mask):
    """Compute masked attention of [heads, tokens, head_dim] in float64; `mask` is [heads, tokens, tokens]."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    scores = np.where(mask, np.einsum("hqd,hkd->hqk", query, key) * query.shape[-1] ** -0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,hkd->hqd", weights, value) / weights.sum(-1, keepdims=True)


def random(layout, heads, dtype, seed=0):
    """Return queries, keys and values [heads, tokens, head_dim], rounded to `dtype`, in the aligned order."""
    generator = np.random.default_rng(seed)
    arrays = (generator.normal(size=(heads, layout.tokens, HEAD_DIM)) for _ in range(3))
    return [np.array(jnp.asarray(array, dtype), np.float64) for array in arrays]


def as_tiles(array, layout, dtype, tiles=None, padding=np.nan):
    """Turn [heads, tokens, head_dim] into tiles, more of them if so many are asked for, with `padding` where it is."""
    array = np.where(layout.is_real()[:, None], array, padding)
    array = np.pad(
        array, ((0, 0), (0, ((tiles or layout.tiles) - layout.tiles) * LANES), (0, 0)), constant_values=padding
    )
    return to_tiles(jnp.asarray(array, dtype)[None])


def errors_of_heads(tiles, expected, layout):
    """Return the normwise relative error of each head, over tokens that are not padding."""
    real = layout.is_real()
    found = np.asarray(from_tiles(tiles, 1, layout.tokens)[0], np.float64)[:, real]
    return np.linalg.norm(found - expected[:, real], axis=(1, 2)) / np.linalg.norm(expected[:, real], axis=(1, 2))


def masks(heads, layout):
    return np.stack([pattern.mask(layout) for pattern in heads])


@pytest.fixture
def narrow_groups(monkeypatch):
    """Let groups of places have few tiles, so that a small video has several."""
    monkeypatch.setattr(layouts, "GROUP_TILES", 4)


# --- Layout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_where_tokens_lie(layout):
    """Each frame begins with a tile, the text follows them, and nothing else is real."""
    packed = np.concatenate([-1 - np.arange(layout.text_tokens), np.arange(layout.frames * layout.frame_tokens)])
    packed = np.pad(packed, (0, 7))  # as a mesh pads it
    aligned = np.asarray(layout.from_packed(jnp.asarray(packed), 0, layout.tokens + 3 * LANES))
    assert aligned.shape == (layout.tokens + 3 * LANES,) and layout.padding == layout.tokens / layout.real_tokens - 1
    frame, stride = np.arange(layout.frame_tokens), -(-layout.frame_tokens // LANES) * LANES
    for number in range(layout.frames):
        assert (aligned[number * stride :][: len(frame)] == number * len(frame) + frame).all()
    assert (aligned[layout.frames * stride :][: layout.text_tokens] == -1 - np.arange(layout.text_tokens)).all()
    assert (aligned[layout.positions()] == packed[: layout.real_tokens]).all()
    assert layout.is_real().sum() == layout.real_tokens == layout.tile_tokens().sum()
    assert (layout.to_packed(jnp.asarray(aligned), 0) == packed[: layout.real_tokens]).all()


def test_parts_of_an_array_are_placed():
    layout = AlignedLayout(3, 130, 40)
    x = np.random.default_rng(0).normal(size=(2, layout.real_tokens, 5)).astype(np.float32)
    tokens = layout.tokens + LANES
    video, text = layout.place_video(x[:, 40:], 1, tokens), layout.place_text(x[:, :40], -2, tokens)
    assert (video + text == layout.from_packed(jnp.asarray(x), 1, tokens)).all() and (video * text == 0).all()
    assert (layout.video(video, 1) == x[:, 40:]).all() and (layout.text(text, 1) == x[:, :40]).all()


def test_layout_of_a_video():
    """81 frames are 21 latent frames, to which one is added for pairs."""
    layout = AlignedLayout.of((11, 48, 85), 226)
    assert (layout.frame_tiles, layout.tiles, layout.group_tiles, layout.place_groups) == (32, 354, 2, 16)
    assert 0.0045 < layout.padding < 0.0046


# --- Patterns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(4, 300, 130), (2, 600, 40)])
@pytest.mark.usefixtures("narrow_groups")
def test_masks(sizes):
    """Token by token, from where a token lies."""
    layout = AlignedLayout(*sizes)
    tokens = [("text", 0)] * layout.text_tokens
    tokens += [(f, i // LANES // layout.group_tiles) for f in range(layout.frames) for i in range(layout.frame_tokens)]
    assert max(group for _, group in tokens) == layout.place_groups - 1 > 0
    frame, group = (np.array([token[i] if token[0] != "text" else 0 for token in tokens]) for i in range(2))
    text = np.array([token[0] == "text" for token in tokens])
    always, place = text[:, None] | text, layout.positions()
    near = {"frames": frame, "positions": group, "dense": np.zeros_like(frame)}
    for pattern in patterns("dense", "frames:0", "frames:2", "positions:0", "positions:1"):
        numbers = near[pattern.kind]
        expected = always | (np.abs(numbers[:, None] - numbers) <= pattern.window)
        mask = pattern.mask(layout)
        assert (mask[place[:, None], place] == expected).all() and not mask[:, ~layout.is_real()].any()
        assert pattern.density(layout) == pytest.approx(expected.mean())


@pytest.mark.parametrize("text", ["dense", "frames:0", "positions:12"])
def test_patterns_are_read_as_they_are_written(text):
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize("text", ["", "dense:0", "frames", "frames:", "frames:-1", "positions:1.5", "text:1"])
def test_what_is_no_pattern(text):
    with pytest.raises(ValueError, match="is no pattern"):
        Pattern.parse(text)


# --- Heads on chips ------------------------------------------------------------------------------------------------


def test_chips_have_equal_work():
    layout = LAYOUTS[0]
    heads = patterns(*["dense"] * 13, *["frames:1"] * 20, *["frames:2"] * 9, *["positions:2"] * 6)
    heads = [heads[i] for i in np.random.default_rng(0).permutation(48)]
    costs = np.array([predicted_cycles(head, layout) for head in heads])
    order = head_order(costs, 4)
    assert sorted(order) == list(range(48)) and (order[inverse(order)] == np.arange(48)).all()
    work = costs[order].reshape(4, 12).sum(1)
    dense, lightest = predicted_cycles(Pattern(), layout), costs.min()
    # One chip has four of the dense heads, and has no more work than it must; the others are equal.
    assert sorted(work)[-1] == pytest.approx(4 * dense + 8 * lightest)
    assert np.ptp(sorted(work)[:3]) <= 0.01 * dense < np.ptp(costs.reshape(4, 12).sum(1))


def test_a_share_that_exists_is_found():
    """Where greed alone is not enough: 8 + 5 + 5 = 7 + 7 + 4, but 8 goes first, then 7 and 7 to the other."""
    for order in itertools.permutations([8, 7, 7, 5, 5, 4]):
        work = np.asarray(order)[head_order(order, 2)].reshape(2, 3).sum(1)
        assert work.tolist() == [18, 18]


def test_heads_that_chips_cannot_share():
    with pytest.raises(ValueError, match="4 chips cannot share 30 heads"):
        head_order([1.0] * 30, 4)


def test_table_of_heads():
    """Of two samples; the heads of a kind are neighbours."""
    table = HeadTable.of(patterns("frames:1", "dense", "positions:2"), samples=2)
    assert table.order.tolist() == [1, 4, 0, 3, 2, 5]
    assert table.windows.tolist() == [0, 0, 1, 1, 2, 2] and table.counts.tolist() == [2, 2, 2]


# --- Geometry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, WindowSizes(384, 512)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_is_in_one_block(kind, layout, sizes):
    """And among the keys of its group; programs are not long, and VMEM holds them."""
    geometry = geometry_of(kind, layout, 2, HEAD_DIM, sizes)
    groups = Pattern(kind).groups(layout)
    found = []
    for block in range(geometry.video_blocks):
        group, inside = divmod(block, geometry.blocks_per_group)
        before = inside * geometry.part_tiles
        start = group * geometry.group_stride + before
        held = min(geometry.run - before, geometry.stop - start, geometry.part_tiles)
        tiles = [start + part * geometry.part_stride + tile for part in range(geometry.parts) for tile in range(held)]
        assert kind == "dense" or {*groups[tiles]} <= {group}
        found += tiles
    text = range(layout.video_tiles, layout.tiles) if geometry.text else []
    assert sorted([*found, *text]) == list(range(layout.tiles))

    tiles, is_held = geometry.key_tiles()
    for window in (0, 1):
        near = [
            sum(abs(group - other) <= window for other in range(geometry.groups)) for group in range(geometry.groups)
        ]
        assert geometry.mean_window(window) == pytest.approx(np.mean(near))
    assert len(tiles) * LANES == geometry.key_rows and sorted(tiles[is_held]) == list(range(layout.tiles))
    if geometry.text:
        of_group = tiles[: geometry.text_key // LANES].reshape(geometry.groups, -1)
        is_held = is_held[: geometry.text_key // LANES].reshape(geometry.groups, -1)
        for group in range(geometry.groups):
            assert {*groups[of_group[group][is_held[group]]]} == {group}
    if sizes is None:
        program = geometry.block_q * (geometry.pass_keys + geometry.group_keys % geometry.pass_keys)
        assert program <= MOST_SCORES or geometry.pass_keys == LANES
        assert geometry.vmem(HEAD_DIM, 2, geometry.key_buffers(HEAD_DIM, 2)) <= core().vmem


@pytest.mark.parametrize(
    ("text", "layout", "counted"),
    [
        ("dense", LAYOUTS[0], 2_588_653),
        ("frames:1", LAYOUTS[0], 710_307),
        ("frames:2", LAYOUTS[0], 1_090_323),
        ("positions:2", LAYOUTS[0], 797_933),
        ("dense", LAYOUTS[1], 9_467_895),
        ("frames:1", LAYOUTS[1], 1_395_509),
        ("positions:1", LAYOUTS[1], 1_016_299),
        ("frames:1", LAYOUTS[2], 131_165),
        ("positions:1", LAYOUTS[2], 251_319),
        ("frames:1", LAYOUTS[3], 352_915),
        ("frames:1", LAYOUTS[4], 637_293),
    ],
)
def test_predicted_cycles(text, layout, counted):
    """Beside what the compile tool counts in the kernel's schedule."""
    assert predicted_cycles(Pattern.parse(text), layout) == pytest.approx(counted, rel=0.04)


def test_keys_beyond_vmem():
    layout = AlignedLayout(40, 4080, 226)
    with pytest.raises(ValueError, match=r"164096 tokens need \d+ MiB of VMEM, of 60"):
        geometry_of("frames", layout, 2, HEAD_DIM).key_buffers(HEAD_DIM, 2)
    with pytest.raises(ValueError, match="block_q=100 is not a multiple of 128"):
        WindowSizes(100, 256)


# --- The kernel ----------------------------------------------------------------------------------------------------


def far_outside(arrays, head, layout, frame, far=400):
    """Let queries prefer the keys of one frame so much, in log2, that those without it are far below the bound."""
    query, key, _ = arrays
    query[head, :, 0] = 16
    key[head, :, 0] = -far / 2 / FACTOR / 16
    first = frame * layout.frame_tiles * LANES
    key[head, first : first + layout.frame_tokens, 0] *= -1


MIXED = patterns("frames:0", "positions:1", "dense", "frames:1", "positions:0", "dense")


@pytest.mark.slow
@pytest.mark.usefixtures("narrow_groups")
def test_patterns_with_strict_memory(capfd):
    """What is not initialised is NaN, so is the padding of all arrays, and copies that overlap are found.

    Each row of the last three heads has, if all keys are seen, one near the bound.
    """
    layout = AlignedLayout(3, 300, 130)
    arrays = random(layout, len(MIXED), "bfloat16")
    for head in (3, 4, 5):
        far_outside(arrays, head, layout, frame=0)
    table = HeadTable.of(MIXED)
    strict = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    run = jax.jit(functools.partial(sparse_attention, table=table, layout=layout, interpret=strict))
    output, online = run(*(as_tiles(array, layout, "bfloat16") for array in arrays))
    assert "RACE" not in capfd.readouterr().out and output.dtype == jnp.bfloat16
    errors = errors_of_heads(output, attention(*arrays, masks(MIXED, layout)), layout)
    assert (errors <= TOLERANCE["bfloat16"]).all(), errors
    # Of frames 0 to 2, a block each, and the text's, one does not see frame 0; places see all frames.
    assert online.tolist() == [0, 0, 0, 1 / 4, 0, 0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.usefixtures("narrow_groups")
def test_by_xla(dtype):
    """The whole, and a part of the queries that begins inside a frame, with tiles beyond the end."""
    layout = AlignedLayout(2, 600, 40)
    heads = patterns("positions:0", "frames:0", "dense", "frames:1", "positions:1")
    arrays = random(layout, len(heads), dtype)
    query, key, value = (as_tiles(array, layout, dtype, tiles=14) for array in arrays)
    run = jax.jit(functools.partial(xla_attention, table=HeadTable.of(heads), layout=layout))
    whole, part = run(query, key, value), run(query[7:], key, value, first_tile=jnp.int32(7))
    assert whole.dtype == dtype and (np.asarray(whole[layout.tiles :], np.float32) == 0).all()
    expected = attention(*arrays, masks(heads, layout))
    for found in (whole, jnp.concatenate([whole[:7], part])):
        errors = errors_of_heads(found, expected, layout)
        assert (errors <= TOLERANCE[dtype]).all(), errors


@pytest.mark.slow
@pytest.mark.usefixtures("narrow_groups")
def test_parts_of_the_queries():
    """By groups of chips, each of which has a part, in blocks that reach beyond frames and groups; counts are data."""
    layout = AlignedLayout(2, 600, 40)
    heads = patterns("positions:0", "frames:0", "frames:0", "frames:1")
    arrays = random(layout, len(heads), "float32")
    far_outside(arrays, 1, layout, frame=1)
    table = HeadTable(*map(jnp.asarray, HeadTable.of(heads)))
    query, key, value = (as_tiles(array, layout, "float32", tiles=14) for array in arrays)

    @jax.jit
    def run(query, first):
        options = {"layout": layout, "sizes": WindowSizes(256, 384, 256), "first_tile": first}
        return sparse_attention(query, key, value, table, **options)

    parts = [run(query[first : first + 7], first) for first in (0, 7)]
    output = jnp.concatenate([output for output, _ in parts])
    errors = errors_of_heads(output, attention(*arrays, masks(heads, layout)), layout)
    assert (errors <= TOLERANCE["float32"]).all(), errors
    assert (np.asarray(output[layout.tiles :]) == 0).all()
    # Of 2 x 3 blocks and the text's, the first part sees three of frame 0, which is far.
    assert [online.tolist()[1] > 0 for _, online in parts] == [True, False]
    assert not any(online.tolist()[head] for _, online in parts for head in (0, 2, 3))


@pytest.mark.slow
def test_heads_on_a_mesh():
    """Two layers of other patterns in one program: heads are permuted so that chips have equal work, and back."""
    layout = AlignedLayout(3, 100, 100)
    layers = [patterns(*(["dense"] * dense + ["frames:1", "frames:0"] * 4)[:8]) for dense in (5, 1)]
    chips = 4
    arrays = random(layout, 8, "bfloat16")
    orders = [head_order([predicted_cycles(head, layout) for head in heads], chips) for heads in layers]
    tables = [
        [HeadTable.of([heads[head] for head in share]) for share in order.reshape(chips, -1)]
        for heads, order in zip(layers, orders, strict=True)
    ]
    tables = jax.tree.map(lambda *leaves: np.stack(leaves), *[jax.tree.map(lambda *x: np.stack(x), *t) for t in tables])
    mesh = Mesh(jax.devices()[:chips], ("sp",))
    heads_axis = P(None, None, "sp")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(heads_axis,) * 3 + (P(None, "sp"),), out_specs=heads_axis, check_vma=False
    )
    def run(query, key, value, tables):
        def layer(_, layer):
            *arrays, table = layer
            table = jax.tree.map(lambda leaf: leaf[0], table)
            return None, sparse_attention(*arrays, table, layout=layout, kinds=("dense", "frames"), interpret=True)[0]

        return jax.lax.scan(layer, None, (query, key, value, tables))[1]

    stacked = [jnp.stack([as_tiles(array[order], layout, "bfloat16", tiles=6) for order in orders]) for array in arrays]
    output = run(*(jax.device_put(array, NamedSharding(mesh, heads_axis)) for array in stacked), tables)
    for heads, order, permuted in zip(layers, orders, output, strict=True):
        found = np.asarray(permuted, np.float32)[:, inverse(order)]
        errors = errors_of_heads(found, attention(*arrays, masks(heads, layout)), layout)
        assert (errors <= TOLERANCE["bfloat16"]).all(), errors
        assert (found[layout.tiles :] == 0).all()


def test_wrong_shapes():
    layout = AlignedLayout(3, 6, 40)
    array, fewer, others = (
        jax.ShapeDtypeStruct((tiles, 2, HEAD_DIM, LANES), dtype)
        for tiles, dtype in ((4, "float32"), (3, "float32"), (4, "bfloat16"))
    )
    table, longer = (HeadTable.of(patterns("dense", *("frames:1",) * count)) for count in (1, 2))
    for message, *arguments in (
        ("shapes do not fit together", array, array, fewer, table),
        ("shapes do not fit together", array, array, array, longer),
        ("the table of 2 heads", array, array, array, table._replace(windows=longer.windows)),
        ("expected bfloat16 or float32", array, array, others, table),
        ("first_tile says which", fewer, array, array, table),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(sparse_attention, layout=layout), *arguments)


# --- The search for patterns ---------------------------------------------------------------------------------------


def test_candidates():
    """In the order of their predicted time; none takes more than dense attention, and none is dense by its window."""
    layout = LAYOUTS[0]
    found = candidates(layout)
    costs = [predicted_cycles(pattern, layout) for pattern in (*found, Pattern())]
    assert costs == sorted(costs) and len(found) == len(set(found)) == 10 + 15
    assert candidates(AlignedLayout(3, 6, 40)) == []


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sampled_tiles(layout):
    """They are of every frame and of places all over a frame, and of the video alone."""
    tiles = sampled_tiles(layout, 44)
    assert (np.diff(tiles) > 0).all() and tiles.max() < layout.video_tiles and len(tiles) <= 44
    assert {*(tiles // layout.frame_tiles)} == {*range(layout.frames)} or layout.frames == 41
    places = np.sort(tiles % layout.frame_tiles)
    assert places[0] == 0 and np.diff(places, append=layout.frame_tiles).max() <= max(layout.frame_tiles / 10, 1)


@pytest.mark.parametrize(("sizes", "dtype"), [((4, 300, 130), "bfloat16"), ((2, 600, 40), "float32")])
@pytest.mark.usefixtures("narrow_groups")
def test_errors_of_patterns(sizes, dtype):
    """Of some tiles of queries, in two parts as groups of chips have them, beside masked attention."""
    layout = AlignedLayout(*sizes)
    names = patterns("positions:0", "frames:0", "positions:1", "frames:1", "frames:2", "dense")
    arrays = random(layout, 2, dtype)
    far_outside(arrays, 1, layout, frame=0, far=80)  # but their weights are numbers in float32
    tiles = sampled_tiles(layout, 7)
    half = -(-layout.tiles // 2)
    query, key, value = (as_tiles(array, layout, dtype, tiles=2 * half) for array in arrays)

    @jax.jit
    def errors(query, first):
        return pattern_errors(query, key, value, layout, tiles, names, first_tile=first)

    parts = [errors(query[first : first + half], jnp.int32(first)) for first in (0, half)]
    found, of_dense = (np.asarray(sum(sums)) for sums in zip(*parts, strict=True))
    chosen = np.isin(np.arange(layout.tokens) // LANES, tiles) & layout.is_real()
    outputs = [attention(*arrays, np.stack([pattern.mask(layout)] * 2))[:, chosen] for pattern in names]
    expected = np.stack([np.square(output - outputs[-1]).sum((1, 2)) for output in outputs], axis=1)
    np.testing.assert_allclose(found[:, :-1], expected[:, :-1], rtol=1e-4)
    np.testing.assert_allclose(of_dense, np.square(outputs[-1]).sum((1, 2)), rtol=1e-4)
    assert (found[:, -1] == 0).all()


def test_choice():
    """The cheapest within the budget, and a better one where another head decides how long the layer takes."""
    layout = LAYOUTS[0]
    options = candidates(layout)
    of = {name: options.index(Pattern.parse(name)) for name in ("frames:1", "frames:2")}
    errors = np.ones((4, 4, len(options)))
    errors[0, :, of["frames:2"]] = 0.03  # a chip has two of these, so the other may, too
    errors[0, 1, of["frames:1"]] = 0.04
    errors[1, :3, of["frames:1"]] = 0.01, 0.03, 0.02  # the last head is dense, so one other may be
    errors[2, :, of["frames:2"]] = 0.02
    errors[2, 3, of["frames:1"]] = 0.02  # no better, and no worse
    errors[3, :2] = np.nan
    errors[3, 2:] = 0.051
    choice = choose(errors, layout, 0.05, chips=2)
    assert [" ".join(map(str, layer)) for layer in choice.patterns] == [
        "frames:2 frames:2 frames:2 frames:2",
        "frames:1 dense frames:1 dense",
        "frames:2 frames:2 frames:2 frames:1",
        "dense dense dense dense",
    ]
    assert choice.errors.max(1).tolist() == [0.03, 0.02, 0.02, 0]
    dense, near, nearest = (predicted_cycles(Pattern.parse(name), layout) for name in ("dense", "frames:2", "frames:1"))
    assert choice.dense_cycles == 2 * dense
    assert choice.cycles.tolist() == pytest.approx([2 * near, dense + nearest, 2 * near, 2 * dense])
    density = Pattern.parse("frames:1").density(layout)
    assert choice.density.tolist()[1::2] == pytest.approx([(1 + density) / 2, 1])
