"""How the kernel goes over the tiles of an aligned sequence: groups of tiles, blocks of queries, passes over keys."""

import dataclasses

import numpy as np

from cogvideox.models.transformer.sparse.layout import LANES, AlignedLayout
from cogvideox.models.transformer.sparse.patterns import Kind, Pattern
from custom_splash_attention import DEFAULT_BLOCK_SIZES, BlockSizes, core, product_rows, round_up

# Of the sizes that are chosen: scores of a pass, which is unrolled, and queries of a block.
MOST_SCORES = DEFAULT_BLOCK_SIZES.block_q * DEFAULT_BLOCK_SIZES.block_kv_compute * 5 // 4
MOST_QUERIES = 2048

# Cycles of a v6e core, from the compiler's schedules: of a product of 256 keys with 256 queries and of its values, of a
# pass over keys, which is unrolled, of a block of queries, and of a key that is copied and transposed.
PRODUCT_CYCLES, PASS_CYCLES, BLOCK_CYCLES, KEY_CYCLES = 80.0, 300, 500, 0.2
PRODUCT = 256


@dataclasses.dataclass(frozen=True)
class WindowSizes:
    """How the kernel divides the work of a head with a window; all sizes are in tokens.

    A block of queries lies in one group of tiles: a frame, or some places of all frames. It goes over the keys of each
    group of its window in passes of block_kv_compute keys (the last one of a group may be shorter), which are unrolled
    into products of block_kv_compute_in keys and 256 queries.
    """

    block_q: int
    block_kv_compute: int
    block_kv_compute_in: int = DEFAULT_BLOCK_SIZES.block_kv_compute_in

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size < LANES or size % LANES:
                raise ValueError(f"{field.name}={size} is not a multiple of {LANES}")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The tiles of one kind of pattern as the kernel takes them; all but the last two count tiles.

    The video's tiles are `groups` of `parts` runs: in a group of a frame its tiles are one run, in a group of places
    each frame has one. A block of queries has `part_tiles` of each run of its group. In VMEM the keys of a group are
    neighbours, and the text's follow those of all groups. A dense head has a single group, in which text is as video.

    Attributes:
        groups: number of groups.
        group_stride: from the beginning of a group to that of the next.
        run: tiles of a run; the last group's are cut off at `stop`.
        stop: where the last group's first run ends.
        parts: runs of a group.
        part_stride: from the beginning of a run to that of the next of its group.
        part_tiles: of a run in a block of queries.
        text: tiles of the text, 0 where it is as video.
        tiles: of the sequence.
        pass_keys: keys of a pass, in tokens.
        keys_in: keys of a product, in tokens.
    """

    groups: int
    group_stride: int
    run: int
    stop: int
    parts: int
    part_stride: int
    part_tiles: int
    text: int
    tiles: int
    pass_keys: int
    keys_in: int

    @property
    def blocks_per_group(self) -> int:
        """Blocks of queries of a group."""
        return -(-self.run // self.part_tiles)

    @property
    def video_blocks(self) -> int:
        """Blocks of queries but the text's own."""
        return self.groups * self.blocks_per_group

    @property
    def blocks(self) -> int:
        """Blocks of queries; the text's own is the last one."""
        return self.video_blocks + (self.text > 0)

    @property
    def block_q(self) -> int:
        """Queries of a block, in tokens."""
        return self.parts * self.part_tiles * LANES

    @property
    def group_keys(self) -> int:
        """Keys of a group in VMEM, in tokens."""
        return self.parts * self.run * LANES

    @property
    def text_key(self) -> int:
        """Where the text's keys begin in VMEM, in tokens."""
        return self.groups * self.group_keys

    @property
    def key_rows(self) -> int:
        """Keys in VMEM, in tokens."""
        return self.text_key + self.text * LANES

    @property
    def text_pass(self) -> int:
        """Keys of a pass for the text's queries, in tokens."""
        most = MOST_SCORES // 6 // (max(self.text, 1) * LANES) // self.keys_in * self.keys_in
        return max(min(most, self.key_rows), self.keys_in)

    def is_whole(self, tiles: int) -> bool:
        """Tell whether no block of queries reaches beyond the end of a run or of an array of so many tiles."""
        return self.run % self.part_tiles == 0 and self.stop % self.run == 0 and tiles >= self.tiles

    def mean_window(self, window: int) -> float:
        """Return over how many groups of keys a block of the video goes, on average."""
        group = np.arange(self.groups)
        return float((np.minimum(group + window + 1, self.groups) - np.maximum(group - window, 0)).mean())

    def cycles(self, window: int) -> float:
        """Predict the cycles of a head with such a window on a v6e core, in bfloat16 and with 64 numbers a token."""
        over_group = _pass_cycles(self.block_q, self.group_keys, self.pass_keys)
        text_q = self.text * LANES
        over_text = _pass_cycles(self.block_q, text_q, max(text_q, 1))
        found = self.video_blocks * (self.mean_window(window) * over_group + over_text)
        found += _pass_cycles(text_q, self.key_rows, self.text_pass)
        return found + self.blocks * BLOCK_CYCLES + self.key_rows * KEY_CYCLES

    def key_tiles(self) -> tuple[np.ndarray, np.ndarray]:
        """Return which tile each place in VMEM holds, and whether it holds one at all; int32 and bool [places]."""
        group, place, part = np.meshgrid(*map(np.arange, (self.groups, self.run, self.parts)), indexing="ij")
        first = group * self.group_stride + place
        tile, held = first + part * self.part_stride, first < self.stop
        text = self.tiles - self.text + np.arange(self.text)
        tile = np.concatenate([np.where(held, tile, 0).reshape(-1), text])
        return tile.astype(np.int32), np.concatenate([held.reshape(-1), np.ones(self.text, bool)])

    def vmem(self, head_dim: int, itemsize: int, buffers: int) -> int:
        """Return the bytes of VMEM that blocks of queries and all keys take, of which there are so many `buffers`."""
        rows, queries = product_rows(head_dim), max(self.block_q, self.text * LANES)
        per_query = itemsize * (3 * head_dim + rows) + 4 * (head_dim + 8 + 8 + 2 * 8)
        per_key = itemsize * ((2 * buffers + 1) * head_dim + round_up(rows, LANES))
        return queries * per_query + self.key_rows * per_key

    def key_buffers(self, head_dim: int, itemsize: int) -> int:
        """Choose how many buffers the keys of a head have: two, or one where they are so many.

        Raises:
            ValueError: not even one fits.
        """
        for buffers in (2, 1):
            if self.vmem(head_dim, itemsize, buffers) <= core().vmem_for_blocks:
                return buffers
        used, most = self.vmem(head_dim, itemsize, 1), core().vmem_for_blocks
        raise ValueError(
            f"{self.tiles * LANES} tokens need {used / 2**20:.0f} MiB of VMEM, of {most >> 20}: sparse attention "
            "holds all keys of a head there; a smaller size or fewer frames"
        )


def geometry_of(
    kind: Kind,
    layout: AlignedLayout,
    itemsize: int,
    head_dim: int,
    sizes: WindowSizes | None = None,
    q_tiles: int | None = None,
) -> Geometry:
    """Choose how the kernel goes over the tiles for one kind of pattern, by default with blocks that waste little.

    Args:
        kind, layout: see `Pattern` and `AlignedLayout`.
        itemsize, head_dim: of queries, keys and values.
        sizes: of a kind with a window.
        q_tiles: tiles of queries, where they are fewer than the layout's.
    """
    geometry = _dense(layout, itemsize, head_dim) if kind == "dense" else _with_windows(kind, layout, itemsize, sizes)
    return dataclasses.replace(geometry, part_tiles=min(geometry.part_tiles, q_tiles or geometry.part_tiles))


def _with_windows(kind: Kind, layout: AlignedLayout, itemsize: int, sizes: WindowSizes | None) -> Geometry:
    """Let a group be a frame, or places of all frames."""
    if kind == "frames":
        groups, stride, run, stop, parts = layout.frames, layout.frame_tiles, layout.frame_tiles, layout.video_tiles, 1
    else:
        groups, stride, run, stop = layout.place_groups, layout.group_tiles, layout.group_tiles, layout.frame_tiles
        parts = layout.frames
    sizes = sizes or _window_sizes(run, parts, itemsize)
    return Geometry(
        groups=groups,
        group_stride=stride,
        run=run,
        stop=stop,
        parts=parts,
        part_stride=0 if parts == 1 else layout.frame_tiles,
        part_tiles=min(max(sizes.block_q // LANES // parts, 1), run),
        text=layout.text_tiles,
        tiles=layout.tiles,
        pass_keys=min(sizes.block_kv_compute, parts * run * LANES),
        keys_in=sizes.block_kv_compute_in,
    )


def _dense(layout: AlignedLayout, itemsize: int, head_dim: int) -> Geometry:
    """Take the blocks of the dense kernel, with all keys at once."""
    tokens = layout.tokens
    blocks = BlockSizes(DEFAULT_BLOCK_SIZES.block_q, round_up(tokens, LANES), DEFAULT_BLOCK_SIZES.block_kv_compute)
    blocks = blocks.fitted(tokens, tokens, head_dim, itemsize)
    tiles = layout.tiles
    return Geometry(
        groups=1,
        group_stride=tiles,
        run=tiles,
        stop=tiles,
        parts=1,
        part_stride=0,
        part_tiles=min(blocks.block_q // LANES, tiles),
        text=0,
        tiles=tiles,
        pass_keys=min(blocks.block_kv_compute, tokens),
        keys_in=blocks.block_kv_compute_in,
    )


def _window_sizes(run: int, parts: int, itemsize: int) -> WindowSizes:
    """Choose the sizes with the least work, of products of 256 queries and of passes, for a program that is not long.

    A float32 product takes about eight times the instructions.
    """
    most = MOST_SCORES // LANES**2 // (8 if itemsize == 4 else 1)
    keys = parts * run
    limit = keys if parts > 1 else max(MOST_QUERIES // LANES, 1)
    blocks = [parts * n for n in range(1, run + 1) if parts * n <= max(limit, parts)]
    choices = [(queries, size) for queries in blocks for size in _passes(keys, max(most // queries, 1))]

    def work(choice: tuple[int, int]) -> float:
        queries, size = choice
        of_block = _pass_cycles(queries * LANES, keys * LANES, size * LANES) + BLOCK_CYCLES
        return -(-run // (queries // parts)) * of_block

    queries, size = min(choices, key=work)
    return WindowSizes(queries * LANES, size * LANES)


def _passes(keys: int, most: int) -> list[int]:
    """Return the sizes of a pass, in tiles, that with a shorter last one make a program of at most so many tiles."""
    return [size for size in range(1, min(keys, most) + 1) if size + keys % size <= most or size == 1]


def _pass_cycles(queries: int, keys: int, pass_keys: int) -> float:
    """Predict the cycles that a block of queries takes to go over so many keys, all in tokens."""
    wide = queries // PRODUCT + 0.85 * (queries % PRODUCT > 0)  # half of the queries take almost as long as all
    return wide * keys / PRODUCT * PRODUCT_CYCLES + -(-keys // pass_keys) * PASS_CYCLES


def predicted_cycles(pattern: Pattern, layout: AlignedLayout, itemsize: int = 2, head_dim: int = 64) -> float:
    """Predict the cycles of a head of a pattern, as `Geometry.cycles`, with the sizes that the kernel chooses."""
    return geometry_of(pattern.kind, layout, itemsize, head_dim).cycles(pattern.window)
