"""The reader of the TPU compiler's schedules, on a small saved dump; test_compile_for_tpu.py reads new ones."""

import gzip
import re
import shutil
from pathlib import Path

import pytest

from compile_for_tpu.kernel_schedule import Region, ScheduleError, read_schedules

# A kernel on a (2, 3, 4) grid that adds seven [128, 128] bf16 products to an accumulator, which it clears in the
# first and writes in the last step of the innermost axis; v6e, libtpu 0.0.42.1. Counted by eye in the listing.
SAVED = Path(__file__).parent / "data" / "looped_kernel"
GRIDS = {"looped_kernel": (2, 3, 4)}


@pytest.fixture
def dump(tmp_path) -> Path:
    return Path(shutil.copytree(SAVED, tmp_path / "dump"))


def edit(dump: Path, pattern: str, replacement: str) -> None:
    """Change the saved program."""
    (path,) = (file for file in dump.glob("*final_bundles*") if "schedule" not in file.name)
    text, count = re.subn(pattern, replacement, gzip.decompress(path.read_bytes()).decode())
    assert count, pattern
    path.write_bytes(gzip.compress(text.encode()))


def test_counts_of_a_saved_dump():
    (schedule,) = read_schedules(SAVED, GRIDS).values()
    assert schedule.regions == (
        Region("grid", 0xA, 0xAD, 24),
        Region("predicated", 0x39, 0x9C, 1),  # all of the body: not in the steps that only drain the pipeline
        Region("predicated", 0x41, 0x4A, 1 / 4),
        Region("loop", 0x4B, 0x79, 7),
        Region("predicated", 0x7E, 0x87, 1 / 4),
    )
    # 163 bundles; 46 of them seven times, 9 and 9 in one step of four.
    assert schedule.body_bundles == 163 + 6 * 46 - 2 * 9 * 3 / 4
    assert schedule.cycles == 24 * schedule.body_bundles + 177 - 163
    # A product pushes eight [16, 128] tiles of weights into each of two MXUs and four pairs of rows through them; its
    # 16 results are added and stored. Clearing stores 16 more in one step of four, writing loads and stores 16.
    assert schedule.used["MXU"] == 7 * (2 * 8 + 4)
    assert schedule.used["VPOP"] == 7 * 16
    assert schedule.used["VSTORE"] == 7 * 16 + 2 * 16 / 4
    assert schedule.used["EUP"] == schedule.used["VSTORE:SPILL"] == schedule.used["VLOAD:FILL"] == 0
    assert schedule.utilization("VPOP") == 7 * 16 / (2 * schedule.body_bundles)


def test_a_loop_that_counts_in_steps(dump):
    edit(dump, r"(%s188_s27 = sadd\.s32) 1,", r"\1 2,")
    (schedule,) = read_schedules(dump, GRIDS).values()
    assert schedule.regions[3].times == 4


def test_a_counter_that_is_counted_twice(dump):
    """The loop's test reads the same sum from another register than the next round does."""
    edit(dump, r"%s188_s27 = sadd\.s32 1, (%\w+)", r"%s188_s27 = sadd.s32 1, \1 ;; %s9999_s27 = sadd.s32 1, \1")
    edit(dump, r"%s188_s27, 7 /", "%s9999_s27, 7 /")
    (schedule,) = read_schedules(dump, GRIDS).values()
    assert schedule.regions[3].times == 7


def test_a_grid_whose_length_depends_on_data(dump):
    edit(dump, r"26 /\* loop exit test \*/", "%s941_s12 /* loop exit test */")
    with pytest.raises(ScheduleError, match="no readable trip count"):
        read_schedules(dump, GRIDS)
    (schedule,) = read_schedules(dump, {"looped_kernel": (2.5, 3, 4)}).values()
    assert schedule.body.times == 2.5 * 12


def test_a_loop_whose_length_depends_on_data(dump):
    """It has the mean length that is given for its kernel, and the grid's loop is still read."""
    edit(dump, r"7 /\* loop exit test \*/", "%s941_s12 /* loop exit test */")
    with pytest.raises(ScheduleError, match="no readable trip count"):
        read_schedules(dump, GRIDS, trips={"another": 2.5})
    (schedule,) = read_schedules(dump, GRIDS, trips={"looped_kernel": 2.5}).values()
    assert [region.times for region in schedule.regions] == [24, 1, 1 / 4, 2.5, 1 / 4]


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"7 /\* loop exit test \*/", "%s941_s12 /* loop exit test */", "no readable trip count"),
        (r"%s1135_s27 = smov 0", "%s1135_s27 = smov %s941_s12", "not a constant"),
        (r"target = \$region24", "target = $region999", "region 999"),
        (r"26 /\* loop exit test \*/", "27 /* loop exit test */", r"grid loop runs 27 times, the grid \(2, 3, 4\)"),
        (r"  0xaa   :  \{\}\n", "", "176 bundles, but the use of 177"),
    ],
)
def test_what_cannot_be_read_is_an_error(dump, pattern, replacement, message):
    edit(dump, pattern, replacement)
    with pytest.raises(ScheduleError, match=f"looped_kernel.*{message}"):
        read_schedules(dump, GRIDS)


@pytest.mark.parametrize(
    ("condition", "share"),
    [
        (r"scmp.ge.s32.totalorder \1, 3", 3 / 4),
        (r"scmp.lt.s32.totalorder \1, 1", 3 / 4),
        (r"pneg %p5_p5 }\n{ %p5_p5 = scmp.lt.s32.totalorder \1, 1", 1 / 4),
        (
            r"por %p5_p5, %p6_p6 }\n{ %p5_p5 = scmp.lt.s32.totalorder \1, 1 ;; %p6_p6 = scmp.eq.s32.totalorder \1, 3",
            2 / 4,
        ),
        (
            r"pnand %p5_p5, %p6_p6 }\n{ %p5_p5 = scmp.lt.s32.totalorder \1, 3 ;; %p6_p6 = scmp.gt.s32.totalorder \1, 0",
            2 / 4,
        ),
        (r"pnand %p5_p5, %p6_p6 }\n{ %p5_p5 = scmp.lt.s32.totalorder \1, 3", 1),
        (  # a spill slot that holds another register later
            r"scmp.ne.s32.totalorder %s9_s9, 0 }\n{ sst [smem:[#slot]] \1 }\n{ %s9_s9 = sld [smem:[#slot]] }\n"
            r"{ sst [smem:[#slot]] %s138_s11",
            1 / 4,
        ),
    ],
)
def test_conditions_on_grid_indices(dump, condition, share):
    edit(dump, r"scmp\.ne\.s32\.totalorder (%s941_s12), 0", condition)
    (schedule,) = read_schedules(dump, GRIDS).values()
    assert schedule.regions[2].times == share


def test_an_unknown_condition_counts_in_full(dump):
    edit(dump, r"scmp\.ne\.s32\.totalorder %s941_s12, 0", "scmp.ne.s32.totalorder %s138_s11, 0")
    (schedule,) = read_schedules(dump, GRIDS).values()
    assert schedule.regions[2].times == 1


def test_runs_that_a_program_does_not_tell(dump):
    """The grid's loop counts as it stands, 26 runs; the condition around its body depends on the buffers in use."""
    edit(dump, r"7 /\* loop exit test \*/", "%s941_s12 /* loop exit test */")
    edit(dump, r"scmp\.ne\.s32\.totalorder %s941_s12, 0", "scmp.ne.s32.totalorder %s138_s11, 0")
    (schedule,) = read_schedules(dump, GRIDS, runs=[24 / 26, 1 / 4, 7]).values()
    assert [region.times for region in schedule.regions] == [1, 26, 24 / 26, 1 / 4, 7, 1 / 4]
    # As in the test of the saved dump, but the two runs that drain the pipeline issue the 64 bundles around the body.
    assert schedule.cycles == pytest.approx(24 * (163 + 6 * 46 - 2 * 9 * 3 / 4) + 2 * 64 + 177 - 163)
    with pytest.raises(ScheduleError, match=r"looped_kernel.*3 regions are unknown \(.*, loop 0x4b\), got 2"):
        read_schedules(dump, GRIDS, runs=[24 / 26, 7])


def test_a_dump_without_what_is_needed(dump, tmp_path):
    with pytest.raises(ScheduleError, match="no schedule of looped_kernel kernel"):
        read_schedules(tmp_path, GRIDS)
    with pytest.raises(ScheduleError, match="no schedule of another kernel"):
        read_schedules(dump, GRIDS | {"another": (1,)})
    next(dump.glob("*utilization*")).unlink()
    with pytest.raises(ScheduleError, match=r"no .*utilization\.txt"):
        read_schedules(dump, GRIDS)
